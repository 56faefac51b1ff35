"""Which structures go, against brute force, and sizes against networks that are smaller."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hand_groups import (
    Plain,
    Residual,
    cross_entropy,
    dense_matrix,
    images,
    network_size,
    objective,
    plain_groups,
    residual_groups,
    trained,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_woodfisher.base.errors import ConfigurationError
from lightning_woodfisher.data.losses import FunctionLoss
from lightning_woodfisher.distributed.communicator import Communicator
from lightning_woodfisher.structured.config import StructureConfig
from lightning_woodfisher.structured.graph.groups import Group, Member
from lightning_woodfisher.structured.network_cost import NetworkSize
from lightning_woodfisher.structured.scores.methods import StructureScores
from lightning_woodfisher.structured.scores.sosp import PairScores
from lightning_woodfisher.structured.selection import (
    additive_scores,
    select_count,
    select_for_size,
)

NO_FLOOR = StructureConfig(min_kept=1, min_kept_share=0.0)


def bare(sizes: Sequence[int]) -> list[Group]:
    return [Group(f"layer{i}", size, ()) for i, size in enumerate(sizes)]


def chosen(groups: Sequence[Group], removed: dict[str, Tensor]) -> list[int]:
    """Numbers among the structures of all groups."""
    first, found = 0, []
    for group in groups:
        found += [first + number for number in removed[group.name].tolist()]
        first += group.size
    return found


def brute_force(
    scores: Sequence[Tensor], limits: StructureConfig, count: int
) -> float | None:
    """Least sum of scores over every permitted way to share the count, by trying all."""
    best: float | None = None
    lowest = [score.sort().values.tolist() for score in scores]
    permitted = []
    for score in scores:
        size, numbers = len(score), [0]
        for gone in range(1, size + 1):
            kept = size - gone
            if (
                kept >= limits.min_kept
                and kept * 100 >= round(limits.min_kept_share * 100) * size
                and gone * 100 <= round(limits.max_ratio * 100) * size
                and kept % limits.round_to == 0
            ):
                numbers.append(gone)
        permitted.append(numbers)
    for shares in itertools.product(*permitted):
        if sum(shares) == count:
            parts = zip(lowest, shares, strict=True)
            cost = sum(sum(values[:number]) for values, number in parts)
            best = cost if best is None else min(best, cost)
    return best


# ---------------------------------------------------------------- exact numbers


@given(
    sizes=st.lists(st.integers(1, 7), min_size=1, max_size=3),
    seed=st.integers(0, 10**6),
    min_kept=st.integers(1, 3),
    share=st.sampled_from([0.0, 0.05, 0.3]),
    ratio=st.sampled_from([0.5, 0.6, 1.0]),
    multiple=st.sampled_from([1, 2, 3]),
    levels=st.sampled_from([3, 1000]),
)
def test_every_count_is_the_best_choice(
    sizes: list[int],
    seed: int,
    min_kept: int,
    share: float,
    ratio: float,
    multiple: int,
    levels: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    # Few levels make ties; negative scores come from HAP.
    scores = [
        torch.randint(-1, levels, (size,), generator=generator).double()
        for size in sizes
    ]
    limits = StructureConfig(
        min_kept=min_kept, min_kept_share=share, max_ratio=ratio, round_to=multiple
    )
    groups = bare(sizes)
    every = {n: brute_force(scores, limits, n) for n in range(sum(sizes) + 1)}
    best = {count: cost for count, cost in every.items() if cost is not None}
    for count in every:
        if count > max(best):
            with pytest.raises(ConfigurationError, match=f"allow {max(best)};"):
                select_count(groups, scores, count, limits)
            continue
        removed = select_count(groups, scores, count, limits)
        found = torch.cat(scores)[chosen(groups, removed)]
        # The nearest number that multiples allow, of two the larger.
        nearest = min(best, key=lambda other: (abs(other - count), -other))
        assert len(found) == nearest
        assert float(found.sum()) == best[nearest]
        for group in groups:
            kept = group.size - len(removed[group.name])
            assert kept == group.size or (kept >= min_kept and kept % multiple == 0)


def test_a_sensitive_layer_is_not_cut_by_the_cap() -> None:
    # Every score of the second layer is above all of the first: it loses only what the
    # first may not give, and never more (HAP's code turns the cap round).
    scores = [torch.arange(64.0), torch.arange(64.0) + 1000]
    groups = bare([64, 64])
    removed = select_count(groups, scores, 60, StructureConfig(max_ratio=0.95))
    assert [len(r) for r in removed.values()] == [60, 0]
    removed = select_count(groups, scores, 70, StructureConfig(max_ratio=0.9))
    # ⌊0.9 · 64⌋ = 57.
    assert [len(r) for r in removed.values()] == [57, 13]
    assert removed["layer1"].tolist() == list(range(13))


def test_the_best_survive_where_all_would_go() -> None:
    scores = [torch.tensor([1.0, 5.0, 2.0, 9.0, 3.0, 4.0]), torch.arange(20.0) + 100]
    removed = select_count(bare([6, 20]), scores, 8)
    # Channels 3 and 1 have the highest scores of the first layer.
    assert removed["layer0"].tolist() == [0, 2, 4, 5]
    assert removed["layer1"].tolist() == [0, 1, 2, 3]
    removed = select_count(bare([6, 20]), scores, 9, NO_FLOOR)
    assert removed["layer0"].tolist() == [0, 1, 2, 4, 5]


def test_floors_of_large_groups_are_shares() -> None:
    assert StructureConfig().removable(100)[-1] == 95
    assert StructureConfig().removable(20)[-1] == 18
    assert StructureConfig().removable(2) == [0]
    assert StructureConfig().removable(1) == [0]
    assert StructureConfig(round_to=8).removable(20) == [0, 4, 12]
    # Heads of 4 or 64 channels.
    assert StructureConfig(round_to=8).removable(6, 4) == [0, 2, 4]
    assert StructureConfig(round_to=8).removable(6, 64) == [0, 1, 2, 3, 4]
    # 0.7 of 10 is 7, whatever binary fractions say.
    assert StructureConfig(min_kept_share=0.7).removable(10)[-1] == 3
    assert StructureConfig(max_ratio=0.29).removable(100)[-1] == 29


def test_unreachable_counts_are_named() -> None:
    scores = [torch.rand(16), torch.rand(10)]
    groups = bare([16, 10])
    with pytest.raises(
        ConfigurationError, match=r"asks for 23 of 26.*the groups allow 22"
    ):
        select_count(groups, scores, 23)


def test_ties_go_in_order() -> None:
    scores = [torch.zeros(5), torch.zeros(5)]
    removed = select_count(bare([5, 5]), scores, 4)
    assert [r.tolist() for r in removed.values()] == [[0, 1, 2], [0]]


# ---------------------------------------------------------------- pairs


def pairs_of(seed: int, size: int = 12, samples: int = 9) -> PairScores:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(samples, size, generator=generator, dtype=torch.float64)
    first = 0.1 * torch.rand(size, generator=generator, dtype=torch.float64)
    return PairScores(rows, samples, first)


def slow_greedy(
    matrix: Tensor,
    sizes: Sequence[int],
    most: Sequence[int],
    costs: Sequence[int] = (1, 1, 1),
) -> list[int]:
    """Try every structure for every step; take the one that adds the least per cost."""
    group_of = [g for g, size in enumerate(sizes) for _ in range(size)]
    found: list[int] = []
    for _ in range(sum(most)):
        free = [
            s
            for s in range(len(matrix))
            if s not in found
            and sum(group_of[f] == group_of[s] for f in found) < most[group_of[s]]
        ]
        before = float(matrix[found][:, found].sum())
        added = [
            (float(matrix[[*found, s]][:, [*found, s]].sum()) - before)
            / costs[group_of[s]]
            for s in free
        ]
        found.append(free[min(range(len(free)), key=added.__getitem__)])
    return found


@pytest.mark.parametrize("seed", range(5))
def test_greedy_adds_the_least_each_time(seed: int) -> None:
    pairs, sizes = pairs_of(seed), [3, 4, 5]
    groups, config = bare(sizes), StructureConfig(search="greedy")
    order = slow_greedy(dense_matrix(pairs), sizes, [1, 2, 3])
    scores = StructureScores(torch.split(pairs.row_sums(), sizes), pairs)
    for count in range(7):
        additive = additive_scores(scores, groups, config, count=count)
        removed = select_count(groups, additive, count)
        assert chosen(groups, removed) == sorted(order[:count])
    # What each has added sums up to the objective.
    whole = torch.cat(additive_scores(scores, groups, config))
    assert float(whole[order].sum()) == pytest.approx(objective(pairs, order))
    assert torch.equal(whole[order].sort().values, whole[order])
    assert whole.isinf().sum() == 6


@pytest.mark.parametrize("costs", [(1, 1, 1), (7, 2, 30)])
@pytest.mark.parametrize("search", ["greedy", "signed"])
@pytest.mark.parametrize("seed", range(3))
def test_searches_take_what_adds_the_least_per_cost(
    seed: int, search: Any, costs: tuple[int, ...]
) -> None:
    pairs, sizes = pairs_of(seed), [3, 4, 5]
    groups, config = bare(sizes), StructureConfig(search=search)
    matrix = dense_matrix(pairs)
    if search == "signed":
        signed = 0.5 * pairs.rows.T @ pairs.rows / pairs.samples
        matrix = signed + torch.diag(pairs.first_order)
    order = slow_greedy(matrix, sizes, [1, 2, 3], costs)
    scores = StructureScores(torch.split(pairs.row_sums(), sizes), pairs)
    saved = {group.name: cost for group, cost in zip(groups, costs, strict=True)}
    size: Any = SimpleNamespace(macs=lambda removed: -sum(map(saved.get, removed)))
    additive = additive_scores(scores, groups, config, size)
    for count in range(7):
        removed = select_count(groups, additive, count)
        assert chosen(groups, removed) == sorted(order[:count])


def test_greedy_with_multiples_keeps_them() -> None:
    pairs, sizes = pairs_of(7, size=20), [8, 12]
    groups, limits = bare(sizes), StructureConfig(round_to=4, search="greedy")
    scores = StructureScores(torch.split(pairs.row_sums(), sizes), pairs)
    additive = additive_scores(scores, groups, limits)
    removed = select_count(groups, additive, 8, limits)
    kept = [g.size - len(removed[g.name]) for g in groups]
    assert sum(kept) == 12
    assert all(number % 4 == 0 for number in kept)


def test_greedy_beats_the_sums_of_rows() -> None:
    greedy, rowsum, hits, pairs_hit = [], [], 0, 0
    groups, greedily = bare([14]), dataclasses.replace(NO_FLOOR, search="greedy")
    for seed in range(60):
        pairs = pairs_of(seed, size=14, samples=4)
        matrix = dense_matrix(pairs)
        scores = StructureScores((pairs.row_sums(),), pairs)
        cost = {}
        for search in ("greedy", "rowsum"):
            config = dataclasses.replace(NO_FLOOR, search=search)
            additive = additive_scores(scores, groups, config)
            removed = select_count(groups, additive, 6, NO_FLOOR)
            cost[search] = objective(pairs, removed["layer0"])
        greedy.append(cost["greedy"])
        rowsum.append(cost["rowsum"])
        additive = additive_scores(scores, groups, greedily)
        one = select_count(groups, additive, 1, NO_FLOOR)["layer0"].tolist()
        hits += one == [int(matrix.diagonal().argmin())]
        two = select_count(groups, additive, 2, NO_FLOOR)["layer0"].tolist()
        best = min(
            itertools.combinations(range(14), 2),
            key=lambda pair: float(matrix[list(pair)][:, list(pair)].sum()),
        )
        pairs_hit += two == list(best)
    assert sum(greedy) < sum(rowsum)
    assert hits == 60
    assert pairs_hit > 30


# ---------------------------------------------------------------- sizes


def shrink(
    model: nn.Module, groups: Sequence[Group], removed: dict[str, Tensor]
) -> None:
    for group in groups:
        gone = set(removed.get(group.name, torch.empty(0)).tolist())
        for one in group.members:
            module = model.get_submodule(one.module)
            numbers = one.structure_of.tolist()
            kept = torch.tensor([i for i, s in enumerate(numbers) if s not in gone])
            tensor = getattr(module, one.tensor).detach().index_select(one.axis, kept)
            if one.role == "statistics":
                setattr(module, one.tensor, tensor)
            else:
                setattr(module, one.tensor, nn.Parameter(tensor))


@pytest.mark.parametrize(
    ("model", "groups"),
    [(Residual(), residual_groups()), (Plain(), plain_groups())],
    ids=["residual", "plain"],
)
def test_sizes_are_those_of_smaller_networks(
    model: nn.Module, groups: list[Group]
) -> None:
    trained(model)
    pixels = images(3).tensors[0]
    size = network_size(model, groups, lambda: model(pixels), len(pixels))
    assert model.training
    assert not any(m._forward_hooks for m in model.modules())
    # By the loss of a source it is the same.
    source = FunctionLoss(model, images(3), cross_entropy)
    assert NetworkSize(source, groups, Communicator()).dense_macs == (size.dense_macs)
    for removed in (
        {},
        {groups[0].name: torch.tensor([1])},
        {groups[0].name: torch.tensor([0, 2]), groups[1].name: torch.tensor([3])},
        {group.name: torch.arange(group.size - 1) for group in groups},
    ):
        smaller = copy.deepcopy(model).eval()
        shrink(smaller, groups, removed)
        assert size.parameters(removed) == sum(p.numel() for p in smaller.parameters())
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            smaller(pixels)
        assert size.macs(removed) == counter.get_total_flops() / 2 / len(pixels)


def test_concatenated_channels_shrink_apart() -> None:
    # Two layers are read side by side, and each group knows its half only.
    model = nn.ModuleDict(
        {"a": nn.Conv2d(1, 3, 1), "b": nn.Conv2d(1, 2, 1), "c": nn.Conv2d(5, 4, 1)}
    )

    def half(name: str, size: int, place: list[int]) -> Group:
        produced = Member(name, "weight", 0, "producer", torch.arange(size))
        bias = Member(name, "bias", 0, "bias", torch.arange(size))
        read = Member("c", "weight", 1, "consumer", torch.tensor(place))
        return Group(name, size, (produced, bias, read))

    groups = [half("a", 3, [0, 1, 2, -1, -1]), half("b", 2, [-1, -1, -1, 0, 1])]
    pixels = torch.ones(1, 1, 2, 2)
    size = network_size(
        model,
        groups,
        lambda: model["c"](torch.cat([model["a"](pixels), model["b"](pixels)], 1)),
    )
    removed = {"a": torch.tensor([0, 1]), "b": torch.tensor([1])}
    # a keeps 1 and b 1, with biases; c keeps 4 × 2 and 4 biases.
    assert size.parameters(removed) == 2 + 2 + 8 + 4
    assert size.macs(removed) == 4 * (1 + 1 + 8)


@pytest.mark.parametrize("multiple", [1, 2])
@pytest.mark.parametrize(
    ("measure", "target"), [("parameters", 0.4), ("macs", 0.5), ("macs", 0.0)]
)
def test_as_few_as_reach_a_size(measure: Any, target: float, multiple: int) -> None:
    model, groups = Residual(6, 8), residual_groups(6, 8)
    pixels = images(1, torch.float32).tensors[0]
    size = network_size(model, groups, lambda: model(pixels))
    generator = torch.Generator().manual_seed(2)
    scores = [torch.rand(group.size, generator=generator) for group in groups]
    limits = StructureConfig(round_to=multiple, measure=measure)

    def share(removed: dict[str, Tensor]) -> float:
        if measure == "macs":
            return size.macs(removed) / size.dense_macs
        return size.parameters(removed) / size.dense_parameters

    removed = select_for_size(groups, scores, size, target, limits)
    count = len(chosen(groups, removed))
    assert share(removed) <= 1 - target
    for fewer in range(0, count, multiple):
        assert share(select_count(groups, scores, fewer, limits)) > 1 - target
    expected = select_count(groups, scores, count, limits)
    assert chosen(groups, removed) == chosen(groups, expected)


def convolutions() -> tuple[nn.Module, list[Group], NetworkSize]:
    """Three convolutions on 6×6 pixels; the outputs of the first two are groups."""
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1, bias=False),
        nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False),
        nn.Conv2d(6, 2, 3, padding=1, bias=False),
    )
    groups = []
    for layer, count in ((0, 4), (1, 6)):
        every = torch.arange(count)
        produced = Member(str(layer), "weight", 0, "producer", every)
        read = Member(str(layer + 1), "weight", 1, "consumer", every)
        groups.append(Group(str(layer), count, (produced, read)))
    pixels = torch.ones(1, 1, 6, 6)
    return model, groups, network_size(model, groups, lambda: model(pixels))


def test_scores_per_cost_take_what_saves_most() -> None:
    _, groups, size = convolutions()
    # 36 positions of 1 · 9 weights and 9 of 6 · 9; 9 of 4 · 9 and 9 of 2 · 9.
    firsts = [{group.name: torch.tensor([0])} for group in groups]
    assert [size.dense_macs - size.macs(first) for first in firsts] == [810, 486]
    left = [size.parameters(first) for first in firsts]
    assert [size.dense_parameters - number for number in left] == [63, 54]
    scores = [torch.full((4,), 1.0), torch.full((6,), 0.8)]

    def numbers(**options: Any) -> list[int]:
        config = StructureConfig(**options)
        known = StructureScores(tuple(scores))
        values = additive_scores(known, groups, config, size)
        removed = select_for_size(groups, values, size, 0.1, config)
        return [len(removed[name]) for name in "01"]

    assert numbers(per_cost=False) == [0, 1]
    assert numbers(per_cost=True) == [1, 0]
    # By default, where scores are losses and the target is work.
    assert numbers() == [1, 0]
    assert numbers(method="magnitude") == [0, 1]
    assert numbers(measure="parameters") == [0, 1]
    # 1 / 63 > 0.8 / 54, so by parameters the order is that of the scores.
    assert numbers(per_cost=True, measure="parameters") == [0, 1]


@pytest.mark.parametrize(
    ("options", "macs", "parameters"),
    [
        ({}, True, True),
        ({"method": "diagonal"}, True, True),
        ({"search": "greedy"}, True, False),
        ({"method": "sosp_h"}, True, False),
        ({"method": "hap"}, True, False),
        ({"method": "magnitude"}, False, False),
        ({"method": "random"}, False, False),
        ({"per_cost": False}, False, False),
    ],
)
def test_scores_are_divided_by_costs_where_that_was_better(
    options: Any, macs: bool, parameters: bool
) -> None:
    found = [
        StructureConfig(measure=measure, **options).is_per_cost
        for measure in ("macs", "parameters", "structures")
    ]
    assert found == [macs, parameters, False]


def test_sizes_below_the_floors_are_named() -> None:
    model, groups = Residual(), residual_groups()
    pixels = images(1, torch.float32).tensors[0]
    size = network_size(model, groups, lambda: model(pixels))
    scores = [torch.rand(group.size) for group in groups]
    with pytest.raises(ConfigurationError, match="target=0.99 of the macs cannot"):
        select_for_size(groups, scores, size, 0.99)
