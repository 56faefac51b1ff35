"""Measure the engines of the inverse Fisher, the recursion, and the GEMM floor.

The floor of a case is the time of its matrix products at this machine's float32 GEMM rate,
without TF32. Operations are multiplications and additions; only half of the entries of a
symmetric product count::

    primal   N·B·D (half of GᵀG) + B²·D (factor, inverse factor)
    dual     N²·D (half of GGᵀ) + N²·D (triangular solve), also for the full Fisher
"""

from __future__ import annotations

__all__ = [
    "InverseRow",
    "add_floor",
    "count_floor_operations",
    "draw_rows",
    "measure_case",
    "measure_errors",
    "measure_gemm_rate",
]

import dataclasses
import functools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_woodfisher.base.clock import time_action
from lightning_woodfisher.benchmark.cases import Case
from lightning_woodfisher.benchmark.recursion import (
    Plan,
    choose_plan,
    invert_by_recursion,
    merge_units,
    read_diagonal,
)
from lightning_woodfisher.benchmark.timing import (
    CPU,
    Timing,
    measure_alternately,
)
from lightning_woodfisher.distributed.communicator import Communicator
from lightning_woodfisher.fisher.config import (
    Engine,
    FisherConfig,
    Precision,
    choose_engine,
    rows_in_chunk,
)
from lightning_woodfisher.fisher.inverse import (
    InverseFisher,
    block_cost,
    full_column_chunk,
    make_inverse_fisher,
)
from lightning_woodfisher.weights.partition import Partition, Unit, make_partition

_AUTO: Engine = "auto"
DAMPING = 1e-5
# Standard deviation of the entries, before each row is scaled by its own factor.
_GRADIENT_SCALE = 1e-3
_GRADIENT_RANK = 16
_BLOCKS_CHECKED = 8
_COLUMNS_CHECKED = 256
_REFERENCE_COLUMNS = 1 << 14
_GEMM_REPEATS = 5


@dataclass(frozen=True)
class InverseRow:
    """One row of the table.

    Attributes:
        case: the problem size.
        engine: ``"recursion"``, ``"published"``, ``"primal"``, ``"dual"`` or ``"full"``.
        plan: kernel and batch size of a recursion; empty for the engines.
        timing: time to observe N rows and to compute the inverse and its diagonal.
        ratio: seconds of the recursion divided by seconds; None without a recursion.
        processor_ratio: the same in processor seconds, which other processes on the cores
            affect less; None without a recursion and on a GPU.
        error: largest relative error of the diagonal against a float64 inverse, in some
            blocks (full Fisher: in some columns).
        update_seconds: time of a joint update that removes half of the weights; None if
            not measured.
        floor_seconds: time of the operations of the engine that ``"auto"`` chooses, at the
            GEMM rate; None before :func:`add_floor`.
        floor_share: ``floor_seconds`` divided by seconds.
    """

    case: Case
    engine: str
    plan: str
    timing: Timing
    ratio: float | None
    processor_ratio: float | None
    error: float
    update_seconds: float | None
    floor_seconds: float | None = None
    floor_share: float | None = None


def draw_rows(num_gradients: int, weights: int, device: torch.device) -> Tensor:
    """Draw random rows with the structure of gradients, the same in every call.

    Half of the variance lies in 16 common directions, half is independent. Entries have a
    standard deviation of 1e-3, and each row has its own log-normal factor, because the
    losses of samples differ.

    Args:
        num_gradients: N.
        weights: D.
        device: device of the result.

    Returns:
        float32 ``[N, D]``.
    """
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    rows = draw(num_gradients, weights)
    common = draw(num_gradients, _GRADIENT_RANK), draw(_GRADIENT_RANK, weights)
    rows.addmm_(*common, alpha=_GRADIENT_RANK**-0.5)
    factors = draw(num_gradients, 1).exp_().mul_(_GRADIENT_SCALE * 0.5**0.5)
    return rows.mul_(factors)


