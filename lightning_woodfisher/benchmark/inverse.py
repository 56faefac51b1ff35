"""The inverse Fisher: our engines, the recursion of the literature, and the GEMM floor.

Floor of a case: the operations (multiplications and additions) of matrix products of the
same shapes at this machine's float32 GEMM rate, TF32 off. Of symmetric products only
half of the entries count::

    primal   N·B·D (GᵀG by halves) + B²·D (factor, inverse factor)
    dual     N²·D (GGᵀ by halves) + N²·D (triangular solve), also for the full Fisher
"""

from __future__ import annotations

__all__ = [
    "Case",
    "InverseRow",
    "floor_operations",
    "gemm_rate",
    "make_rows",
    "measure_case",
    "reference_error",
    "slice_segments",
    "with_rate",
]

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_woodfisher.benchmark.recursion import (
    BlockRun,
    Plan,
    block_runs,
    choose_plan,
    recursion_diagonal,
    recursion_inverse,
)
from lightning_woodfisher.benchmark.timing import (
    Tick,
    Timing,
    measure_alternately,
    wait_for,
)
from lightning_woodfisher.distributed.communicator import Communicator
from lightning_woodfisher.fisher.config import (
    Engine,
    FisherConfig,
    choose_engine,
    rows_in_chunk,
)
from lightning_woodfisher.fisher.inverse import (
    InverseFisher,
    block_cost,
    full_column_chunk,
    make_inverse_fisher,
)
from lightning_woodfisher.weights.partition import Partition, make_partition

DAMPING = 1e-5
# Entries of rows have this standard deviation, before each row's own factor.
_GRADIENT_SCALE = 1e-3
_GRADIENT_RANK = 16
_BLOCKS_CHECKED = 8
_COLUMNS_CHECKED = 256
_REFERENCE_COLUMNS = 1 << 14


@dataclass(frozen=True)
class Case:
    """One problem size.

    Attributes:
        name: shown in the table.
        num_gradients: N.
        block_size: B, or None for the full Fisher.
        segments: weights of each tensor that is measured; D is their sum.
        total_weights: weights of the whole network, more than D for a slice of it.
    """

    name: str
    num_gradients: int
    block_size: int | None
    segments: tuple[int, ...]
    total_weights: int

    @property
    def weights(self) -> int:
        """D, the weights that are measured."""
        return sum(self.segments)


@dataclass(frozen=True)
class InverseRow:
    """One line of the table.

    Attributes:
        case: name of the case.
        num_gradients: N.
        block_size: B; None for the full Fisher.
        weights: D, as measured.
        total_weights: of the network; more than ``weights`` means a slice.
        engine: ``"recursion"``, ``"primal"``, ``"dual"`` or ``"full"``.
        how: how the recursion was run; empty for the engines.
        seconds: observing N rows, inverse and its diagonal; median.
        scaled_seconds: ``seconds`` times total_weights / weights: an extrapolation.
        runs: seconds of every repetition.
        cores: processor seconds per second; see :class:`~.timing.Timing`.
        ratio: seconds of the recursion over ``seconds``; None without a recursion.
        processor_ratio: the same in processor seconds, which a rival on the cores
            disturbs less; None without a recursion and on a GPU.
        floor_seconds: operations of the cheaper engine over the GEMM rate.
        floor_share: ``floor_seconds / seconds``.
        peak_bytes: memory beyond the given rows; None where it cannot be measured.
        error: largest relative error of the diagonal against a float64 inverse, on a
            subset of blocks (the full Fisher: of columns).
        update_seconds: joint update at half of the weights; None when not asked for.
    """

    case: str
    num_gradients: int
    block_size: int | None
    weights: int
    total_weights: int
    engine: str
    how: str
    seconds: float
    scaled_seconds: float
    runs: tuple[float, ...]
    cores: float
    ratio: float | None
    processor_ratio: float | None
    floor_seconds: float
    floor_share: float
    peak_bytes: int | None
    error: float
    update_seconds: float | None


