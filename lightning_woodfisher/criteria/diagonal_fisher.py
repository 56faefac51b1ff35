"""Diagonal Fisher, a baseline: as WoodFisher, but weights know nothing of each other."""

from __future__ import annotations

__all__ = ["DiagonalFisher"]

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from lightning_woodfisher.criteria.base import Criterion
from lightning_woodfisher.distributed import Communicator
from lightning_woodfisher.fisher import FisherConfig
from lightning_woodfisher.obs import Update
from lightning_woodfisher.partition import Partition, make_partition
from lightning_woodfisher.patterns import GroupRun, Pattern, cheapest_in_groups


class DiagonalFisher(Criterion):
    """Saliency ½w²F_jj with F_jj = λ + mean of g_j², no change of the kept weights.

    Without coupling between weights all three updates are the same: nothing can make up
    for a weight that goes.
    """

    compensates: ClassVar[bool] = False

    def __init__(self, fisher: FisherConfig, update: Update) -> None:
        super().__init__(fisher, update)
        self.damping = fisher.damping
        self._total = torch.zeros(0, dtype=torch.float64)
        self._rows = 0

    def layout(
        self,
        segments: Sequence[int],
        world_size: int,
        group_sizes: Sequence[int] | None = None,
    ) -> Partition:
        """Cut the weights into equal shares; there are no blocks to respect.

        Args:
            segments: active weights of each tensor.
            world_size: number of ranks.
            group_sizes: weights of each tensor that go together.

        Returns:
            The partition.
        """
        return make_partition(segments, group_sizes or 1, world_size)

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

    def score_groups(
        self, weights: Tensor, runs: Sequence[GroupRun], pattern: Pattern
    ) -> tuple[Tensor, Tensor]:
        """Give Σ ½w²F_jj over what leaves; of N:M these are the weights of least worth.

        Args:
            weights: float64 ``[D_r]``.
            runs: the groups of this rank.
            pattern: what goes together.

        Returns:
            Costs, float64 ``[G_r]``, and bool ``[D_r]``: what leaves.
        """
        return cheapest_in_groups(self.score(weights), runs, pattern)

    def compensate(self, weights: Tensor, removed: Tensor) -> Tensor:
        """Remove without compensation.

        Args:
            weights: float64 ``[D_r]``.
            removed: bool ``[D_r]``.

        Returns:
            −w where removed, 0 elsewhere.
        """
        return torch.where(removed, -weights, 0.0)

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
