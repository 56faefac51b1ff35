"""What was written: bytes before and after, zeros, tensor by tensor."""

from __future__ import annotations

__all__ = ["ExportSummary", "TensorSummary", "summarise"]

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor

from lightning_woodfisher.base.byte_sizes import format_bytes
from lightning_woodfisher.export.bitmask import count_zeros
from lightning_woodfisher.export.shared_memory import find_views
from lightning_woodfisher.pruning.report import format_table

Storage = Literal["dense", "sparse", "shared"]
_MOST_ROWS = 24


@dataclass(frozen=True)
class TensorSummary:
    """One tensor of a file.

    Attributes:
        name: its key.
        shape: its shape.
        elements: their number.
        zeros: elements whose bits are all zero.
        dense_bytes: bytes of the elements; 0 where another tensor shares its memory.
        written_bytes: bytes of the elements in the file.
        storage: ``"sparse"``, ``"dense"``, or ``"shared"``: memory of another tensor.
    """

    name: str
    shape: tuple[int, ...]
    elements: int
    zeros: int
    dense_bytes: int
    written_bytes: int
    storage: Storage


@dataclass(frozen=True)
class ExportSummary:
    """A file and what is in it.

    Attributes:
        path: of the file.
        file_bytes: its size, with all headers, graphs and side files.
        tensors: in the order of the ``state_dict``.
    """

    path: Path
    file_bytes: int
    tensors: tuple[TensorSummary, ...]

    @property
    def dense_bytes(self) -> int:
        """Bytes of all elements; memory that tensors share counts once."""
        return sum(tensor.dense_bytes for tensor in self.tensors)

    @property
    def zeros(self) -> int:
        """Zeros in all tensors; those of shared memory count once."""
        return sum(t.zeros for t in self.tensors if t.storage != "shared")

    @property
    def elements(self) -> int:
        """Elements of all tensors; those of shared memory count once."""
        return sum(t.elements for t in self.tensors if t.storage != "shared")

    @property
    def ratio(self) -> float:
        """Size of the file over the bytes of all elements."""
        return self.file_bytes / max(1, self.dense_bytes)

    def to_table(self) -> str:
        """Draw the tensors as a text table.

        Returns:
            A line for each tensor with zeros (the largest, when they are many), one for
            the others together, and the totals of the file.
        """
        head = ("tensor", "shape", "zeros", "dense", "written", "stored")
        listed = sorted(
            (t for t in self.tensors if t.zeros and t.storage != "shared"),
            key=lambda t: -t.elements,
        )[:_MOST_ROWS]
        rows: list[tuple[str, ...]] = [
            (
                t.name,
                "×".join(map(str, t.shape)) or "–",
                _share(t.zeros, t.elements),
                format_bytes(t.dense_bytes),
                format_bytes(t.written_bytes),
                t.storage,
            )
            for t in self.tensors
            if t in listed
        ]
        others = [t for t in self.tensors if t not in listed]
        if others:
            owned = [t for t in others if t.storage != "shared"]
            rows.append(
                (
                    f"{len(others)} others",
                    "",
                    _share(sum(t.zeros for t in owned), sum(t.elements for t in owned)),
                    format_bytes(sum(t.dense_bytes for t in others)),
                    format_bytes(sum(t.written_bytes for t in others)),
                    "",
                )
            )
        total = (
            "file",
            "",
            _share(self.zeros, self.elements),
            format_bytes(self.dense_bytes),
            format_bytes(self.file_bytes),
            f"{self.ratio:.1%}",
        )
        return format_table(head, rows, total)


def summarise(
    state_dict: Mapping[str, Tensor],
    path: Path,
    sparse_bytes: Mapping[str, int] | None = None,
    side_files: tuple[Path, ...] = (),
) -> ExportSummary:
    """Describe a file that holds a ``state_dict``.

    Args:
        state_dict: what was written.
        path: of the file.
        sparse_bytes: bytes of the tensors that are stored sparse, by name.
        side_files: files that belong to it.

    Returns:
        The description.
    """
    views, sparse = find_views(state_dict), sparse_bytes or {}
    tensors = []
    for name, tensor in state_dict.items():
        size = 0 if name in views else tensor.numel() * tensor.itemsize
        storage: Storage = "sparse" if name in sparse else "dense"
        tensors.append(
            TensorSummary(
                name=name,
                shape=tuple(tensor.shape),
                elements=tensor.numel(),
                zeros=count_zeros(tensor),
                dense_bytes=size,
                written_bytes=sparse.get(name, size),
                storage="shared" if name in views else storage,
            )
        )
    written = sum(file.stat().st_size for file in (path, *side_files))
    return ExportSummary(path, written, tuple(tensors))


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.2%}" if whole else "–"
