"""How well scores rank structures: against what their removal really costs."""

from __future__ import annotations

__all__ = ["rank_correlation", "removal_losses", "spearman"]

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lightning_woodfisher.data.isolation import isolated
from lightning_woodfisher.structured.graph.groups import Group, Role

_SILENCED: tuple[Role, ...] = ("producer", "bias", "norm")


def spearman(first: Tensor, second: Tensor) -> float:
    """Correlate the ranks of two lists of numbers; equal numbers share a mean rank.

    Args:
        first: ``[n]``.
        second: ``[n]``.

    Returns:
        A number in [-1, 1]; NaN where one list is constant.
    """
    ranks = torch.stack([_ranks(first), _ranks(second)])
    ranks = ranks - ranks.mean(dim=1, keepdim=True)
    norms = ranks.norm(dim=1)
    return float(ranks[0] @ ranks[1] / norms.prod())


def rank_correlation(
    scores: Sequence[Tensor],
    structures: Sequence[tuple[int, int]],
    losses: Tensor,
) -> float:
    """Correlate scores with what the removal of some structures has cost.

    Args:
        scores: ``[group.size]`` for each group.
        structures: (place of the group, number in the group) of each.
        losses: ``[n]`` from :func:`removal_losses`.

    Returns:
        Spearman's coefficient; NaN where one of them is constant.
    """
    chosen = torch.stack([scores[group][number] for group, number in structures])
    return spearman(chosen, losses)


@torch.no_grad()
def removal_losses(
    model: nn.Module,
    groups: Sequence[Group],
    structures: Sequence[tuple[int, int]],
    loss: Callable[[nn.Module], float | Tensor],
) -> Tensor:
    """Measure how the loss rises when one structure at a time is removed.

    Filter and bias, and weight and bias of the norms behind it, are set to zero, which
    is the same function as without them where the activation of zero is zero. The model is
    left as it was.

    Args:
        model: the network; evaluated with running statistics.
        groups: its groups.
        structures: (place of the group, number in the group) of each.
        loss: gives the loss of a model, the same samples in every call.

    Returns:
        float64 ``[n]``: the loss without the structure less that of the whole network.
    """
    rises = []
    with isolated(model, "eval"), torch.no_grad():
        whole = float(loss(model))
        for group, number in structures:
            with _silenced(model, groups[group], number):
                rises.append(float(loss(model)) - whole)
    return torch.tensor(rises, dtype=torch.float64)


@contextmanager
def _silenced(model: nn.Module, group: Group, number: int) -> Iterator[None]:
    parameters = dict(model.named_parameters(remove_duplicate=False))
    touched = []
    try:
        for member in group.of_role(*_SILENCED):
            parameter = parameters[member.name].data
            where = member.slices([number]).to(parameter.device)
            kept = parameter.index_select(member.axis, where)
            touched.append((parameter, member.axis, where, kept))
            parameter.index_fill_(member.axis, where, 0.0)
        yield
    finally:
        for parameter, axis, where, kept in reversed(touched):
            parameter.index_copy_(axis, where, kept)


def _ranks(values: Tensor) -> Tensor:
    ordered, order = values.double().sort()
    # Equal numbers are neighbours: their run begins and ends at the same places.
    starts = torch.searchsorted(ordered, ordered)
    ends = torch.searchsorted(ordered, ordered, right=True)
    ranks = torch.empty_like(ordered)
    ranks[order] = (starts + ends).double() / 2
    return ranks
