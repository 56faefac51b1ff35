"""Compute the cost of one stage of a pruning step on one rank.

The formulas follow the code of :mod:`~.pruning.pruner`, :mod:`~.gradients` and
:mod:`~.fisher` phase by phase and must change with it. Tests compare them with counted
bytes. Symbols: T selected weights, D active weights, D_r active weights of a rank, N
gradients, B block size, K blocks and U = K·B weights of a unit, R ranks. The activations of
the network are not included.
"""

from __future__ import annotations

__all__ = [
    "Memory",
    "count_flops",
    "count_host_bytes",
    "count_memory",
    "count_traffic",
]

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lightning_woodfisher.fisher.config import (
    count_kept_factors,
    mini_batches_in_group,
    rows_in_chunk,
)
from lightning_woodfisher.gradients.kronecker_factors import factor_sides
from lightning_woodfisher.layerwise.memory import (
    LayerSize,
    count_copies,
    count_stages,
)
from lightning_woodfisher.layerwise.rows import split_rows
from lightning_woodfisher.resources.workload import Workload
from lightning_woodfisher.weights.partition import Unit
from lightning_woodfisher.weights.patterns import numbers_at_once

# Bytes of one number of GᵀG; "auto" starts in float32 and is counted as float32.
_GRAM_ITEMSIZE = {"auto": 4, "float32": 4, "split": 8, "float64": 8}
# float64 copies of the matrices of a unit while it is processed.
_PRIMAL_MATRICES = 4
_DUAL_GRAMS, _DUAL_ROWS = 4, 2
_FULL_GRAMS = 6
# Copies of a layer's factor during its inversion; matrices and vectors of a layer's
# weights during the update.
_FACTOR_MATRICES = 2
_LAYER_MATRICES, _LAYER_VECTORS = 3, 7
# Approximate number of conjugate gradient steps in the joint update.
_SOLVER_STEPS = 50
# Operations of an eigendecomposition, by the cube of the side. Products with a square
# matrix in the re-solve of the kept weights and around it; ADMM takes two an iteration.
_EIGH_FLOPS, _SWEEP_STEPS = 10, 26
# Products with a square matrix for the error curve of a layer.
_CURVE_STEPS = 93
# float64 vectors of D_r numbers that exist at the same time in each phase.
_VECTORS = {"factorize": 5, "select": 9, "update": 7, "search": 6, "write": 8}
# Additional vectors of the line search for a second update to try, and for a first-order
# direction.
_VECTORS_ALTERNATIVE = 2
_VECTORS_DESCENT = 1
# Vectors of a point of the local model: the update, a fraction of it, and products with F.
_VECTORS_LOCAL_MODEL = 5
# Copies of the sub-blocks of a unit for group scores, and of the rows they are computed
# from.
_GROUP_MATRICES, _GROUP_ROWS = 3, 2
_SUPPORT_MATRICES = 2.5
_VECTORS_GROUPS = 2


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank in one phase of a step.

    Attributes:
        state: GᵀG or the rows that the Fisher stores.
        rows: gradient rows that the Fisher has not observed yet; activations of the
            samples for ``criterion="layerwise"``.
        workspace: matrices of the units that are being processed.
        copies: vectors over all weights: copies of weights and masks, positions,
            saliencies and gathered values; and the Cholesky factors that are kept.
    """

    state: int
    rows: int
    workspace: int
    copies: int

    @property
    def total(self) -> int:
        """Sum of the four attributes."""
        return self.state + self.rows + self.workspace + self.copies


def count_memory(workload: Workload, rank: int) -> dict[str, Memory]:
    """Count the memory of a rank in each phase.

    Args:
        workload: the stage.
        rank: index of the rank.

    Returns:
        Memory by phase, in the order of the phases. The largest total is the peak of the
        step.
    """
    if workload.engine == "layers":
        return _count_layerwise(workload)
    units = workload.partition.owned(rank)
    active, vector = workload.partition.size, 8 * _count_weights(units)
    weights = workload.local_weights
    total, largest = sum(weights), max(weights, default=0)
    weight_bytes, value_bytes = workload.weight_bytes, workload.value_bytes
    first_order = int(workload.criterion.first_order)
    state = _count_state_bytes(workload, units) - count_host_bytes(workload, units)
    # Copies of weights and masks before the step, and the positions of active weights.
    kept = total * (weight_bytes + 1) + 8 * active
    kept += vector * first_order + _count_mean_gradient_bytes(workload, units)
    phases: dict[str, Memory] = {}
    has_factors = workload.engine == "factors"
    if has_factors:
        phases["collect"] = _count_factor_collection(workload, units, kept, state)
    elif workload.uses_gradients:
        phases |= _count_collection(workload, units, kept, state)
    # From here on all active weights exist in float64.
    kept += 8 * active
    # The first-order step, and the weights at the start of the local model.
    kept += vector * first_order
    kept += weight_bytes * total * (workload.config.step.local_model_points > 0)

    def add(phase: str, vectors: int, others: int = 0, workspace: int = 0) -> None:
        copies = kept + vectors * vector + others
        memory = Memory(state, 0, workspace, copies)
        phases[phase] = max(phases.get(phase, memory), memory, key=lambda m: m.total)

    inverting, solving = _count_workspace(workload, units)
    # Those are kept until the end of the stage.
    kept += _count_factor_bytes(workload, units)
    # Layers are processed one after the other, each with its own vectors.
    vectors = 1 if has_factors else _VECTORS["factorize"]
    gathered = value_bytes * active
    add("factorize", 0, max(gathered, vectors * vector), inverting)
    if groups := _count_group_bytes(workload, units):
        add("factorize", _VECTORS_GROUPS, workspace=groups)
    if workload.group_sizes:
        scores = _VECTORS["select"] * vector // min(workload.group_sizes)
        add("select", _VECTORS_GROUPS, scores)
    else:
        add("select", _VECTORS["select"])
    vectors = 2 if has_factors else _VECTORS["update"] + _VECTORS_DESCENT * first_order
    add("update", vectors, workspace=solving)
    ranks = workload.exchange_ranks
    buffers = max(workload.partition.shard_sizes()) * (1 + ranks) * (ranks > 1)
    gathered = value_bytes * (active + buffers) + weight_bytes * largest
    if workload.config.searches:
        vectors = _VECTORS["search"] + _VECTORS_DESCENT * first_order
        vectors += _VECTORS_ALTERNATIVE * (workload.config.update == "joint")
        add("search", vectors, gathered)
    add("write", _VECTORS["write"], gathered + 2 * (active + total))
    if workload.config.step.local_model_points:
        between = weight_bytes * total + 3 * 8 * largest
        add("local model", _VECTORS_LOCAL_MODEL, between, solving)
    return phases


def _count_layerwise(workload: Workload) -> dict[str, Memory]:
    """Count the memory of a step that prunes layer after layer, the same on every rank.

    Activations, as ``rows``, are those of linear layers with ``positions`` tokens in each
    sample. Convolutions are counted as if they had no groups, and without patches.

    Returns:
        Memory by phase.
    """
    copies = count_copies(sum(workload.local_weights), workload.weight_bytes)
    tokens = workload.samples_at_once * workload.positions
    layers = [
        LayerSize(o, i, 1, tokens * i, tokens * o)
        for o, i in (factor_sides(shape) for shape in workload.shapes)
    ]
    stages = count_stages(
        layers,
        workload.mini_batches,
        workload.exchange_ranks,
        workload.weight_bytes,
        competing=workload.layers_compete,
    )
    return {
        name: Memory(stage.state, stage.activations, stage.workspace, copies)
        for name, stage in stages.items()
    }


def _count_mean_gradient_bytes(workload: Workload, units: Sequence[Unit]) -> int:
    """Count the bytes of the mean gradient, or of its preliminary value."""
    if not (workload.fisher.centered and workload.has_blocks):
        return 0
    shift = workload.value_bytes if workload.engine == "primal" else 0
    return (8 + shift) * _count_weights(units)


def _count_state_bytes(workload: Workload, units: Sequence[Unit]) -> int:
    """Count the bytes that the Fisher stores for some units."""
    if workload.engine == "primal":
        item = _GRAM_ITEMSIZE[workload.fisher.precision]
        return item * sum(unit.count * unit.size**2 for unit in units)
    if workload.engine == "none":
        return 0
    if workload.engine == "factors":
        # The damped factors and their inverses.
        return 2 * 8 * (_count_factor_numbers(workload, units) - 2 * len(units))
    weights = _count_weights(units)
    if workload.engine == "diagonal":
        return 8 * weights
    return workload.row_bytes * workload.fisher.num_gradients * weights


def count_host_bytes(workload: Workload, units: Sequence[Unit]) -> int:
    """Count the bytes of rows that are stored in host memory for some units.

    Args:
        workload: the stage.
        units: the units.

    Returns:
        Bytes; zero unless ``offload_rows`` is set and the engine stores rows.
    """
    if workload.fisher.offload_rows and workload.engine in {"dual", "full"}:
        return _count_state_bytes(workload, units)
    return 0


def _count_collection(
    workload: Workload, units: Sequence[Unit], kept: int, state: int
) -> dict[str, Memory]:
    """Count the memory while rows are computed, and while the Fisher observes a chunk."""
    own, active = _count_weights(units), workload.partition.size
    ranks, count = workload.exchange_ranks, workload.fisher.num_gradients
    value_bytes, row_bytes = workload.value_bytes, workload.row_bytes
    chunk = rows_in_chunk(workload.fisher, active)
    at_once = workload.rows_at_once(count, workload.fisher.gradient_batch_size)
    # Computed rows, sent rows, received rows, and rows that wait for a full chunk.
    rows = at_once * active * value_bytes
    if count > at_once or ranks > 1 or row_bytes != value_bytes:
        rows += at_once * active * row_bytes
    if ranks > 1:
        rows += row_bytes * own * min(ranks * at_once, count)
    rows += chunk * row_bytes * own
    weights = workload.local_weights
    gradients = workload.weight_bytes * (sum(weights) + max(weights, default=0))
    # z, its Hessian product and the gradient with its graph exist at the same time.
    gradients *= 3 if workload.uses_hessian else 1
    diagonal = kept + 8 * own
    # Rows of a unit in float64 if needed, and their product.
    longest = _largest(units, lambda unit: unit.count * unit.size)
    numbers = 2 * 8 * chunk * longest
    if workload.engine == "primal":
        numbers += 4 * _largest(units, lambda unit: unit.count * unit.size**2)
        numbers += value_bytes * chunk * longest * workload.fisher.centered
    is_diagonal = workload.engine == "diagonal"
    workspace = 2 * 8 * own if is_diagonal else workload.threads * numbers
    return {
        "collect": Memory(state, rows, 0, diagonal + gradients),
        "accumulate": Memory(state, rows, workspace, diagonal),
    }


def _count_factor_collection(
    workload: Workload, units: Sequence[Unit], kept: int, state: int
) -> Memory:
    """Count the memory while Kronecker factors are computed, without image patches."""
    ranks, own = workload.world_size, _count_factor_numbers(workload, units)
    everything = _count_factor_numbers(workload, workload.partition.units)
    rows = everything * (1 + (ranks > 1)) + own * ranks * (ranks > 1)
    # One summand of a row, and the flags of its finite numbers. Sums and means take as
    # much memory as factors and inverses do later.
    sides = _factor_sides(workload, units)
    largest = max((max(pair) ** 2 for pair in sides), default=0)
    workspace = workload.value_bytes * largest + everything
    return Memory(state, rows * workload.value_bytes, workspace, kept)


def _count_factor_numbers(workload: Workload, units: Sequence[Unit]) -> int:
    """Count the exchanged numbers of some layers: factors, samples and positions."""
    return sum(o**2 + i**2 + 2 for o, i in _factor_sides(workload, units))


def _factor_sides(workload: Workload, units: Sequence[Unit]) -> list[tuple[int, int]]:
    return [factor_sides(workload.shapes[unit.segment]) for unit in units]


def _count_workspace(workload: Workload, units: Sequence[Unit]) -> tuple[int, int]:
    """Count the bytes of matrices for the inverse, and for the update."""
    engine, count = workload.engine, workload.fisher.num_gradients
    longest = _largest(units, lambda unit: unit.count * unit.size)
    if engine == "factors":
        # Layers are processed one after the other.
        sides = _factor_sides(workload, units)
        squares = max((max(pair) ** 2 for pair in sides), default=0)
        dense = max((o * i for o, i in sides), default=0)
        inverting = 8 * max(_FACTOR_MATRICES * squares, dense)
        return inverting, 8 * (_LAYER_MATRICES * dense + _LAYER_VECTORS * longest)
    numbers = 0
    if engine == "primal":
        matrices = _largest(units, lambda unit: unit.count * unit.size**2)
        numbers = _PRIMAL_MATRICES * matrices
    elif engine == "dual":
        gram, row = _DUAL_GRAMS * count**2, _DUAL_ROWS * count
        numbers = _largest(units, lambda unit: unit.count * (gram + row * unit.size))
    elif engine == "full":
        numbers = _FULL_GRAMS * count**2 + _DUAL_ROWS * count * longest
    size = 8 * numbers
    if workload.fisher.centered and engine == "dual":
        # Centered rows, before they are cut into blocks.
        size += workload.value_bytes * count * longest
    if count_host_bytes(workload, units):
        # Offloaded rows of a unit on the device, before conversion to float64.
        size += workload.row_bytes * count * longest
    size *= _count_units_at_once(workload, units)
    return size, size


def _count_factor_bytes(workload: Workload, units: Sequence[Unit]) -> int:
    """Count the bytes of the Cholesky factors that are kept for the update."""
    if workload.engine not in {"primal", "dual"}:
        return 0
    sizes = [(unit.size, unit.count) for unit in units]
    return count_kept_factors(workload.fisher, sizes)[1]


def _count_group_bytes(workload: Workload, units: Sequence[Unit]) -> int:
    """Count the bytes of sub-blocks of F⁻¹ and of the comparison of their groups."""
    if not (workload.group_sizes and workload.has_blocks):
        return 0

    def count_numbers(unit: Unit) -> int:
        size = workload.group_sizes[unit.segment % len(workload.shapes)]
        weights = unit.count * unit.size
        if size > unit.size:
            return 0
        is_primal = workload.engine == "primal"
        length = unit.size if is_primal else workload.fisher.num_gradients
        numbers = _GROUP_MATRICES * weights * size + _GROUP_ROWS * weights * length
        if workload.pattern.kind == "N:M":
            compared = numbers_at_once(weights // size, size, workload.pattern)
            numbers += round(_SUPPORT_MATRICES * compared)
        return numbers

    return 8 * _largest(units, count_numbers) * _count_units_at_once(workload, units)


def _count_units_at_once(workload: Workload, units: Sequence[Unit]) -> int:
    return min(workload.threads, max(1, len(units)))


def _count_weights(units: Sequence[Unit]) -> int:
    return sum(unit.count * unit.size for unit in units)


def _largest(units: Sequence[Unit], count: Callable[[Unit], int]) -> int:
    return max(map(count, units), default=0)


def count_traffic(workload: Workload, rank: int) -> dict[str, int]:
    """Count the bytes that a rank sends to other ranks.

    Args:
        workload: the stage.
        rank: index of the sender.

    Returns:
        Bytes by purpose: ``"exchange"`` of gradient rows, ``"gather"`` of new weights and
        masks, ``"search"`` (trial weights of a usual line search), and ``"reduce"`` (sums
        of N×N matrices in a ring, full Fisher only).
    """
    partition, ranks = workload.partition, workload.exchange_ranks
    if workload.engine == "layers":
        sides = [factor_sides(shape) for shape in workload.shapes]
        summed = sum((i + 1) * (i + 1 + o) + o for o, i in sides)
        reduced = 2 * (ranks - 1) * 8 * summed // ranks
        # Scores in each iteration, in the end float64 weights and two errors of a row.
        iterations = max(1, workload.config.layerwise.admm_iterations)
        width = workload.value_bytes * iterations + 8
        gathered = (ranks - 1) * sum(
            max(split_rows(o, ranks)) * (width * i + 16) for o, i in sides
        )
        return {"exchange": 0, "gather": gathered, "search": 0, "reduce": reduced}
    sizes = partition.shard_sizes()
    others = partition.size - sizes[rank]
    count = workload.fisher.num_gradients if workload.uses_gradients else 0
    if workload.engine == "factors":
        batches = count // mini_batches_in_group(workload.fisher)
        sent = [u for r in range(ranks) if r != rank for u in partition.owned(r)]
        exchange = len(range(rank, batches, ranks)) * workload.value_bytes
        exchange *= _count_factor_numbers(workload, sent)
    else:
        rows = _count_rows(workload, rank, count, workload.fisher.gradient_batch_size)
        exchange = rows * others * workload.row_bytes
        rows = _count_rows(workload, rank, *workload.first_order_batches)
        exchange += rows * others * workload.value_bytes
    sums = (1 + (workload.config.update == "joint")) * (workload.engine == "full")
    gathered = (ranks - 1) * max(sizes)
    written = workload.expected_trials + workload.finalists
    return {
        "exchange": exchange,
        "gather": gathered * (workload.value_bytes + 1),
        "search": gathered * workload.value_bytes * written,
        "reduce": 2 * (ranks - 1) * 8 * count**2 * sums // ranks,
    }


def _count_rows(workload: Workload, rank: int, count: int, size: int) -> int:
    """Count the rows that a rank computes; micro-batch k belongs to rank k mod R."""
    if not count:
        return 0
    at_once = workload.rows_at_once(count, size)
    starts = range(rank * at_once, count, workload.exchange_ranks * at_once)
    return sum(min(at_once, count - first) for first in starts)


def count_flops(workload: Workload, rank: int) -> dict[str, int]:
    """Count the floating-point operations of a rank.

    Gradients are not included, nor are Kronecker factors, whose cost depends on the
    inputs.

    Args:
        workload: the stage.
        rank: index of the rank.

    Returns:
        Operations by phase; a multiplication and an addition count as two.
    """
    units, engine = workload.partition.owned(rank), workload.engine
    n, joint = workload.fisher.num_gradients, workload.config.update == "joint"
    # Products with F⁻¹ that factorize blocks again: with the mean gradient, and for the
    # independent update if it is configured or tried by the line search.
    solves = int(workload.criterion.first_order)
    searches_joint = workload.config.searches and joint
    independent = int(workload.config.update == "independent" or searches_joint)
    gram = factorize = update = 0
    if engine == "layers":
        steps = _SWEEP_STEPS + 2 * workload.config.layerwise.admm_iterations
        tokens = workload.samples_at_once * workload.positions
        tokens *= -(-workload.mini_batches // workload.exchange_ranks)
        for o, i in (factor_sides(shape) for shape in workload.shapes):
            gram += 2 * tokens * i * (i + o)
            factorize += _EIGH_FLOPS * i**3
            update += 2 * max(split_rows(o, workload.exchange_ranks)) * i**2 * steps
            if workload.layers_compete:
                curves = _EIGH_FLOPS * i**3 + 2 * o * i**2 * _CURVE_STEPS
                factorize += curves // workload.exchange_ranks
    for unit in units:
        b, k = unit.size, unit.count
        if engine == "primal":
            gram += k * 2 * n * b**2
            # A Cholesky factor and its inverse; the factor again for the update.
            factorize += k * (b**3 // 3 * (1 + solves) + b**3)
            update += k * (b**3 // 3 * (joint + independent) + 10 * b**2)
        elif engine in {"dual", "full"}:
            product = 2 * n**2 * k * b
            cubic = k * n**3 // 3 if engine == "dual" else 0
            again = (product + cubic) * (engine == "dual")
            factorize += product + cubic + n**2 * k * b + again * solves
            update += (product + cubic) * joint + again * independent + 8 * n * k * b
    if engine == "diagonal":
        gram = 2 * n * _count_weights(units)
    if engine == "factors":
        for outputs, inputs in _factor_sides(workload, units):
            product = 2 * outputs * inputs * (outputs + inputs)
            factorize += outputs**3 + inputs**3
            # A product with the inverse, or one with it and one with F in each step.
            update += product * (2 * _SOLVER_STEPS * joint + independent)
    if engine == "full":
        # Every rank factorizes the N×N matrix.
        factorize += n**3 // 3
        update += n**3 // 3 * joint
    return {"accumulate": gram, "factorize": factorize, "update": update}
