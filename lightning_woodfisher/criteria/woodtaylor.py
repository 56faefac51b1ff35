"""WoodTaylor: WoodFisher with the first-order term of the loss."""

from __future__ import annotations

__all__ = ["WoodTaylor"]

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from lightning_woodfisher.criteria.obs import saliency, weight_update
from lightning_woodfisher.criteria.woodfisher import WoodFisher
from lightning_woodfisher.distributed.communicator import Communicator
from lightning_woodfisher.weights.partition import Partition


class WoodTaylor(WoodFisher):
    """OBS where the loss is not at a minimum (Singh & Alistarh 2020, "WoodTaylor").

    The minimiser of gᵀδ + ½δᵀFδ under w_S + δ_S = 0, with the mean gradient g:
    ρ_q = (w_q − [F⁻¹g]_q)² / (2[F⁻¹]_qq), and δ_R = F_RR⁻¹F_RS w_S − F_RR⁻¹g_R for the
    joint update. g is the mean of the N gradients, or that of ``first_order_samples``.
    """

    # The mean gradient would have to follow the weights.
    can_restrict: ClassVar[bool] = False
    first_order: ClassVar[bool] = True

    def begin(self, partition: Partition, communicator: Communicator) -> None:
        """Make the empty Fisher of this rank's blocks, and an empty mean gradient.

        Args:
            partition: what :meth:`layout` gave.
            communicator: the ranks.
        """
        super().begin(partition, communicator)
        self._gradient_sum = torch.zeros_like(self.inverse_fisher.diagonal())
        self._summed = 0
        self._newton: Tensor | None = None

    def observe(self, rows: Tensor) -> None:
        """Add gradients to the Fisher, and to g unless that has a sample of its own.

        Args:
            rows: tensor ``[n, D_r]``.
        """
        super().observe(rows)
        if self.fisher.first_order_samples is None:
            self.observe_first_order(rows)

    def observe_first_order(self, rows: Tensor) -> None:
        """Add gradients to g.

        Args:
            rows: tensor ``[n, D_r]``, of mini-batches of equal size; the same n for every
                world size, so that sums have the same bits.
        """
        # Row by row: float32 rows need not be there in float64 all at once.
        for row in rows:
            self._gradient_sum += row
        self._summed += len(rows)

    @property
    def mean_gradient(self) -> Tensor:
        """g, float64 ``[D_r]``.

        Raises:
            RuntimeError: before any gradient was observed.
        """
        if not self._summed:
            raise RuntimeError("no gradient of the first order was observed")
        return self._gradient_sum / self._summed

    def descent(self) -> Tensor:
        """Invert the Fisher and give the Newton step of all weights.

        Returns:
            −F⁻¹g, float64 ``[D_r]``.
        """
        if self._newton is None:
            self.inverse_fisher.factorize()
            self._newton = self.inverse_fisher.matvec(self.mean_gradient)
        return -self._newton

    def score(self, weights: Tensor) -> Tensor:
        """Give the saliencies without their common constant.

        With a ``first_order_scale`` t below 1 they are those of the loss seen from
        w − tF⁻¹g, as far as the local model is trusted.

        Args:
            weights: float64 ``[D_r]``.

        Returns:
            (w − tF⁻¹g)² / (2 diag F⁻¹), float64 ``[D_r]``.
        """
        stepped = weights + self.first_order_scale * self.descent()
        return saliency(stepped, self.inverse_fisher.diagonal())

    def directions(self, weights: Tensor, removed: Tensor) -> Sequence[Tensor]:
        """Give the compensation and the descent against g, or nothing without update.

        Args:
            weights: float64 ``[D_r]``.
            removed: bool ``[D_r]``.

        Returns:
            The OBS update and −F_RR⁻¹g_R of the kept weights, zero where removed.
        """
        if self.update == "none":
            return ()
        # With u = F⁻¹g: u_R + F_RR⁻¹F_RS u_S = F_RR⁻¹g_R, which is what the joint update
        # of u gives. The independent update is the sum of single-weight ones of w − u.
        newton = -self.descent()
        compensation, correction = self._updates(weights, newton, removed=removed)
        return (
            torch.where(removed, 0.0, compensation),
            torch.where(removed, 0.0, -(newton + correction)),
        )

    def _updates(self, *vectors: Tensor, removed: Tensor) -> Sequence[Tensor]:
        """Update vectors as if they were weights; the joint ones share a factorisation."""
        inverse, update = self.inverse_fisher, self.update
        if update == "joint":
            return weight_update(
                torch.stack(vectors), removed, inverse, update
            ).unbind()
        return [weight_update(vector, removed, inverse, update) for vector in vectors]

    def compensate(self, weights: Tensor, removed: Tensor) -> Tensor:
        """Compute the minimiser of the local model.

        Args:
            weights: float64 ``[D_r]``.
            removed: bool ``[D_r]``.

        Returns:
            δ, float64 ``[D_r]``.
        """
        moves = self.directions(weights, removed)
        return sum(moves, torch.where(removed, -weights, 0.0))

    def predicted_increase(self, change: Tensor) -> Tensor:
        """Give each weight's share of gᵀδ + ½δᵀFδ.

        Args:
            change: δ, float64 ``[D_r]``.

        Returns:
            g∘δ + ½ δ∘Fδ, float64 ``[D_r]``.
        """
        return self.mean_gradient * change + super().predicted_increase(change)
