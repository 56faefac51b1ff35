"""Sparse safetensors: a bit for each weight, and the weights that are not zero.

The file is a safetensors file with three entries in its metadata: ``woodfisher.format``,
``woodfisher.version`` and ``woodfisher.layout``, a JSON object with

- ``order``: names of the tensors;
- ``sparse``: for each tensor that is stored sparse its shape and the names under which
  the file has its bits (uint8) and its values (see :mod:`.bitmask`);
- ``views``: for each tensor in the memory of another one where it lies in it.

All others are stored dense under their name. Whoever reads it as a plain safetensors file
gets bits and values, and can tell by the metadata.
"""

from __future__ import annotations

__all__ = ["load_sparse", "read_metadata", "save_sparse"]

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_woodfisher.base.errors import ConfigurationError
from lightning_woodfisher.base.optional_imports import import_optional
from lightning_woodfisher.distributed.dtensor import is_sharded
from lightning_woodfisher.export.bitmask import count_zeros, pack, packed_bytes, unpack
from lightning_woodfisher.export.shared_memory import View, find_views, view_of
from lightning_woodfisher.export.summary import ExportSummary, summarise

_FORMAT, _VERSION = "lightning-woodfisher-sparse", 1
_OURS = "woodfisher."
# A sparse tensor has two entries in the header in place of one, and one in the layout.
_HEADER_BYTES = 300
_DTYPES = frozenset(
    {
        *(torch.bool, torch.uint8, torch.uint16, torch.uint32, torch.uint64),
        *(torch.int8, torch.int16, torch.int32, torch.int64, torch.complex64),
        *(torch.float8_e4m3fn, torch.float8_e5m2),
        *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    }
)
# The name that safetensors itself uses in the header.
_RESERVED = "__metadata__"


def save_sparse(
    state_dict: Mapping[str, Tensor],
    path: str | os.PathLike[str],
    metadata: Mapping[str, str] | None = None,
) -> ExportSummary:
    """Write tensors to a safetensors file, those with many zeros as bits and values.

    A tensor is stored sparse where that is smaller. Every bit comes back, -0.0 and NaN
    too; tensors that share memory are written once, and share it again when loaded. The
    file appears under its name only when it is complete. What cannot be written (an entry
    that is no tensor, is sharded or of another dtype; metadata that is no text) is
    refused with a ConfigurationError.

    Args:
        state_dict: tensors by name, on any device; integers, bool, float8 to float64, or
            complex64.
        path: of the file; folders are made as needed.
        metadata: what else to write into the header; strings.

    Returns:
        What was written.
    """
    library = import_optional("safetensors.torch", "this file")
    header = _check_metadata(metadata or {})
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
        size, item = tensor.numel(), tensor.itemsize
        packed = packed_bytes(size, count_zeros(tensor), item)
        if packed + _HEADER_BYTES < size * item:
            keys = _free(f"{name}.bits", state), _free(f"{name}.values", state)
            stored.update(zip(keys, pack(tensor.cpu()), strict=True))
            sparse[name] = dict(
                zip(
                    ("bits", "values", "shape"),
                    (*keys, list(tensor.shape)),
                    strict=True,
                )
            )
            sparse_bytes[name] = packed
        else:
            stored[name] = _alone(tensor)
    layout = {
        "order": list(state),
        "sparse": sparse,
        "views": {name: dataclasses.asdict(view) for name, view in views.items()},
    }
    header |= {
        f"{_OURS}format": _FORMAT,
        f"{_OURS}version": str(_VERSION),
        f"{_OURS}layout": json.dumps(layout, separators=(",", ":")),
    }
    path = Path(path)
    with replacing(path) as unfinished:
        library.save_file(stored, unfinished, header)
    return summarise(state, path, sparse_bytes)


