"""What a part of a pruning step costs one rank: the formulas, all in this file.

They follow the code of :mod:`.pruner`, :mod:`.gradients` and :mod:`.fisher` phase by phase
and change with it; tests compare them with counted bytes. Symbols: T selected weights,
D active ones, D_r those of a rank, N gradients, B block size, K blocks and U = K·B weights
of a unit, R ranks. The network's own activations are not in here.
"""

from __future__ import annotations

__all__ = [
    "Memory",
    "Work",
    "host_bytes",
    "rank_flops",
    "rank_memory",
    "rank_traffic",
    "state_bytes",
]

from collections.abc import Sequence
from dataclasses import dataclass, field

from lightning_woodfisher.criteria import CRITERIA, make_criterion
from lightning_woodfisher.factors import factor_sides
from lightning_woodfisher.fisher import (
    FisherConfig,
    mini_batches_in_group,
    rows_in_chunk,
)
from lightning_woodfisher.gradients import micro_batch_size
from lightning_woodfisher.obs import Update
from lightning_woodfisher.partition import Partition, Unit

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
_VECTORS_UPDATE = 9
_VECTORS_WRITE = 8


@dataclass(frozen=True)
class Work:
    """What the cost of a part of a step depends on.

    Args:
        weights: weights of each selected tensor.
        active: those of them that are not pruned yet.
        fisher: how the Fisher is estimated.
        world_size: number of ranks, R.
        criterion: name of the criterion.
        update: how the kept weights make up for the removed ones.
        weight_bytes: bytes of a weight in the model.
        threads: units in work at once.
        sharded: every rank holds 1/R of every tensor (FSDP2) and all of it is its own.
        shapes: of each selected tensor; K-FAC only.

    Attributes:
        engine: what the criterion keeps of the curvature.
        held: weights of each selected tensor that a rank holds.
        exchanging: ranks among which gradients are exchanged.
        partition: the blocks and their owners, the same as in the step itself.
    """

    weights: Sequence[int]
    active: Sequence[int]
    fisher: FisherConfig
    world_size: int = 1
    criterion: str = "woodfisher"
    update: Update = "joint"
    weight_bytes: int = 4
    threads: int = 1
    sharded: bool = False
    shapes: Sequence[Sequence[int]] = ()
    engine: str = field(init=False)
    held: Sequence[int] = field(init=False)
    exchanging: int = field(init=False)
    partition: Partition = field(init=False)

    def __post_init__(self) -> None:
        criterion = make_criterion(self.criterion, self.fisher, self.update)
        shards = self.world_size if self.sharded else 1
        exchanging = 1 if self.sharded else self.world_size
        object.__setattr__(self, "held", [-(-n // shards) for n in self.weights])
        object.__setattr__(self, "exchanging", exchanging)
        active = [-(-n // shards) for n in self.active]
        partition = criterion.layout(active, exchanging)
        object.__setattr__(self, "partition", partition)
        object.__setattr__(self, "engine", criterion.engine)

    @property
    def uses_gradients(self) -> bool:
        """Whether there are backward passes."""
        return CRITERIA[self.criterion].needs != "nothing"

    @property
    def twice(self) -> bool:
        """Whether the loss is differentiated twice."""
        return CRITERIA[self.criterion].needs == "curvature rows"

    @property
    def computed_bytes(self) -> int:
        """Bytes of a number in a gradient row when it is computed."""
        return 8 if self.weight_bytes == 8 else 4

    @property
    def row_bytes(self) -> int:
        """Bytes of a number in a gradient row that is sent and kept."""
        return 2 if self.fisher.row_dtype == "bfloat16" else self.computed_bytes

    @property
    def gradients_at_once(self) -> int:
        """Rows that a rank computes in one pass, if the network allows more than one."""
        fisher = self.fisher
        if fisher.collection == "loop" or self.sharded or self.twice:
            return 1
        return micro_batch_size(
            fisher.num_gradients, fisher.gradient_batch_size, self.partition.size
        )

    @property
    def gather_bytes(self) -> int:
        """Bytes of a weight when the ranks exchange the new ones."""
        return 8 if self.weight_bytes == 8 else 4


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
    phases: dict[str, Memory] = {}
    if work.engine == "factors":
        phases["collect"] = _factor_collection(work, units, kept, state)
    elif work.uses_gradients:
        phases |= _collection(work, units, kept, state)
    layers = work.engine == "factors"  # One follows the other, with vectors of its own.
    # From here on all active weights are there in float64.
    kept += 8 * active
    gathering = work.gather_bytes * active
    vectors = 8 * own
    inverting, solving = _workspace(work, units)
    phases["factorize"] = Memory(
        state,
        0,
        inverting,
        kept + max(gathering, (1 if layers else _VECTORS_FACTORIZE) * vectors),
    )
    phases["select"] = Memory(state, 0, 0, kept + _VECTORS_SELECT * vectors)
    phases["update"] = Memory(
        state, 0, solving, kept + (2 if layers else _VECTORS_UPDATE) * vectors
    )
    longest = max(work.partition.shard_sizes())
    buffers = longest * (1 + work.exchanging) * (work.exchanging > 1)
    shared = (work.gather_bytes + 2) * active + work.gather_bytes * buffers
    written = work.weight_bytes * largest + 2 * total
    phases["write"] = Memory(
        state, 0, 0, kept + _VECTORS_WRITE * vectors + shared + written
    )
    return phases


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
    if host_bytes(work, units):
        # The rows of a unit come to the device as they are, before they are float64.
        visiting = work.row_bytes * count * _largest(units)
        inverting, solving = inverting + visiting, solving + visiting
    at_once = min(work.threads, max(1, len(units)))
    return at_once * inverting, at_once * solving


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
        and masks, and of the sums of N×N matrices (``"reduce"``, full Fisher only; as of
        a ring).
    """
    ranks, sizes = work.exchanging, work.partition.shard_sizes()
    others = work.partition.size - sizes[rank]
    count = work.fisher.num_gradients if work.uses_gradients else 0
    own_rows = sum(
        min(work.gradients_at_once, count - first)
        for first in range(
            rank * work.gradients_at_once, count, ranks * work.gradients_at_once
        )
    )
    exchange = own_rows * others * work.row_bytes
    if work.engine == "factors":
        batches = count // mini_batches_in_group(work.fisher)
        abroad = [u for r in range(ranks) if r != rank for u in work.partition.owned(r)]
        own_batches = len(range(rank, batches, ranks))
        exchange = own_batches * _factor_numbers(work, abroad) * work.computed_bytes
    sums = (1 + (work.update == "joint")) * (work.engine == "full")
    return {
        "exchange": exchange,
        "gather": (ranks - 1) * max(sizes) * (work.gather_bytes + 1),
        "reduce": 2 * (ranks - 1) * 8 * count**2 * sums // ranks,
    }


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
    gram = factorize = update = 0
    for unit in units:
        b, k = unit.size, unit.count
        if work.engine == "primal":
            gram += k * 2 * n * b**2
            # A Cholesky factor and its inverse; the factor again for the update.
            factorize += k * (b**3 // 3 + b**3)
            update += k * ((b**3 // 3 if joint else 0) + 10 * b**2)
        elif work.engine in {"dual", "full"}:
            product = 2 * n**2 * k * b
            cubic = k * n**3 // 3 if work.engine == "dual" else 0
            factorize += product + cubic + n**2 * k * b
            update += (product + cubic if joint else 0) + 8 * n * k * b
    if work.engine == "diagonal":
        gram = 2 * n * sum(unit.count * unit.size for unit in units)
    if work.engine == "factors":
        for outputs, inputs in _sides(work, units):
            product = 2 * outputs * inputs * (outputs + inputs)
            factorize += outputs**3 + inputs**3
            # A product with the inverse, or one with it and one with F in each step.
            update += product * (2 * _SOLVER_STEPS if joint else 1)
    if work.engine == "full":
        # Every rank factorises the one N×N matrix.
        factorize += n**3 // 3
        update += n**3 // 3 if joint else 0
    return {"accumulate": gram, "factorize": factorize, "update": update}
