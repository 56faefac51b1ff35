"""The baseline: the inverse Fisher by N rank-one Woodbury updates, as in the literature.

For every block, from F⁻¹ = I/λ, one row g after the other (WoodFisher, section 3)::

    v = F⁻¹g,    F⁻¹ ← F⁻¹ − v vᵀ / (N + gᵀv)

This is written to be fast, so that the comparison is fair: all rows are applied to a
batch of blocks that fits into cache before the next batch is touched, everything is in
place, and both the batch and the kernels are chosen by trying them on this machine.
"""

from __future__ import annotations

__all__ = [
    "BlockRun",
    "Plan",
    "block_runs",
    "choose_plan",
    "recursion_diagonal",
    "recursion_inverse",
]

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_woodfisher.benchmark.timing import wait_for
from lightning_woodfisher.weights.partition import Partition

# Batches of blocks up to this size are tried; beyond it no processor's cache reaches.
_LARGEST_BATCH_BYTES = {"cpu": 64 << 20, "cuda": 4 << 30}
_SMALLEST_BATCH_BYTES = {"cpu": 64 << 10, "cuda": 16 << 20}
_UPDATES_TRIED = 6
_TRIALS = 3

Kernel = Callable[[Tensor, Tensor, Tensor, float], None]


@dataclass(frozen=True)
class BlockRun:
    """``count`` consecutive blocks of ``size`` weights, from weight ``start``."""

    start: int
    size: int
    count: int

    @property
    def stop(self) -> int:
        """One past the last weight."""
        return self.start + self.size * self.count


@dataclass(frozen=True)
class Plan:
    """How to run the recursion.

    Attributes:
        kernel: name of the way to do one update, a key of ``KERNELS``.
        blocks_at_once: blocks that go through all rows together.
    """

    kernel: str
    blocks_at_once: int


def block_runs(partition: Partition) -> list[BlockRun]:
    """Merge the units of a partition into the longest runs of equal blocks.

    Args:
        partition: all blocks.

    Returns:
        Runs in order; together they cover the same weights.
    """
    runs: list[BlockRun] = []
    for unit in partition.units:
        last = runs[-1] if runs else None
        if last and last.size == unit.size and last.stop == unit.start:
            runs[-1] = BlockRun(last.start, last.size, last.count + unit.count)
        else:
            runs.append(BlockRun(unit.start, unit.size, unit.count))
    return runs


def recursion_inverse(
    rows: Tensor, runs: Sequence[BlockRun], damping: float, plan: Plan
) -> list[Tensor]:
    """Invert all blocks by the recursion.

    Args:
        rows: ``[N, D]``, float32 as in the literature, or float64.
        runs: the blocks.
        damping: λ.
        plan: how; see :func:`choose_plan`.

    Returns:
        F⁻¹ of each run, ``[K, B, B]`` in the dtype of the rows.
    """
    kernel = KERNELS[plan.kernel]
    inverses = []
    for run in runs:
        inverse = rows.new_empty(run.count, run.size, run.size)
        for first in range(0, run.count, plan.blocks_at_once):
            batch = inverse[first : first + plan.blocks_at_once]
            columns = rows[:, run.start + first * run.size :]
            _apply(kernel, batch, columns, len(rows), damping)
        inverses.append(inverse)
    return inverses


def recursion_diagonal(inverses: Sequence[Tensor]) -> Tensor:
    """Read the diagonal off.

    Args:
        inverses: F⁻¹ of each run, ``[K, B, B]``.

    Returns:
        diag(F⁻¹), ``[D]``.
    """
    return torch.cat([f.diagonal(dim1=-2, dim2=-1).reshape(-1) for f in inverses])


def choose_plan(rows: Tensor, runs: Sequence[BlockRun], damping: float) -> Plan:
    """Try kernels and batches for a few updates and keep the fastest.

    Args:
        rows: ``[N, D]``.
        runs: the blocks; the longest run is tried.
        damping: λ.

    Returns:
        The plan with the least time for one block.
    """
    run = max(runs, key=lambda run: run.size**2 * run.count)
    plans = [Plan(kernel, count) for count in _batches(run, rows) for kernel in KERNELS]
    return min(plans, key=lambda plan: _seconds_of_a_block(rows, run, damping, plan))


def _batches(run: BlockRun, rows: Tensor) -> list[int]:
    """Numbers of blocks to try: powers of two around the sizes of caches."""
    block = run.size**2 * rows.element_size()
    smallest = _SMALLEST_BATCH_BYTES[rows.device.type]
    largest = _LARGEST_BATCH_BYTES[rows.device.type]
    counts = [2**power for power in range(32)]
    fitting = [c for c in counts if smallest <= c * block <= largest and c < run.count]
    if run.count * block <= largest:
        fitting.append(run.count)
    return fitting or [min(run.count, max(1, largest // block))]


def _seconds_of_a_block(
    rows: Tensor, run: BlockRun, damping: float, plan: Plan
) -> float:
    some = rows[:_UPDATES_TRIED, run.start :]
    batch = rows.new_empty(plan.blocks_at_once, run.size, run.size)
    kernel, best = KERNELS[plan.kernel], float("inf")
    _apply(kernel, batch, some, len(some), damping)
    for _ in range(_TRIALS):
        wait_for(rows.device)
        start = time.perf_counter()
        _apply(kernel, batch, some, len(some), damping)
        wait_for(rows.device)
        best = min(best, time.perf_counter() - start)
    return best / plan.blocks_at_once


def _apply(
    kernel: Kernel, inverse: Tensor, columns: Tensor, count: int, damping: float
) -> None:
    """Set F⁻¹ to I/λ and apply all rows, in place."""
    blocks, size = inverse.shape[:2]
    inverse.zero_()
    inverse.diagonal(dim1=-2, dim2=-1).fill_(1.0 / damping)
    product = inverse.new_empty(blocks, size)
    for row in columns:
        kernel(inverse, row[: blocks * size].view(blocks, size), product, float(count))


def _by_broadcast(inverse: Tensor, row: Tensor, product: Tensor, count: float) -> None:
    # F⁻¹ is symmetric: gᵀF⁻¹ reads it row by row, and addcmul_ writes it in one pass.
    torch.bmm(row.unsqueeze(1), inverse, out=product.unsqueeze(1))
    scale = (row * product).sum(dim=1, keepdim=True).add_(count)
    inverse.addcmul_((product / scale).unsqueeze(2), product.unsqueeze(1), value=-1.0)


def _by_products(inverse: Tensor, row: Tensor, product: Tensor, count: float) -> None:
    torch.bmm(inverse, row.unsqueeze(2), out=product.unsqueeze(2))
    scale = (row * product).sum(dim=1, keepdim=True).add_(count)
    inverse.baddbmm_((product / scale).unsqueeze(2), product.unsqueeze(1), alpha=-1.0)


def _by_mixed(inverse: Tensor, row: Tensor, product: Tensor, count: float) -> None:
    torch.bmm(row.unsqueeze(1), inverse, out=product.unsqueeze(1))
    scale = (row * product).sum(dim=1, keepdim=True).add_(count)
    inverse.baddbmm_((product / scale).unsqueeze(2), product.unsqueeze(1), alpha=-1.0)


KERNELS: dict[str, Kernel] = {
    "broadcast": _by_broadcast,
    "products": _by_products,
    "mixed": _by_mixed,
}
