"""The quadratic model checked along the pruning direction.

WoodFisher takes the loss for a quadratic around the trained weights. Between the weights
``w`` before a part of a step and ``w + δ`` after it, the model predicts a rise of the loss of
``t² · ½ δᵀFδ`` at ``w + t·δ``: without a first-order term, because the gradient at a minimum
is zero. The same points are measured on the samples of the gradients, as in the local
quadratic analysis of the paper (Singh & Alistarh 2020, appendix).
"""

from __future__ import annotations

__all__ = ["LocalModel", "require_points"]

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from lightning_woodfisher.base.errors import ConfigurationError, require_count
from lightning_woodfisher.pruning.report import LocalModelPoint
from lightning_woodfisher.weights.masks import Masks

_FEWEST_POINTS = 2


def require_points(points: int, measure_loss: bool) -> None:
    """Check how many points are asked for.

    Args:
        points: 0 for none.
        measure_loss: whether losses are measured at all.

    Raises:
        ConfigurationError: for a number that cannot work.
    """
    require_count("local_model_points", points)
    if points and points < _FEWEST_POINTS:
        raise ConfigurationError(
            f"local_model_points={points} must be 0 (off), or at least {_FEWEST_POINTS}: the "
            "weights before and after the step are two of them."
        )
    if points and not measure_loss:
        raise ConfigurationError(
            f"local_model_points={points} needs measured losses; set measure_loss=True."
        )


class LocalModel:
    """Remembers the weights before they are written, and measures on the way.

    Keeps two more copies of the selected weights while it measures, none without points.

    Args:
        masks: with the parameters; nothing of theirs is changed in the end.
        points: how many, evenly spaced from the weights before to those after.
    """

    def __init__(self, masks: Masks, points: int) -> None:
        self._masks = masks
        self._fractions = [i / (points - 1) for i in range(points)]
        self._before = self._copy() if points else {}

    def check(
        self,
        predict: Callable[[float], float | None],
        measure: Callable[[], Sequence[float]],
        losses_before: Sequence[float],
        losses_after: Sequence[float],
    ) -> tuple[LocalModelPoint, ...]:
        """Compare prediction and measurement. Call on all ranks, after the write.

        Args:
            predict: maps the fraction t to the predicted rise of the mean loss.
            measure: gives the losses at the present weights.
            losses_before: those at t = 0.
            losses_after: those at t = 1.

        Returns:
            A point for each fraction; the model has its final weights, bit for bit.
        """
        if not self._fractions:
            return ()
        after = self._copy()
        start = _mean(losses_before)
        found = []
        try:
            for fraction in self._fractions:
                if fraction == 0.0:
                    losses = losses_before
                elif fraction == 1.0:
                    losses = losses_after
                else:
                    self._go_to(fraction, after)
                    losses = measure()
                rise = _mean(losses) - start
                found.append(LocalModelPoint(fraction, predict(fraction), rise))
        finally:
            self._go_to(1.0, after)
        return tuple(found)

    @torch.no_grad()
    def _go_to(self, fraction: float, after: Mapping[str, Tensor]) -> None:
        for name, end in after.items():
            # The end itself is copied: a formula might miss it by a rounding.
            between = end
            if fraction < 1.0:
                start = self._before[name].double()
                between = torch.lerp(start, end.double(), fraction)
            self._masks.local(name).copy_(between)

    def _copy(self) -> dict[str, Tensor]:
        return {
            name: self._masks.local(name).clone() for name in self._masks.parameters
        }


def _mean(losses: Sequence[float]) -> float:
    return sum(losses) / len(losses)
