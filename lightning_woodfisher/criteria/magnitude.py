"""Magnitude pruning, a baseline: remove the smallest weights and keep the others as is."""

from __future__ import annotations

__all__ = ["Magnitude"]

from typing import ClassVar

from torch import Tensor
from typing_extensions import override

from lightning_woodfisher.criteria.base import Needs
from lightning_woodfisher.criteria.diagonal import DiagonalCriterion
from lightning_woodfisher.distributed.communicator import Communicator
from lightning_woodfisher.weights.partition import Partition


class Magnitude(DiagonalCriterion):
    """Saliency ``|w|``, no update. A group costs the sum of its w²."""

    needs: ClassVar[Needs] = "nothing"
    can_restrict: ClassVar[bool] = True

    @override
    def begin(self, partition: Partition, communicator: Communicator) -> None:
        pass

    @override
    def score(self, weights: Tensor) -> Tensor:
        return weights.abs()

    @override
    def cost_in_group(self, weights: Tensor) -> Tensor:
        return weights.square()
