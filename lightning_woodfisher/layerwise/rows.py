"""Rows of a layer's weights: units of work, and the rank that owns each of them.

Rows are independent of each other but for the choice of the mask. They are computed in units
that do not depend on the number of ranks, so that results have the same bits for any number
of ranks and threads. Each rank owns a run of consecutive units.
"""

from __future__ import annotations

__all__ = ["RowShare", "split_rows"]

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from lightning_woodfisher.distributed.communicator import Communicator
from lightning_woodfisher.fisher.parallel import run_in_threads

# A unit has 1/32 of the rows, but 64 or more, because products of fewer are slower.
# Products may round differently for matrices that start elsewhere in a cache line: 16 rows
# are a multiple of its 64 bytes.
_UNITS_WANTED = 32
_FEWEST_ROWS, _MULTIPLE = 64, 16


def _rows_of_unit(outputs: int) -> int:
    rows = max(_FEWEST_ROWS, -(-outputs // _UNITS_WANTED))
    return rows + -rows % _MULTIPLE


def split_rows(outputs: int, ranks: int) -> list[int]:
    """Count the rows of a layer that each rank owns.

    Args:
        outputs: number of rows.
        ranks: number of ranks.

    Returns:
        Whole units of rows, but for the last one; zero for a rank without a unit.
    """
    unit = _rows_of_unit(outputs)
    units = -(-outputs // unit)
    ends = [units * r // ranks * unit for r in range(ranks)]
    return [b - a for a, b in itertools.pairwise([*ends, outputs])]


class RowShare:
    """The rows of one linear map that this rank owns.

    All ranks own all rows of a map with several groups, which is small.

    Args:
        groups: g.
        outputs: o, the number of rows of a group.
        device: device of the tensors.
        comm: the ranks that share the rows; None if this rank computes all of them.

    Attributes:
        count: number of rows that this rank owns.
    """

    def __init__(
        self,
        groups: int,
        outputs: int,
        device: torch.device,
        comm: Communicator | None = None,
    ) -> None:
        self._device = device
        self._comm = comm
        self._unit = _rows_of_unit(outputs)
        self._sizes, rank = [outputs], 0
        if comm is not None and groups == 1:
            self._sizes, rank = split_rows(outputs, comm.world_size), comm.rank
        self._first, self.count = sum(self._sizes[:rank]), self._sizes[rank]
        # A batch of small matrices, or a GPU, is faster with all rows at once.
        if groups > 1 or device.type != "cpu":
            self._unit = max(1, self.count)

    def own(self, rows: Tensor) -> Tensor:
        """View the rows of this rank.

        Args:
            rows: ``[g, o, ...]``.

        Returns:
            ``[g, o_r, ...]``.
        """
        return rows.narrow(1, self._first, self.count)

    def gather(self, own: Tensor) -> Tensor:
        """Collect the rows of all ranks, with the same bits on every rank.

        Args:
            own: ``[g, o_r, ...]``.

        Returns:
            ``[g, o, ...]``.
        """
        comm = self._comm
        if comm is None or comm.world_size == 1:
            return own
        if len(self._sizes) == 1:
            own = own.contiguous()
            if self._device.type != "cpu":
                # Products on a GPU may round differently on each rank.
                comm.broadcast([own])
            return own
        width = own.shape[2:].numel()
        sizes = [size * width for size in self._sizes]
        return comm.gather_shards(own.flatten(), sizes).view(1, -1, *own.shape[2:])

    def each(self, work: Callable[..., Tensor], *rows: Tensor) -> Tensor:
        """Compute all units, in as many threads as torch has on a CPU.

        Args:
            work: computes ``[g, u, ...]`` from tensors of the same rows.
            rows: ``[g, o_r, ...]`` each.

        Returns:
            ``[g, o_r, ...]``.
        """
        parts = list(zip(*(torch.split(x, self._unit, 1) for x in rows), strict=True))
        results: list[Tensor] = [rows[0]] * len(parts)

        def run(index: int) -> None:
            results[index] = work(*parts[index])

        run_in_threads(run, len(parts), self._device)
        return results[0] if len(results) == 1 else torch.cat(results, 1)
