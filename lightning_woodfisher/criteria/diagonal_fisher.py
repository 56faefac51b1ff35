"""Diagonal Fisher, a baseline: WoodFisher without dependence between weights."""

from __future__ import annotations

__all__ = ["DiagonalFisher"]

import torch
from torch import Tensor
from typing_extensions import override

from lightning_woodfisher.criteria.diagonal import DiagonalCriterion
from lightning_woodfisher.criteria.obs import Update
from lightning_woodfisher.distributed.communicator import Communicator
from lightning_woodfisher.fisher.config import FisherConfig
from lightning_woodfisher.weights.partition import Partition


class DiagonalFisher(DiagonalCriterion):
    """Saliency ½w²F_jj with F_jj = λ + mean of g_j², no change of the kept weights.

    All updates are the same, because without coupling no weight can compensate for another.
    """

    def __init__(self, fisher: FisherConfig, update: Update) -> None:
        super().__init__(fisher, update)
        self.damping = fisher.damping

    @override
    def begin(self, partition: Partition, communicator: Communicator) -> None:
        own = partition.shard_sizes()[communicator.rank]
        self._total = torch.zeros(own, dtype=torch.float64, device=communicator.device)
        self._rows = 0

    @override
    def observe(self, rows: Tensor) -> None:
        # One by one: the order in which torch sums a column depends on the neighboring
        # columns, and these depend on the number of ranks.
        for row in rows:
            self._total += self._diagonal_of(row.double())
        self._rows += len(rows)

    def _diagonal_of(self, row: Tensor) -> Tensor:
        """Return one row's estimate of the diagonal."""
        return row.square()

    def _curvature(self) -> Tensor:
        """Return the damped diagonal, positive."""
        return self._total / max(1, self._rows) + self.fisher.damping

    @override
    def score(self, weights: Tensor) -> Tensor:
        return 0.5 * weights.square() * self._curvature()

    @override
    def predicted_increase(self, change: Tensor) -> Tensor:
        return self.score(change)

    @property
    @override
    def engine(self) -> str:
        return "diagonal"

    @property
    @override
    def state_bytes(self) -> int:
        return self._total.nbytes
