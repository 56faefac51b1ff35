"""Base of criteria without a model of how weights depend on each other."""

from __future__ import annotations

__all__ = ["DiagonalCriterion"]

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from lightning_woodfisher.criteria.base import Criterion
from lightning_woodfisher.weights.partition import Partition, make_partition
from lightning_woodfisher.weights.patterns import GroupRun, Pattern, cheapest_in_groups


class DiagonalCriterion(Criterion):
    """A criterion that scores each weight alone.

    Weights form no blocks, a group costs the sum of its weights, and kept weights do not
    change. Subclasses define :meth:`begin`, :meth:`observe` and :meth:`score`.
    """

    compensates: ClassVar[bool] = False

    @override
    def layout(
        self,
        segments: Sequence[int],
        world_size: int,
        group_sizes: Sequence[int] | None = None,
    ) -> Partition:
        return make_partition(segments, group_sizes or 1, world_size)

    @override
    def score_groups(
        self, weights: Tensor, runs: Sequence[GroupRun], pattern: Pattern
    ) -> tuple[Tensor, Tensor]:
        return cheapest_in_groups(self.cost_in_group(weights), runs, pattern)

    def cost_in_group(self, weights: Tensor) -> Tensor:
        """Return the share of each weight in the cost of its group; its score by default.

        Args:
            weights: float64 ``[D_r]``.

        Returns:
            float64 ``[D_r]``.
        """
        return self.score(weights)

    @override
    def compensate(self, weights: Tensor, removed: Tensor) -> Tensor:
        return torch.where(removed, -weights, 0.0)
