"""Line search: scales of a weight update, chosen by the measured loss.

The quadratic model holds only near the present weights. Further away, the directions of its
minimizer are still good but their length is not, so the length is chosen by measurement.
"""

from __future__ import annotations

__all__ = [
    "FINALISTS",
    "count_trials",
    "screening_batches",
    "search_first_order",
    "search_scales",
]

import math
from collections.abc import Callable

Scales = tuple[float, ...]

#: Number of trials that are measured on all samples: those that were best on the first.
FINALISTS = 2
# Samples on which every trial is measured.
_SCREENING_SAMPLES = 256

# Shares of the compensation that are tried.
_COMPENSATIONS = (0.0, 0.5, 1.0)
# Outside the span of the gradients, the first-order direction is g/λ: with a scale in
# proportion to λ, the length of the step along g does not depend on λ.
_FIRST_ORDER_PER_DAMPING = 10.0
# Ratios of neighboring scales of the first-order direction.
_COARSE, _FINE = 3.0, 3.0**0.5
_MOST_RATIOS = 6


def search_first_order(
    loss: Callable[[float], float], damping: float, largest: float = 1.0
) -> float:
    """Choose the scale of a first-order direction, before anything is removed.

    Scales start at 10·λ and change in ratios of 3 as long as the loss falls.

    Args:
        loss: measures the loss at a scale; a scale with a loss that is not finite is never
            chosen.
        damping: λ.
        largest: largest scale.

    Returns:
        The scale with the smallest measured loss; 0 is always measured.
    """
    found = _Measured(lambda scales: loss(*scales))
    start = min(_FIRST_ORDER_PER_DAMPING * damping, largest)
    found.measure((0.0,))
    found.measure((start,))
    for factor in (_COARSE, 1.0 / _COARSE):
        _follow(lambda scale: found.measure((scale,)), start, factor, largest)
    return found.best()[0]


def search_scales(
    loss: Callable[[Scales], float],
    directions: int,
    largest: float = 1.0,
    first_order: float = 0.0,
) -> Scales:
    """Choose the scales of all directions with few measurements.

    The compensation is tried at 0, ½ and 1 times ``largest``; then the scale of the second
    direction changes in ratios of √3 as long as the loss falls.

    Args:
        loss: measures the loss at given scales, one for each direction, each at most once.
            Scales with a loss that is not finite are never chosen. Scales of zero, which
            mean no update, are always measured.
        directions: number of directions: 1, or 2 with a first-order direction.
        largest: largest scale.
        first_order: initial scale of the second direction; 0 leaves it out.

    Returns:
        The scales with the smallest measured loss, one for each direction.
    """
    none = (0.0,) * directions
    if directions == 0 or largest == 0.0:
        return none
    found = _Measured(loss)
    found.measure(none)
    start = none[1:] if first_order == 0.0 else (first_order,) * (directions - 1)
    for share in _COMPENSATIONS:
        found.measure((share * largest, *start))
    if any(start):
        compensation = found.best()[0]
        for factor in (_FINE, 1.0 / _FINE):
            _follow(
                lambda scale: found.measure((compensation, scale)),
                first_order,
                factor,
                largest,
            )
    return found.best()


def count_trials(first_order: bool) -> tuple[int, int]:
    """Count the losses that both searches measure together.

    Args:
        first_order: whether there is a first-order direction.

    Returns:
        The smallest and the largest number; the smallest if the initial scale is the best.
    """
    compensations = len(_COMPENSATIONS)
    if not first_order:
        # A compensation of 0 means no update.
        return compensations, compensations
    # Each search measures its start and 0, and searches in two directions.
    fixed = 2 + 1 + compensations
    return fixed + 2 * 2, fixed + 2 * 2 * _MOST_RATIOS


def screening_batches(size: int) -> int:
    """Return the number of batches that every trial is measured on.

    Args:
        size: samples in a batch.

    Returns:
        The batches that have 256 samples.
    """
    return -(-_SCREENING_SAMPLES // size)


class _Measured:
    """Losses by scales, each measured once."""

    def __init__(self, loss: Callable[[Scales], float]) -> None:
        self._loss = loss
        self._values: dict[Scales, float] = {}

    def measure(self, scales: Scales) -> float:
        if scales not in self._values:
            value = self._loss(scales)
            self._values[scales] = value if math.isfinite(value) else math.inf
        return self._values[scales]

    def best(self) -> Scales:
        # Of equal losses the first one, which is the smaller step.
        return min(self._values, key=self._values.__getitem__)


def _follow(
    measure: Callable[[float], float], start: float, factor: float, largest: float
) -> None:
    """Change a scale by a factor as long as the loss falls."""
    lowest, scale = measure(start), start
    for _ in range(_MOST_RATIOS):
        scale = min(scale * factor, largest)
        value = measure(scale)
        if value >= lowest:
            return
        lowest = value
