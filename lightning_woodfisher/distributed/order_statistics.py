"""The value at a given place of each group, over all ranks, without gathering the values.

Float64 numbers that are not negative sort like their bit patterns, read as integers. Each
rank sorts its own values once. The value at a place is then found in eight passes of 8 bits:
each pass counts how many values have at most each digit, and adds these counts over the
ranks as integers. The result has the same bits for any number of ranks and any order of the
values. The host waits for the device once, for the lengths of several groups.
"""

from __future__ import annotations

__all__ = ["SortedGroups", "sort_keys"]

import torch
from torch import Tensor

from lightning_woodfisher.distributed.communicator import Communicator

# The sign bit is always 0.
_DIGITS = (7, 8, 8, 8, 8, 8, 8, 8)


def sort_keys(values: Tensor) -> Tensor:
    """Return integers that sort like numbers that are not negative.

    Args:
        values: any floating-point dtype; −0 is 0.

    Returns:
        int64 of the same shape; negative for negative numbers.
    """
    return (values.double() + 0.0).view(torch.int64)


class SortedGroups:
    """The values of this rank, sorted within groups.

    Args:
        values: ``[D_r]``, not negative.
        groups: int64 ``[D_r]`` group of each value, or None for a single group.
        number: number of groups, G.
        sizes: int64 ``[D_r]``, how often each value counts; None for once.
    """

    def __init__(
        self,
        values: Tensor,
        groups: Tensor | None,
        number: int,
        sizes: Tensor | None = None,
    ) -> None:
        self._order = None if groups is None else groups.argsort(stable=True)
        self._lengths = [len(values)]
        if groups is not None:
            lengths = groups.new_zeros(number)
            lengths.scatter_add_(0, groups, torch.ones_like(groups))
            self._lengths = lengths.tolist()
        self._keys: list[Tensor] = []
        # Sums of the sizes of the first values of each group.
        self._sums: list[Tensor] = []
        parts = self.split(sort_keys(values))
        if sizes is None:
            self._keys = [part.sort().values for part in parts]
            return
        for part, own in zip(parts, self.split(sizes), strict=True):
            keys, order = part.sort()
            self._keys.append(keys)
            self._sums.append(torch.cat([own.new_zeros(1), own[order].cumsum(0)]))

    def split(self, values: Tensor) -> tuple[Tensor, ...]:
        """Split one number for each value by group, in the order of the values.

        Args:
            values: ``[D_r]``.

        Returns:
            G tensors.
        """
        ordered = values if self._order is None else values[self._order]
        return torch.split(ordered, self._lengths)

    def join(self, parts: list[Tensor]) -> Tensor:
        """Undo :meth:`split`.

        Args:
            parts: G tensors.

        Returns:
            ``[D_r]``.
        """
        ordered = torch.cat(parts)
        if self._order is None:
            return ordered
        return torch.empty_like(ordered).scatter_(0, self._order, ordered)

    def count(self, keys: Tensor, *, equal: bool) -> Tensor:
        """Count the values of this rank below some keys.

        Args:
            keys: int64 ``[G, n]``.
            equal: also count the values that are equal to a key.

        Returns:
            int64 ``[G, n]``, with sizes the sum of the sizes.
        """
        found = [
            torch.searchsorted(own, wanted, right=equal)
            for own, wanted in zip(self._keys, keys, strict=True)
        ]
        if self._sums:
            found = [s[where] for s, where in zip(self._sums, found, strict=True)]
        return torch.stack(found)

    def find(self, places: Tensor, comm: Communicator) -> Tensor:
        """Find the values at some places of the sorted values of all ranks.

        Args:
            places: int64 ``[G, n]``, how many values to skip.
            comm: the ranks.

        Returns:
            Keys, int64 ``[G, n]``; where a group has fewer values, 2⁶³ − 1, which is above all
            keys.
        """
        found, shift = torch.zeros_like(places), sum(_DIGITS)
        for bits in _DIGITS:
            shift -= bits
            ends = torch.arange(1, 2**bits + 1, device=places.device)
            # The last end of the first digit is 2⁶³, which wraps around and back.
            upper = found.unsqueeze(2) + ((ends << shift) - 1)
            counts = comm.sum_integers(self.count(upper.flatten(1), equal=True))
            # First digit up to which there are more values than must be skipped.
            digit = (counts.view_as(upper) <= places.unsqueeze(2)).sum(dim=2)
            found = found + (digit.clamp(max=2**bits - 1) << shift)
        return found
