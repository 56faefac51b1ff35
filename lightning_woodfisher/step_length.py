"""The length of a weight update in one part of a step, with or without the search."""

from __future__ import annotations

__all__ = ["StepLength"]

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_woodfisher.active_weights import ActiveWeights
from lightning_woodfisher.criteria import Criterion
from lightning_woodfisher.sampling import Sampling
from lightning_woodfisher.step_search import search_first_order, search_scales


class StepLength:
    """Scales the directions of a criterion.

    Trials write weights into the model. The step that is taken at the end overwrites all
    of them, and one that fails puts the weights back.

    Args:
        criterion: fed with all rows.
        active: the weights that take part.
        sampling: measures the losses.
        weights: as they are, float64 ``[D_r]``.
        seed: of the samples.
        largest: no scale exceeds it; without search every scale is this.
        search: whether scales are chosen by the measured loss.
    """

    def __init__(
        self,
        criterion: Criterion,
        active: ActiveWeights,
        sampling: Sampling,
        weights: Tensor,
        seed: int,
        *,
        largest: float,
        search: bool,
    ) -> None:
        self._criterion = criterion
        self._active = active
        self._sampling = sampling
        self._weights = weights
        self._seed = seed
        self._largest = largest
        self._search = search
        self._first_order = 0.0

    def prepare(self, descent: Tensor | None) -> None:
        """Find out how far the first order is trusted; call it before the scores.

        Args:
            descent: what the criterion gives, None where nothing is to be found out.
        """
        criterion, weights = self._criterion, self._weights
        if descent is None:
            return
        nothing = torch.zeros_like(weights, dtype=torch.bool)
        self._first_order = search_first_order(
            lambda scale: self._loss(scale * descent, nothing),
            criterion.damping or 0.0,
            self._largest,
        )
        criterion.first_order_scale = self._first_order

    def choose(
        self, removed: Tensor, directions: Sequence[Tensor]
    ) -> tuple[tuple[float, ...], Tensor]:
        """Choose the scales and give the change of the weights.

        Args:
            removed: bool ``[D_r]``.
            directions: of the kept weights, float64 ``[D_r]`` each, zero where removed.

        Returns:
            A scale for each direction, and δ, float64 ``[D_r]``, exactly −w where removed.
        """
        zeroing = torch.where(removed, -self._weights, 0.0)

        def change_at(scales: Sequence[float]) -> Tensor:
            moves = [s * d for s, d in zip(scales, directions, strict=True)]
            return sum(moves, zeroing)

        scales = (self._largest,) * len(directions)
        if self._search:
            scales = search_scales(
                lambda trial: self._loss(change_at(trial), removed),
                len(directions),
                self._largest,
                self._first_order,
            )
        return scales, change_at(scales)

    def _loss(self, change: Tensor, removed: Tensor) -> float:
        if not self._active.try_on(self._weights + change, removed):
            return math.inf
        return self._sampling.measure_trial(self._criterion, self._seed)
