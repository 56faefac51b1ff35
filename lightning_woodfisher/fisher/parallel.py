"""Run independent work on the CPU cores of this process.

On a CPU each call runs in one thread, and as many calls run at once as torch has threads.
That is faster than threads within each product, because LAPACK factorizes the matrices of a
batch one after another. A call gives the same bits for any number of threads.
"""

from __future__ import annotations

__all__ = ["run_in_threads"]

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch


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
    with _full_float32():
        if device.type != "cpu" or threads == 1 or count < 2:
            for index in range(count):
                work(index)
            return
        try:
            with ThreadPoolExecutor(
                min(threads, count), initializer=_use_one_thread
            ) as pool:
                # The list raises the first error of a call.
                list(pool.map(work, range(count)))
        finally:
            # The number is kept per thread, but new threads copy the last one that was set.
            torch.set_num_threads(threads)


def _use_one_thread() -> None:
    torch.set_num_threads(1)


@contextlib.contextmanager
def _full_float32() -> Iterator[None]:
    """Forbid TF32 and bfloat16 in float32 products, whose 8 to 11 bits are too few."""
    previous = torch.get_float32_matmul_precision()
    if previous == "highest":
        yield
        return
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(previous)
