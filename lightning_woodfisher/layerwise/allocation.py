"""How many weights each layer loses, from the error that it makes at each sparsity.

The sparsities that minimize the sum of the layers' errors are found with one multiplier: all
layers lose weights until the next one costs the same. The curves know nothing about the errors
that layers pass on, and so the sparsities are moved half of the way to equal ones.
"""

from __future__ import annotations

__all__ = ["Share", "error_curve", "fill", "propose"]

import bisect
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_woodfisher.layerwise.solver import LayerProblem

#: Sparsities at which the error of a layer is computed.
SPARSITIES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 1.0)
_STEPS = 5
_TINY = 1e-300
_BISECTIONS = 60
_TOWARDS_EQUAL = 0.5


@dataclass(frozen=True)
class Share:
    """A layer that competes for a number of weights to remove.

    Attributes:
        weights: number of weights.
        leaving: number of weights that one group of the pattern loses.
        least: number of weights that are pruned already.
        most: largest number of pruned weights.
    """

    weights: int
    leaving: int
    least: int
    most: int


def error_curve(
    problem: LayerProblem,
    errors: Callable[[Tensor], float],
    choose: Callable[[float, Tensor], Tensor],
) -> list[float]:
    """Compute the error of a layer at each of :data:`SPARSITIES`.

    Args:
        problem: the layer with inputs of the dense network.
        errors: returns the error of weights ``[g, o, d]``.
        choose: returns the removed weights for a sparsity and scores ``[g, o, d]``.

    Returns:
        The errors, which do not fall.
    """
    found: list[float] = []
    for sparsity in SPARSITIES:
        removed, _ = problem.find_mask(functools.partial(choose, sparsity), 0)
        error = errors(problem.solve(removed, _STEPS, torch.float32))
        found.append(max(error, found[-1] if found else 0.0))
    return found


def propose(
    curves: Sequence[Sequence[float]], weights: Sequence[int], sparsity: float
) -> list[float]:
    """Choose sparsities of layers with the least sum of errors, half way to equal ones.

    Args:
        curves: errors of each layer at :data:`SPARSITIES`.
        weights: number of weights of each layer.
        sparsity: sparsity of all layers together.

    Returns:
        The sparsity of each layer; the mean, weighted by the numbers, is ``sparsity``
        unless layers have reached an end of their curve.
    """
    points = (0.0, *SPARSITIES)
    middles = [(a + b) / 2 for a, b in zip(points, points[1:], strict=False)]
    slopes = []
    for curve, number in zip(curves, weights, strict=True):
        values = [0.0, *curve]
        found: list[float] = []
        for i in range(len(SPARSITIES)):
            slope = (values[i + 1] - values[i]) / (points[i + 1] - points[i]) / number
            found.append(max(slope, found[-1] if found else 0.0))
        slopes.append(found)

    def at(multiplier: float) -> list[float]:
        return [_sparsity_at(slope, middles, multiplier) for slope in slopes]

    total = sparsity * sum(weights)
    low, high = 0.0, 2 * max(max(slope) for slope in slopes)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        reached = sum(s * n for s, n in zip(at(middle), weights, strict=True))
        low, high = (middle, high) if reached < total else (low, middle)
    return [_TOWARDS_EQUAL * sparsity + (1 - _TOWARDS_EQUAL) * s for s in at(high)]


def _sparsity_at(
    slopes: Sequence[float], middles: Sequence[float], multiplier: float
) -> float:
    """Return the sparsity at which the error rises by ``multiplier`` a weight."""
    index = bisect.bisect_right(slopes, multiplier)
    if index == 0:
        return middles[0] * (multiplier / max(slopes[0], _TINY))
    if index == len(slopes):
        # From the last middle to 1, while the rise doubles.
        beyond = min(1.0, multiplier / max(slopes[-1], _TINY) - 1.0)
        return middles[-1] + (1.0 - middles[-1]) * beyond
    below, above = slopes[index - 1], slopes[index]
    part = (multiplier - below) / (above - below)
    return middles[index - 1] + part * (middles[index] - middles[index - 1])


def fill(shares: Sequence[Share], wanted: Sequence[float], total: int) -> list[int]:
    """Turn sparsities into an exact number of weights.

    Args:
        shares: the layers.
        wanted: sparsity of each.
        total: number of pruned weights of all layers together, those pruned already
            included.

    Returns:
        Number of pruned weights of each layer: ``least`` or more whole groups, at most
        ``most``. The sum is ``total``, or less by a remainder that no group fits into.
    """

    def clamp(share: Share, value: float) -> float:
        return min(max(value, share.least), share.most)

    def at(shift: float) -> list[float]:
        return [
            clamp(share, (s + shift) * share.weights)
            for share, s in zip(shares, wanted, strict=True)
        ]

    low, high = -1.0, 1.0
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(at(middle)) < total else (low, middle)
    exact = at(high)
    counts = [
        share.least + int((value - share.least + 1e-6) // share.leaving) * share.leaving
        for share, value in zip(shares, exact, strict=True)
    ]
    # The largest remainders first; of equal ones, the first layer.
    rest = total - sum(counts)
    order = sorted(
        range(len(shares)), key=lambda i: (counts[i] - exact[i]) / shares[i].leaving
    )
    while rest > 0:
        room = [
            i
            for i in order
            if shares[i].leaving <= rest
            and counts[i] + shares[i].leaving <= shares[i].most
        ]
        if not room:
            break
        for i in room:
            if shares[i].leaving <= rest:
                counts[i] += shares[i].leaving
                rest -= shares[i].leaving
    return counts
