"""Exact selection of the smallest scores over all ranks.

Scores that are not negative sort like their float64 bit patterns, read as integers. Eight
passes of 8 bits count how many scores have each leading digit; the counts of all ranks are
added, so every rank finds the same threshold without seeing the scores of another rank.
"""

from __future__ import annotations

__all__ = ["select_smallest"]

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_woodfisher.base.errors import PruningError
from lightning_woodfisher.distributed.communicator import Communicator

_DIGIT_BITS = 8


def select_smallest(
    scores: Tensor,
    groups: Tensor | None,
    counts: Sequence[int],
    comm: Communicator,
    sizes: Tensor | None = None,
) -> Tensor:
    """Mark exactly ``counts[g]`` smallest scores of every group g, over all ranks.

    Args:
        scores: float64 ``[D_r]``, not negative; ranks hold consecutive runs of the global
            order.
        groups: int64 ``[D_r]`` group of each score, or None for a single group.
        counts: number of scores to mark in each group.
        comm: the ranks.
        sizes: int64 ``[D_r]``, weight of each score in the count, at least 1. The smallest
            scores are marked until their sizes would add up to more than the count.

    Returns:
        bool ``[D_r]``, True where marked. Ties go to the lowest global index.

    Raises:
        PruningError: if a score is NaN or negative, or if, without sizes, a group has
            fewer members than ``counts`` asks for.
    """
    wanted = torch.tensor(list(counts), dtype=torch.int64, device=scores.device)
    member = torch.zeros_like(scores, dtype=torch.int64) if groups is None else groups
    invalid = comm.sum_integers((~(scores >= 0)).sum().reshape(1))
    if int(invalid):
        raise PruningError(f"{int(invalid)} saliencies are NaN or negative")
    keys = (scores.double() + 0.0).view(torch.int64)
    totals = comm.sum_integers(_count(member, len(wanted), sizes))
    if sizes is None and bool((totals < wanted).any()):
        raise PruningError(
            f"cannot remove {wanted.tolist()} of {totals.tolist()} remaining weights"
        )
    # The threshold is the first score that is not marked. A group that is marked completely
    # has no such score, so its threshold is not used.
    everything = totals <= wanted
    left = wanted.clone()
    threshold = torch.zeros_like(wanted)
    candidates = torch.arange(len(keys), device=keys.device)
    for shift in range(64 - _DIGIT_BITS, -1, -_DIGIT_BITS):
        digit = (keys[candidates] >> shift) & (2**_DIGIT_BITS - 1)
        group = member[candidates]
        histogram = comm.sum_integers(
            _count(
                group * 2**_DIGIT_BITS + digit,
                len(wanted) * 2**_DIGIT_BITS,
                None if sizes is None else sizes[candidates],
            )
        ).view(len(wanted), -1)
        ends = histogram.cumsum(dim=1)
        # First digit whose cumulative size exceeds the remaining count.
        chosen = (ends <= left.unsqueeze(1)).sum(dim=1).clamp(max=ends.shape[1] - 1)
        below = (ends - histogram).gather(1, chosen.unsqueeze(1)).squeeze(1)
        left = left - below
        threshold |= chosen << shift
        candidates = candidates[digit == chosen[group]]
    marked = (keys < threshold[member]) | everything[member]
    _mark_ties(marked, keys, member, threshold, left, comm, sizes)
    return marked


def _count(bins: Tensor, number: int, sizes: Tensor | None) -> Tensor:
    """Add up sizes (or ones) by bin, int64 ``[number]``."""
    if sizes is None:
        return torch.bincount(bins, minlength=number)
    return bins.new_zeros(number).scatter_add_(0, bins, sizes)


def _mark_ties(
    marked: Tensor,
    keys: Tensor,
    member: Tensor,
    threshold: Tensor,
    left: Tensor,
    comm: Communicator,
    sizes: Tensor | None,
) -> None:
    """Mark the first keys equal to the threshold, as many as fit into ``left[g]``."""
    ties = torch.nonzero((keys == threshold[member]) & ~marked).squeeze(1)
    tied_group = member[ties]
    weight = torch.ones_like(ties) if sizes is None else sizes[ties]
    mine = _count(tied_group, len(left), weight)
    # As integers, because float64 cannot represent every sum of sizes exactly.
    everyone = mine.new_zeros(comm.world_size, len(left))
    everyone[comm.rank] = mine
    everyone = comm.sum_integers(everyone)
    before = everyone[: comm.rank].sum(dim=0).tolist()
    for group, room in enumerate(left.tolist()):
        here = tied_group == group
        ends = weight[here].cumsum(dim=0) + before[group]
        marked[ties[here][ends <= room]] = True
