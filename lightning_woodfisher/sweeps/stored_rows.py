"""Gradients collected once and used by many settings of a sweep.

Settings that differ in damping, block size, update or sparsity take the same gradients at
the start, and fewer gradients are the first of many: mini-batch i has the same samples
whatever N is. Rows are kept in memory, or in a temporary file where they are too many.
"""

from __future__ import annotations

__all__ = ["RowStore", "StoredSampling", "kind_of_rows"]

import dataclasses
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_woodfisher.base.types import common_dtype
from lightning_woodfisher.criteria import Criterion
from lightning_woodfisher.fisher.config import FisherConfig, rows_in_chunk
from lightning_woodfisher.pruning.sampling import Sampling
from lightning_woodfisher.weights.active import ActiveWeights
from lightning_woodfisher.weights.masks import Masks


@dataclass(frozen=True)
class _Kept:
    """Rows ``[N, D_r]`` on the CPU, the losses and the note that came with them."""

    key: tuple[Any, ...]
    rows: Tensor
    losses: list[float]
    notes: list[str]


class RowStore:
    """The gradients at the start of a sweep; one kind of them at a time.

    Args:
        memory: bytes that rows may take in host memory; more go to a temporary file.
        most: N for each m: how many gradients the settings want at most.

    Attributes:
        collections: how many times gradients were collected for it.
    """

    def __init__(self, memory: int, most: dict[int, int]) -> None:
        self.collections = 0
        self._memory = memory
        self._most = most
        self._kept: _Kept | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def most(self, size: int, count: int) -> int:
        """Give the number of gradients to collect.

        Args:
            size: m.
            count: N of the setting that asks.

        Returns:
            The largest N of the settings with this m.
        """
        return max(count, self._most.get(size, 0))

    def find(self, key: tuple[Any, ...]) -> _Kept | None:
        """Look rows up.

        Args:
            key: what they depend on.

        Returns:
            What is kept under the same key.
        """
        kept = self._kept
        return kept if kept is not None and kept.key == key else None

    def make_room(self, count: int, width: int, dtype: torch.dtype) -> Tensor | None:
        """Make the tensor for rows; those kept before are dropped.

        Args:
            count: N.
            width: D_r.
            dtype: of the rows.

        Returns:
            Tensor ``[N, D_r]`` in memory or on disk, None when neither has room.
        """
        self.close()
        size = count * width * dtype.itemsize
        if size <= self._memory:
            return torch.empty(count, width, dtype=dtype)
        try:
            self._folder = tempfile.TemporaryDirectory(prefix="lightning-woodfisher-")
            if size > shutil.disk_usage(self._folder.name).free:
                self.close()
                return None
            path = str(Path(self._folder.name, "rows"))
            flat = torch.from_file(path, shared=True, size=count * width, dtype=dtype)
        except (OSError, RuntimeError):
            # The other ranks must learn of it; gradients are then collected each time.
            self.close()
            return None
        return flat.view(count, width)

    def keep(
        self, key: tuple[Any, ...], rows: Tensor, losses: list[float], notes: list[str]
    ) -> None:
        """Keep rows.

        Args:
            key: what they depend on.
            rows: made by :meth:`make_room`, filled.
            losses: of their mini-batches.
            notes: how they were computed.
        """
        self._kept = _Kept(key, rows, losses, notes)
        self.collections += 1

    def close(self) -> None:
        """Drop what is kept, and its file."""
        self._kept = None
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None


