"""What every criterion does: observe → score → compensate."""

from __future__ import annotations

__all__ = ["Criterion"]

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from lightning_woodfisher.distributed import Communicator
from lightning_woodfisher.fisher import FisherConfig
from lightning_woodfisher.obs import Update
from lightning_woodfisher.partition import Partition


class Criterion(ABC):
    """One part of a pruning step, from gradients to new weights, on this rank's shard.

    The pruner calls :meth:`layout`, :meth:`begin`, :meth:`observe` for all rows,
    :meth:`score`, and :meth:`compensate`. Vectors are float64 ``[D_r]``.

    Args:
        fisher: how gradients become a Fisher matrix.
        update: how the kept weights make up for the removed ones.

    Attributes:
        uses_gradients: whether rows must be collected for it.
        can_restrict: whether :meth:`restrict` makes it ready for another part.
        damping: λ, None for a criterion without.
    """

    uses_gradients: ClassVar[bool] = True
    can_restrict: ClassVar[bool] = False

    def __init__(self, fisher: FisherConfig, update: Update) -> None:
        self.fisher = fisher
        self.update: Update = update
        self.damping: float | None = None

    @abstractmethod
    def layout(self, segments: Sequence[int], world_size: int) -> Partition:
        """Cut the active weights into blocks and choose owners.

        Args:
            segments: active weights of each tensor.
            world_size: number of ranks.

        Returns:
            The partition.
        """

    @abstractmethod
    def begin(self, partition: Partition, communicator: Communicator) -> None:
        """Prepare for the rows of this rank.

        Args:
            partition: what :meth:`layout` gave.
            communicator: the ranks.
        """

    def observe(self, rows: Tensor) -> None:  # noqa: B027  (magnitude has nothing to do)
        """Take in gradients; every row comes once, in order.

        Args:
            rows: tensor ``[n, D_r]``.
        """

    @abstractmethod
    def score(self, weights: Tensor) -> Tensor:
        """Give the saliency of each weight: small ones go first.

        Args:
            weights: float64 ``[D_r]``.

        Returns:
            float64 ``[D_r]``, not negative.
        """

    @abstractmethod
    def compensate(self, weights: Tensor, removed: Tensor) -> Tensor:
        """Compute the change of the weights.

        Args:
            weights: float64 ``[D_r]``.
            removed: bool ``[D_r]``.

        Returns:
            δ, float64 ``[D_r]``; exactly −w where removed.
        """

    def restrict(self, kept: Tensor) -> None:  # noqa: B027  (many have nothing to drop)
        """Drop weights for good, for another part with the same gradients.

        Args:
            kept: bool ``[D_r]``; the others have become zero.
        """

    def predicted_increase(self, change: Tensor) -> Tensor | None:
        """Predict the rise of the loss under a change of the weights.

        Args:
            change: δ, float64 ``[D_r]``.

        Returns:
            Each weight's share of the rise, float64 ``[D_r]``; None without a model.
        """
        return None

    def raised_damping(self) -> dict[int, float]:
        """List blocks whose λ had to be raised.

        Returns:
            λ by first active weight (global number).
        """
        return {}

    @property
    def state_bytes(self) -> int:
        """Bytes that this rank keeps."""
        return 0
