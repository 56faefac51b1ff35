"""Seconds of a forward pass, dense and shrunk, measured in turns."""

from __future__ import annotations

__all__ = ["Latency", "measure_latency"]

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_woodfisher.data.isolation import isolated
from lightning_woodfisher.structured.graph.inputs import (
    map_tensors,
    run_model,
    tensors_in,
)


@dataclass(frozen=True)
class Latency:
    """Medians of many forward passes.

    Attributes:
        dense: seconds of the dense network.
        shrunk: seconds of the smaller one.
        batch_size: samples in a pass.
        runs: passes of each that were timed.
    """

    dense: float
    shrunk: float
    batch_size: int
    runs: int

    @property
    def ratio(self) -> float:
        """Time of the smaller network as a share of that of the dense one."""
        return self.shrunk / self.dense


@torch.no_grad()
def measure_latency(
    dense: nn.Module, shrunk: nn.Module, inputs: Any, runs: int, batch_size: int = 1
) -> Latency:
    """Time two networks in turns, so that a busy machine slows both.

    Args:
        dense: the network.
        shrunk: the smaller one, on the same device.
        inputs: of one sample; repeated along the first axis.
        runs: timed passes of each.
        batch_size: samples in a pass.

    Returns:
        The medians, after a few passes that do not count.
    """

    def repeat(value: Tensor) -> Tensor:
        return value.repeat(batch_size, *(1,) * (value.dim() - 1))

    inputs = map_tensors(repeat, inputs)
    device = next(tensors_in(inputs)).device
    seconds: tuple[list[float], list[float]] = ([], [])
    with isolated(dense, "eval"), isolated(shrunk, "eval"):
        for number in range(runs + 3):
            for model, found in zip((dense, shrunk), seconds, strict=True):
                found.append(_seconds(lambda: run_model(model, inputs), device))  # noqa: B023
            if number < 3:
                seconds[0].clear()
                seconds[1].clear()
    first, second = map(statistics.median, seconds)
    return Latency(first, second, batch_size, runs)


def _seconds(work: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
