"""What a part of a pruning step costs one rank: the formulas, all in this file.

They follow the code of :mod:`.pruner`, :mod:`.gradients` and :mod:`.fisher` phase by phase
and change with it; tests compare them with counted bytes. Symbols: T selected weights,
D active ones, D_r those of a rank, N gradients, B block size, K blocks and U = K·B weights
of a unit, R ranks. The network's own activations are not in here.
"""

from __future__ import annotations

__all__ = [
    "Memory",
    "host_bytes",
    "rank_flops",
    "rank_memory",
    "rank_traffic",
    "state_bytes",
]

from collections.abc import Sequence
from dataclasses import dataclass

from lightning_woodfisher.fisher.config import mini_batches_in_group, rows_in_chunk
from lightning_woodfisher.gradients.kronecker_factors import factor_sides
from lightning_woodfisher.resources.workload import Work
from lightning_woodfisher.weights.partition import Unit
from lightning_woodfisher.weights.patterns import numbers_at_once

# ---------------------------------------------------------------- what the engine does

# Bytes of a number of GᵀG; "auto" starts like float32 and counts so.
_GRAM_ITEMSIZE = {"auto": 4, "float32": 4, "float64": 8}
# Copies of the matrices of a unit in work, float64.
_PRIMAL_MATRICES = 4
_DUAL_GRAMS, _DUAL_ROWS = 4, 2
_FULL_GRAMS = 6
# Copies of a layer's factor when it is inverted, and of its weights when it is updated.
_FACTOR_MATRICES = 2
_LAYER_MATRICES, _LAYER_VECTORS = 3, 7
# Steps of conjugate gradients in the joint update, about.
_SOLVER_STEPS = 50
# Whole vectors of the shard that live at once, 8 bytes each: after the factorisation
# (diagonal and its parts), in the choice of weights, and when they are written.
_VECTORS_FACTORIZE = 5
_VECTORS_SELECT = 11
_VECTORS_UPDATE = 7
_VECTORS_SEARCH = 6
_VECTORS_WRITE = 8
# More of them with another update to try, and with a direction of first order; those that
# a criterion with one keeps: the sum of gradients, and from its inverse on F⁻¹g.
_VECTORS_ALTERNATIVE = 2
_VECTORS_DESCENT = 1
# Beside a point of the local model: the change, its part, and products with F.
_VECTORS_LOCAL_MODEL = 5
# Copies of the sub-blocks of the units in work, and of the rows that they are made of.
_GROUP_MATRICES, _GROUP_ROWS = 3, 2
_SUPPORT_MATRICES = 2.5
_VECTORS_GROUPS = 2


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank in one phase of a step.

    Attributes:
        state: what the Fisher keeps: GᵀG, or the rows.
        rows: gradients on their way into it.
        workspace: matrices of the units in work.
        copies: whole vectors: weights and masks as they were, positions, saliencies,
            what is gathered.
    """

    state: int
    rows: int
    workspace: int
    copies: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.state + self.rows + self.workspace + self.copies


# ---------------------------------------------------------------- bytes


def rank_memory(work: Work, rank: int) -> dict[str, Memory]:
    """Give the memory of a rank in each phase, in the order of the phases.

    Args:
        work: the part of the step.
        rank: whose memory.

    Returns:
        Memory by phase; its largest total is the peak of the step.
    """
    units = work.partition.owned(rank)
    shard = work.partition.shard(rank)
    own, active = shard.stop - shard.start, work.partition.size
    total, largest = sum(work.held), max(work.held, default=0)
    state = state_bytes(work, units) - host_bytes(work, units)
    # Weights and masks as they were before, and the positions of the active weights.
    kept = total * (work.weight_bytes + 1) + 8 * active
    kept += 8 * own * work.first_order + _centre_bytes(work, own)
    phases: dict[str, Memory] = {}
    if work.engine == "factors":
        phases["collect"] = _factor_collection(work, units, kept, state)
    elif work.uses_gradients:
        phases |= _collection(work, units, kept, state)
    layers = work.engine == "factors"  # One follows the other, with vectors of its own.
    # From here on all active weights are there in float64.
    kept += 8 * active
    # Its Newton step, and the weights from which points of the local model begin.
    kept += 8 * own * work.first_order
    kept += work.weight_bytes * total * (work.local_model_points > 0)
    gathering = work.gather_bytes * active
    vectors = 8 * own
    inverting, solving = _workspace(work, units)
    phases["factorize"] = Memory(
        state,
        0,
        inverting,
        kept + max(gathering, (1 if layers else _VECTORS_FACTORIZE) * vectors),
    )
    comparing = kept + _VECTORS_GROUPS * vectors
    if (groups := Memory(state, 0, _group_bytes(work, units), comparing)).workspace:
        phases["factorize"] = max(phases["factorize"], groups, key=lambda m: m.total)
    chosen = _VECTORS_SELECT * vectors
    if work.group_sizes:
        chosen = chosen // min(work.group_sizes) + _VECTORS_GROUPS * vectors
    phases["select"] = Memory(state, 0, 0, kept + chosen)
    phases["update"] = Memory(
        state,
        0,
        solving,
        kept
        + (2 if layers else _VECTORS_UPDATE + _VECTORS_DESCENT * work.first_order)
        * vectors,
    )
    longest = max(work.partition.shard_sizes())
    buffers = longest * (1 + work.exchanging) * (work.exchanging > 1)
    shared = (work.gather_bytes + 2) * active + work.gather_bytes * buffers
    written = work.weight_bytes * largest + 2 * total
    if work.searches:
        number = _VECTORS_SEARCH + _VECTORS_DESCENT * work.first_order
        number += _VECTORS_ALTERNATIVE * (work.update == "joint")
        trial = work.gather_bytes * (active + buffers) + work.weight_bytes * largest
        phases["search"] = Memory(state, 0, 0, kept + number * vectors + trial)
    phases["write"] = Memory(
        state, 0, 0, kept + _VECTORS_WRITE * vectors + shared + written
    )
    if work.local_model_points:
        between = work.weight_bytes * total + 3 * 8 * largest
        phases["local model"] = Memory(
            state, 0, solving, kept + between + _VECTORS_LOCAL_MODEL * vectors
        )
    return phases


def _centre_bytes(work: Work, own: int) -> int:
    """Bytes of the mean gradient, or of what stands in for it until all have come."""
    if not work.fisher.centered or work.engine not in {"primal", "dual", "full"}:
        return 0
    shift = work.computed_bytes if work.engine == "primal" else 0
    return (8 + shift) * own


def state_bytes(work: Work, units: Sequence[Unit]) -> int:
    """Count the bytes that the Fisher keeps for some units.

    Args:
        work: the part of the step.
        units: whose state.

    Returns:
        Bytes.
    """
    if work.engine == "primal":
        item = _GRAM_ITEMSIZE[work.fisher.precision]
        return item * sum(unit.count * unit.size**2 for unit in units)
    if work.engine == "none":
        return 0
    if work.engine == "factors":
        # The damped factors and their inverses.
        return 2 * 8 * (_factor_numbers(work, units) - 2 * len(units))
    weights = sum(unit.count * unit.size for unit in units)
    if work.engine == "diagonal":
        return 8 * weights
    return work.row_bytes * work.fisher.num_gradients * weights


def host_bytes(work: Work, units: Sequence[Unit]) -> int:
    """Count the bytes of rows that are kept in host memory for some units.

    Args:
        work: the part of the step.
        units: whose rows.

    Returns:
        Bytes; zero unless ``offload_rows`` is set and rows are kept.
    """
    keeps_rows = work.engine in {"dual", "full"}
    return state_bytes(work, units) * (work.fisher.offload_rows and keeps_rows)


def _collection(
    work: Work, units: Sequence[Unit], kept: int, state: int
) -> dict[str, Memory]:
    """Memory while gradients are taken, and while a chunk of them enters the Fisher."""
    own = sum(unit.count * unit.size for unit in units)
    ranks, count = work.exchanging, work.fisher.num_gradients
    chunk = rows_in_chunk(work.fisher, work.partition.size)
    at_once = work.gradients_at_once
    arrived = work.row_bytes * own
    # The rows that are computed and those that are sent, beside what has arrived.
    sending = at_once * work.partition.size * work.computed_bytes
    if count > at_once or ranks > 1 or work.row_bytes != work.computed_bytes:
        sending += at_once * work.partition.size * work.row_bytes
    if ranks > 1:
        sending += arrived * min(ranks * at_once, count)
    gradients = work.weight_bytes * (sum(work.held) + max(work.held, default=0))
    # z, its product with the Hessian and the gradient with its graph live together.
    gradients *= 3 if work.twice else 1
    diagonal = kept + 8 * own
    waiting = chunk * arrived
    # A unit's rows in float64 if need be, and their product.
    products = max((unit.count * unit.size**2 for unit in units), default=0)
    products *= 4 * (work.engine == "primal")
    workspace = work.threads * (2 * 8 * chunk * _largest(units) + products)
    if work.fisher.centered and work.engine == "primal":
        workspace += work.threads * work.computed_bytes * chunk * _largest(units)
    if work.engine == "diagonal":
        workspace = 2 * 8 * own
    return {
        "collect": Memory(state, sending + waiting, 0, diagonal + gradients),
        "accumulate": Memory(state, sending + waiting, workspace, diagonal),
    }


def _factor_collection(
    work: Work, units: Sequence[Unit], kept: int, state: int
) -> Memory:
    """Memory while the Kronecker factors of layers are taken; patches not counted."""
    ranks, own = work.world_size, _factor_numbers(work, units)
    everything = _factor_numbers(work, work.partition.units)
    sending = everything * (1 + (ranks > 1)) + own * ranks * (ranks > 1)
    # What is being added to the row, and which of its numbers are finite. The sums and
    # the means made of them take as much as factors and inverses do later.
    largest = max((max(pair) ** 2 for pair in _sides(work, units)), default=0)
    workspace = work.computed_bytes * largest + everything
    return Memory(state, sending * work.computed_bytes, workspace, kept)


def _factor_numbers(work: Work, units: Sequence[Unit]) -> int:
    """Count the numbers that travel for some layers: factors, samples and positions."""
    return sum(o**2 + i**2 + 2 for o, i in _sides(work, units))


def _sides(work: Work, units: Sequence[Unit]) -> list[tuple[int, int]]:
    return [factor_sides(work.shapes[unit.segment]) for unit in units]


def _workspace(work: Work, units: Sequence[Unit]) -> tuple[int, int]:
    """Bytes of the matrices in work when inverting, and when solving for the update."""
    count = work.fisher.num_gradients
    if work.engine == "primal":
        matrices = 8 * max((u.count * u.size**2 for u in units), default=0)
        inverting = solving = _PRIMAL_MATRICES * matrices
    elif work.engine == "dual":
        inverting = solving = 8 * max(
            (
                _DUAL_GRAMS * u.count * count**2 + _DUAL_ROWS * count * u.count * u.size
                for u in units
            ),
            default=0,
        )
    elif work.engine == "full":
        rows = _DUAL_ROWS * count * _largest(units)
        inverting = solving = 8 * (_FULL_GRAMS * count**2 + rows)
    elif work.engine == "factors":
        # Layers follow one another.
        sides = _sides(work, units)
        squares = max((max(pair) ** 2 for pair in sides), default=0)
        dense = max((o * i for o, i in sides), default=0)
        inverting = 8 * max(_FACTOR_MATRICES * squares, dense)
        solving = _LAYER_MATRICES * dense + _LAYER_VECTORS * _largest(units)
        return inverting, 8 * solving
    else:
        inverting = solving = 0
    if work.fisher.centered and work.engine == "dual":
        # Rows less their mean, before they are cut into blocks.
        centred = work.computed_bytes * count * _largest(units)
        inverting, solving = inverting + centred, solving + centred
    if host_bytes(work, units):
        # The rows of a unit come to the device as they are, before they are float64.
        visiting = work.row_bytes * count * _largest(units)
        inverting, solving = inverting + visiting, solving + visiting
    at_once = min(work.threads, max(1, len(units)))
    return at_once * inverting, at_once * solving


def _group_bytes(work: Work, units: Sequence[Unit]) -> int:
    """Bytes of the sub-blocks of F⁻¹ of a unit, and of what their comparison takes."""
    if not work.group_sizes or work.engine not in {"primal", "dual", "full"}:
        return 0
    tensors, found = len(work.shapes), 0
    for unit in units:
        size, weights = work.group_sizes[unit.segment % tensors], unit.count * unit.size
        if size > unit.size:
            continue
        length = unit.size if work.engine == "primal" else work.fisher.num_gradients
        numbers = _GROUP_MATRICES * weights * size + _GROUP_ROWS * weights * length
        if work.pattern.kind == "N:M":
            compared = numbers_at_once(weights // size, size, work.pattern)
            numbers += round(_SUPPORT_MATRICES * compared)
        found = max(found, 8 * numbers)
    return found * min(work.threads, max(1, len(units)))


def _largest(units: Sequence[Unit]) -> int:
    return max((unit.count * unit.size for unit in units), default=0)


# ---------------------------------------------------------------- traffic and work


def rank_traffic(work: Work, rank: int) -> dict[str, int]:
    """Count the bytes that a rank sends to others.

    Args:
        work: the part of the step.
        rank: the sender.

    Returns:
        Bytes of the ``"exchange"`` of gradient rows, of the ``"gather"`` of new weights
        and masks, of the weights on trial (``"search"``, about as many as are usual), and
        of the sums of N×N matrices (``"reduce"``, full Fisher only; as of a ring).
    """
    ranks, sizes = work.exchanging, work.partition.shard_sizes()
    others = work.partition.size - sizes[rank]
    count = work.fisher.num_gradients if work.uses_gradients else 0
    own_rows = _rows_of_rank(rank, ranks, count, work.gradients_at_once)
    exchange = own_rows * others * work.row_bytes
    sample, _ = work.first_order_batches
    more_rows = _rows_of_rank(rank, ranks, sample, work.first_order_at_once)
    exchange += more_rows * others * work.computed_bytes
    if work.engine == "factors":
        batches = count // mini_batches_in_group(work.fisher)
        abroad = [u for r in range(ranks) if r != rank for u in work.partition.owned(r)]
        own_batches = len(range(rank, batches, ranks))
        exchange = own_batches * _factor_numbers(work, abroad) * work.computed_bytes
    sums = (1 + (work.update == "joint")) * (work.engine == "full")
    abroad_weights = (ranks - 1) * max(sizes)
    return {
        "exchange": exchange,
        "gather": abroad_weights * (work.gather_bytes + 1),
        "search": abroad_weights * work.gather_bytes * work.usual_trials,
        "reduce": 2 * (ranks - 1) * 8 * count**2 * sums // ranks,
    }


def _rows_of_rank(rank: int, ranks: int, count: int, at_once: int) -> int:
    """Count the rows that a rank computes; micro-batch k is of rank k mod R."""
    if not count:
        return 0
    starts = range(rank * at_once, count, ranks * at_once)
    return sum(min(at_once, count - first) for first in starts)


def rank_flops(work: Work, rank: int) -> dict[str, int]:
    """Count the floating-point operations of a rank, without the gradients themselves.

    Nor are those in here that make the Kronecker factors: they depend on the inputs.

    Args:
        work: the part of the step.
        rank: the one that works.

    Returns:
        Operations (a multiplication and an addition are two) by phase.
    """
    units = work.partition.owned(rank)
    n, joint = work.fisher.num_gradients, work.update == "joint"
    # Products with F⁻¹, for which blocks are factorised anew: of the mean gradient, and
    # of the independent update, asked for or on trial.
    solves = int(work.first_order)
    independent = int(work.update == "independent" or (work.searches and joint))
    gram = factorize = update = 0
    for unit in units:
        b, k = unit.size, unit.count
        if work.engine == "primal":
            gram += k * 2 * n * b**2
            # A Cholesky factor and its inverse; the factor again for the update.
            factorize += k * (b**3 // 3 * (1 + solves) + b**3)
            update += k * (b**3 // 3 * (joint + independent) + 10 * b**2)
        elif work.engine in {"dual", "full"}:
            product = 2 * n**2 * k * b
            cubic = k * n**3 // 3 if work.engine == "dual" else 0
            factorize += product + cubic + n**2 * k * b
            anew = (product + cubic) * (work.engine == "dual")
            factorize += anew * solves
            update += (product + cubic) * joint + anew * independent + 8 * n * k * b
    if work.engine == "diagonal":
        gram = 2 * n * sum(unit.count * unit.size for unit in units)
    if work.engine == "factors":
        for outputs, inputs in _sides(work, units):
            product = 2 * outputs * inputs * (outputs + inputs)
            factorize += outputs**3 + inputs**3
            # A product with the inverse, or one with it and one with F in each step.
            update += product * (2 * _SOLVER_STEPS * joint + independent)
    if work.engine == "full":
        # Every rank factorises the one N×N matrix.
        factorize += n**3 // 3
        update += n**3 // 3 if joint else 0
    return {"accumulate": gram, "factorize": factorize, "update": update}