def count_floor_operations(case: Case) -> float:
    """Count the operations of the GEMM floor.

    Args:
        case: the problem size.

    Returns:
        Multiplications and additions of the engine that ``"auto"`` chooses.
    """
    n, size, d = float(case.num_gradients), case.block_size, float(case.weights)
    if size is None or choose_engine(_settings(case)) == "dual":
        return 2.0 * n * n * d
    return n * size * d + float(size) ** 2 * d


def _settings(
    case: Case, engine: Engine = _AUTO, precision: Precision = "auto"
) -> FisherConfig:
    return FisherConfig(
        case.num_gradients,
        1,
        case.block_size,
        DAMPING,
        engine=engine,
        precision=precision,
    )


def measure_gemm_rate(
    device: torch.device,
    size: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> float:
    """Measure the GEMM rate on square matrices.

    Args:
        device: device of the matrices.
        size: number of rows and columns; None for 2048 on a CPU and 8192 on a GPU.
        dtype: dtype of the matrices.

    Returns:
        Multiplications and additions per second, the best of several products.
    """
    size = size or (8192 if device.type == "cuda" else 2048)
    left, right = torch.randn(2, size, size, device=device, dtype=dtype)
    result = left @ right
    multiply = functools.partial(torch.mm, left, right, out=result)
    seconds = min(time_action(multiply, device) for _ in range(_GEMM_REPEATS))
    return 2.0 * size**3 / seconds


def add_floor(row: InverseRow, rate: float) -> InverseRow:
    """Fill in the floor of a row.

    Args:
        row: the measurement.
        rate: result of :func:`measure_gemm_rate`.

    Returns:
        The row with ``floor_seconds`` and ``floor_share``.
    """
    floor = count_floor_operations(row.case) / rate
    return dataclasses.replace(
        row, floor_seconds=floor, floor_share=floor / row.timing.seconds
    )


def measure_case(
    case: Case,
    *,
    repeats: int = 3,
    device: torch.device = CPU,
    engines: Sequence[Engine] = (_AUTO,),
    with_update: bool = False,
    as_published: bool = False,
    precision: Precision = "auto",
) -> list[InverseRow]:
    """Measure one case. All engines get the same rows and run alternately.

    Args:
        case: the problem size.
        repeats: number of repetitions.
        device: device to measure on.
        engines: engines of this package; the full Fisher has only one.
        with_update: whether to also measure the joint update.
        as_published: whether to also measure the recursion as batched products over all
            blocks, as in published code.
        precision: dtype of the products of the engines.

    Returns:
        A row for the recursion, unless the case is the full Fisher, and one for each
        engine, all without floor.
    """
    rows = draw_rows(case.num_gradients, case.weights, device)
    cost = block_cost(_settings(case))
    block_size = case.block_size or full_column_chunk(case.segments)
    partition = make_partition(case.segments, block_size, 1, cost)
    diagonals: dict[str, Tensor] = {}
    updates: dict[str, list[float]] = {}

    def run_recursion(name: str, plan: Plan) -> None:
        inverses = invert_by_recursion(rows, units, DAMPING, plan)
        diagonals[name] = read_diagonal(inverses)

    def run_engine(name: str, engine: Engine) -> None:
        inverse = _invert(rows, partition, _settings(case, engine, precision))
        diagonals[name] = inverse.diagonal()
        if with_update:
            updates.setdefault(name, []).append(_time_update(inverse, device))

    actions: dict[str, Callable[[], object]] = {}
    plans: dict[str, Plan] = {}
    if case.block_size is not None:
        units = merge_units(partition)
        plans["recursion"] = choose_plan(rows, units, DAMPING)
        if as_published:
            plans["published"] = Plan("products", max(unit.count for unit in units))
        for name, plan in plans.items():
            actions[name] = functools.partial(run_recursion, name, plan)
    for engine in engines if case.block_size else (_AUTO,):
        name = choose_engine(_settings(case, engine))
        actions[name] = functools.partial(run_engine, name, engine)
    timings = measure_alternately(actions, repeats, device)
    errors = measure_errors(rows, partition, case, diagonals)
    update_seconds = {n: statistics.median(spent) for n, spent in updates.items()}
    for name, spent in updates.items():
        # The update runs inside the measured action, but is reported separately.
        pairs = zip(timings[name].runs, spent, strict=True)
        runs = tuple(total - update for total, update in pairs)
        timings[name] = dataclasses.replace(timings[name], runs=runs)
    recursion = timings.get("recursion")
    return [
        InverseRow(
            case=case,
            engine=name,
            plan=str(plans.get(name, "")),
            timing=timing,
            ratio=recursion.seconds / timing.seconds if recursion else None,
            # While the GPU computes, the processor only waits.
            processor_ratio=recursion.processor_seconds / timing.processor_seconds
            if recursion and device.type == "cpu"
            else None,
            error=errors[name],
            update_seconds=update_seconds.get(name),
        )
        for name, timing in timings.items()
    ]


def _invert(rows: Tensor, partition: Partition, fisher: FisherConfig) -> InverseFisher:
    """Compute the inverse with an engine, as a pruning step does."""
    inverse = make_inverse_fisher(partition, fisher, Communicator(rows.device))
    for chunk in torch.split(rows, rows_in_chunk(fisher, rows.shape[1])):
        inverse.observe(chunk)
    inverse.factorize()
    return inverse


def _time_update(inverse: InverseFisher, device: torch.device) -> float:
    """Measure the joint update that removes the half of the weights with least saliency."""
    generator = torch.Generator(device).manual_seed(0)
    weights = torch.randn(
        inverse.size, generator=generator, dtype=torch.float64, device=device
    )
    saliency = weights.square() / inverse.diagonal()
    removed = saliency < saliency.median()
    return time_action(lambda: inverse.constrained_solve(weights, removed), device)


def measure_errors(
    rows: Tensor, partition: Partition, case: Case, diagonals: dict[str, Tensor]
) -> dict[str, float]:
    """Compare diagonals with dense float64 inverses of some blocks.

    The full Fisher is too large for a dense inverse. Its diagonal is compared for some
    columns g with (1 − gᵀ(NλI + GGᵀ)⁻¹g)/λ, computed by LU in float64.

    Args:
        rows: ``[N, D]``.
        partition: all blocks.
        case: the problem size.
        diagonals: ``[D]`` by name.

    Returns:
        Largest relative error by name.
    """
    if case.block_size is None:
        columns = _spread(case.weights, _COLUMNS_CHECKED)
        checked = torch.tensor(columns, device=rows.device)
        expected = _full_reference(rows, checked)
    else:
        starts = [
            dataclasses.replace(unit, start=unit.start + index * unit.size, count=1)
            for unit in merge_units(partition)
            for index in _spread(unit.count, _BLOCKS_CHECKED)
        ]
        blocks = [starts[i] for i in _spread(len(starts), _BLOCKS_CHECKED)]
        checked = torch.cat(
            [torch.arange(b.start, b.stop, device=rows.device) for b in blocks]
        )
        expected = torch.cat([_block_reference(rows, block) for block in blocks])
    return {
        name: float(((diagonal[checked].double() - expected) / expected).abs().max())
        for name, diagonal in diagonals.items()
    }


def _block_reference(rows: Tensor, block: Unit) -> Tensor:
    columns = rows[:, block.start : block.stop].double()
    fisher = columns.mT @ columns / len(rows)
    fisher.diagonal().add_(DAMPING)
    inverse: Tensor = torch.linalg.inv(fisher)
    return inverse.diagonal()


def _full_reference(rows: Tensor, checked: Tensor) -> Tensor:
    count = len(rows)
    gram = torch.eye(count, dtype=torch.float64, device=rows.device) * count * DAMPING
    for part in torch.split(rows, _REFERENCE_COLUMNS, dim=1):
        wide = part.double()
        gram.addmm_(wide, wide.mT)
    columns = rows[:, checked].double()
    solved: Tensor = torch.linalg.solve(gram, columns)
    return (1.0 - (columns * solved).sum(dim=0)) / DAMPING


def _spread(count: int, wanted: int) -> list[int]:
    """Return up to ``wanted`` evenly spaced numbers from 0 to ``count - 1``."""
    return sorted({i * (count - 1) // (wanted - 1) for i in range(wanted)})