def slice_segments(
    segments: Sequence[int], most: int | None, block_size: int | None
) -> tuple[int, ...]:
    """Take the same share of every tensor, in whole blocks, about ``most`` in all.

    Args:
        segments: weights of each tensor.
        most: weights wanted; None for all.
        block_size: B, or None for the full Fisher.

    Returns:
        Weights of each tensor's slice; all of it where that is no more than a block.
    """
    total = sum(segments)
    if most is None or total <= most:
        return tuple(segments)
    unit = block_size or 1
    return tuple(
        min(weights, max(unit, weights * most // total // unit * unit))
        for weights in segments
    )


def make_rows(
    num_gradients: int, weights: int, device: torch.device, seed: int = 0
) -> Tensor:
    """Draw rows with the structure of gradients.

    Half of the variance lies in 16 common directions, half is independent; the
    entries have standard deviation 1e-3, and each row has its own log-normal factor, as
    samples differ in loss.

    Args:
        num_gradients: N.
        weights: D.
        device: of the result.
        seed: of the numbers.

    Returns:
        float32 ``[N, D]``.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    rows = draw(num_gradients, weights)
    common = draw(num_gradients, _GRADIENT_RANK), draw(_GRADIENT_RANK, weights)
    rows.addmm_(*common, alpha=_GRADIENT_RANK**-0.5)
    factors = draw(num_gradients, 1).exp_().mul_(_GRADIENT_SCALE * 0.5**0.5)
    return rows.mul_(factors)


def floor_operations(
    num_gradients: int, block_size: int | None, weights: int, engine: Engine = "auto"
) -> float:
    """Count the operations of matrix products of the same shapes (see the module).

    Args:
        num_gradients: N.
        block_size: B, or None for the full Fisher.
        weights: D.
        engine: which form; ``"auto"`` for the one that would be chosen.

    Returns:
        Multiplications and additions.
    """
    n, d = float(num_gradients), float(weights)
    dual = 2.0 * n * n * d
    fisher = FisherConfig(num_gradients, block_size=block_size, engine=engine)
    if block_size is None or choose_engine(fisher) == "dual":
        return dual
    return n * block_size * d + float(block_size) ** 2 * d


def gemm_rate(device: torch.device, size: int | None = None, repeats: int = 5) -> float:
    """Measure the float32 GEMM rate on square products; the best of several counts.

    Args:
        device: where.
        size: of the matrices; None for 2048 on a processor and 8192 on a GPU.
        repeats: products, after one that is not counted.

    Returns:
        Multiplications and additions per second.
    """
    size = size or (8192 if device.type == "cuda" else 2048)
    left, right = torch.randn(2, size, size, device=device)
    result = left @ right
    seconds = float("inf")
    for _ in range(repeats):
        wait_for(device)
        start = time.perf_counter()
        torch.mm(left, right, out=result)
        wait_for(device)
        seconds = min(seconds, time.perf_counter() - start)
    return 2.0 * size**3 / seconds


def with_rate(row: InverseRow, old: float, new: float) -> InverseRow:
    """Give a row the floor of another GEMM rate.

    Args:
        row: measured beside the old rate.
        old: operations per second.
        new: operations per second.

    Returns:
        The row with its floor and its share changed.
    """
    floor = row.floor_seconds * old / new
    return dataclasses.replace(
        row, floor_seconds=floor, floor_share=floor / row.seconds
    )


def measure_case(
    case: Case,
    rate: float,
    *,
    repeats: int = 3,
    device: torch.device | str = "cpu",
    engines: Sequence[Engine] = ("auto",),
    with_update: bool = False,
    as_published: bool = False,
    tick: Tick = lambda _: None,
) -> list[InverseRow]:
    """Measure one case; all engines get the same rows and take turns.

    Args:
        case: the problem.
        rate: from :func:`gemm_rate`.
        repeats: repetitions.
        device: where.
        engines: which of ours.
        with_update: also measure the joint update.
        as_published: also measure the recursion with one batched product after another
            over all blocks, as published code has it.
        tick: called after every repetition of every engine.

    Returns:
        A row for the recursion, where it is possible, and one for each engine.
    """
    device = torch.device(device)
    rows = make_rows(case.num_gradients, case.weights, device)
    partition = _make_partition(case)
    diagonals: dict[str, Tensor] = {}
    updates: dict[str, list[float]] = {}
    actions: dict[str, Callable[[], object]] = {}
    how: dict[str, str] = {}
    if case.block_size is not None:
        runs = block_runs(partition)
        plans = {"recursion": choose_plan(rows, runs, DAMPING)}
        if as_published:
            plans["published"] = Plan("products", max(run.count for run in runs))
        for name, plan in plans.items():
            how[name] = f"{plan.kernel}, {plan.blocks_at_once} blocks at once"

            def recursion(name: str = name, plan: Plan = plan) -> None:
                inverses = recursion_inverse(rows, runs, DAMPING, plan)
                diagonals[name] = recursion_diagonal(inverses)

            actions[name] = recursion
    for engine in engines:
        name = _name_of(engine, case)

        def ours(engine: Engine = engine, name: str = name) -> None:
            inverse = run_engine(rows, partition, case, engine)
            diagonals[name] = inverse.diagonal()
            if with_update:
                updates.setdefault(name, []).append(_time_update(inverse, device))

        actions[name] = ours
    timings = measure_alternately(actions, repeats, device, tick)
    errors = reference_error(rows, partition, case, diagonals)
    on_gpu = device.type == "cuda"
    return _make_table(case, rate, timings, how, errors, updates, on_gpu)


def run_engine(
    rows: Tensor, partition: Partition, case: Case, engine: Engine
) -> InverseFisher:
    """Run one of our engines as a pruning step does.

    Args:
        rows: ``[N, D]``.
        partition: all blocks.
        case: the problem.
        engine: which form.

    Returns:
        The inverse, factorised.
    """
    fisher = FisherConfig(
        case.num_gradients, 1, case.block_size, DAMPING, engine=engine
    )
    inverse = make_inverse_fisher(partition, fisher, Communicator(rows.device))
    for chunk in torch.split(rows, rows_in_chunk(fisher, case.weights)):
        inverse.observe(chunk)
    inverse.factorize()
    return inverse


def reference_error(
    rows: Tensor,
    partition: Partition,
    case: Case,
    diagonals: dict[str, Tensor],
) -> dict[str, float]:
    """Compare diagonals with float64: dense inverses of some blocks.

    The full Fisher is too large for a dense inverse: there some columns g are compared
    with (1 − gᵀ(NλI + GGᵀ)⁻¹g)/λ, solved by LU in float64.

    Args:
        rows: ``[N, D]``.
        partition: all blocks.
        case: the problem.
        diagonals: ``[D]``, by name.

    Returns:
        Largest relative error by name.
    """
    if case.block_size is None:
        columns = _spread(case.weights, _COLUMNS_CHECKED)
        checked = torch.tensor(columns, device=rows.device)
        expected = _full_reference(rows, checked)
    else:
        starts = [
            BlockRun(run.start + index * run.size, run.size, 1)
            for run in block_runs(partition)
            for index in _spread(run.count, _BLOCKS_CHECKED)
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


def _block_reference(rows: Tensor, block: BlockRun) -> Tensor:
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
    """Up to ``wanted`` numbers below ``count``, first and last among them."""
    if count <= wanted:
        return list(range(count))
    return [i * (count - 1) // (wanted - 1) for i in range(wanted)]


def _make_partition(case: Case) -> Partition:
    cost = block_cost(FisherConfig(case.num_gradients, block_size=case.block_size))
    size = case.block_size or full_column_chunk(case.segments)
    return make_partition(case.segments, size, 1, cost)


def _name_of(engine: Engine, case: Case) -> str:
    fisher = FisherConfig(case.num_gradients, block_size=case.block_size, engine=engine)
    return choose_engine(fisher)


def _time_update(inverse: InverseFisher, device: torch.device) -> float:
    """Seconds of the joint update that removes the less salient half."""
    generator = torch.Generator(device).manual_seed(0)
    weights = torch.randn(
        inverse.size, generator=generator, dtype=torch.float64, device=device
    )
    saliency = weights.square() / inverse.diagonal()
    removed = saliency < saliency.median()
    wait_for(device)
    start = time.perf_counter()
    inverse.constrained_solve(weights, removed)
    wait_for(device)
    return time.perf_counter() - start


def _make_table(
    case: Case,
    rate: float,
    timings: dict[str, Timing],
    how: dict[str, str],
    errors: dict[str, float],
    updates: dict[str, list[float]],
    on_gpu: bool,
) -> list[InverseRow]:
    floor = floor_operations(case.num_gradients, case.block_size, case.weights) / rate
    # The update runs inside the measured action, but has a column of its own.
    runs = {
        name: tuple(
            seconds - update
            for seconds, update in zip(
                timing.runs, updates.get(name, [0.0] * len(timing.runs)), strict=True
            )
        )
        for name, timing in timings.items()
    }
    medians = {name: statistics.median(seconds) for name, seconds in runs.items()}
    recursion = medians.get("recursion")
    # On a GPU the processor only waits; within an update it works for another column.
    processor = {n: medians[n] * timing.cores for n, timing in timings.items()}
    comparable = recursion is not None and not on_gpu
    return [
        InverseRow(
            case=case.name,
            num_gradients=case.num_gradients,
            block_size=case.block_size,
            weights=case.weights,
            total_weights=case.total_weights,
            engine=name,
            how=how.get(name, ""),
            seconds=seconds,
            scaled_seconds=seconds * case.total_weights / case.weights,
            runs=runs[name],
            cores=timings[name].cores,
            ratio=None if recursion is None else recursion / seconds,
            processor_ratio=processor["recursion"] / max(processor[name], 1e-9)
            if comparable
            else None,
            floor_seconds=floor,
            floor_share=floor / seconds,
            peak_bytes=timings[name].peak_bytes,
            error=errors[name],
            update_seconds=statistics.median(updates[name])
            if name in updates
            else None,
        )
        for name, seconds in medians.items()
    ]
