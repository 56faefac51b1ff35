"""Measure the peak number of bytes of tensors that a piece of code allocates.

On a GPU the allocator keeps the count. On a CPU every operation is intercepted, and each
new storage is counted until it is freed. Unlike the size of the process, the result is
the same in every run.
"""

from __future__ import annotations

__all__ = ["AllocationMeter", "measure_step_bytes"]

import contextlib
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class AllocationMeter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of the storages that operations make and that still live.

    Only what is made while the meter is entered counts, by the thread that has entered
    it; what a kernel allocates for itself does not.

    Attributes:
        live_bytes: now.
        peak_bytes: the largest value of ``live_bytes`` so far.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live_bytes = 0
        self.peak_bytes = 0
        self._known: set[int] = set()
        self._paused = 0

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave what the body makes uncounted, such as the network's activations.

        Yields:
            Nothing.
        """
        self._paused += 1
        try:
            yield
        finally:
            self._paused -= 1

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        # A storage that was there before is known by being an argument.
        before = {_key(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and _key(tensor) not in before:
                self._count(tensor)
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known or self._paused or tensor.is_meta:
            return
        self._known.add(key)
        self.live_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        # The Python object of a storage lives as long as the storage itself.
        weakref.finalize(storage, self._forget, key, size).atexit = False

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live_bytes -= size


def measure_step_bytes(
    step: Callable[[], object], device: torch.device | str = "cpu"
) -> int:
    """Measure what a pruning step needs above what is allocated before it.

    The network's own activations count where the step computes them: give it a network
    that needs none, or mini-batches that are small beside the weights.

    Args:
        step: does the step.
        device: where its tensors live.

    Returns:
        The largest number of bytes of tensors that lived at once.
    """
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = int(torch.cuda.memory_allocated(device))
        step()
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device)) - before
    meter = AllocationMeter()
    with meter:
        step()
    return meter.peak_bytes


def _key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
