"""Exact selection of the smallest scores over all ranks.

Every rank finds the same threshold without seeing the scores of another rank.
"""

from __future__ import annotations

__all__ = ["select_smallest"]

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_woodfisher.base.errors import PruningError
from lightning_woodfisher.distributed.communicator import Communicator
from lightning_woodfisher.distributed.order_statistics import SortedGroups, sort_keys

_LARGEST_KEY = 2**63 - 1


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
    keys, ordered = sort_keys(scores), SortedGroups(scores, groups, len(wanted), sizes)
    largest = torch.full_like(wanted, _LARGEST_KEY).unsqueeze(1)
    invalid = (~(scores >= 0)).sum().reshape(1)
    totals = ordered.count(largest, equal=True).squeeze(1)
    invalid, totals = comm.sum_integers(torch.cat([invalid, totals])).tensor_split([1])
    # The first score that is not marked; above all scores if a group is marked completely.
    threshold = ordered.find(wanted.unsqueeze(1), comm)
    below = comm.sum_integers(ordered.count(threshold, equal=False)).squeeze(1)
    left, threshold = wanted - below, threshold.squeeze(1)
    if groups is not None:
        threshold = threshold[groups]
    marked = keys < threshold
    ties = (keys == threshold) & ~marked
    weight = ties.long() if sizes is None else torch.where(ties, sizes, 0)
    marked |= ties & _fits(weight, left, ordered, comm)
    # Last, so that the host waits once.
    bad, *available = torch.cat([invalid, totals]).tolist()
    if bad:
        raise PruningError(f"{bad} saliencies are NaN or negative")
    if sizes is None and any(a < w for a, w in zip(available, counts, strict=True)):
        raise PruningError(
            f"cannot remove {list(counts)} of {available} remaining weights"
        )
    return marked


def _fits(
    weight: Tensor, left: Tensor, ordered: SortedGroups, comm: Communicator
) -> Tensor:
    """Mark the first scores of each group whose weights fit into ``left[g]``."""
    ends = [part.cumsum(dim=0) for part in ordered.split(weight)]
    # As integers, because float64 cannot represent every sum of sizes exactly.
    everyone = left.new_zeros(comm.world_size, len(left))
    everyone[comm.rank] = torch.stack([end[-1:].sum() for end in ends])
    before = comm.sum_integers(everyone)[: comm.rank].sum(dim=0)
    room = (left - before).unbind()
    return ordered.join([end <= most for end, most in zip(ends, room, strict=True)])
