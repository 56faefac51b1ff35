"""Blocks of the Fisher matrix and the ranks that own them: pure data, no tensors.

Legend of shape suffixes used in the package: D active weights, N gradients,
B block size, K blocks, R ranks, L tensors (segments).

The active (not yet pruned) weights of all selected tensors are numbered 0 .. D-1 in the
order of the tensors. Each tensor is cut into blocks that never leave it; consecutive
blocks of equal size form a *unit*, the smallest thing that is owned and computed.

           tensor 0            tensor 1
    | B B B B | B B B | b | B B B | B B B | b |      b is what is left over
    |- unit --|- unit-|-u-|- unit-|- unit-|-u-|
    '----- rank 0 ----'-------- rank 1 -------'

Units do not depend on the number of ranks. Ranks take whole units, so every product
is computed from the same numbers in the same order whatever the world size.
"""

from __future__ import annotations

__all__ = ["Partition", "Unit", "align_block_size", "make_partition"]

import bisect
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

# A unit costs at most this share of the whole, so that R ranks can share evenly.
_UNITS_WANTED = 96
# Nor does it hold more weights than this, unless a block does: units in work take memory.
_LARGEST_UNIT = 2**22


@dataclass(frozen=True)
class Unit:
    """``count`` consecutive blocks of ``size`` weights inside one tensor.

    Attributes:
        segment: index of the tensor.
        start: first active weight.
        size: weights in a block (B).
        count: number of blocks (K).
    """

    segment: int
    start: int
    size: int
    count: int

    @property
    def stop(self) -> int:
        """One past the last active weight."""
        return self.start + self.size * self.count


@dataclass(frozen=True)
class Partition:
    """All units in order, and which rank owns which.

    Attributes:
        segments: active weights of each tensor.
        units: every unit, in order of ``start``; together they cover 0 .. D-1.
        bounds: rank r owns ``units[bounds[r]:bounds[r + 1]]``.
    """

    segments: tuple[int, ...]
    units: tuple[Unit, ...]
    bounds: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of active weights, D."""
        return sum(self.segments)

    @property
    def world_size(self) -> int:
        """Number of ranks, R."""
        return len(self.bounds) - 1

    def owned(self, rank: int) -> tuple[Unit, ...]:
        """List the units of one rank.

        Args:
            rank: the owner.

        Returns:
            Its units, possibly none.
        """
        return self.units[self.bounds[rank] : self.bounds[rank + 1]]

    def shard(self, rank: int) -> slice:
        """Locate the active weights of one rank.

        Args:
            rank: the owner.

        Returns:
            A contiguous slice of 0 .. D-1, possibly empty.
        """
        starts = [unit.start for unit in self.units] + [self.size]
        return slice(starts[self.bounds[rank]], starts[self.bounds[rank + 1]])

    def shard_sizes(self) -> list[int]:
        """Count the active weights of every rank.

        Returns:
            R numbers that add up to D.
        """
        shards = [self.shard(rank) for rank in range(self.world_size)]
        return [shard.stop - shard.start for shard in shards]

    def owned_by_segment(self, owners: Sequence[int]) -> Partition:
        """Let the owner of a tensor own all its units: nobody else holds it.

        Args:
            owners: rank of each segment, rising from 0 to R-1.

        Returns:
            The same units with other bounds.
        """
        ranks = [owners[unit.segment] for unit in self.units]
        bounds = [bisect.bisect_left(ranks, r) for r in range(self.world_size)]
        return replace(self, bounds=(*bounds, len(self.units)))


def align_block_size(block_size: int, group_size: int, may_cut: bool = False) -> int:
    """Choose a block size such that blocks and groups of weights do not straddle.

    Args:
        block_size: the wanted size, B.
        group_size: weights that go together, q.
        may_cut: whether a group may consist of several blocks.

    Returns:
        The largest multiple of q up to B. For q > B it is q, or if groups may be cut the
        largest divisor of q up to B.

    Examples:
        >>> align_block_size(50, 4), align_block_size(3, 4)
        (48, 4)
        >>> align_block_size(50, 147, may_cut=True)
        49
    """
    if group_size <= block_size:
        return block_size - block_size % group_size
    if not may_cut:
        return group_size
    return max(b for b in range(1, block_size + 1) if group_size % b == 0)


def make_partition(
    segments: Sequence[int],
    block_size: int | Sequence[int],
    world_size: int,
    cost: Callable[[int], float] = float,
    group_sizes: Sequence[int] | None = None,
) -> Partition:
    """Cut tensors into blocks and give the blocks to ranks.

    A tensor of n active weights becomes blocks of ``block_size`` and one of what is left
    over. Each rank owns a contiguous run of units of about equal cost.

    Args:
        segments: active weights of each tensor, zero allowed.
        block_size: largest number of weights in a block, B; or one for each tensor.
        world_size: number of ranks, R.
        cost: work for one block of the given size; only ratios matter.
        group_sizes: weights that go together in each tensor; no unit ends inside a group
            of which B is a divisor.

    Returns:
        The partition. Ranks beyond the number of units own nothing.
    """
    sizes = [block_size] * len(segments) if isinstance(block_size, int) else block_size
    together = [
        max(1, group // size)
        for group, size in zip(group_sizes or [1] * len(segments), sizes, strict=True)
    ]
    blocks = list(_blocks(segments, sizes))
    total = sum(cost(size) * count for _, _, size, count in blocks)
    units = tuple(
        unit
        for segment, start, size, count in blocks
        for unit in _split(
            segment, start, size, count, total, cost(size), together[segment]
        )
    )
    ends = list(itertools.accumulate(cost(unit.size) * unit.count for unit in units))
    # A boundary is put where the accumulated cost comes closest to r/R of the whole.
    bounds = [0]
    for rank in range(1, world_size):
        wanted = total * rank / world_size
        index = bisect.bisect_left(ends, wanted)
        before = ends[index - 1] if index else 0.0
        if index < len(ends) and ends[index] - wanted <= wanted - before:
            index += 1
        bounds.append(min(max(index, bounds[-1]), len(units)))
    return Partition(tuple(segments), units, (*bounds, len(units)))


def _blocks(
    segments: Sequence[int], block_sizes: Sequence[int]
) -> Iterator[tuple[int, int, int, int]]:
    """Yield (segment, start, size, count) runs of equal blocks."""
    start = 0
    for segment, weights in enumerate(segments):
        if weights == 0:
            continue
        block_size = block_sizes[segment]
        count, rest = divmod(weights, block_size)
        if count:
            yield segment, start, block_size, count
        if rest:
            yield segment, start + count * block_size, rest, 1
        start += weights


def _split(
    segment: int,
    start: int,
    size: int,
    count: int,
    total: float,
    block_cost: float,
    together: int,
) -> Iterator[Unit]:
    """Cut a run of equal blocks into units of at most the wanted cost and size."""
    at_once = int(total / _UNITS_WANTED / block_cost)
    at_once = min(at_once, _LARGEST_UNIT // size)
    at_once = max(together, at_once - at_once % together)
    for first in range(0, count, at_once):
        yield Unit(segment, start + first * size, size, min(at_once, count - first))
