"""The weights that are not pruned yet, as one vector that is sharded over the ranks.

The active weights of all selected tensors are concatenated and cut into blocks. Each rank
reads the slice ``[D_r]`` that it owns, and returns new values for it. Parameters that are
already sharded (FSDP2) keep their owner.
"""

from __future__ import annotations

__all__ = ["ActiveWeights"]

import bisect
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from lightning_woodfisher.base.errors import ConfigurationError, PruningError
from lightning_woodfisher.base.types import common_dtype
from lightning_woodfisher.distributed.communicator import Communicator
from lightning_woodfisher.distributed.exact_sum import ExactSum
from lightning_woodfisher.weights.masks import Masks
from lightning_woodfisher.weights.partition import Partition
from lightning_woodfisher.weights.patterns import UNSTRUCTURED, GroupRun, Pattern

# Relative difference of two vectors that are equal up to rounding.
_ROUNDING = 1e-6


class ActiveWeights:
    """The active weights at the start of one stage of a pruning step.

    Args:
        masks: masks of the selected weights.
        layout: cuts the active weights of each tensor into blocks for the ranks:
            :meth:`.Criterion.layout`.
        communicator: the ranks.
        pattern: which weights form a group. The weights of a tensor are then in the order
            of its groups, starting with the groups that are still dense.

    Attributes:
        positions: int64 positions of the active weights in each flattened tensor, or in
            this rank's shard of it.
        partition: the blocks and their owners.
        runs: the dense groups of this rank; none without a pattern.
        pattern: the pattern.

    Raises:
        ConfigurationError: if a group is partly pruned.
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
        # Weights in the dense groups of each tensor.
        self._in_groups = dict.fromkeys(masks.parameters, 0)
        self._group_sizes: list[int] | None = None
        if pattern.is_grouped:
            self._group_sizes = [
                pattern.group_size(masks.outputs_first(name, parameter).shape)
                for name, parameter in masks.parameters.items()
            ]
            self.positions = {name: self._by_group(name) for name in masks.parameters}
        else:
            self.positions = _positions(masks)
        self.partition = self._make_partition(layout)
        self.runs = tuple(self._find_runs(self._group_sizes or ()))

    def read(self) -> Tensor:
        """Read the weights of this rank.

        Returns:
            float64 ``[D_r]``.
        """
        dtype = common_dtype(self._masks.parameters.values())
        weights = torch.cat(
            [
                self._masks.local(name).reshape(-1)[where].to(dtype)
                for name, where in self.positions.items()
            ]
        ).to(torch.float64)
        if self._masks.sharded:
            return weights
        return weights[self.partition.shard(self._comm.rank)]

    def weight_layers(self) -> Tensor:
        """Find the tensor that each weight of this rank belongs to.

        Returns:
            int64 ``[D_r]``, index of the tensor.
        """
        units = self.partition.owned(self._comm.rank)
        layers = [unit.segment % len(self.positions) for unit in units]
        return self._repeat(layers, [unit.stop - unit.start for unit in units])

    def group_layers(self) -> Tensor:
        """Find the tensor that each group of this rank belongs to.

        Returns:
            int64 ``[G_r]``, index of the tensor.
        """
        layers = [run.layer for run in self.runs]
        return self._repeat(layers, [run.count for run in self.runs])

    def _repeat(self, values: Sequence[int], counts: Sequence[int]) -> Tensor:
        # Made on the device: a copy of so many numbers would take longer.
        pairs = torch.tensor([values, counts], dtype=torch.int64).view(2, -1)
        what, often = pairs.to(self._comm.device)
        repeated: Tensor = what.repeat_interleave(often, output_size=sum(counts))
        return repeated

    def weights_in_groups(self, chosen: Tensor) -> Tensor:
        """Find the weights of chosen groups.

        Args:
            chosen: bool ``[G_r]``.

        Returns:
            bool ``[D_r]``, True in the chosen groups.
        """
        shard = self.partition.shard(self._comm.rank)
        inside = chosen.new_zeros(shard.stop - shard.start)
        runs = torch.split(chosen, [run.count for run in self.runs])
        for run, own in zip(self.runs, runs, strict=True):
            inside[run.local] = own.repeat_interleave(run.size)
        return inside

    def sum_by_layer(self, values: Tensor) -> list[float]:
        """Add up one value per weight within each tensor.

        Args:
            values: float64 ``[D_r]``.

        Returns:
            The sum over all ranks for each tensor, bit-identical for every world size.
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
        total = ExactSum(self._comm, bound, (number,))
        for part in parts:
            total.add(part)
        sums: list[float] = total.result().tolist()
        return sums

    def columns_by_layer(self) -> list[tuple[int, slice]]:
        """Find the columns of this rank that belong to each tensor.

        Returns:
            Index of the tensor, and a slice of ``[D_r]``; a tensor may have several, or
            none.
        """
        first = self.partition.shard(self._comm.rank).start
        owned = self.partition.owned(self._comm.rank)
        return [
            (
                segment % len(self.positions),
                slice(run[0].start - first, run[-1].stop - first),
            )
            for segment, units in itertools.groupby(owned, lambda unit: unit.segment)
            for run in [list(units)]
        ]

    def largest_by_layer(
        self, values: Tensor, chosen: Tensor, layers: Tensor
    ) -> list[float | None]:
        """Find the largest value among chosen weights (or groups) of each tensor.

        Args:
            values: float64 ``[D_r]``, not negative.
            chosen: bool ``[D_r]``.
            layers: int64 ``[D_r]``, index of the tensor.

        Returns:
            The maximum over all ranks for each tensor, None if none is chosen.
        """
        largest = values.new_full((len(self.positions),), -1.0)
        compared = torch.where(chosen, values, -1.0)
        largest.scatter_reduce_(0, layers, compared, "amax")
        found: list[float] = self._comm.maximum(largest).tolist()
        return [None if value < 0 else value for value in found]

    def name_blocks(self, values: Mapping[int, float]) -> dict[str, float]:
        """Collect a number per block from all ranks, and name the blocks.

        Args:
            values: values of blocks of this rank, by the global index of the block's first
                active weight.

        Returns:
            The numbers of all ranks by tensor and weight.
        """
        most = int(max(row[0] for row in self._comm.gather_numbers([len(values)])))
        pairs = [*values.items(), *[(-1, 0.0)] * (most - len(values))]
        rows = self._comm.gather_numbers([x for pair in pairs for x in pair])
        names, units = list(self.positions), self.partition.units
        starts = [unit.start for unit in units]
        found: dict[str, float] = {}
        for row in rows:
            for first, value in zip(row[::2], row[1::2], strict=True):
                if first >= 0:
                    unit = units[bisect.bisect_right(starts, first) - 1]
                    name = names[unit.segment % len(names)]
                    found[f"{name} from weight {int(first)}"] = value
        return found

    @torch.no_grad()
    def write(self, weights: Tensor, removed: Tensor) -> None:
        """Exchange new weights, check them, write them in place and extend the masks.

        Args:
            weights: float64 ``[D_r]``.
            removed: bool ``[D_r]``; these weights become zero and pruned.

        Raises:
            PruningError: if a weight is not finite in the dtype of its tensor, before
                anything is written.
        """
        comm, masks = self._comm, self._masks
        new, gone = self._gather(weights, removed), removed
        if not masks.sharded:
            sizes = self.partition.shard_sizes()
            gone = comm.gather_shards(gone.to(torch.uint8), sizes).bool()
            comm.require_equal(new, "the updated weights")
            comm.require_equal(gone, "the masks")
        bad = self._write_if_finite(new)
        if bad:
            raise PruningError(
                f"{bad} updated weights are not finite; "
                "raise fisher.damping or recompute_steps, or lower the step's sparsity"
            )
        pruned = {}
        for name, leaving in self._by_tensor(gone).items():
            part = masks.local(name)
            mask = torch.zeros(part.numel(), dtype=torch.bool, device=part.device)
            mask[self.positions[name]] = leaving
            pruned[name] = mask.view(part.shape)
        masks.prune(pruned)

    @torch.no_grad()
    def write_trial(self, weights: Tensor, removed: Tensor) -> bool:
        """Write weights that :meth:`write` will overwrite, without changing the masks.

        Args:
            weights: float64 ``[D_r]``.
            removed: bool ``[D_r]``; these weights are zero in the trial.

        Returns:
            Whether all weights are finite in the dtype of their tensor. If not, nothing
            has been written.
        """
        return not self._write_if_finite(self._gather(weights, removed))

    def is_close(self, one: Tensor, other: Tensor) -> bool:
        """Check whether two vectors are equal up to rounding.

        Args:
            one: float64 ``[D_r]``.
            other: float64 ``[D_r]``.

        Returns:
            The same on all ranks.
        """
        # A rank may have no weights.
        sizes = [x.abs().amax() if len(x) else x.sum() for x in (one, one - other)]
        size, gap = self._comm.maximum(torch.stack(sizes)).tolist()
        return bool(gap <= _ROUNDING * size)

    def _gather(self, weights: Tensor, removed: Tensor) -> Tensor:
        """Return all active weights that this rank holds in the model, ``[D]``."""
        # A kept weight may not underflow to zero silently, but a removed one is zero.
        dtype = common_dtype(self._masks.parameters.values())
        new = torch.where(removed, 0.0, weights).to(dtype)
        # In a sharded model no other rank needs these weights.
        if self._masks.sharded:
            return new
        return self._comm.gather_shards(new, self.partition.shard_sizes())

    def _write_if_finite(self, weights: Tensor) -> int:
        """Write ``[D]`` into the model; return the largest number of bad weights of a rank."""
        # In the dtypes in which they are written: float16 overflows early.
        new = {
            name: values.to(self._masks.local(name).dtype)
            for name, values in self._by_tensor(weights).items()
        }
        counts = [(~values.isfinite()).sum() for values in new.values()]
        bad = int(self._comm.maximum(torch.stack(counts).sum().reshape(1)))
        if not bad:
            self._overwrite(new)
        return bad

    def _overwrite(self, new: Mapping[str, Tensor]) -> None:
        for name, values in new.items():
            part = self._masks.local(name)
            flat = part.reshape(-1).clone()
            flat[self.positions[name]] = values
            part.copy_(flat.view(part.shape))

    def _by_tensor(self, values: Tensor) -> dict[str, Tensor]:
        """Split a vector of all active weights that this rank holds."""
        lengths = [len(where) for where in self.positions.values()]
        return dict(zip(self.positions, torch.split(values, lengths), strict=True))

    def _by_group(self, name: str) -> Tensor:
        """Return the positions of the active weights of a tensor in order of its groups."""
        pattern, kept = self.pattern, self._masks.kept(name)
        places = torch.arange(kept.numel(), device=kept.device).view(kept.shape)
        groups, active = (
            pattern.grouped(self._masks.outputs_first(name, tensor))
            for tensor in (places, kept)
        )
        number, size = active.sum(dim=1), groups.shape[1]
        dense = number == size
        if bool((~dense & (number != pattern.kept)).any()):
            # Masks of another pattern, for example from a checkpoint.
            raise ConfigurationError(
                f"{name} has groups of weights that are partly pruned, which does not fit "
                f"the selection.pattern: groups of {size} that keep {pattern.kept}. Start "
                "from a dense network, or continue with the pattern of the masks."
            )
        self._in_groups[name] = int(dense.sum()) * size
        return torch.cat([groups[dense].flatten(), groups[~dense][active[~dense]]])

    def _find_runs(self, group_sizes: Sequence[int]) -> Iterator[GroupRun]:
        """Yield the dense groups of each unit of this rank, at the start of segments."""
        number, rank = len(self.positions), self._comm.rank
        in_groups = list(self._in_groups.values())
        if self._masks.sharded:
            # Only this rank has units in its segments.
            in_groups = [0] * (rank * number) + in_groups
        starts = [0, *itertools.accumulate(self.partition.segments)]
        offset = self.partition.shard(rank).start
        for index, unit in enumerate(self.partition.owned(rank)):
            layer = unit.segment % number
            end = starts[unit.segment] + in_groups[unit.segment]
            inside = max(0, min(unit.stop, end) - unit.start)
            if inside:
                size = group_sizes[layer]
                yield GroupRun(index, layer, unit.start - offset, size, inside // size)

    def _make_partition(self, layout: Callable[..., Partition]) -> Partition:
        # Sharded parameters are numbered rank by rank, each rank's part of each tensor as
        # a segment of its own: segment r·L + l is tensor l on rank r, which owns it.
        segments = [len(positions) for positions in self.positions.values()]
        ranks, sizes = self._comm.world_size, self._group_sizes
        if not self._masks.sharded:
            return layout(segments, ranks, sizes)
        rows = self._comm.gather_numbers(segments)
        counts = [int(count) for row in rows for count in row]
        partition = layout(counts, ranks, sizes and sizes * ranks)
        return partition.owned_by_segment(
            [rank for rank in range(ranks) for _ in segments]
        )


def _positions(masks: Masks) -> dict[str, Tensor]:
    """Find the active weights of all tensors, with two waits for the device."""
    kept = [masks.kept(name).reshape(-1) for name in masks.parameters]
    counts = torch.stack([part.sum() for part in kept]).tolist()
    found = torch.nonzero(torch.cat(kept)).squeeze(1)
    starts = [0, *itertools.accumulate(len(part) for part in kept)]
    parts = torch.split(found, counts)
    return {
        name: part - start
        for name, part, start in zip(masks.parameters, parts, starts, strict=False)
    }
