"""What every criterion does: observe → score → compensate."""

from __future__ import annotations

__all__ = ["Criterion", "Needs"]

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lightning_woodfisher.criteria.kronecker_factors import KroneckerFactors
from lightning_woodfisher.criteria.obs import Update
from lightning_woodfisher.distributed.communicator import Communicator
from lightning_woodfisher.fisher.config import FisherConfig
from lightning_woodfisher.weights.partition import Partition
from lightning_woodfisher.weights.patterns import GroupRun, Pattern

# What a criterion wants to observe: rows of gradients, rows z∘Hz of the Hessian, factors of
# whole layers, or none of these.
Needs = Literal["gradients", "curvature rows", "factors", "nothing"]


class Criterion(ABC):
    """One part of a pruning step, from gradients to new weights, on this rank's shard.

    The pruner calls :meth:`layout`, :meth:`begin`, :meth:`observe` for all rows (or once
    :meth:`observe_factors`), :meth:`score`, and :meth:`compensate`. Vectors are float64
    ``[D_r]``.

    Args:
        fisher: how gradients become a Fisher matrix.
        update: how the kept weights make up for the removed ones.

    Attributes:
        needs: what it observes.
        first_order: whether it has a mean gradient, to which ``first_order_samples`` and
            :meth:`observe_first_order` belong.
        compensates: whether the kept weights change.
        first_order_scale: share of :meth:`descent` that :meth:`score` takes for granted.
        can_restrict: whether :meth:`restrict` makes it ready for another part.
        damping: λ, None for a criterion without.
    """

    needs: ClassVar[Needs] = "gradients"
    first_order: ClassVar[bool] = False
    can_restrict: ClassVar[bool] = False
    compensates: ClassVar[bool] = True

    def __init__(self, fisher: FisherConfig, update: Update) -> None:
        self.fisher = fisher
        self.update: Update = update
        self.damping: float | None = None
        self.first_order_scale = 1.0

    @abstractmethod
    def layout(
        self,
        segments: Sequence[int],
        world_size: int,
        group_sizes: Sequence[int] | None = None,
    ) -> Partition:
        """Cut the active weights into blocks and choose owners.

        Args:
            segments: active weights of each tensor.
            world_size: number of ranks.
            group_sizes: weights of each tensor that go together, if any do; a group
                begins at the start of the tensor and after each group.

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
        """Take in rows of gradients or of the Hessian; each comes once, in order.

        Args:
            rows: tensor ``[n, D_r]``.
        """

    def leave_out(self, number: int) -> None:  # noqa: B027  (many count their rows)
        """Learn how many of the announced rows do not come; called after the last one.

        Args:
            number: of gradients that were not finite.
        """

    def observe_first_order(self, rows: Tensor) -> None:  # noqa: B027  (few have any)
        """Take in gradients of the sample for the mean gradient.

        Args:
            rows: tensor ``[n, D_r]``.
        """

    def descent(self) -> Tensor | None:
        """Give the step of first order with nothing removed; call it after all rows.

        Returns:
            float64 ``[D_r]``, or None for a criterion without.
        """
        return None

    def observe_factors(  # noqa: B027  (only one criterion needs them)
        self, factors: Sequence[KroneckerFactors]
    ) -> None:
        """Take in the Kronecker factors of this rank's layers.

        Args:
            factors: one for each unit of this rank, in order.
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
    def score_groups(
        self, weights: Tensor, runs: Sequence[GroupRun], pattern: Pattern
    ) -> tuple[Tensor, Tensor]:
        """Give the saliency of each group of weights: small ones go first.

        Args:
            weights: float64 ``[D_r]``.
            runs: the groups of this rank.
            pattern: what goes together.

        Returns:
            Cost of each group, float64 ``[G_r]``, not negative, and bool ``[D_r]``: the
            weights that leave if their group does.
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

    def directions(self, weights: Tensor, removed: Tensor) -> Sequence[Tensor]:
        """Take the change of the kept weights apart into what can be scaled on its own.

        Args:
            weights: float64 ``[D_r]``.
            removed: bool ``[D_r]``.

        Returns:
            float64 ``[D_r]`` each, zero where removed: the compensation, and after it a
            direction of first order where the criterion has one. Their sum is what
            :meth:`compensate` does to the kept weights.
        """
        if self.update == "none" or not self.compensates:
            return ()
        return (torch.where(removed, 0.0, self.compensate(weights, removed)),)

    def alternatives(self, weights: Tensor, removed: Tensor) -> Mapping[Update, Tensor]:
        """Give other compensations for the same removed weights, to be tried whole.

        Args:
            weights: float64 ``[D_r]``.
            removed: bool ``[D_r]``.

        Returns:
            By name what may stand in for the first of :meth:`directions`, float64
            ``[D_r]`` each, zero where removed; nothing where there is no other.
        """
        return {}

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
    def engine(self) -> str:
        """What it keeps of the curvature, as estimates name it; ``"none"`` for nothing."""
        return "none"

    @property
    def state_bytes(self) -> int:
        """Bytes that this rank keeps."""
        return 0
