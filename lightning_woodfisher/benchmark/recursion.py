"""Invert the Fisher by N rank-one Woodbury updates, the baseline from the literature.

For every block, starting with F⁻¹ = I/λ, for each row g (WoodFisher, section 3)::

    v = F⁻¹g,    F⁻¹ ← F⁻¹ − v vᵀ / (N + gᵀv)

For a fair comparison the implementation is fast: updates are in place, all rows are applied
to a batch of blocks that fits into cache before the next batch starts, and the batch size
and one of three kernels are chosen by trying them on this machine.
"""

from __future__ import annotations

__all__ = [
    "Plan",
    "choose_plan",
    "invert_by_recursion",
    "merge_units",
    "read_diagonal",
]

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_woodfisher.base.clock import time_action
from lightning_woodfisher.weights.partition import Partition, Unit

# Range of the batch sizes to try; all caches lie within it.
_LARGEST_BATCH_BYTES = {"cpu": 64 << 20, "cuda": 4 << 30}
_SMALLEST_BATCH_BYTES = {"cpu": 64 << 10, "cuda": 16 << 20}
_UPDATES_TRIED = 6
_TRIALS = 3

# How a batch of blocks is updated; see _apply.
KERNELS = ("broadcast", "products", "mixed")


@dataclass(frozen=True)
class Plan:
    """How to run the recursion.

    Attributes:
        kernel: implementation of one update, one of ``KERNELS``.
        blocks_at_once: number of blocks in a batch.
    """

    kernel: str
    blocks_at_once: int

    def __str__(self) -> str:
        """Return the plan as a note for the table."""
        return f"{self.kernel}, {self.blocks_at_once} blocks at once"


def merge_units(partition: Partition) -> list[Unit]:
    """Merge the units of a partition into the longest runs of equal blocks.

    Args:
        partition: all blocks.

    Returns:
        Units in order, which may span several tensors and cover the same weights.
    """
    merged: list[Unit] = []
    for unit in partition.units:
        last = merged[-1] if merged else None
        if last and last.size == unit.size and last.stop == unit.start:
            merged[-1] = dataclasses.replace(last, count=last.count + unit.count)
        else:
            merged.append(unit)
    return merged


def invert_by_recursion(
    rows: Tensor, units: Sequence[Unit], damping: float, plan: Plan
) -> list[Tensor]:
    """Invert all blocks by the recursion.

    Args:
        rows: ``[N, D]``, float32 as in the literature, or float64.
        units: the blocks.
        damping: λ.
        plan: result of :func:`choose_plan`.

    Returns:
        F⁻¹ of each unit, ``[K, B, B]`` in the dtype of the rows.
    """
    inverses = []
    for unit in units:
        inverse = rows.new_empty(unit.count, unit.size, unit.size)
        for first in range(0, unit.count, plan.blocks_at_once):
            batch = inverse[first : first + plan.blocks_at_once]
            columns = rows[:, unit.start + first * unit.size :]
            _apply(plan.kernel, batch, columns, len(rows), damping)
        inverses.append(inverse)
    return inverses


def read_diagonal(inverses: Sequence[Tensor]) -> Tensor:
    """Return the diagonal of the inverse.

    Args:
        inverses: F⁻¹ of each unit, ``[K, B, B]``.

    Returns:
        diag(F⁻¹), ``[D]``.
    """
    return torch.cat([f.diagonal(dim1=-2, dim2=-1).reshape(-1) for f in inverses])


def choose_plan(rows: Tensor, units: Sequence[Unit], damping: float) -> Plan:
    """Try kernels and batch sizes for a few updates and return the fastest.

    Args:
        rows: ``[N, D]``.
        units: the blocks; only the largest unit is tried.
        damping: λ.

    Returns:
        The plan with the least time per block.
    """
    unit = max(units, key=lambda unit: unit.size**2 * unit.count)
    plans = [
        Plan(name, count) for count in _batch_sizes(unit, rows) for name in KERNELS
    ]
    return min(plans, key=lambda plan: _seconds_per_block(rows, unit, damping, plan))


def _batch_sizes(unit: Unit, rows: Tensor) -> list[int]:
    """Return the numbers of blocks to try: powers of two around the sizes of caches."""
    block = unit.size**2 * rows.element_size()
    smallest = _SMALLEST_BATCH_BYTES[rows.device.type]
    largest = _LARGEST_BATCH_BYTES[rows.device.type]
    counts = [2**power for power in range(32)]
    fitting = [c for c in counts if smallest <= c * block <= largest and c < unit.count]
    if unit.count * block <= largest:
        fitting.append(unit.count)
    return fitting or [min(unit.count, max(1, largest // block))]


def _seconds_per_block(rows: Tensor, unit: Unit, damping: float, plan: Plan) -> float:
    tried = rows[:_UPDATES_TRIED, unit.start :]
    batch = rows.new_empty(plan.blocks_at_once, unit.size, unit.size)

    apply = functools.partial(_apply, plan.kernel, batch, tried, len(tried), damping)
    apply()
    seconds = min(time_action(apply, rows.device) for _ in range(_TRIALS))
    return seconds / plan.blocks_at_once


def _apply(
    kernel: str, inverse: Tensor, columns: Tensor, count: int, damping: float
) -> None:
    """Set F⁻¹ to I/λ and apply all rows in place."""
    blocks, size = inverse.shape[:2]
    inverse.zero_()
    inverse.diagonal(dim1=-2, dim2=-1).fill_(1.0 / damping)
    product = inverse.new_empty(blocks, size)
    for row in columns:
        gradient = row[: blocks * size].view(blocks, size)
        if kernel == "products":
            torch.bmm(inverse, gradient.unsqueeze(2), out=product.unsqueeze(2))
        else:
            # F⁻¹ is symmetric: gᵀF⁻¹ is the same, and reads it row by row.
            torch.bmm(gradient.unsqueeze(1), inverse, out=product.unsqueeze(1))
        scale = (gradient * product).sum(dim=1, keepdim=True).add_(float(count))
        left, right = (product / scale).unsqueeze(2), product.unsqueeze(1)
        if kernel == "broadcast":
            inverse.addcmul_(left, right, value=-1.0)
        else:
            inverse.baddbmm_(left, right, alpha=-1.0)
