"""How far to go: the scales of a weight update, chosen by the measured loss.

The quadratic model holds near the present weights only. The directions of its minimiser
are good further out, its length is not; so the length is measured.
"""

from __future__ import annotations

__all__ = ["count_trials", "search_first_order", "search_scales"]

import math
from collections.abc import Callable

Scales = tuple[float, ...]

# Shares of the compensation that are tried.
_COMPENSATIONS = (0.0, 0.5, 1.0)
# Where gradients span little, the first-order direction is g/λ: a scale in proportion to
# λ is a step along g of a length that does not depend on λ.
_FIRST_ORDER_PER_DAMPING = 10.0
# Ratios of neighbouring scales of the first-order direction.
_COARSE, _FINE = 3.0, 3.0**0.5
_MOST_RATIOS = 6


def search_first_order(
    loss: Callable[[float], float], damping: float, largest: float = 1.0
) -> float:
    """Choose how far to go along a direction of first order, before anything is removed.

    From 10·λ up and down in ratios of 3 as long as the loss falls.

    Args:
        loss: measures the loss at a scale; what is not finite is never chosen.
        damping: λ.
        largest: no scale exceeds it.

    Returns:
        The scale of the smallest loss that was measured, 0 among them.
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
    """Choose the scales of a step with few measurements.

    The compensation is tried at 0, ½ and 1 times ``largest``, with and without the second
    direction; then that one is followed in ratios of √3 as long as the loss falls.

    Args:
        loss: measures the loss at given scales, one for each direction; what is not finite
            is never chosen. Asked once for each scales. Scales of zero, which stand for no
            update, are always among them.
        directions: 1, or 2 with one of first order.
        largest: no scale exceeds it.
        first_order: where to begin in the second direction; 0 leaves it out.

    Returns:
        The scales of the smallest loss that was measured, one for each direction.
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
        first_order: whether there is a direction of first order.

    Returns:
        The fewest and the most; the fewest where the first guess is the best.
    """
    compensations = len(_COMPENSATIONS)
    if not first_order:
        # Nothing at all is the first of the compensations.
        return compensations, compensations
    # Each search has its start, where nothing is another, and two ways to go.
    fixed = 2 + 1 + compensations
    return fixed + 2 * 2, fixed + 2 * 2 * _MOST_RATIOS


class _Measured:
    """Losses by scales; each is measured once."""

    def __init__(self, loss: Callable[[Scales], float]) -> None:
        self._loss = loss
        self._values: dict[Scales, float] = {}

    def measure(self, scales: Scales) -> float:
        if scales not in self._values:
            value = self._loss(scales)
            self._values[scales] = value if math.isfinite(value) else math.inf
        return self._values[scales]

    def best(self) -> Scales:
        # The first of several: the smaller step, for it was measured earlier.
        return min(self._values, key=self._values.__getitem__)


def _follow(
    measure: Callable[[float], float], start: float, factor: float, largest: float
) -> None:
    """Go on in one direction as long as the loss falls."""
    lowest, scale = measure(start), start
    for _ in range(_MOST_RATIOS):
        scale = min(scale * factor, largest)
        value = measure(scale)
        if value >= lowest:
            return
        lowest = value
