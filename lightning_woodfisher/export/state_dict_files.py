"""Save a ``state_dict`` to a dense or sparse file, and load sparse files.

A sparse file is a safetensors file that stores a bit for each weight and the nonzero
weights. Its metadata has three entries: ``woodfisher.format``, ``woodfisher.version`` and
``woodfisher.layout``, a JSON object with

- ``order``: names of all tensors, in order;
- ``sparse``: for each tensor that is stored sparse, its shape and the names of its bits
  (uint8) and its values in the file (see :mod:`.bitmask`);
- ``views``: for each tensor that lies in the memory of another one, its position there
  (see :mod:`.shared_memory`).

All other tensors are stored dense under their own names. A program that reads the file as
plain safetensors sees bits and values.
"""

from __future__ import annotations

__all__ = [
    "load_sparse",
    "read_metadata",
    "save_dense",
    "save_sparse",
    "write_atomically",
]

import contextlib
import dataclasses
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_woodfisher.base.errors import ConfigurationError
from lightning_woodfisher.base.optional_imports import import_optional
from lightning_woodfisher.distributed.dtensor import is_sharded
from lightning_woodfisher.export.bitmask import count_packed_bytes, pack, unpack
from lightning_woodfisher.export.shared_memory import View, find_views, make_view
from lightning_woodfisher.export.summary import ExportSummary, summarize

_FORMAT, _VERSION = "lightning-woodfisher-sparse", 1
_PREFIX = "woodfisher."
# A sparse tensor has two header entries instead of one, and an entry in the layout.
_HEADER_BYTES = 300
_DTYPES = frozenset(
    {
        *(torch.bool, torch.uint8, torch.uint16, torch.uint32, torch.uint64),
        *(torch.int8, torch.int16, torch.int32, torch.int64, torch.complex64),
        *(torch.float8_e4m3fn, torch.float8_e5m2),
        *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    }
)
# Key of the metadata in the header of a safetensors file.
_RESERVED = "__metadata__"
# The two parts of a sparse tensor, in the order of :func:`pack`.
_PACKED = ("bits", "values")


def save_dense(
    state_dict: Mapping[str, Tensor], path: str | os.PathLike[str]
) -> ExportSummary:
    """Save tensors for ``torch.load(path, weights_only=True)``.

    Args:
        state_dict: tensors by name.
        path: path of the file; missing folders are created.

    Returns:
        Summary of the file.
    """
    path = Path(path)
    state = {name: tensor.detach().cpu() for name, tensor in state_dict.items()}
    with write_atomically(path) as unfinished:
        torch.save(state, unfinished)
    return summarize(state, path)


def save_sparse(
    state_dict: Mapping[str, Tensor],
    path: str | os.PathLike[str],
    metadata: Mapping[str, str] | None = None,
) -> ExportSummary:
    """Save tensors to a safetensors file, those with many zeros as bits and values.

    A tensor is stored sparse if that is smaller. Loading restores every bit, also of -0.0
    and NaN. Tensors that share memory are written once and share it again when loaded. The
    file appears under its name only when it is complete. A ConfigurationError is raised for
    entries that are not tensors, are sharded or have another dtype, and for metadata that
    is not text.

    Args:
        state_dict: tensors by name, on any device; integers, bool, float8 to float64, or
            complex64.
        path: path of the file; missing folders are created.
        metadata: additional strings for the header of the file, by name.

    Returns:
        Summary of the file.
    """
    library = import_optional("safetensors.torch", "the sparse format")
    header = dict(metadata or {})
    for name, text in header.items():
        _check_metadata(name, text)
    for name, tensor in state_dict.items():
        _check_tensor(name, tensor)
    state = {
        name: tensor.detach().resolve_conj().resolve_neg()
        for name, tensor in state_dict.items()
    }
    views = find_views(state)
    stored: dict[str, Tensor] = {}
    sparse: dict[str, dict[str, Any]] = {}
    sparse_bytes: dict[str, int] = {}
    for name, tensor in state.items():
        if name in views:
            continue
        packed = count_packed_bytes(tensor)
        if packed + _HEADER_BYTES < tensor.nbytes:
            bits, values = (_find_free_name(f"{name}.{k}", state) for k in _PACKED)
            stored[bits], stored[values] = pack(tensor.cpu())
            shape = list(tensor.shape)
            sparse[name] = {"bits": bits, "values": values, "shape": shape}
            sparse_bytes[name] = packed
        else:
            stored[name] = _own_memory(tensor)
    layout = {
        "order": list(state),
        "sparse": sparse,
        "views": {name: dataclasses.asdict(view) for name, view in views.items()},
    }
    header |= {
        f"{_PREFIX}format": _FORMAT,
        f"{_PREFIX}version": str(_VERSION),
        f"{_PREFIX}layout": json.dumps(layout, separators=(",", ":")),
    }
    path = Path(path)
    with write_atomically(path) as unfinished:
        library.save_file(stored, unfinished, header)
    return summarize(state, path, sparse_bytes)


