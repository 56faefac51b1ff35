"""Gradients that are collected once and used by many settings of a sweep.

Settings that differ in damping, block size, update or sparsity use the same gradients at
the start. A setting with fewer gradients uses the first of them: mini-batch i has the same
samples for every N. Rows are kept in memory, or in a temporary file if they are too large.
"""

from __future__ import annotations

__all__ = ["RowStore", "StoredEvaluator", "gradient_settings"]

import dataclasses
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_woodfisher.base.types import common_dtype
from lightning_woodfisher.fisher.config import FisherConfig, rows_in_chunk
from lightning_woodfisher.pruning.evaluator import CollectionRecord, Evaluator
from lightning_woodfisher.weights.active import ActiveWeights
from lightning_woodfisher.weights.masks import Masks


class RowStore:
    """The gradients of one kind at the start of a sweep.

    Args:
        memory: bytes of host memory for the rows; if they need more, a file is used.
        most_gradients: the largest N of the settings, by their m.

    Attributes:
        most_gradients: as given.
        collections: number of times that gradients were stored.
        rows: tensor ``[N, D_r]`` on the CPU, uninitialized until ``key`` is set.
        key: the properties on which the rows depend; None without rows.
        notes: how the rows were computed.
    """

    def __init__(self, memory: int, most_gradients: Mapping[int, int]) -> None:
        self.most_gradients = most_gradients
        self.collections = 0
        self.key: tuple[Any, ...] | None = None
        self.notes: list[str] = []
        self.rows = torch.empty(0, 0)
        self._memory = memory
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def make_room(self, count: int, width: int, dtype: torch.dtype) -> bool:
        """Replace ``rows`` by an empty tensor.

        Args:
            count: N.
            width: D_r.
            dtype: dtype of the rows.

        Returns:
            Whether there is room for them, in memory or on disk.
        """
        self.close()
        size = count * width * dtype.itemsize
        if size <= self._memory:
            self.rows = torch.empty(count, width, dtype=dtype)
            return True
        try:
            self._folder = tempfile.TemporaryDirectory(prefix="lightning-woodfisher-")
            if size > shutil.disk_usage(self._folder.name).free:
                return False
            path = str(Path(self._folder.name, "rows"))
            flat = torch.from_file(path, shared=True, size=count * width, dtype=dtype)
        except (OSError, RuntimeError):
            # The other ranks must learn of it; gradients are then collected each time.
            return False
        self.rows = flat.view(count, width)
        return True

    def close(self) -> None:
        """Delete the rows and their file."""
        self.key = None
        self.rows = torch.empty(0, 0)
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None


class StoredEvaluator(Evaluator):
    """An :class:`Evaluator` that takes the gradients at the start of a sweep from a store.

    Args:
        arguments: arguments of :class:`Evaluator`.
        store: the store of the sweep.
        is_start: returns whether weights and masks are those at the start of the sweep.
        options: keyword arguments of :class:`Evaluator`.
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

    def _stored_rows(
        self,
        active: ActiveWeights,
        seed: int,
        record: CollectionRecord,
    ) -> Iterator[Tensor] | None:
        fisher, store = self._fisher, self._store
        # If rows are left out, the first of many are not those of fewer gradients.
        if fisher.max_nonfinite or not self._is_start(self._masks):
            return None
        sizes = tuple(active.partition.shard_sizes())
        names = tuple(self._masks.parameters)
        key = (seed, sizes, names, active.pattern, gradient_settings(fisher))
        if store.key != key and not self._collect(active, seed, key, record.tick):
            return None
        record.notes.extend(store.notes)
        rows = store.rows[: fisher.num_gradients]
        chunks = torch.split(rows, rows_in_chunk(fisher, rows.shape[1]))
        return (chunk.to(self._comm.device) for chunk in chunks)

    def _collect(
        self,
        active: ActiveWeights,
        seed: int,
        key: tuple[Any, ...],
        tick: Callable[[int], object],
    ) -> bool:
        """Store as many rows as any setting needs; return whether there is room."""
        store = self._store
        count = store.most_gradients[self._fisher.gradient_batch_size]
        width = active.partition.shard_sizes()[self._comm.rank]
        dtype = common_dtype(self._masks.parameters.values())
        if self._fisher.row_dtype == "bfloat16":
            dtype = torch.bfloat16
        has_room = store.make_room(count, width, dtype)
        if not all(row[0] for row in self._comm.gather_numbers([float(has_room)])):
            store.close()
            return False
        record, done = CollectionRecord(tick=tick), 0
        fisher = dataclasses.replace(self._fisher, num_gradients=count)
        for piece in self.rows(active, seed, record, fisher):
            store.rows[done : done + len(piece)] = piece
            done += len(piece)
        store.key, store.notes = key, record.notes
        store.collections += 1
        return True


def gradient_settings(fisher: FisherConfig) -> FisherConfig:
    """Set the settings that do not change the gradients to constants.

    Args:
        fisher: all settings.

    Returns:
        A configuration that is equal for settings with the same gradients, except for
        their number.
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