def load_sparse(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read what :func:`save_sparse` has written.

    A file of another kind, of a later version of the format, or a damaged one is refused
    with a ConfigurationError.

    Args:
        path: of the file.

    Returns:
        Contiguous tensors on the CPU by name, in the order in which they were saved.
    """
    with _opened(path) as file:
        header = file.metadata() or {}
        _check_version(path, header)
        layout = json.loads(header[f"{_OURS}layout"])
        views = {name: View(**view) for name, view in layout["views"].items()}
        owned: dict[str, Tensor] = {}
        for name in (name for name in layout["order"] if name not in views):
            entry = layout["sparse"].get(name)
            if entry is None:
                # A copy: what safetensors gives lies in the mapped file.
                owned[name] = file.get_tensor(name).clone()
            else:
                bits, values = (file.get_tensor(entry[k]) for k in ("bits", "values"))
                owned[name] = unpack(bits, values, entry["shape"])
        return {
            name: view_of(owned[views[name].owner], views[name])
            if name in views
            else owned[name]
            for name in layout["order"]
        }


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """Read the metadata that :func:`save_sparse` was given.

    Args:
        path: of the file.

    Returns:
        Texts by name.
    """
    with _opened(path) as file:
        header = file.metadata() or {}
        _check_version(path, header)
        return {k: v for k, v in header.items() if not k.startswith(_OURS)}


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Let a file appear under its name only when it is complete.

    Args:
        path: of the file; folders are made as needed.

    Yields:
        The path to write to.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield unfinished
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


@contextlib.contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[Any]:
    """Open a safetensors file, and say what is wrong with it."""
    library = import_optional("safetensors", "this file")
    if not Path(path).is_file():
        raise ConfigurationError(f"{path} is not a file.")
    try:
        with library.safe_open(path, framework="pt") as file:
            yield file
    except library.SafetensorError as error:
        raise ConfigurationError(
            f"{path} is no safetensors file, or it is cut off ({error})."
        ) from error
    except ConfigurationError:
        raise
    # What json, missing keys, unpack and view_of raise, and torch for absurd shapes.
    except (
        *(ValueError, LookupError, TypeError, AttributeError),
        *(ArithmeticError, RuntimeError),
    ) as error:
        raise ConfigurationError(
            f"{path} is damaged: its layout and its tensors do not fit ({error})."
        ) from error


def _check_version(path: object, header: Mapping[str, str]) -> None:
    if header.get(f"{_OURS}format") != _FORMAT:
        raise ConfigurationError(
            f"{path} is a safetensors file, but not a sparse one; read it with "
            "safetensors.torch.load_file."
        )
    version = int(header[f"{_OURS}version"])
    if version > _VERSION:
        raise ConfigurationError(
            f"{path} has version {version} of the sparse format; this package reads up to "
            f"{_VERSION}. Update lightning-woodfisher."
        )


def _check_metadata(metadata: Mapping[str, str]) -> dict[str, str]:
    for name, text in metadata.items():
        if not isinstance(name, str) or not isinstance(text, str):
            raise ConfigurationError(
                f"metadata {name!r}: {text!r} is not text; write str(…) or json.dumps(…)."
            )
        if name.startswith(_OURS):
            raise ConfigurationError(
                f"metadata {name!r}: names that begin with {_OURS!r} are those of the "
                "format; take another one."
            )
    return dict(metadata)


def _check_tensor(name: str, tensor: object) -> None:
    reason = ""
    if not isinstance(tensor, Tensor):
        reason = f"is a {type(tensor).__name__} and no tensor; leave it out"
    elif is_sharded(tensor):
        reason = "is sharded; gather it first with full_tensor()"
    elif tensor.is_meta:
        reason = "is on the meta device and has no elements; load the weights first"
    elif tensor.layout != torch.strided:
        reason = f"has layout {tensor.layout}; make it dense with to_dense()"
    elif tensor.dtype not in _DTYPES:
        reason = (
            f"has dtype {tensor.dtype}, for which safetensors has no name; convert it"
        )
    elif name == _RESERVED:
        reason = "has the name of the header of safetensors; rename it"
    if reason:
        raise ConfigurationError(f"state_dict[{name!r}] {reason}.")


def _free(key: str, taken: Mapping[str, object]) -> str:
    """Find a name that no tensor has."""
    while key in taken:
        key += "_"
    return key


def _alone(tensor: Tensor) -> Tensor:
    """Give a contiguous tensor on the CPU that shares no memory with another one."""
    tensor = tensor.cpu().contiguous()
    size = tensor.numel() * tensor.itemsize
    return tensor if tensor.untyped_storage().nbytes() == size else tensor.clone()
