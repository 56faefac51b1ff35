"""The exact k smallest, against sorting."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_woodfisher.base.errors import ConfigurationError, PruningError
from lightning_woodfisher.distributed.communicator import Communicator
from lightning_woodfisher.distributed.smallest import (
    select_smallest,
)
from lightning_woodfisher.pruning.config import (
    SelectionConfig,
)
from lightning_woodfisher.pruning.quotas import (
    removal_count,
)

# Few distinct values, so that ties happen, next to every value that float64 has.
AWKWARD = [0.0, -0.0, 5e-324, 2.2e-308, 1e-300, 1.0, 1.0 + 2**-52, 1e300, math.inf]
values = st.one_of(
    st.sampled_from(AWKWARD), st.floats(min_value=0.0, allow_nan=False, width=64)
)


def smallest_by_sorting(
    scores: list[float], groups: list[int], counts: list[int]
) -> list[bool]:
    """Sort each group by (score, index) and mark the first ones."""
    marked = [False] * len(scores)
    for group, count in enumerate(counts):
        members = [i for i, g in enumerate(groups) if g == group]
        for index in sorted(members, key=lambda i: (scores[i], i))[:count]:
            marked[index] = True
    return marked


def as_scores(numbers: list[float]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


@given(data=st.data(), scores=st.lists(values, max_size=60))
def test_one_group_equals_sorting(
    comm: Communicator, data: st.DataObject, scores: list[float]
) -> None:
    count = data.draw(st.integers(0, len(scores)))
    marked = select_smallest(as_scores(scores), None, [count], comm)
    assert marked.dtype == torch.bool
    assert marked.tolist() == smallest_by_sorting(scores, [0] * len(scores), [count])


@given(data=st.data(), scores=st.lists(values, max_size=60))
def test_several_groups_equal_sorting_each(
    comm: Communicator, data: st.DataObject, scores: list[float]
) -> None:
    number = data.draw(st.integers(1, 5))
    groups = data.draw(
        st.lists(st.integers(0, number - 1), min_size=len(scores), max_size=len(scores))
    )
    counts = [data.draw(st.integers(0, groups.count(g))) for g in range(number)]
    marked = select_smallest(
        as_scores(scores), torch.tensor(groups).long(), counts, comm
    )
    assert marked.tolist() == smallest_by_sorting(scores, groups, counts)


@pytest.mark.parametrize("count", [0, 1, 4_000, 7_777, 10_000])
def test_many_scores_with_few_values(comm: Communicator, count: int) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 50, (10_000,), generator=generator).double() / 7
    marked = select_smallest(scores, None, [count], comm)
    expected = torch.zeros(10_000, dtype=torch.bool)
    expected[scores.sort(stable=True).indices[:count]] = True
    assert torch.equal(marked, expected)


def test_neighbouring_floats_are_told_apart(comm: Communicator) -> None:
    scores = as_scores([1.0 + i * 2**-52 for i in (5, 3, 4, 0, 2, 1)])
    marked = select_smallest(scores, None, [3], comm)
    assert marked.tolist() == [False, False, False, True, True, True]


def test_ties_go_to_the_lowest_index(comm: Communicator) -> None:
    marked = select_smallest(as_scores([2.0, 1.0, 2.0, 2.0, 2.0]), None, [3], comm)
    assert marked.tolist() == [True, True, True, False, False]


def test_zeros_of_both_signs_are_equal(comm: Communicator) -> None:
    marked = select_smallest(as_scores([0.0, -0.0, 0.0, -0.0]), None, [2], comm)
    assert marked.tolist() == [True, True, False, False]


def test_scores_of_lower_precision(comm: Communicator) -> None:
    scores = torch.tensor([3.0, 1.0, 2.0], dtype=torch.float32)
    assert select_smallest(scores, None, [2], comm).tolist() == [False, True, True]


def test_scores_are_left_as_they_were(comm: Communicator) -> None:
    scores, groups = as_scores([3.0, 1.0, -0.0]), torch.tensor([0, 1, 1])
    select_smallest(scores, groups, [1, 1], comm)
    assert scores.tolist() == [3.0, 1.0, -0.0]
    assert math.copysign(1.0, float(scores[2])) == -1.0
    assert groups.tolist() == [0, 1, 1]


@pytest.mark.parametrize("bad", [math.nan, -1.0, -5e-324, -math.inf])
def test_invalid_scores_are_refused(comm: Communicator, bad: float) -> None:
    with pytest.raises(PruningError, match="2 saliencies are NaN or negative"):
        select_smallest(as_scores([1.0, bad, 2.0, bad]), None, [1], comm)


def test_more_than_there_are_is_refused(comm: Communicator) -> None:
    with pytest.raises(PruningError, match=r"cannot remove \[4\] of \[3\]"):
        select_smallest(as_scores([1.0, 2.0, 3.0]), None, [4], comm)
    with pytest.raises(PruningError, match=r"cannot remove \[1, 1\] of \[3, 0\]"):
        select_smallest(as_scores([1.0, 2.0, 3.0]), torch.zeros(3).long(), [1, 1], comm)


def competing(
    scope: str, weights: list[int], zeros: list[int]
) -> list[tuple[int, int]]:
    """Weights and zeros of each group of layers that compete with each other."""
    if scope == "global":
        return [(sum(weights), sum(zeros))]
    return list(zip(weights, zeros, strict=True))


@pytest.mark.parametrize(
    ("scope", "target", "weights", "zeros", "expected"),
    [
        ("global", 0.9, [100, 10], [0, 0], [99]),
        ("layer", 0.9, [100, 10], [0, 0], [90, 9]),
        ("global", 0.5, [100, 10], [30, 5], [20]),
        ("layer", 0.5, [100, 10], [30, 5], [20, 0]),
        ("global", 0.5, [7], [0], [4]),
        ("global", 0.0, [7], [0], [0]),
        # A layer that has more zeros already keeps them.
        ("layer", 0.5, [100, 10], [80, 0], [0, 5]),
        ("global", 0.1, [10], [5], [0]),
        # 0.29 · 100 is 28.999999999999996 in floating point.
        ("global", 0.29, [100], [0], [29]),
    ],
)
def test_removal_counts(
    scope: str, target: float, weights: list[int], zeros: list[int], expected: list[int]
) -> None:
    groups = competing(scope, weights, zeros)
    assert [removal_count(target, *group) for group in groups] == expected


@given(
    target=st.floats(0.0, 1.0, exclude_max=True),
    weights=st.lists(st.integers(1, 10_000), min_size=1, max_size=8),
)
def test_removal_counts_miss_the_target_by_half_a_weight_at_most(
    target: float, weights: list[int]
) -> None:
    for scope in ("global", "layer"):
        for total, _ in competing(scope, weights, [0] * len(weights)):
            assert abs(removal_count(target, total, 0) - target * total) <= 0.5 + 1e-9


@given(
    scope=st.sampled_from(["global", "layer"]),
    target=st.floats(0.0, 1.0, exclude_max=True),
    layers=st.lists(
        st.integers(1, 500).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n))),
        min_size=1,
        max_size=5,
    ),
    parts=st.integers(1, 6),
    spacing=st.sampled_from(["geometric", "linear", "polynomial"]),
)
def test_parts_end_at_the_target_and_none_gives_anything_back(
    scope: Any,
    target: float,
    layers: list[tuple[int, int]],
    parts: int,
    spacing: Any,
) -> None:
    weights, zeros = map(list, zip(*layers, strict=True))
    for group in competing(scope, weights, zeros):
        ends = [
            removal_count(target, *group, part / parts, spacing)
            for part in range(parts + 1)
        ]
        assert ends[0] == 0
        assert all(before <= after for before, after in itertools.pairwise(ends))
        assert ends[-1] == removal_count(target, *group)


@pytest.mark.parametrize(
    ("spacing", "expected"),
    [
        # Of 1000 weights 100 are gone; 900 shall become 300.
        ("linear", [0, 200, 400, 600]),
        ("geometric", [0, 276, 467, 600]),
        ("polynomial", [0, 422, 578, 600]),
    ],
)
def test_spacing_of_parts(spacing: Any, expected: list[int]) -> None:
    ends = [removal_count(0.7, 1000, 100, part / 3, spacing) for part in range(4)]
    assert ends == expected
    # By hand: what is kept falls by equal amounts, by equal ratios, by a cubic.
    kept = [900 - end for end in ends]
    by_hand = {
        "linear": [900, 700, 500, 300],
        "geometric": [900, 900 / 3 ** (1 / 3), 900 / 3 ** (2 / 3), 300],
        "polynomial": [300 + 600 * (1 - part / 3) ** 3 for part in range(4)],
    }[spacing]
    assert kept == pytest.approx(by_hand, abs=0.5)


def test_selection_config() -> None:
    assert SelectionConfig().scope == "global"
    assert SelectionConfig().include == []
    assert SelectionConfig(scope="layer", include=["Conv2d"]).exclude == []
    with pytest.raises(ConfigurationError, match=r"selection.scope='row'"):
        SelectionConfig(scope="row")  # type: ignore[arg-type]
