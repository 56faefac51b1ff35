"""What criteria share that know nothing of how weights depend on each other."""

from __future__ import annotations

__all__ = ["DiagonalCriterion"]

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from lightning_woodfisher.criteria.base import Criterion
from lightning_woodfisher.weights.partition import Partition, make_partition
from lightning_woodfisher.weights.patterns import GroupRun, Pattern, cheapest_in_groups


class DiagonalCriterion(Criterion):
    """Weights have no blocks, groups cost what their weights cost, and none makes up."""

    compensates: ClassVar[bool] = False

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

    def score_groups(
        self, weights: Tensor, runs: Sequence[GroupRun], pattern: Pattern
    ) -> tuple[Tensor, Tensor]:
        """Add up what leaves; of N:M these are the weights of least worth.

        Args:
            weights: float64 ``[D_r]``.
            runs: the groups of this rank.
            pattern: what goes together.

        Returns:
            Costs, float64 ``[G_r]``, and bool ``[D_r]``: what leaves.
        """
        return cheapest_in_groups(self._worth(weights), runs, pattern)

    @abstractmethod
    def _worth(self, weights: Tensor) -> Tensor:
        """What each weight adds to the cost of its group, float64 ``[D_r]``."""

    def compensate(self, weights: Tensor, removed: Tensor) -> Tensor:
        """Remove without compensation.

        Args:
            weights: float64 ``[D_r]``.
            removed: bool ``[D_r]``.

        Returns:
            −w where removed, 0 elsewhere.
        """
        return torch.where(removed, -weights, 0.0)
