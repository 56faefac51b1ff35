"""Stages of a pruning step: where each ends, and when they become shorter."""

from __future__ import annotations

__all__ = ["Spacing", "Stages", "removed_fraction"]

from fractions import Fraction
from typing import Literal

Spacing = Literal["geometric", "linear", "polynomial"]

# Stages are halved at most this often.
_MOST_HALVINGS = 3


def removed_fraction(kept_ratio: float, fraction: float, spacing: Spacing) -> float:
    """Return the share of the initial weights that is removed after a fraction of a step.

    Args:
        kept_ratio: share that is left at the end of the step, r.
        fraction: fraction of the step, f in [0, 1].
        spacing: ``"geometric"`` 1 − rᶠ: each stage removes the same share of what it finds;
            ``"linear"`` (1 − r)f: the same number; ``"polynomial"``
            (1 − r)(1 − (1 − f)³): as in Zhu & Gupta's schedule.

    Returns:
        A share from 0 to 1 − r.
    """
    if spacing == "linear":
        return (1.0 - kept_ratio) * fraction
    if spacing == "polynomial":
        return (1.0 - kept_ratio) * (1.0 - (1.0 - fraction) ** 3)
    kept: float = kept_ratio**fraction
    return 1.0 - kept


class Stages:
    """Position within a step of equal stages, which :meth:`halve` makes shorter.

    Args:
        number: number of stages when none is halved.

    Attributes:
        halvings: how often the stages became half as long.
    """

    def __init__(self, number: int) -> None:
        self._position = Fraction(0)
        self._stride = Fraction(1, number)
        self.halvings = 0

    @property
    def is_done(self) -> bool:
        """Whether the step has reached its end."""
        return self._position == 1

    def advance(self) -> float:
        """Move to the end of the next stage.

        Returns:
            The fraction of the step that is done then; exactly 1 at the end.
        """
        self._position = min(self._position + self._stride, Fraction(1))
        return float(self._position)

    def halve(self) -> None:
        """Make the following stages half as long, at most three times."""
        if self.halvings < _MOST_HALVINGS and not self.is_done:
            self._stride /= 2
            self.halvings += 1
