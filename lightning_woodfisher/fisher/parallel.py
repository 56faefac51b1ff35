"""Independent pieces of work on the cores of this process.

On a CPU a piece runs in one thread, and as many pieces run at once as torch has threads.
That is faster than threads inside every product (LAPACK factorises a batch one matrix
after the other), and a piece gives the same bits whatever the number of threads.
"""

from __future__ import annotations

__all__ = ["run_pieces"]

import contextlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def run_pieces(
    work: Callable[[Item], Result], items: Sequence[Item], device: torch.device
) -> list[Result]:
    """Do the same work for every item, with float32 products in full float32.

    Args:
        work: called once for each item, possibly in another thread; it shares nothing
            with the work for another item.
        items: in the order in which they are started.
        device: where the tensors are; on a GPU the items follow one another.

    Returns:
        The results, in order of the items.
    """
    threads = torch.get_num_threads()
    with _full_float32():
        if device.type != "cpu" or threads == 1 or len(items) < 2:
            return [work(item) for item in items]
        try:
            with ThreadPoolExecutor(
                min(threads, len(items)), initializer=_use_one_thread
            ) as pool:
                return list(pool.map(work, items))
        finally:
            # The number is kept per thread, but threads to come copy the last one set.
            torch.set_num_threads(threads)


def _use_one_thread() -> None:
    torch.set_num_threads(1)


@contextlib.contextmanager
def _full_float32() -> Iterator[None]:
    """Forbid TF32 and bfloat16 inside float32 products: eleven bits cannot decide."""
    previous = torch.get_float32_matmul_precision()
    if previous == "highest":
        yield
        return
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(previous)
