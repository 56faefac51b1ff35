"""How a step is cut into parts: where each ends, and finer parts where trust is lost."""

from __future__ import annotations

__all__ = ["Spacing", "Stages", "removed_fraction"]

from fractions import Fraction
from typing import Literal

Spacing = Literal["geometric", "linear", "polynomial"]

# A part is at most halved so often.
_MOST_HALVINGS = 3


def removed_fraction(kept_ratio: float, fraction: float, spacing: Spacing) -> float:
    """Tell how much of what is there at the start has gone after a fraction of a step.

    Args:
        kept_ratio: share that is left at the end of the step, r.
        fraction: of the step, f in [0, 1].
        spacing: ``"geometric"`` 1 − rᶠ: each part removes the same share of what it finds;
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
    """Goes through a step in equal parts that may become finer on the way.

    Args:
        number: of parts when none is cut.

    Attributes:
        stage_halvings: how often the parts became half as long.
    """

    def __init__(self, number: int) -> None:
        self._at = Fraction(0)
        self._stride = Fraction(1, number)
        self.stage_halvings = 0

    @property
    def is_done(self) -> bool:
        """Whether the step has reached its end."""
        return self._at == 1

    def advance(self) -> float:
        """Go to the end of the next part.

        Returns:
            The fraction of the step that is done then; exactly 1 in the end.
        """
        self._at = min(self._at + self._stride, Fraction(1))
        return float(self._at)

    def halve(self) -> None:
        """Make the parts that follow half as long; in vain once they are an eighth."""
        if self.stage_halvings < _MOST_HALVINGS and not self.is_done:
            self._stride /= 2
            self.stage_halvings += 1
