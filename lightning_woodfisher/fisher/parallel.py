"""Run independent work on the CPU cores of this process.

On a CPU each call runs in one thread, and as many calls run at once as torch has threads.
That is faster than threads within each product, because LAPACK factorizes the matrices of a
batch one after another. A call gives the same bits for any number of threads.

Where OpenMP binds its threads to cores (``OMP_PROC_BIND``), a new thread would inherit the one
core of the thread that starts it. The threads here may use the cores of all threads of the
process, and not more, because a launcher may have given the others to other ranks.
"""

from __future__ import annotations

__all__ = ["run_in_threads"]

import contextlib
import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

from lightning_woodfisher.base.full_float32 import full_float32

# torch splits work of this size between all of its threads.
_NUMBERS_FOR_ALL_THREADS = 2**20


def run_in_threads(
    work: Callable[[int], None], count: int, device: torch.device
) -> None:
    """Call ``work`` with 0 .. count − 1, with float32 products in full float32.

    Args:
        work: called once for each number, possibly in another thread; calls must not share
            data that they change.
        count: number of calls.
        device: device of the tensors; on a GPU the calls run one after another.
    """
    threads = torch.get_num_threads()
    with full_float32():
        if device.type != "cpu" or threads == 1 or count < 2:
            for index in range(count):
                work(index)
            return
        try:
            start = functools.partial(_start_thread, _find_cores(threads))
            with ThreadPoolExecutor(min(threads, count), initializer=start) as pool:
                # The list raises the first error of a call.
                list(pool.map(work, range(count)))
        finally:
            # The number is kept per thread, but new threads copy the last one that was set.
            torch.set_num_threads(threads)


def _find_cores(threads: int) -> set[int]:
    """Find the cores of all threads of this process; empty if this one has enough."""
    # Not every platform has these calls, and not every container allows them.
    with contextlib.suppress(AttributeError, OSError):
        if len(os.sched_getaffinity(0)) < threads:
            # OpenMP binds its threads when it starts them.
            torch.ones(_NUMBERS_FOR_ALL_THREADS).sum()
            cores: set[int] = set()
            for task in os.listdir("/proc/self/task"):
                with contextlib.suppress(ProcessLookupError):
                    cores |= os.sched_getaffinity(int(task))
            return cores
    return set()


def _start_thread(cores: set[int]) -> None:
    torch.set_num_threads(1)
    if cores:
        with contextlib.suppress(OSError):
            os.sched_setaffinity(0, cores)
