"""Magnitude pruning, the baseline: the smallest weights go, the others stay as they are."""

from __future__ import annotations

__all__ = ["Magnitude"]

from typing import ClassVar

from torch import Tensor

from lightning_woodfisher.criteria.base import Needs
from lightning_woodfisher.criteria.diagonal import DiagonalCriterion
from lightning_woodfisher.distributed.communicator import Communicator
from lightning_woodfisher.weights.partition import Partition


class Magnitude(DiagonalCriterion):
    """Saliency ``|w|``, no update."""

    needs: ClassVar[Needs] = "nothing"
    can_restrict: ClassVar[bool] = True

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

    def _worth(self, weights: Tensor) -> Tensor:
        return weights.square()
