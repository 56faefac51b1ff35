"""The weights that are not pruned yet, as one vector that is shared by the ranks.

Out of the model and back: active weights of all selected tensors, one behind the other,
are cut into blocks; each rank takes the slice ``[D_r]`` that it owns, and gives new values
for it back. Parameters that are sharded already (FSDP2) keep their owner.
"""

from __future__ import annotations

__all__ = ["ActiveWeights"]

import bisect
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from lightning_woodfisher.base.errors import ConfigurationError, PruningError
from lightning_woodfisher.base.precision import common_dtype
from lightning_woodfisher.distributed.communicator import Communicator
from lightning_woodfisher.distributed.exact_sum import sum_exactly
from lightning_woodfisher.weights.agreement import checksum
from lightning_woodfisher.weights.masks import Masks
from lightning_woodfisher.weights.partition import Partition
from lightning_woodfisher.weights.patterns import UNSTRUCTURED, GroupRun, Pattern

_ROUNDING = 1e-6


class ActiveWeights:
    """The active weights at the start of one part of a step.

    Args:
        masks: what is selected and what is already pruned.
        layout: cuts so many weights of each tensor into blocks for so many ranks.
        communicator: the ranks.
        pattern: what goes together. The weights of a tensor are then in the order of its
            groups, those of groups that have still to give first.

    Attributes:
        positions: int64 positions of the active weights in each flattened tensor, or in
            this rank's part of it.
        partition: the blocks and their owners.
        runs: the groups of this rank that have still to give; none without a pattern.
        pattern: as given.

    Raises:
        ConfigurationError: for a group that has given up a part of what it must.
    """

    def __init__(
        self,
        masks: Masks,
        layout: Callable[..., Partition],
        communicator: Communicator,
        pattern: Pattern = UNSTRUCTURED,
    ) -> None:
        self._masks = masks
        self._comm = communicator
        self.pattern = pattern
        # Weights in groups that have still to give, of each tensor.
        self._in_groups = dict.fromkeys(masks.parameters, 0)
        if pattern.is_grouped:
            self.positions = {name: self._by_group(name) for name in masks.parameters}
        else:
            self.positions = {
                name: torch.nonzero(masks.kept(name).reshape(-1)).squeeze(1)
                for name in masks.parameters
            }
        self.partition = self._cut(layout)
        self.runs = tuple(self._runs()) if pattern.is_grouped else ()

    def gather(self) -> Tensor:
        """Read the weights of this rank.

        Returns:
            float64 ``[D_r]``.
        """
        dtype = common_dtype(self._masks.parameters.values())
        everything = torch.cat(
            [
                self._masks.local(name).reshape(-1)[where].to(dtype)
                for name, where in self.positions.items()
            ]
        ).to(torch.float64)
        if self._masks.sharded:
            return everything
        return everything[self.partition.shard(self._comm.rank)]

    def layers(self) -> Tensor:
        """Tell which tensor each weight of this rank belongs to.

        Returns:
            int64 ``[D_r]``, index of the tensor.
        """
        units = self.partition.owned(self._comm.rank)
        number = len(self.positions)
        ids = torch.tensor([unit.segment % number for unit in units], dtype=torch.int64)
        lengths = torch.tensor(
            [unit.stop - unit.start for unit in units], dtype=torch.int64
        )
        return ids.repeat_interleave(lengths).to(self._comm.device)

    def layers_of_groups(self) -> Tensor:
        """Tell which tensor each group of this rank belongs to.

        Returns:
            int64 ``[G_r]``, index of the tensor.
        """
        return self._by_run([run.layer for run in self.runs])

    def members(self, chosen: Tensor) -> Tensor:
        """Find the weights of groups.

        Args:
            chosen: bool ``[G_r]``.

        Returns:
            bool ``[D_r]``, True in the chosen groups.
        """
        shard = self.partition.shard(self._comm.rank)
        inside = torch.zeros(
            shard.stop - shard.start, dtype=torch.bool, device=chosen.device
        )
        first = 0
        for run in self.runs:
            own = chosen[first : first + run.count]
            inside[run.local] = own.repeat_interleave(run.size)
            first += run.count
        return inside

    def _by_run(self, values: Sequence[int]) -> Tensor:
        counts = torch.tensor([run.count for run in self.runs], dtype=torch.int64)
        numbers = torch.tensor(values, dtype=torch.int64)
        return numbers.repeat_interleave(counts).to(self._comm.device)

    def sum_by_layer(self, values: Tensor) -> list[float]:
        """Add a number of each weight up.

        Args:
            values: float64 ``[D_r]``.

        Returns:
            A sum over all ranks for each tensor, the same bits for every world size.
        """
        offset = self.partition.shard(self._comm.rank).start
        number = len(self.positions)
        parts = []
        for unit in self.partition.owned(self._comm.rank):
            part = values.new_zeros(number)
            own = values[unit.start - offset : unit.stop - offset]
            part[unit.segment % number] = own.sum()
            parts.append(part)
        magnitudes = [values.new_zeros(()), *(part.abs().max() for part in parts)]
        bound = torch.stack(magnitudes).max() * len(self.partition.units)
        sums: list[float] = sum_exactly(self._comm, parts, bound, (number,)).tolist()
        return sums

    def largest_by_layer(
        self, values: Tensor, chosen: Tensor, layers: Tensor
    ) -> list[float | None]:
        """Find the largest value among chosen weights, or groups, of each tensor.

        Args:
            values: float64 ``[D_r]``, not negative.
            chosen: bool ``[D_r]``.
            layers: int64 ``[D_r]``, index of the tensor.

        Returns:
            A value over all ranks for each tensor, None where none is chosen.
        """
        largest = values.new_full((len(self.positions),), -1.0)
        largest.scatter_reduce_(0, layers[chosen], values[chosen], "amax")
        found: list[float] = self._comm.maximum(largest).tolist()
        return [None if value < 0 else value for value in found]

    def name_blocks(self, values: Mapping[int, float]) -> dict[str, float]:
        """Name blocks of this rank, and collect those of every rank.

        Args:
            values: a number by the block's first active weight (global number).

        Returns:
            The numbers of all ranks by tensor and weight.
        """
        most = int(max(row[0] for row in self._comm.gather_numbers([len(values)])))
        pairs = [*values.items(), *[(-1, 0.0)] * (most - len(values))]
        everyone = self._comm.gather_numbers([x for pair in pairs for x in pair])
        names = list(self.positions)
        by_start = {unit.start: unit.segment for unit in self.partition.units}
        starts = sorted(by_start)
        found: dict[str, float] = {}
        for row in everyone:
            for first, value in zip(row[::2], row[1::2], strict=True):
                if first >= 0:
                    unit = starts[bisect.bisect_right(starts, first) - 1]
                    name = names[by_start[unit] % len(names)]
                    found[f"{name} from weight {int(first)}"] = value
        return found

    @torch.no_grad()
    def write(self, weights: Tensor, removed: Tensor) -> None:
        """Share new weights, check them, and write them in place with the masks.

        Args:
            weights: float64 ``[D_r]``.
            removed: bool ``[D_r]``; these become zero and pruned.

        Raises:
            PruningError: when a weight is not finite in the dtype of its tensor; nothing
                has been written then.
        """
        comm, masks = self._comm, self._masks
        new, gone = self._share(weights, removed), removed
        if not masks.sharded:
            sizes = self.partition.shard_sizes()
            gone = comm.gather_shards(gone.to(torch.uint8), sizes).bool()
            comm.require_equal(checksum([new]), "the updated weights")
            comm.require_equal(checksum([gone]), "the masks")
        parts = self._in_own_dtype(new)
        bad = self._count_bad(parts)
        if bad:
            raise PruningError(
                f"{bad} updated weights are not finite; "
                "raise fisher.damping or recompute_steps, or lower the step's sparsity"
            )
        self._put(parts)
        pruned = {}
        for name, leaving in self._by_tensor(gone).items():
            part = masks.local(name)
            mask = torch.zeros_like(part, dtype=torch.bool).reshape(-1)
            mask[self.positions[name]] = leaving
            pruned[name] = mask.view(part.shape)
        masks.grow(pruned)

    @torch.no_grad()
    def try_on(self, weights: Tensor, removed: Tensor) -> bool:
        """Put weights into the model that :meth:`write` will overwrite; no mask grows.

        Args:
            weights: float64 ``[D_r]``.
            removed: bool ``[D_r]``; these are zero in the trial.

        Returns:
            False when a weight is not finite in the dtype of its tensor; nothing has been
            written then.
        """
        parts = self._in_own_dtype(self._share(weights, removed))
        if self._count_bad(parts):
            return False
        self._put(parts)
        return True

    def is_same(self, one: Tensor, other: Tensor) -> bool:
        """Tell whether two vectors differ by no more than roundings.

        Args:
            one: float64 ``[D_r]``.
            other: float64 ``[D_r]``.

        Returns:
            The same on all ranks.
        """
        pairs = torch.stack([one, one - other]).abs()
        # A rank may have no weights.
        largest = torch.cat([pairs, pairs.new_zeros(2, 1)], dim=1).amax(dim=1)
        size, gap = self._comm.maximum(largest).tolist()
        return bool(gap <= _ROUNDING * size)

    def _share(self, weights: Tensor, removed: Tensor) -> Tensor:
        """Give all active weights that this rank holds in the model, ``[D]``."""
        # A kept weight may not underflow to zero silently, but a removed one is zero.
        dtype = common_dtype(self._masks.parameters.values())
        new = torch.where(removed, 0.0, weights).to(dtype)
        # Nobody else needs the weights of a shard.
        if self._masks.sharded:
            return new
        return self._comm.gather_shards(new, self.partition.shard_sizes())

    def _in_own_dtype(self, values: Tensor) -> dict[str, Tensor]:
        """Cut a vector of all active weights, each tensor in the dtype of the model."""
        masks = self._masks
        return {
            name: part.to(masks.local(name).dtype)
            for name, part in self._by_tensor(values).items()
        }

    def _count_bad(self, parts: Mapping[str, Tensor]) -> int:
        """Count what is not finite, on the rank that has most of it."""
        # In the dtype in which they will be written: float16 overflows early.
        bad = sum(int((~values.isfinite()).sum()) for values in parts.values())
        return int(max(row[0] for row in self._comm.gather_numbers([bad])))

    def _put(self, parts: Mapping[str, Tensor]) -> None:
        """Overwrite the active weights in the model."""
        for name, values in parts.items():
            part = self._masks.local(name)
            flat = part.reshape(-1).clone()
            flat[self.positions[name]] = values
            part.copy_(flat.view(part.shape))

    def _by_tensor(self, values: Tensor) -> dict[str, Tensor]:
        """Cut a vector of all active weights that this rank holds."""
        lengths = [len(where) for where in self.positions.values()]
        return dict(zip(self.positions, torch.split(values, lengths), strict=True))

    def _by_group(self, name: str) -> Tensor:
        """Positions of the active weights of one tensor in the order of its groups."""
        pattern, kept = self.pattern, self._masks.kept(name)
        places = torch.arange(kept.numel(), device=kept.device).view(kept.shape)
        groups, active = pattern.grouped(places), pattern.grouped(kept)
        number, size = active.sum(dim=1), groups.shape[1]
        waiting = number == size
        if bool((~waiting & (number != pattern.kept)).any()):
            # Masks of another pattern, of a checkpoint for example.
            raise ConfigurationError(
                f"{name} has groups of weights that are pruned in part, which does not fit "
                f"selection.pattern of groups of {size} that keep {pattern.kept}; start "
                "from a dense network or go on with the pattern of the masks."
            )
        self._in_groups[name] = int(waiting.sum()) * size
        return torch.cat(
            [groups[waiting].flatten(), groups[~waiting][active[~waiting]]]
        )

    def _runs(self) -> Iterator[GroupRun]:
        """Groups of each unit of this rank; they lie at the start of a segment."""
        number, rank = len(self.positions), self._comm.rank
        sizes = [
            self.pattern.group_size(parameter.shape)
            for parameter in self._masks.parameters.values()
        ]
        waiting = list(self._in_groups.values())
        if self._masks.sharded:
            # Only this rank has units in its segments.
            waiting = [0] * (rank * number) + waiting
        starts = [0, *itertools.accumulate(self.partition.segments)]
        offset = self.partition.shard(rank).start
        for index, unit in enumerate(self.partition.owned(rank)):
            layer = unit.segment % number
            end = starts[unit.segment] + waiting[unit.segment]
            inside = max(0, min(unit.stop, end) - unit.start)
            if inside:
                count = inside // sizes[layer]
                yield GroupRun(index, layer, unit.start - offset, sizes[layer], count)

    def _cut(self, layout: Callable[..., Partition]) -> Partition:
        # Sharded parameters are numbered rank by rank, each rank's part of each tensor as
        # a segment of its own: segment r·L + l is tensor l on rank r, which owns it.
        segments = [len(positions) for positions in self.positions.values()]
        ranks = self._comm.world_size
        sizes: list[int] | None = None
        if self.pattern.is_grouped:
            shapes = [p.shape for p in self._masks.parameters.values()]
            sizes = [self.pattern.group_size(shape) for shape in shapes]
        if not self._masks.sharded:
            return layout(segments, ranks, sizes)
        everyone = self._comm.gather_numbers([float(count) for count in segments])
        counts = [int(count) for row in everyone for count in row]
        partition = layout(counts, ranks, sizes and sizes * ranks)
        return partition.owned_by_segment(
            [rank for rank, row in enumerate(everyone) for _ in row]
        )
