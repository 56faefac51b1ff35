"""Diagonal Fisher, a baseline: as WoodFisher, but weights know nothing of each other."""

from __future__ import annotations

__all__ = ["DiagonalFisher"]


import torch
from torch import Tensor

from lightning_woodfisher.criteria.diagonal import DiagonalCriterion
from lightning_woodfisher.criteria.obs import Update
from lightning_woodfisher.distributed.communicator import Communicator
from lightning_woodfisher.fisher.config import FisherConfig
from lightning_woodfisher.weights.partition import Partition


class DiagonalFisher(DiagonalCriterion):
    """Saliency ½w²F_jj with F_jj = λ + mean of g_j², no change of the kept weights.

    Without coupling between weights all three updates are the same: nothing can make up
    for a weight that goes.
    """

    def __init__(self, fisher: FisherConfig, update: Update) -> None:
        super().__init__(fisher, update)
        self.damping = fisher.damping
        self._total = torch.zeros(0, dtype=torch.float64)
        self._rows = 0

    def begin(self, partition: Partition, communicator: Communicator) -> None:
        """Make the empty diagonal of this rank's weights.

        Args:
            partition: what :meth:`layout` gave.
            communicator: the ranks.
        """
        own = partition.shard_sizes()[communicator.rank]
        self._total = torch.zeros(own, dtype=torch.float64, device=communicator.device)
        self._rows = 0

    def observe(self, rows: Tensor) -> None:
        """Add rows to the diagonal.

        Args:
            rows: tensor ``[n, D_r]``.
        """
        # One by one: the order in which torch sums a column depends on the columns beside
        # it, and these on the number of ranks.
        for row in rows:
            self._total += self._diagonal_of(row.double())
        self._rows += len(rows)

    def _diagonal_of(self, row: Tensor) -> Tensor:
        """What one row says of the diagonal."""
        return row.square()

    def _curvature(self) -> Tensor:
        """The damped diagonal, positive."""
        return self._total / max(1, self._rows) + self.fisher.damping

    def score(self, weights: Tensor) -> Tensor:
        """Give what the quadratic model says that each weight is worth.

        Args:
            weights: float64 ``[D_r]``.

        Returns:
            ½w²F_jj, float64 ``[D_r]``.
        """
        return 0.5 * weights.square() * self._curvature()

    def _worth(self, weights: Tensor) -> Tensor:
        return self.score(weights)

    def predicted_increase(self, change: Tensor) -> Tensor:
        """Give each weight's share of ½δᵀFδ.

        Args:
            change: δ, float64 ``[D_r]``.

        Returns:
            ½δ²F_jj, float64 ``[D_r]``.
        """
        return 0.5 * change.square() * self._curvature()

    @property
    def engine(self) -> str:
        """Always the same."""
        return "diagonal"

    @property
    def state_bytes(self) -> int:
        """Bytes of the diagonal."""
        return self._total.nbytes
