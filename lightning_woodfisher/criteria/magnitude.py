"""Magnitude pruning, the baseline: the smallest weights go, the others stay as they are."""

from __future__ import annotations

__all__ = ["Magnitude"]

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from lightning_woodfisher.criteria.base import Criterion, Needs
from lightning_woodfisher.distributed import Communicator
from lightning_woodfisher.partition import Partition, make_partition
from lightning_woodfisher.patterns import GroupRun, Pattern, cheapest_in_groups


class Magnitude(Criterion):
    """Saliency ``|w|``, no update."""

    needs: ClassVar[Needs] = "nothing"
    compensates: ClassVar[bool] = False
    can_restrict: ClassVar[bool] = True

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
        """Do nothing.

        Args:
            partition: not used.
            communicator: not used.
        """

    def score(self, weights: Tensor) -> Tensor:
        """Give the magnitudes.

        Args:
            weights: float64 ``[D_r]``.

        Returns:
            ``|w|``.
        """
        return weights.abs()

    def score_groups(
        self, weights: Tensor, runs: Sequence[GroupRun], pattern: Pattern
    ) -> tuple[Tensor, Tensor]:
        """Give Σ w² over what leaves; of N:M these are the smallest weights.

        Args:
            weights: float64 ``[D_r]``.
            runs: the groups of this rank.
            pattern: what goes together.

        Returns:
            Costs, float64 ``[G_r]``, and bool ``[D_r]``: what leaves.
        """
        return cheapest_in_groups(weights.square(), runs, pattern)

    def compensate(self, weights: Tensor, removed: Tensor) -> Tensor:
        """Remove without compensation.

        Args:
            weights: float64 ``[D_r]``.
            removed: bool ``[D_r]``.

        Returns:
            −w where removed, 0 elsewhere.
        """
        return torch.where(removed, -weights, 0.0)
