"""The search over scales on functions whose minimum is known."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_woodfisher.pruning.line_search import search_first_order, search_scales


@pytest.mark.parametrize(("optimum", "expected"), [(0.9, 1.0), (0.4, 0.5), (-2.0, 0.0)])
def test_compensation_is_the_best_of_three(optimum: float, expected: float) -> None:
    def loss(scales: tuple[float, ...]) -> float:
        return (scales[0] - optimum) ** 2

    assert search_scales(loss, 1) == (expected,)
    assert search_scales(loss, 1, largest=0.5)[0] <= 0.5


@given(st.floats(1e-4, 1.0), st.sampled_from([1e-5, 1e-3, 1e-1, 10.0]))
def test_first_order_scale_is_found_within_its_ratio(
    optimum: float, damping: float
) -> None:
    """With an optimum that six steps of three can reach."""

    def loss(scale: float) -> float:
        return math.log(max(scale, 1e-9) / optimum) ** 2

    start = min(1.0, 10 * damping)
    found = search_first_order(loss, damping)
    reach = min(1.0, start * 3**6), start / 3**6
    wanted = min(max(optimum, reach[1]), reach[0])
    assert abs(math.log(found / wanted)) <= math.log(3.0) / 2 + 1e-9 or found == 1.0


def test_both_scales_are_refined() -> None:
    def loss(scales: tuple[float, ...]) -> float:
        return (scales[0] - 0.6) ** 2 + math.log(max(scales[1], 1e-9) / 0.05) ** 2

    compensation, first_order = search_scales(loss, 2, first_order=0.01)
    assert compensation == 0.5
    assert abs(math.log(first_order / 0.05)) <= math.log(3.0) / 4


@given(st.integers(0, 2**32 - 1))
def test_what_is_chosen_is_the_least_of_all_that_was_measured(seed: int) -> None:
    asked: dict[tuple[float, ...], float] = {}

    def loss(scales: tuple[float, ...]) -> float:
        assert scales not in asked
        assert all(0.0 <= scale <= 1.0 for scale in scales)
        value = float(hash((scales, seed)) % 1000)
        asked[scales] = math.nan if value > 900 else value
        return asked[scales]

    chosen = search_scales(loss, 2, first_order=0.02)
    finite = [value for value in asked.values() if not math.isnan(value)]
    assert (0.0, 0.0) in asked
    assert len(asked) <= 4 + 2 * 6
    assert not finite or asked[chosen] == min(finite)


def test_nothing_is_done_where_every_loss_is_infinite_or_nothing_may_be() -> None:
    assert search_scales(lambda _: math.inf, 2, first_order=0.1) == (0.0, 0.0)
    assert search_first_order(lambda _: math.nan, 1e-3) == 0.0

    def never(_: object) -> float:
        raise AssertionError("measured in vain")

    assert search_scales(never, 0) == ()
    assert search_scales(never, 2, largest=0.0) == (0.0, 0.0)


def test_without_a_first_order_scale_only_the_compensation_is_searched() -> None:
    chosen = search_scales(lambda s: (s[0] - 1) ** 2 + (s[1] - 1) ** 2, 2)
    assert chosen == (1.0, 0.0)
