"""Cut weights into blocks of the Fisher and assign them to ranks, without tensors.

Legend of shape suffixes used in the package: D active weights, N gradients,
B block size, K blocks, R ranks, L tensors (segments).

The active (not yet pruned) weights of all selected tensors are numbered 0 .. D-1 in the
order of the tensors. Each tensor is cut into blocks that do not cross its ends. Consecutive
blocks of equal size form a *unit*, which is owned and computed as a whole.

           tensor 0            tensor 1
    | B B B B | B B B | b | B B B | B B B | b |      b is the remainder
    |- unit --|- unit-|-u-|- unit-|- unit-|-u-|
    '----- rank 0 ----'-------- rank 1 -------'

Units do not depend on the number of ranks. Ranks own whole units, so every product is
computed from the same numbers in the same order for every world size.
"""

from __future__ import annotations

__all__ = ["Partition", "Unit", "align_block_size", "make_partition"]

import bisect
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

# A unit costs at most 1/96 of the whole, so that R ranks can share the cost evenly.
_UNITS_WANTED = 96
# It holds at most this number of weights, unless a block is larger. Its matrices then fit
# into the cache of a core, and their memory is used again instead of being mapped anew.
_LARGEST_UNIT = 2**13
# Units of networks with more weights are larger, so that there are not many more than this:
# an estimate tries many settings, and goes through all units of each.
_MOST_UNITS = 2**10


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
    """All units in order, and their owners.

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
            Its units; possibly none.
        """
        return self.units[self.bounds[rank] : self.bounds[rank + 1]]

    def shard(self, rank: int) -> slice:
        """Return the range of active weights of one rank.

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
        """Assign all units of a tensor to the rank that holds the tensor.

        Args:
            owners: rank of each segment, increasing from 0 to R-1.

        Returns:
            The same units with other bounds.
        """
        ranks = [owners[unit.segment] for unit in self.units]
        bounds = [bisect.bisect_left(ranks, r) for r in range(self.world_size)]
        return replace(self, bounds=(*bounds, len(self.units)))


def align_block_size(block_size: int, group_size: int, may_cut: bool = False) -> int:
    """Choose a block size such that block boundaries do not cut groups of weights.

    Args:
        block_size: the wanted size, B.
        group_size: weights of a group, q.
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
    """Cut tensors into blocks and assign the blocks to ranks.

    A tensor of n active weights becomes blocks of ``block_size`` and one block for the
    remainder. Each rank owns a contiguous run of units of about equal cost.

    Args:
        segments: active weights of each tensor, zero allowed.
        block_size: largest number of weights in a block, B; or one for each tensor.
        world_size: number of ranks, R.
        cost: work for one block of the given size; only ratios matter.
        group_sizes: weights of a group in each tensor; no unit ends inside a group of
            which B is a divisor.

    Returns:
        The partition. Ranks beyond the number of units own nothing.
    """
    sizes = [block_size] * len(segments) if isinstance(block_size, int) else block_size
    runs = list(_equal_blocks(segments, sizes))
    total = sum(cost(run.size) * run.count for run in runs)
    largest = max(_LARGEST_UNIT, sum(segments) // _MOST_UNITS)
    units: list[Unit] = []
    for run in runs:
        group_size = group_sizes[run.segment] if group_sizes else 1
        together = max(1, group_size // sizes[run.segment])
        at_once = int(total / _UNITS_WANTED / cost(run.size))
        at_once = min(at_once, largest // run.size)
        at_once = max(together, at_once - at_once % together)
        for first in range(0, run.count, at_once):
            start, count = run.start + first * run.size, min(at_once, run.count - first)
            units.append(Unit(run.segment, start, run.size, count))
    ends = list(itertools.accumulate(cost(unit.size) * unit.count for unit in units))
    # Each boundary is where the accumulated cost is closest to r/R of the whole.
    bounds = [0]
    for rank in range(1, world_size):
        wanted = total * rank / world_size
        index = bisect.bisect_left(ends, wanted)
        before = ends[index - 1] if index else 0.0
        if index < len(ends) and ends[index] - wanted <= wanted - before:
            index += 1
        bounds.append(min(max(index, bounds[-1]), len(units)))
    return Partition(tuple(segments), tuple(units), (*bounds, len(units)))


def _equal_blocks(
    segments: Sequence[int], block_sizes: Sequence[int]
) -> Iterator[Unit]:
    """Yield the longest runs of equal blocks: those of each segment, and its remainder."""
    start = 0
    for segment, (weights, size) in enumerate(zip(segments, block_sizes, strict=True)):
        count, rest = divmod(weights, size) if weights else (0, 0)
        if count:
            yield Unit(segment, start, size, count)
        if rest:
            yield Unit(segment, start + count * size, rest, 1)
        start += weights
