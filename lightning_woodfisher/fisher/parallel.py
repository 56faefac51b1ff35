"""Run independent work on the CPU cores of this process.

On a CPU each call runs in one thread, and as many calls run at once as torch has threads.
That is faster than threads within each product, because LAPACK factorizes the matrices of a
batch one after another. A call gives the same bits for any number of threads.
"""

from __future__ import annotations

__all__ = ["run_in_threads"]

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

from lightning_woodfisher.base.full_float32 import full_float32


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
