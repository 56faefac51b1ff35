"""How well scores rank structures, compared with the loss after their removal."""

from __future__ import annotations

__all__ = ["removal_losses", "spearman"]

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from lightning_woodfisher.data.isolation import isolated
from lightning_woodfisher.structured.graph.groups import Group, channel_masks


def spearman(first: Tensor, second: Tensor) -> float:
    """Compute Spearman's rank correlation; equal numbers share their mean rank.

    Args:
        first: ``[n]``.
        second: ``[n]``.

    Returns:
        A number in [-1, 1]; NaN if one list is constant.
    """
    ranks = torch.stack([_ranks(first), _ranks(second)])
    ranks = ranks - ranks.mean(dim=1, keepdim=True)
    norms = ranks.norm(dim=1)
    return float(ranks[0] @ ranks[1] / norms.prod())


def removal_losses(
    model: nn.Module,
    groups: Sequence[Group],
    structures: Sequence[tuple[int, int]],
    loss: Callable[[nn.Module], float | Tensor],
) -> Tensor:
    """Measure how much the loss rises when one structure at a time is masked.

    Masking is the same as removal if the activation of zero is zero. The model is left
    unchanged.

    Args:
        model: the network; evaluated with running statistics.
        groups: its groups.
        structures: (index of the group, index in the group) of each structure.
        loss: computes the loss of a model, on the same samples in every call.

    Returns:
        float64 ``[n]``: the loss without the structure minus the loss of the whole
        network.
    """
    rises = []
    with isolated(model, "eval"), torch.no_grad():
        whole = float(loss(model))
        for place, number in structures:
            group = groups[place]
            masks = channel_masks(model, [group], {group.name: [number]})
            weights = {name: model.get_parameter(name) for name in masks}
            before = {name: weight.clone() for name, weight in weights.items()}
            try:
                for name, weight in weights.items():
                    weight.masked_fill_(masks[name], 0.0)
                rises.append(float(loss(model)) - whole)
            finally:
                for name, weight in weights.items():
                    weight.copy_(before[name])
    return torch.tensor(rises, dtype=torch.float64)


def _ranks(values: Tensor) -> Tensor:
    ordered, order = values.double().sort()
    # Equal numbers are neighbors: their run begins and ends at the same places.
    starts = torch.searchsorted(ordered, ordered)
    ends = torch.searchsorted(ordered, ordered, right=True)
    ranks = torch.empty_like(ordered)
    ranks[order] = (starts + ends).double() / 2
    return ranks
