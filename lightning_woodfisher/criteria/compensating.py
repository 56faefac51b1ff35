"""What criteria share that know how weights depend on each other."""

from __future__ import annotations

__all__ = ["CompensatingCriterion"]

from abc import abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_woodfisher.criteria.base import Criterion
from lightning_woodfisher.criteria.obs import Update


class CompensatingCriterion(Criterion):
    """Kept weights make up for the removed ones, in one of two ways."""

    @abstractmethod
    def _change(self, weights: Tensor, removed: Tensor, update: Update) -> Tensor:
        """Give δ of an update of this kind, float64 ``[D_r]``."""

    def compensate(self, weights: Tensor, removed: Tensor) -> Tensor:
        """Compute the OBS update.

        Args:
            weights: float64 ``[D_r]``.
            removed: bool ``[D_r]``.

        Returns:
            δ, float64 ``[D_r]``.
        """
        return self._change(weights, removed, self.update)

    def alternatives(self, weights: Tensor, removed: Tensor) -> Mapping[Update, Tensor]:
        """Give the sum of the single-weight updates beside the joint one.

        Args:
            weights: float64 ``[D_r]``.
            removed: bool ``[D_r]``.

        Returns:
            It under ``"independent"``; nothing unless the update is joint.
        """
        if self.update != "joint":
            return {}
        change = self._change(weights, removed, "independent")
        return {"independent": torch.where(removed, 0.0, change)}
