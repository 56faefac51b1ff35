"""WoodTaylor: WoodFisher with the first-order term of the loss."""

from __future__ import annotations

__all__ = ["WoodTaylor"]

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from lightning_woodfisher.criteria.obs import saliency
from lightning_woodfisher.criteria.woodfisher import WoodFisher
from lightning_woodfisher.distributed.communicator import Communicator
from lightning_woodfisher.weights.partition import Partition


class WoodTaylor(WoodFisher):
    """OBS away from a minimum of the loss (Singh & Alistarh 2020, "WoodTaylor").

    Minimizes gᵀδ + ½δᵀFδ under w_S + δ_S = 0, with the mean gradient g. The saliency is
    ρ_q = (w_q − [F⁻¹g]_q)² / (2[F⁻¹]_qq) and the joint update
    δ_R = F_RR⁻¹F_RS w_S − F_RR⁻¹g_R. g is the mean of the N gradients, or of those of
    ``first_order_samples``. With a ``first_order_scale`` t below 1, saliencies are those of
    w − tF⁻¹g: the Newton step is shortened to where the local model is trusted.
    """

    # The mean gradient would have to follow the weights.
    can_restrict: ClassVar[bool] = False
    first_order: ClassVar[bool] = True

    @override
    def begin(self, partition: Partition, communicator: Communicator) -> None:
        super().begin(partition, communicator)
        self._gradient_sum = torch.zeros_like(self.inverse_fisher.diagonal())
        self._summed = 0
        self._newton: Tensor | None = None

    @override
    def observe(self, rows: Tensor) -> None:
        super().observe(rows)
        if self.fisher.first_order_samples is None:
            self.observe_first_order(rows)

    @override
    def observe_first_order(self, rows: Tensor) -> None:
        # Row by row, so that float32 rows need not be converted to float64 all at once.
        for row in rows:
            self._gradient_sum += row
        self._summed += len(rows)

    @property
    def mean_gradient(self) -> Tensor:
        """Mean gradient g, float64 ``[D_r]``."""
        return self._gradient_sum / self._summed

    @override
    def descent(self) -> Tensor:
        if self._newton is None:
            self.inverse_fisher.factorize()
            self._newton = self.inverse_fisher.matvec(self.mean_gradient)
        return -self._newton

    @override
    def score(self, weights: Tensor) -> Tensor:
        # The constant that all weights share is left out.
        stepped = weights + self.first_order_scale * self.descent()
        return saliency(stepped, self.inverse_fisher.diagonal())

    @override
    def directions(self, weights: Tensor, removed: Tensor) -> Sequence[Tensor]:
        if self.update == "none":
            return ()
        # With u = F⁻¹g: u_R + F_RR⁻¹F_RS u_S = F_RR⁻¹g_R, so that the joint update of u
        # gives F_RR⁻¹g_R. The independent update is the sum of the single-weight updates
        # of w − u.
        newton = -self.descent()
        compensation, correction = self._updates(weights, newton, removed=removed)
        return (
            torch.where(removed, 0.0, compensation),
            torch.where(removed, 0.0, -(newton + correction)),
        )

    def _updates(self, *vectors: Tensor, removed: Tensor) -> Sequence[Tensor]:
        """Update vectors as if they were weights; joint updates share a factorization."""
        if self.update == "joint":
            return self._change(torch.stack(vectors), removed, "joint").unbind()
        return [self._change(vector, removed, self.update) for vector in vectors]

    @override
    def compensate(self, weights: Tensor, removed: Tensor) -> Tensor:
        moves = self.directions(weights, removed)
        return sum(moves, torch.where(removed, -weights, 0.0))

    @override
    def predicted_increase(self, change: Tensor) -> Tensor:
        return self.mean_gradient * change + super().predicted_increase(change)
