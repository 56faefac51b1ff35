"""Common interface of all criteria: observe, score, compensate."""

from __future__ import annotations

__all__ = ["CompensatingCriterion", "Criterion", "CriterionBase", "Needs"]

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor
from typing_extensions import override

from lightning_woodfisher.criteria.obs import Update
from lightning_woodfisher.distributed.communicator import Communicator
from lightning_woodfisher.fisher.config import FisherConfig
from lightning_woodfisher.gradients.kronecker_factors import KroneckerFactors
from lightning_woodfisher.weights.partition import Partition
from lightning_woodfisher.weights.patterns import GroupRun, Pattern

# What a criterion observes: rows of gradients, rows z∘Hz of the Hessian, Kronecker factors
# of whole layers, the inputs of layers, or nothing.
Needs = Literal["gradients", "hessian rows", "factors", "layer inputs", "nothing"]


class CriterionBase(ABC):
    """What the settings and the estimates ask of any criterion.

    Args:
        fisher: settings of the Fisher matrix.
        update: how the kept weights compensate for the removed ones.

    Attributes:
        needs: what the criterion observes.
        first_order: whether it uses a mean gradient, and so ``first_order_samples``.
        compensates: whether the kept weights change.
        can_restrict: whether it can serve another stage of a step.
        damping: λ, or None for a criterion without damping.
    """

    needs: ClassVar[Needs] = "gradients"
    first_order: ClassVar[bool] = False
    can_restrict: ClassVar[bool] = False
    compensates: ClassVar[bool] = True

    def __init__(self, fisher: FisherConfig, update: Update) -> None:
        self.fisher = fisher
        self.update: Update = update
        self.damping: float | None = None

    @abstractmethod
    def layout(
        self,
        segments: Sequence[int],
        world_size: int,
        group_sizes: Sequence[int] | None = None,
    ) -> Partition:
        """Cut the active weights into blocks and choose their owners.

        Args:
            segments: active weights of each tensor.
            world_size: number of ranks.
            group_sizes: weights in a group of each tensor, with a grouped pattern. Groups
                follow one another from the start of the tensor.

        Returns:
            The partition.
        """

    def count_arithmetics(self) -> Mapping[str, int]:
        """Count the weights of this rank by the arithmetic of their curvature.

        Returns:
            Numbers of weights by name: ``"float32"``, ``"split"`` or ``"float64"``; empty
            for a criterion without a choice.
        """
        return {}

    @property
    def engine(self) -> str:
        """Representation of the curvature, as named in estimates; ``"none"`` for none."""
        return "none"

    @property
    def state_bytes(self) -> int:
        """Bytes that this rank keeps."""
        return 0


