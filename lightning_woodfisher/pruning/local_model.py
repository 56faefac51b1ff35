"""Comparison of the quadratic model with the measured loss along a weight update.

WoodFisher approximates the loss by a quadratic around the trained weights. Between the
weights ``w`` before a stage and ``w + δ`` after it, this model predicts that the loss rises
by ``t² · ½ δᵀFδ`` at ``w + t·δ``. There is no first-order term, because the gradient at a
minimum is zero. The same points are measured on the samples of the gradients, as in the
local quadratic analysis of the paper (Singh & Alistarh 2020, appendix).
"""

from __future__ import annotations

__all__ = ["LocalModel"]

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from lightning_woodfisher.pruning.report import LocalModelPoint
from lightning_woodfisher.weights.masks import Masks


class LocalModel:
    """Compare predicted and measured loss between the weights before and after a stage.

    Keeps two copies of the selected weights while it measures, none without points.

    Args:
        masks: masks with the parameters.
        points: number of points, evenly spaced from the weights before to those after.
    """

    def __init__(self, masks: Masks, points: int) -> None:
        self._masks = masks
        self._fractions = [i / (points - 1) for i in range(points)]
        self._before = self._copy() if points else {}

    def check(
        self,
        predict: Callable[[float], list[float] | None],
        measure: Callable[[], Sequence[float]],
        losses_before: Sequence[float],
        losses_after: Sequence[float],
    ) -> tuple[LocalModelPoint, ...]:
        """Compare prediction and measurement. Call on all ranks, after the write.

        Args:
            predict: maps the fraction t to the predicted rise of the mean loss, by layer.
            measure: returns the losses at the present weights.
            losses_before: losses at t = 0.
            losses_after: losses at t = 1.

        Returns:
            One point for each fraction. The model has its final weights afterwards, bit
            for bit.
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
                    self._interpolate(fraction, after)
                    losses = measure()
                rise = _mean(losses) - start
                shares = predict(fraction)
                predicted = None if shares is None else sum(shares)
                found.append(LocalModelPoint(fraction, predicted, rise))
        finally:
            self._interpolate(1.0, after)
        return tuple(found)

    @torch.no_grad()
    def _interpolate(self, fraction: float, after: Mapping[str, Tensor]) -> None:
        for name, end in after.items():
            # The end itself is copied, because lerp may differ from it by a rounding error.
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
