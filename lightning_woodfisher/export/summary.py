"""Summarize an exported file: bytes and zeros of each tensor."""

from __future__ import annotations

__all__ = ["ExportSummary", "TensorSummary", "summarize"]

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor

from lightning_woodfisher.base.byte_sizes import format_bytes
from lightning_woodfisher.base.text_table import format_table
from lightning_woodfisher.export.bitmask import count_zeros
from lightning_woodfisher.export.shared_memory import find_views

Storage = Literal["dense", "sparse", "shared"]
_MAX_ROWS = 24


@dataclass(frozen=True)
class TensorSummary:
    """One tensor of a file.

    Attributes:
        name: key in the ``state_dict``.
        shape: shape of the tensor.
        zeros: elements whose bits are all zero.
        dense_bytes: bytes of the elements; 0 if another tensor shares its memory.
        written_bytes: bytes of the elements in the file.
        storage: ``"sparse"``, ``"dense"``, or ``"shared"`` if it lies in the memory of
            another tensor.
    """

    name: str
    shape: tuple[int, ...]
    zeros: int
    dense_bytes: int
    written_bytes: int
    storage: Storage


@dataclass(frozen=True)
class ExportSummary:
    """A file and the tensors in it.

    Attributes:
        path: path of the file.
        file_bytes: size of the file, with headers, graphs and side files.
        tensors: the tensors, in the order of the ``state_dict``.
    """

    path: Path
    file_bytes: int
    tensors: tuple[TensorSummary, ...]

    @property
    def dense_bytes(self) -> int:
        """Bytes of all elements, with shared memory counted once."""
        return sum(tensor.dense_bytes for tensor in self.tensors)

    @property
    def zeros(self) -> int:
        """Zeros in all tensors, with shared memory counted once."""
        return sum(t.zeros for t in self.tensors if t.storage != "shared")

    @property
    def ratio(self) -> float:
        """Size of the file divided by the bytes of all elements."""
        return self.file_bytes / max(1, self.dense_bytes)

    def to_table(self) -> str:
        """Format the tensors as a text table.

        Returns:
            A line for each of the largest tensors with zeros, one line for all others,
            and the totals of the file.
        """
        head = ("tensor", "shape", "zeros", "dense", "written", "stored")
        pruned = [t for t in self.tensors if t.zeros and t.storage != "shared"]
        pruned = sorted(pruned, key=lambda t: -math.prod(t.shape))[:_MAX_ROWS]
        rows: list[tuple[str, ...]] = [
            (t.name, "×".join(map(str, t.shape)) or "–", *_format_sizes([t]), t.storage)
            for t in self.tensors
            if t in pruned
        ]
        others = [t for t in self.tensors if t not in pruned]
        if others:
            rows.append((f"{len(others)} others", "", *_format_sizes(others), ""))
        zeros, dense, _ = _format_sizes(self.tensors)
        written = (format_bytes(self.file_bytes), f"{self.ratio:.1%}")
        return format_table(head, rows, ("file", "", zeros, dense, *written))


def summarize(
    state_dict: Mapping[str, Tensor],
    path: Path,
    sparse_bytes: Mapping[str, int] | None = None,
    side_files: tuple[Path, ...] = (),
) -> ExportSummary:
    """Summarize a file that holds a ``state_dict``.

    Args:
        state_dict: tensors that were written, by name.
        path: path of the file.
        sparse_bytes: bytes of the tensors that are stored sparse, by name.
        side_files: paths of additional files with weights.

    Returns:
        The summary.
    """
    views, sparse = find_views(state_dict), sparse_bytes or {}
    tensors = []
    for name, tensor in state_dict.items():
        size = 0 if name in views else tensor.nbytes
        storage: Storage = "sparse" if name in sparse else "dense"
        tensors.append(
            TensorSummary(
                name=name,
                shape=tuple(tensor.shape),
                zeros=count_zeros(tensor),
                dense_bytes=size,
                written_bytes=sparse.get(name, size),
                storage="shared" if name in views else storage,
            )
        )
    written = sum(file.stat().st_size for file in (path, *side_files))
    return ExportSummary(path, written, tuple(tensors))


def _format_sizes(tensors: Sequence[TensorSummary]) -> tuple[str, str, str]:
    """Format the share of zeros, the dense and the written bytes of tensors together."""
    owned = [tensor for tensor in tensors if tensor.storage != "shared"]
    elements = sum(math.prod(tensor.shape) for tensor in owned)
    zeros = sum(tensor.zeros for tensor in owned)
    return (
        f"{zeros / elements:.2%}" if elements else "–",
        format_bytes(sum(tensor.dense_bytes for tensor in tensors)),
        format_bytes(sum(tensor.written_bytes for tensor in tensors)),
    )
