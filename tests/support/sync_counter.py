"""Count the operations for which the host waits for a GPU, on any device.

The host waits where it reads a number from the device, where the shape of a result depends
on numbers on the device, and where it copies between host and device without
``non_blocking``. On a CPU none of them waits, but they are the same operations, except for
copies to the device: the counter cannot tell them there, because both ends are on the host.
"""

from __future__ import annotations

import collections
import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from devices import DEVICE
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import lightning_woodfisher

_PACKAGE = str(Path(lightning_woodfisher.__file__).parent)
# Names of ATen operations; those of linear algebra check for errors on the host.
_WAITING = {
    "_linalg_check_errors",
    "cholesky_inverse",
    "_local_scalar_dense",
    "_unique2",
    "bincount",
    "equal",
    "is_nonzero",
    "masked_select",
    "nonzero",
    "repeat_interleave",
    "unique_consecutive",
    "unique_dim",
}
# Their tensors are on the host, copied there before later work was started.
_ON_HOST = ("base/host_copy.py", "data/isolation.py")
_INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}
_COPYING = {"_to_copy", "copy_"}
# Methods that read a tensor without an ATen operation if it is on the host.
_READING = {Tensor.tolist, Tensor.numpy, Tensor.cpu}
_MAKING = {torch.tensor, torch.as_tensor}


class Waits(collections.Counter[str]):
    """Number of waits by place in the package; ``total()`` is their sum."""

    def inside(self, *folders: str) -> int:
        """Number of those whose innermost line of the package is in the folders."""
        return sum(n for place, n in self.items() if place.startswith(folders))

    def __str__(self) -> str:
        lines = (f"{number:6}  {place}" for place, number in self.most_common())
        return "\n".join([f"{self.total()} waits", *lines])


@contextlib.contextmanager
def counted_waits() -> Iterator[Waits]:
    """Count the waits inside the block, which uses one thread."""
    waits, threads = Waits(), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with _Operations(waits), _Methods(waits):
            yield waits
    finally:
        torch.set_num_threads(threads)


class _Operations(TorchDispatchMode):
    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self._waits = waits

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if _waits(func, args, kwargs):
            _note(self._waits, str(func))
        return func(*args, **kwargs)


class _Methods(TorchFunctionMode):
    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self._waits = waits

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        made = func in _MAKING and kwargs.get("device") is not None
        if made or (DEVICE.type == "cpu" and func in _READING):
            _note(self._waits, func.__name__)
        return func(*args, **kwargs)


def _waits(func: Any, args: Any, kwargs: Any) -> bool:
    name = func.overloadpacket.__name__
    if name == "repeat_interleave":
        return kwargs.get("output_size") is None
    if name in _WAITING:
        return True
    if name in _INDEXING:
        by_mask = any(
            index is not None and index.dtype in {torch.bool, torch.uint8}
            for index in args[1]
        )
        # One number on the host is written as by masked_fill_.
        number = name != "index" and args[2].dim() == 0 and args[2].device.type == "cpu"
        return by_mask and not (number and DEVICE.type != "cpu")
    if name in _COPYING:
        source = args[1] if name == "copy_" else args[0]
        target = args[0].device if name == "copy_" else kwargs.get("device")
        waiting = not (kwargs.get("non_blocking") or (name == "copy_" and args[2:3]))
        return target is not None and waiting and source.device != torch.device(target)
    return False


def _note(waits: Waits, operation: str) -> None:
    """Count for the innermost line of the package."""
    frame = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(_PACKAGE):
            place = f"{file[len(_PACKAGE) + 1 :]}:{frame.f_lineno}"
            if place.startswith(_ON_HOST):
                return
            waits[f"{place}  {operation}"] += 1
            return
        frame = frame.f_back  # type: ignore[assignment]
    waits[f"elsewhere  {operation}"] += 1