class StoredSampling(Sampling):
    """A :class:`Sampling` whose first gradients come from a store.

    Args:
        arguments: of :class:`Sampling`.
        store: of the sweep.
        is_start: tells whether weights and masks are those that the sweep started from.
        options: of :class:`Sampling`.
    """

    def __init__(
        self,
        *arguments: Any,
        store: RowStore,
        is_start: Callable[[Masks], bool],
        **options: Any,
    ) -> None:
        super().__init__(*arguments, **options)
        self._store = store
        self._is_start = is_start
        self._from_store = False

    def observe(
        self, criterion: Criterion, active: ActiveWeights, seed: int
    ) -> tuple[list[float], str | None]:
        """Feed a criterion with the gradients it wants.

        Args:
            criterion: begun.
            active: whose gradients.
            seed: of the samples.

        Returns:
            The losses before the step, and how gradients were computed.
        """
        losses, note = super().observe(criterion, active, seed)
        if self._from_store:
            # A prefix may cut a micro-batch whose gradients share one mean loss.
            losses = self.measure(seed)
        return losses, note

    def rows(
        self,
        active: ActiveWeights,
        seed: int,
        losses: list[float] | None = None,
        tick: Callable[[int], object] = lambda _: None,
        notes: list[str] | None = None,
        fisher: FisherConfig | None = None,
        curved: bool = False,
    ) -> Iterator[Tensor]:
        """Compute gradients, or take those that are kept.

        Args:
            active: whose gradients.
            seed: of the samples.
            losses: receives those of the mini-batches at the end.
            tick: called with the number of gradients that have been done.
            notes: receives how gradients were computed.
            fisher: other settings than those of the sweep; such rows are not kept.
            curved: rows of the Hessian; such rows are not kept.

        Returns:
            This rank's slice of all gradients, in order: tensors ``[n, D_r]``.
        """
        losses = [] if losses is None else losses
        notes = [] if notes is None else notes
        if fisher is not None or curved:
            return super().rows(active, seed, losses, tick, notes, fisher, curved)
        self._from_store = False
        # Of rows that were left out a setting with fewer gradients has others.
        if self._fisher.max_nonfinite:
            return super().rows(active, seed, losses, tick, notes)
        if not self._is_start(self._masks):
            return super().rows(active, seed, losses, tick, notes)
        fisher, sizes = self._fisher, active.partition.shard_sizes()
        names = tuple(self._masks.parameters)
        key = (seed, tuple(sizes), names, active.pattern, kind_of_rows(fisher))
        kept = self._store.find(key)
        if kept is None:
            kept = self._collect(active, seed, key, tick)
        if kept is None:
            return super().rows(active, seed, losses, tick, notes)
        self._from_store = True
        losses.extend(kept.losses[: fisher.num_gradients])
        notes.extend(kept.notes)
        return self._pieces(kept.rows)

    def _pieces(self, rows: Tensor) -> Iterator[Tensor]:
        chunk = rows_in_chunk(self._fisher, rows.shape[1])
        for piece in torch.split(rows[: self._fisher.num_gradients], chunk):
            yield piece.to(self._comm.device)

    def _collect(
        self,
        active: ActiveWeights,
        seed: int,
        key: tuple[Any, ...],
        tick: Callable[[int], object],
    ) -> _Kept | None:
        """Collect as many rows as any setting needs; None where they cannot be kept."""
        wanted, store = self._fisher, self._store
        count = store.most(wanted.gradient_batch_size, wanted.num_gradients)
        width = active.partition.shard_sizes()[self._comm.rank]
        rows = store.make_room(count, width, self._row_dtype())
        lacking = self._comm.gather_numbers([float(rows is None)])
        if rows is None or any(row[0] for row in lacking):
            return None
        losses: list[float] = []
        notes: list[str] = []
        done = 0
        self._fisher = dataclasses.replace(wanted, num_gradients=count)
        try:
            for piece in super().rows(active, seed, losses, tick, notes):
                rows[done : done + len(piece)] = piece
                done += len(piece)
        finally:
            self._fisher = wanted
        store.keep(key, rows, losses, notes)
        return store.find(key)

    def _row_dtype(self) -> torch.dtype:
        if self._fisher.row_dtype == "bfloat16":
            return torch.bfloat16
        return common_dtype(self._masks.parameters.values())


def kind_of_rows(fisher: FisherConfig) -> FisherConfig:
    """Forget the settings on which gradients do not depend.

    Args:
        fisher: all settings.

    Returns:
        Equal for settings whose gradients are the same, but for their number.
    """
    return dataclasses.replace(
        fisher,
        num_gradients=1,
        block_size=1,
        damping=1.0,
        engine="auto",
        precision="auto",
        offload_rows=False,
        memory_budget=None,
        centered=False,
        first_order_samples=None,
    )
