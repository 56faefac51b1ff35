"""Exact quantiles of each layer over all ranks, without gathering the values.

As in :mod:`.smallest`, float64 numbers that are not negative sort like their bit patterns.
Each quantile is found digit by digit, from counts that are added over the ranks as integers.
The result has the same bits for any number of ranks and any order of the values.
"""

from __future__ import annotations

__all__ = ["quantiles_by_group"]

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_woodfisher.distributed.communicator import Communicator

# Bits of each digit. The first one is the exponent, because it separates values better than
# eight bits would; the sign bit is always 0.
_DIGITS = (11, 8, 8, 8, 8, 8, 8, 4)
_PIECE = 2**20


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
    found = torch.zeros(number, len(shares), dtype=torch.int64, device=values.device)
    finite = values.isfinite()
    sizes = comm.sum_integers(torch.bincount(groups[finite], minlength=number))
    # How many smaller values to skip.
    skipped = [[max(1, math.ceil(s * n)) - 1 for s in shares] for n in sizes.tolist()]
    left = torch.tensor(skipped, dtype=torch.int64, device=values.device)
    # A slot is a group and the digits so far; each quantile lies in one of them.
    slot_of = torch.arange(number, device=values.device).unsqueeze(1).expand_as(left)
    pieces = [
        ((piece.double() + 0.0).view(torch.int64)[inside], group[inside])
        for piece, group, inside in zip(
            torch.split(values, _PIECE),
            torch.split(groups, _PIECE),
            torch.split(finite, _PIECE),
            strict=True,
        )
    ]
    slots, shift = number, sum(_DIGITS)
    for bits in _DIGITS:
        shift -= bits
        width = 2**bits
        counts = torch.zeros(slots * width, dtype=torch.int64, device=values.device)
        for keys, slot in pieces:
            where = slot * width + ((keys >> shift) & (width - 1))
            counts += torch.bincount(where, minlength=len(counts))
        counts = comm.sum_integers(counts).view(slots, width)
        ends = counts.cumsum(dim=1)[slot_of]
        # First digit up to which there are more values than must be skipped.
        digit = (ends <= left.unsqueeze(2)).sum(dim=2).clamp(max=width - 1)
        below = ends - counts[slot_of]
        left = left - below.gather(2, digit.unsqueeze(2)).squeeze(2)
        found |= digit << shift
        chosen, inverse = (slot_of * width + digit).unique(return_inverse=True)
        table = torch.full((slots * width,), -1, device=values.device)
        table[chosen] = torch.arange(len(chosen), device=values.device)
        pieces = [_keep(keys, slot, shift, width, table) for keys, slot in pieces]
        slot_of, slots = inverse, len(chosen)
    rows = found.view(torch.float64).tolist()
    return [
        tuple(row) if size else ()
        for row, size in zip(rows, sizes.tolist(), strict=True)
    ]


def _keep(
    keys: Tensor, slot: Tensor, shift: int, width: int, table: Tensor
) -> tuple[Tensor, Tensor]:
    """Keep the values that share their digits with a quantile; return their new slots."""
    slot = table[slot * width + ((keys >> shift) & (width - 1))]
    inside = slot >= 0
    return keys[inside], slot[inside]
