"""The device that tests run on: the CPU, or that of ``WOODFISHER_TEST_DEVICE``.

Tests compare on the CPU, against results that were computed there.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

DEVICE = torch.device(os.environ.get("WOODFISHER_TEST_DEVICE", "cpu"))
#: For the Trainer.
ACCELERATOR = DEVICE.type

T = TypeVar("T")


def called_from_cpu(thing: T) -> T:
    """Wrap an object on DEVICE: arguments are moved there, and results to the CPU."""
    return thing if DEVICE.type == "cpu" else _CalledFromCpu(thing)  # type: ignore[return-value]


class _CalledFromCpu:
    def __init__(self, thing: Any) -> None:
        self._thing = thing

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._thing, name)
        if isinstance(found, Tensor) or not callable(found):
            return _moved(found, torch.device("cpu"))
        return self._call(found)

    def _call(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            result = method(*_moved(args, DEVICE), **_moved(kwargs, DEVICE))
            return _moved(result, torch.device("cpu"))

        return call


def _moved(value: Any, device: torch.device) -> Any:
    return tree_map_only(Tensor, lambda tensor: tensor.to(device), value)