class Criterion(CriterionBase):
    """Base class of the criteria: one stage, from gradients to new weights.

    The pruner calls :meth:`layout`, :meth:`begin`, :meth:`observe` for all rows (or
    :meth:`observe_factors` once), :meth:`score` and :meth:`compensate`, in this order.
    Vectors are float64 ``[D_r]``, for the active weights of this rank.

    Args:
        fisher: settings of the Fisher matrix.
        update: how the kept weights compensate for the removed ones.

    Attributes:
        first_order: whether it uses :meth:`observe_first_order`.
        first_order_scale: the share of :meth:`descent` that :meth:`score` assumes.
        can_restrict: whether :meth:`restrict` prepares it for another stage of the step.
    """

    def __init__(self, fisher: FisherConfig, update: Update) -> None:
        super().__init__(fisher, update)
        self.first_order_scale = 1.0

    @abstractmethod
    def begin(self, partition: Partition, communicator: Communicator) -> None:
        """Prepare for the rows of this rank.

        Args:
            partition: the result of :meth:`layout`.
            communicator: the ranks.
        """

    def observe(self, rows: Tensor) -> None:
        """Add rows of gradients or of the Hessian; each is passed once, in order.

        Args:
            rows: tensor ``[n, D_r]``.
        """

    def leave_out(self, number: int) -> None:
        """Reduce the number of expected rows, after the last row.

        Args:
            number: gradients that were left out because they were not finite.
        """

    def observe_first_order(self, rows: Tensor) -> None:
        """Add gradients of the sample for the mean gradient.

        Args:
            rows: tensor ``[n, D_r]``.
        """

    def descent(self) -> Tensor | None:
        """Return the first-order step with nothing removed, after the last row.

        Returns:
            float64 ``[D_r]``, or None for a criterion without a mean gradient.
        """
        return None

    def observe_factors(self, factors: Sequence[KroneckerFactors]) -> None:
        """Store the Kronecker factors of this rank's layers.

        Args:
            factors: one for each unit of this rank, in order.
        """

    @abstractmethod
    def score(self, weights: Tensor) -> Tensor:
        """Return the saliency of each weight; weights of low saliency are removed first.

        Args:
            weights: float64 ``[D_r]``.

        Returns:
            float64 ``[D_r]``, not negative.
        """

    @abstractmethod
    def score_groups(
        self, weights: Tensor, runs: Sequence[GroupRun], pattern: Pattern
    ) -> tuple[Tensor, Tensor]:
        """Return the saliency of each group of weights.

        Args:
            weights: float64 ``[D_r]``.
            runs: the groups of this rank.
            pattern: the pattern that defines the groups.

        Returns:
            Cost of each group, float64 ``[G_r]``, not negative, and bool ``[D_r]``: the
            weights that are removed if their group is.
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
        """Split the change of the kept weights into directions that can be scaled.

        Args:
            weights: float64 ``[D_r]``.
            removed: bool ``[D_r]``.

        Returns:
            float64 ``[D_r]`` each, zero where removed: the compensation, followed by a
            first-order direction if the criterion has one. Their sum is the change of the
            kept weights in :meth:`compensate`.
        """
        if self.update == "none" or not self.compensates:
            return ()
        return (torch.where(removed, 0.0, self.compensate(weights, removed)),)

    def alternatives(self, weights: Tensor, removed: Tensor) -> Mapping[Update, Tensor]:
        """Return other compensations for the same removed weights.

        Args:
            weights: float64 ``[D_r]``.
            removed: bool ``[D_r]``.

        Returns:
            Replacements for the first of :meth:`directions`, by name: float64 ``[D_r]``
            each, zero where removed.
        """
        return {}

    def restrict(self, kept: Tensor) -> None:
        """Drop weights permanently, for another stage with the same gradients.

        Args:
            kept: bool ``[D_r]``; the other weights are zero now.
        """

    def predicted_increase(self, change: Tensor) -> Tensor | None:
        """Predict the increase of the loss for a change of the weights.

        Args:
            change: δ, float64 ``[D_r]``.

        Returns:
            Each weight's share of the increase, float64 ``[D_r]``; None for a criterion
            without a model of the loss.
        """
        return None

    def raised_damping(self) -> dict[int, float]:
        """List the blocks whose λ had to be raised.

        Returns:
            λ by first active weight (global number).
        """
        return {}


class CompensatingCriterion(Criterion):
    """A criterion that models how weights depend on each other, damped by λ.

    Subclasses compute the update of either kind in ``_change``.
    """

    def __init__(self, fisher: FisherConfig, update: Update) -> None:
        super().__init__(fisher, update)
        self.damping = fisher.damping

    @abstractmethod
    def _change(self, weights: Tensor, removed: Tensor, update: Update) -> Tensor:
        """Return δ of the given update, float64 ``[D_r]``."""

    @override
    def compensate(self, weights: Tensor, removed: Tensor) -> Tensor:
        return self._change(weights, removed, self.update)

    @override
    def alternatives(self, weights: Tensor, removed: Tensor) -> Mapping[Update, Tensor]:
        if self.update != "joint":
            return {}
        change = self._change(weights, removed, "independent")
        return {"independent": torch.where(removed, 0.0, change)}
