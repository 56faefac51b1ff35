"""Exact number of weights to remove from one layer, by pattern."""

from __future__ import annotations

__all__ = ["MaskRule"]

import numpy as np
import torch
from torch import Tensor

from lightning_woodfisher.weights.patterns import Pattern


class MaskRule:
    """Choose the weights of a layer that are removed, an exact number of them.

    Weights that are pruned already are chosen first.

    Args:
        places: positions of the weights of each group of the pattern, int64 ``[G, q]``;
            single weights are groups of one.
        pattern: the pattern.
        pruned: weights that are pruned already, bool ``[W]`` by position.
        groups: number of groups that lose weights, those that have lost them included.
    """

    def __init__(
        self, places: Tensor, pattern: Pattern, pruned: Tensor, groups: int
    ) -> None:
        self._places = places
        self._pattern = pattern
        self._leaving = places.shape[1] - pattern.kept
        self._pruned = pruned
        self._groups = groups

    def __call__(self, scores: Tensor) -> Tensor:
        """Choose by scores.

        Args:
            scores: not negative, in the shape of the weights as a matrix; positions count
                along it.

        Returns:
            bool of the same shape, True where removed.
        """
        # Earlier zeros sort before all others.
        flat = scores.reshape(-1).masked_fill(self._pruned, -1.0)
        if not self._pattern.is_grouped:
            return _smallest(flat, self._groups).view(scores.shape)
        each = flat[self._places]
        if each.shape[1] == self._leaving:
            costs, leaving = each.sum(1), self._places
        else:
            order = each.sort(dim=1, stable=True)
            costs = order.values[:, : self._leaving].sum(1)
            leaving = self._places.gather(1, order.indices[:, : self._leaving])
        # No indices, for which a GPU would wait.
        chosen = _smallest(costs, self._groups).unsqueeze(1).expand_as(leaving)
        removed = torch.zeros_like(self._pruned)
        removed.scatter_(0, leaving.flatten(), chosen.flatten())
        return removed.view(scores.shape)


def _smallest(costs: Tensor, count: int) -> Tensor:
    """Mark the smallest costs; of equal ones, the first."""
    if not count:
        return torch.zeros_like(costs, dtype=torch.bool)
    if costs.device.type == "cpu":
        # Ten times faster than kthvalue, which would take as long as the products.
        found = np.partition(costs.numpy(), count - 1)[count - 1]
        threshold = torch.from_numpy(found.reshape(1))
    else:
        threshold = costs.kthvalue(count).values
    below, ties = costs < threshold, costs == threshold
    return below | (ties & (ties.cumsum(0) <= count - below.sum()))
