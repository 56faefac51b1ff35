"""Numbers of weights by layer: exact, within limits, and near the least error."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_woodfisher.layerwise.allocation import (
    SPARSITIES,
    Share,
    fill,
    propose,
)


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[Share], list[float], int]:
    shares, wanted = [], []
    for _ in range(draw(st.integers(1, 5))):
        groups = draw(st.integers(1, 40))
        least = draw(st.integers(0, groups))
        most = draw(st.integers(least, groups))
        shares.append(Share(groups, 1, least, most))
        wanted.append(draw(st.floats(0, 1)))
    low, high = sum(s.least for s in shares), sum(s.most for s in shares)
    return shares, wanted, draw(st.integers(low, high))


@given(problems())
def test_counts_are_exact_and_within_limits(
    problem: tuple[list[Share], list[float], int],
) -> None:
    shares, wanted, total = problem
    counts = fill(shares, wanted, total)
    assert sum(counts) == total
    for share, count in zip(shares, counts, strict=True):
        assert share.least <= count <= share.most


def test_whole_groups_leave_a_remainder() -> None:
    shares = [Share(40, 4, 0, 40), Share(42, 7, 7, 42)]
    counts = fill(shares, [0.5, 0.5], 41)
    assert counts[0] % 4 == 0
    assert counts[1] % 7 == 0
    assert 41 - 4 < sum(counts) <= 41


@pytest.mark.parametrize("sparsity", [0.3, 0.6, 0.9])
def test_half_way_to_the_least_sum_of_errors(sparsity: float) -> None:
    # Errors a·s²·n, whose optimum has equal slopes: s in proportion to 1/a.
    weights, factors = [100, 300, 200], [1.0, 4.0, 2.0]
    curves = [
        [a * s**2 * n for s in SPARSITIES]
        for a, n in zip(factors, weights, strict=True)
    ]
    found = propose(curves, weights, sparsity)
    mean = sum(s * n for s, n in zip(found, weights, strict=True)) / sum(weights)
    assert mean == pytest.approx(sparsity, abs=1e-3)
    best = [2 * s - sparsity for s in found]

    def cost(values: list[float]) -> float:
        terms = zip(factors, weights, values, strict=True)
        return sum(a * n * s**2 for a, n, s in terms)

    # No layer can give a little sparsity to another one at a gain.
    for i, j in itertools.permutations(range(3), 2):
        moved = list(best)
        moved[i] += 3.0 / weights[i]
        moved[j] -= 3.0 / weights[j]
        if moved[i] <= 0.98:
            assert cost(moved) >= cost(best) * (1 - 2e-3)
