"""Exact quantiles of each layer over all ranks, without gathering the values."""

from __future__ import annotations

__all__ = ["quantiles_by_group"]

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_woodfisher.distributed.communicator import Communicator
from lightning_woodfisher.distributed.order_statistics import SortedGroups, sort_keys


def quantiles_by_group(
    values: Tensor,
    groups: Tensor,
    number: int,
    shares: Sequence[float],
    comm: Communicator,
) -> list[tuple[float, ...]]:
    """Find quantiles of each group by the nearest-rank method: each is one of the values.

    Args:
        values: float64 ``[D_r]``, not negative; infinite ones are ignored.
        groups: int64 ``[D_r]``, group of each value.
        number: number of groups, G.
        shares: which quantiles, each in [0, 1].
        comm: the ranks.

    Returns:
        For each group and share the value at place max(1, ⌈share · n⌉) of its n sorted
        values; an empty tuple for a group without values.
    """
    ordered = SortedGroups(values, groups, number)
    infinity = sort_keys(values.new_full((number, 1), math.inf))
    sizes = comm.sum_integers(ordered.count(infinity, equal=False))
    wanted = torch.tensor(list(shares), dtype=torch.float64, device=values.device)
    places = (wanted * sizes).ceil().clamp(min=1.0).to(torch.int64) - 1
    found = ordered.find(places, comm).view(torch.float64)
    rows = torch.cat([sizes.double(), found], dim=1).tolist()
    return [tuple(row) if size else () for size, *row in rows]
