"""Measure wall time, processor time and peak memory of actions that take turns."""

from __future__ import annotations

__all__ = [
    "CPU",
    "Timing",
    "describe_memory_measure",
    "measure_alternately",
    "require_device",
]

import contextlib
import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm.auto import tqdm

from lightning_woodfisher.base.clock import time_action
from lightning_woodfisher.base.errors import ConfigurationError

CPU = torch.device("cpu")
_STATUS = Path("/proc/self/status")


@dataclass(frozen=True)
class Timing:
    """Time and memory of the repetitions of one action.

    Attributes:
        runs: seconds of every repetition.
        cores: processor seconds per second, median over repetitions. A value far below
            the number of threads means that other processes used the cores, that the
            action is not parallel, or that it runs on a GPU.
        peak_bytes: peak memory beyond the memory in use before, the largest of all
            repetitions; None if it was not measured.
    """

    runs: tuple[float, ...]
    cores: float
    peak_bytes: int | None

    @property
    def seconds(self) -> float:
        """Median over repetitions."""
        return statistics.median(self.runs)

    @property
    def processor_seconds(self) -> float:
        """Processor seconds of a repetition, more than zero."""
        return max(self.seconds * self.cores, 1e-9)


def measure_alternately(
    actions: Mapping[str, Callable[[], object]],
    repeats: int,
    device: torch.device,
    *,
    warm_up: int = 0,
    track_memory: bool = True,
) -> dict[str, Timing]:
    """Run all actions in turn, several times, so that drift affects all of them alike.

    Progress is shown on stderr.

    Args:
        actions: the actions by name.
        repeats: number of measured rounds.
        device: device of the actions; its work is included in the time.
        warm_up: number of rounds before them that are not measured.
        track_memory: whether to measure the peak memory, which takes time between runs.

    Returns:
        A timing for each name.
    """
    measured: dict[str, list[tuple[float, float, int]]] = {name: [] for name in actions}
    total = len(actions) * (warm_up + repeats)
    with tqdm(total=total, leave=False, disable=None) as bar:
        for repeat in range(-warm_up, repeats):
            for name, action in actions.items():
                before = _start_peak(device) if track_memory else None
                processor = time.process_time()
                spent = time_action(action, device)
                cores = (time.process_time() - processor) / max(spent, 1e-9)
                peak = -1 if before is None else max(0, _read_peak(device) - before)
                if repeat >= 0:
                    measured[name].append((spent, cores, peak))
                bar.set_description(name)
                bar.update()
    timings = {}
    for name, runs in measured.items():
        seconds, cores_of_runs, peaks = zip(*runs, strict=True)
        peak = max(peaks)
        timings[name] = Timing(
            seconds, statistics.median(cores_of_runs), None if peak < 0 else peak
        )
    return timings


def require_device(name: str) -> torch.device:
    """Check that a device can be measured.

    Args:
        name: value of ``--device``.

    Returns:
        The device.

    Raises:
        ConfigurationError: for a CUDA device that is not there.
    """
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigurationError(
            f"--device {name}: torch finds no CUDA device; use --device cpu."
        )
    return device


def describe_memory_measure(device: torch.device) -> str:
    """Describe what :attr:`Timing.peak_bytes` counts.

    Args:
        device: device of the actions.

    Returns:
        A few words.
    """
    if device.type == "cuda":
        return "torch.cuda.max_memory_allocated above the start"
    if _reset_resident_peak():
        return "peak resident memory (VmHWM) above the start"
    return "not measured on this system"


def _start_peak(device: torch.device) -> int | None:
    """Reset the peak and return the bytes in use, None if unknown."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    # The next action could reuse memory that malloc keeps, and its peak would be too low.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    return _read_status("VmRSS") if _reset_resident_peak() else None


def _read_peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _read_status("VmHWM")


def _reset_resident_peak() -> bool:
    """Reset VmHWM on Linux; return False if that is not possible."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _read_status(field: str) -> int:
    lines = _STATUS.read_text().splitlines()
    (value,) = (line for line in lines if line.startswith(f"{field}:"))
    return int(value.split()[1]) * 1024