def load_sparse(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Load tensors that :func:`save_sparse` has written.

    A ConfigurationError is raised for a damaged file, a file of another kind, or a later
    version of the format.

    Args:
        path: path of the file.

    Returns:
        Contiguous tensors on the CPU by name, in the order in which they were saved.
    """
    with _open_sparse(path) as (file, header):
        layout = json.loads(header[f"{_PREFIX}layout"])
        views = {name: View(**view) for name, view in layout["views"].items()}
        _require_used_once(layout, views)
        owned: dict[str, Tensor] = {}
        for name in (name for name in layout["order"] if name not in views):
            entry = layout["sparse"].get(name)
            if entry is None:
                # A copy: the tensor of safetensors lies in the mapped file.
                owned[name] = file.get_tensor(name).clone()
            else:
                bits, values = (file.get_tensor(entry[k]) for k in _PACKED)
                owned[name] = unpack(bits, values, entry["shape"])
        return {
            name: make_view(owned[views[name].owner], views[name])
            if name in views
            else owned[name]
            for name in layout["order"]
        }


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """Read the metadata that was passed to :func:`save_sparse`.

    Args:
        path: path of the file.

    Returns:
        Strings by name.
    """
    with _open_sparse(path) as (_, header):
        return {k: v for k, v in header.items() if not k.startswith(_PREFIX)}


@contextlib.contextmanager
def write_atomically(path: Path) -> Iterator[Path]:
    """Write a file that appears under its name only when it is complete.

    Args:
        path: path of the file; missing folders are created.

    Yields:
        Path of the same name in an empty temporary folder. After an error the folder is
        deleted; otherwise all files in it are moved beside ``path``.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".export", dir=path.parent) as folder:
        yield Path(folder, path.name)
        # Some writers make files that only their owner can read: use the umask's mode.
        probe = Path(folder, ".mode")
        probe.touch()
        mode = probe.stat().st_mode
        probe.unlink()
        for written in Path(folder).iterdir():
            written.chmod(mode)
            written.replace(path.parent / written.name)


@contextlib.contextmanager
def _open_sparse(
    path: str | os.PathLike[str],
) -> Iterator[tuple[Any, dict[str, str]]]:
    """Open a sparse file and yield it with its metadata; explain errors of the reader."""
    library = import_optional("safetensors", "the sparse format")
    if not Path(path).is_file():
        raise ConfigurationError(f"{path} is not a file.")
    try:
        with library.safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            _check_version(path, header)
            yield file, header
    except library.SafetensorError as error:
        raise ConfigurationError(
            f"{path} is not a safetensors file, or it is cut off ({error})."
        ) from error
    except ConfigurationError:
        raise
    # From json, missing keys, unpack and make_view, and from torch for impossible shapes.
    except (
        *(ValueError, LookupError, TypeError, AttributeError),
        *(ArithmeticError, MemoryError, RuntimeError),
    ) as error:
        raise ConfigurationError(
            f"{path} is damaged: its layout and its tensors do not match ({error})."
        ) from error


def _require_used_once(layout: Mapping[str, Any], views: Mapping[str, View]) -> None:
    """Check that no tensor of the file is read more than once."""
    owned = (name for name in layout["order"] if name not in views)
    sparse = layout["sparse"]
    used = [
        key
        for name in owned
        for key in ([sparse[name][k] for k in _PACKED] if name in sparse else [name])
    ]
    if len({*used}) < len(used):
        raise ValueError("two entries are the same tensor of the file")


def _check_version(path: object, header: Mapping[str, str]) -> None:
    if header.get(f"{_PREFIX}format") != _FORMAT:
        raise ConfigurationError(
            f"{path} is a safetensors file, but not a sparse one; read it with "
            "safetensors.torch.load_file."
        )
    version = int(header[f"{_PREFIX}version"])
    if version > _VERSION:
        raise ConfigurationError(
            f"{path} has version {version} of the sparse format, but this package reads "
            f"versions up to {_VERSION}. Update lightning-woodfisher."
        )
    if version < 1:
        raise ValueError(f"there is no version {version} of the format")


def _check_metadata(name: object, text: object) -> None:
    if not isinstance(name, str) or not isinstance(text, str):
        raise ConfigurationError(
            f"metadata {name!r}: {text!r} is not text; use str(…) or json.dumps(…)."
        )
    if name.startswith(_PREFIX):
        raise ConfigurationError(
            f"metadata {name!r}: names that begin with {_PREFIX!r} are reserved for the "
            "format; choose another name."
        )


def _check_tensor(name: str, tensor: object) -> None:
    reason = ""
    if not isinstance(tensor, Tensor):
        reason = f"is of type {type(tensor).__name__}, not a tensor; leave it out"
    elif is_sharded(tensor):
        reason = "is sharded; gather it first with full_tensor()"
    elif tensor.is_meta:
        reason = "is on the meta device and has no elements; load the weights first"
    elif tensor.layout != torch.strided:
        reason = f"has layout {tensor.layout}; make it dense with to_dense()"
    elif tensor.dtype not in _DTYPES:
        reason = f"has dtype {tensor.dtype}, which safetensors cannot store; convert it"
    elif name == _RESERVED:
        reason = "has a name that safetensors reserves for its header; rename it"
    if reason:
        raise ConfigurationError(f"state_dict[{name!r}] {reason}.")


def _find_free_name(key: str, taken: Mapping[str, object]) -> str:
    while key in taken:
        key += "_"
    return key


def _own_memory(tensor: Tensor) -> Tensor:
    """Return a contiguous tensor on the CPU that shares no memory with another one."""
    tensor = tensor.cpu().contiguous()
    owns_all = tensor.untyped_storage().nbytes() == tensor.nbytes
    return tensor if owns_all else tensor.clone()
