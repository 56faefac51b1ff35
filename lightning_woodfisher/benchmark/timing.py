"""Seconds, processor time and peak memory of actions that take turns."""

from __future__ import annotations

__all__ = [
    "Tick",
    "Timing",
    "measure_alternately",
    "memory_measure",
    "show_progress",
    "wait_for",
]

import contextlib
import ctypes
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

Tick = Callable[[str], object]

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Timing:
    """What the repetitions of one action took.

    Attributes:
        runs: seconds of every repetition.
        cores: processor seconds per second, median over repetitions. Far below the
            number of threads, something else was using the cores (or the action is
            not parallel, or runs on a GPU).
        peak_bytes: most memory beyond what was in use before, over repetitions; None
            where the system does not tell.
    """

    runs: tuple[float, ...]
    cores: float
    peak_bytes: int | None

    @property
    def seconds(self) -> float:
        """Median over repetitions."""
        return statistics.median(self.runs)


def measure_alternately(
    actions: Mapping[str, Callable[[], object]],
    repeats: int,
    device: torch.device,
    tick: Tick = lambda _: None,
) -> dict[str, Timing]:
    """Run every action once, then every action again, so that drift hits all alike.

    Args:
        actions: what to measure, by name.
        repeats: how often each one runs.
        device: waited for before the clock stops.
        tick: called with the name of each action that is done.

    Returns:
        A timing for each name.
    """
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    cores: dict[str, list[float]] = {name: [] for name in actions}
    peaks: dict[str, list[int]] = {name: [] for name in actions}
    for _ in range(repeats):
        for name, action in actions.items():
            gc.collect()
            before = _start_peak(device)
            processor, start = time.process_time(), time.perf_counter()
            action()
            wait_for(device)
            spent = time.perf_counter() - start
            seconds[name].append(spent)
            cores[name].append((time.process_time() - processor) / max(spent, 1e-9))
            peak = _read_peak(device)
            if before is not None and peak is not None:
                peaks[name].append(max(0, peak - before))
            tick(name)
    return {
        name: Timing(
            tuple(seconds[name]),
            statistics.median(cores[name]),
            max(peaks[name], default=None),
        )
        for name in actions
    }


def memory_measure(device: torch.device) -> str:
    """Say what :attr:`Timing.peak_bytes` counts.

    Args:
        device: where the actions run.

    Returns:
        A few words.
    """
    if device.type == "cuda":
        return "torch.cuda.max_memory_allocated above the start"
    if _reset_resident_peak():
        return "peak resident memory (VmHWM) above the start"
    return "not measured on this system"


def wait_for(device: torch.device) -> None:
    """Wait until the device has done all its work.

    Args:
        device: nothing to wait for on a processor.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _start_peak(device: torch.device) -> int | None:
    """Forget the old peak and give the bytes in use."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    # Memory that malloc keeps for later would hide the next action's use of it.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    return _read_status("VmRSS") if _reset_resident_peak() else None


def _read_peak(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _read_status("VmHWM")


def _reset_resident_peak() -> bool:
    """Let Linux start VmHWM anew; False where that cannot be done."""
    try:
        _CLEAR_REFS.write_text("5")
    except OSError:
        return False
    return _STATUS.exists()


def _read_status(field: str) -> int | None:
    try:
        text = _STATUS.read_text()
    except OSError:
        return None
    for line in text.splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    return None


@contextlib.contextmanager
def show_progress(total: int) -> Iterator[Tick]:
    """Show on stderr what has been done: a tqdm bar, or lines without tqdm.

    Args:
        total: how many ticks will come.

    Yields:
        A function to call with the name of each thing that is done.
    """
    try:
        from tqdm.auto import tqdm
    except ImportError:
        done = 0

        def line(name: str) -> None:
            nonlocal done
            done += 1
            sys.stderr.write(f"[{done}/{total}] {name}\n")

        yield line
        return
    with tqdm(total=total, leave=False, disable=None) as bar:

        def advance(name: str) -> None:
            bar.set_description(name)
            bar.update(1)

        yield advance
