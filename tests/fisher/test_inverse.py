"""The inverse Fisher against a dense oracle in float64 that loses no digits."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import pytest
import torch
from dense_inverse import to_dense
from devices import DEVICE, called_from_cpu
from torch import Tensor

from lightning_woodfisher.base.errors import ConfigurationError, PruningError
from lightning_woodfisher.distributed.communicator import Communicator
from lightning_woodfisher.fisher.config import FisherConfig, Precision, choose_engine
from lightning_woodfisher.fisher.inverse import (
    DualInverseFisher,
    FullInverseFisher,
    InverseFisher,
    PrimalInverseFisher,
    block_cost,
    full_column_chunk,
    make_inverse_fisher,
)
from lightning_woodfisher.weights.partition import Partition, make_partition

Form = Literal["primal", "dual", "full"]

FORMS: tuple[Form, ...] = ("primal", "dual", "full")
DAMPINGS = (1e-7, 1e-5, 1e-3, 1e-1)
BLOCK_SIZES = (1, 7, 50, 784)
GRADIENTS = (1, 10, 300)
# Of F⁻¹, by precision.
TOLERANCES: dict[Precision, float] = {"auto": 1e-3, "split": 1e-3, "float64": 1e-5}
PRECISIONS = tuple(TOLERANCES)


class Oracle:
    """One block of F = λI + GᵀG/N and its inverse, from the singular values of G.

    With G/√N = UΣVᵀ (all of V) it is F⁻¹ = V (λ + Σ²)⁻¹ Vᵀ: a sum of positive terms, so
    that nothing cancels however small λ is. `torch.linalg.inv` of F loses
    cond(F)·2⁻⁵³ instead. Neither engine works this way.
    """

    def __init__(self, rows: Tensor, damping: float) -> None:
        self.rows = rows.double()
        self.damping = damping
        _, values, self.basis = _singular(self.rows)
        self.eigenvalues = rows.new_full((rows.shape[1],), damping, dtype=torch.float64)
        self.eigenvalues[: len(values)] += values.square()

    def diagonal(self) -> Tensor:
        return (self.basis.square() / self.eigenvalues.unsqueeze(1)).sum(dim=0)

    def dense(self) -> Tensor:
        return self.basis.mT @ (self.basis / self.eigenvalues.unsqueeze(1))

    def solve(self, vector: Tensor) -> Tensor:
        return self.basis.mT @ ((self.basis @ vector) / self.eigenvalues)

    def multiply(self, vector: Tensor) -> Tensor:
        product = self.rows.mT @ (self.rows @ vector)
        return self.damping * vector + product / len(self.rows)

    def constrained(self, weights: Tensor, removed: Tensor) -> Tensor:
        """−w_S on S and on R the ridge regression F_RR⁻¹F_RS w_S, in the span of G_R."""
        change = torch.where(removed, -weights, 0.0)
        kept = self.rows[:, ~removed]
        if kept.shape[1]:
            left, values, basis = _singular(kept)
            target = (self.rows @ -change) / math.sqrt(len(kept))
            solved = values / (self.damping + values.square()) * (left.mT @ target)
            change[~removed] = basis[: len(values)].mT @ solved
        return change


_KNOWN: dict[tuple[object, ...], tuple[Tensor, Tensor, Tensor]] = {}


def _singular(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U, Σ and all of Vᵀ of G/√N; remembered, as λ does not enter."""
    key = (rows.shape, float(rows.sum()), float(rows.square().sum()))
    if key not in _KNOWN:
        left, values, basis = torch.linalg.svd(rows / math.sqrt(len(rows)))
        _KNOWN[key] = left[:, : len(values)].clone(), values, basis
    return _KNOWN[key]


@dataclass(frozen=True)
class Problem:
    """Gradients as they come from a network, weights, and what is removed."""

    rows: Tensor
    weights: Tensor
    removed: Tensor
    vector: Tensor


Kind = Literal["columns", "normal", "rows", "shared"]


@functools.cache
def problem(size: int, num_gradients: int, kind: Kind = "columns") -> Problem:
    """Float32 gradients.

    By default columns differ by three orders, some are dead and some equal. Otherwise
    entries are normal; ``"rows"`` differ by orders, or ``"shared"`` is the largest part.
    """
    generator = torch.Generator().manual_seed(size * 1000 + num_gradients)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    rows = normal(num_gradients, size)
    if kind == "columns":
        rows *= 10.0 ** (
            -3.0 * torch.rand(size, generator=generator, dtype=torch.float64)
        )
        rows[:, 2::11] = 0.0  # dead units
        rows[:, 4::13] = rows[:, 3::13][:, : len(range(4, size, 13))]  # equal inputs
    elif kind == "rows":
        rows *= torch.exp(2.0 * normal(num_gradients, 1))
    elif kind == "shared":
        rows += 3.0 * normal(1, size)
    return Problem(
        rows=rows.float(),
        weights=normal(size),
        removed=torch.rand(size, generator=generator) < 0.6,
        vector=normal(size),
    )


def segments_for(block_size: int) -> list[int]:
    """Two tensors that the block size does not divide."""
    longest = max(2 * block_size + block_size // 2, 40)
    return [longest, block_size // 3 + 1]


def make(
    form: Form,
    segments: list[int],
    block_size: int,
    num_gradients: int,
    damping: float,
    *,
    ranks: tuple[int, int] = (0, 1),
    precision: Precision = "auto",
) -> InverseFisher:
    rank, world_size = ranks
    communicator = Communicator(DEVICE)
    communicator.rank = rank
    partition = make_partition(segments, block_size, world_size)
    inverse = make_inverse_fisher(
        partition,
        FisherConfig(
            num_gradients,
            damping=damping,
            block_size=None if form == "full" else block_size,
            engine="auto" if form == "full" else form,
            precision=precision,
        ),
        communicator,
    )
    return called_from_cpu(inverse)


def filled(
    form: Form,
    rows: Tensor,
    segments: list[int],
    block_size: int,
    damping: float,
    precision: Precision = "auto",
) -> InverseFisher:
    number = len(rows)
    inverse = make(form, segments, block_size, number, damping, precision=precision)
    inverse.observe(rows)
    inverse.factorize()
    return inverse


def block_slices(form: Form, segments: list[int], block_size: int) -> Iterator[slice]:
    if form == "full":
        yield slice(0, sum(segments))
        return
    for unit in make_partition(segments, block_size, 1).units:
        for index in range(unit.count):
            first = unit.start + index * unit.size
            yield slice(first, first + unit.size)


def error(actual: Tensor, expected: Tensor) -> float:
    """Largest deviation in a block relative to its largest entry."""
    if not len(expected):
        return 0.0
    largest = float(expected.abs().max())
    deviation = float((actual - expected).abs().max())
    return deviation / largest if largest else deviation


def worst_errors(
    form: Form,
    segments: list[int],
    block_size: int,
    num_gradients: int,
    damping: float,
    kind: Kind = "columns",
    precision: Precision = "auto",
) -> dict[str, float]:
    """Largest relative error of every quantity over the blocks of a problem."""
    case = problem(sum(segments), num_gradients, kind)
    inverse = filled(form, case.rows, segments, block_size, damping, precision)
    assert inverse.raised_damping() == {}
    answers = {
        "diagonal": inverse.diagonal(),
        "matvec": inverse.matvec(case.vector),
        "joint": inverse.constrained_solve(case.weights, case.removed),
        "fisher_matvec": inverse.fisher_matvec(case.vector),
    }
    worst = dict.fromkeys(answers, 0.0)
    for block in block_slices(form, segments, block_size):
        oracle = Oracle(case.rows[:, block], damping)
        vector = case.vector[block]
        kept = ~case.removed[block]
        diagonal = oracle.diagonal()
        found = {
            # Every entry of the diagonal must be right, also the small ones.
            "diagonal": error(answers["diagonal"][block] / diagonal, torch.ones(1)),
            "matvec": error(answers["matvec"][block], oracle.solve(vector)),
            # On the kept weights: the change of the others is −w, and large.
            "joint": error(
                answers["joint"][block][kept],
                oracle.constrained(case.weights[block], ~kept)[kept],
            ),
            "fisher_matvec": error(
                answers["fisher_matvec"][block], oracle.multiply(vector)
            ),
        }
        worst = {name: max(worst[name], found[name]) for name in worst}
    return worst


# --- the oracle itself ----------------------------------------------------------------


def exact_inverse(rows: Tensor, damping: float) -> list[list[Fraction]]:
    """F⁻¹ by Gauss-Jordan elimination in rational numbers: no rounding at all."""
    gradients = [[Fraction(value) for value in row] for row in rows.double().tolist()]
    size, number = rows.shape[1], len(rows)
    table = [
        [
            sum((g[i] * g[j] for g in gradients), Fraction(0)) / number
            + (Fraction(damping) if i == j else 0)
            for j in range(size)
        ]
        + [Fraction(int(i == j)) for j in range(size)]
        for i in range(size)
    ]
    for i in range(size):
        pivot = table[i][i]
        table[i] = [value / pivot for value in table[i]]
        for j in range(size):
            if j != i:
                factor = table[j][i]
                table[j] = [
                    a - factor * b for a, b in zip(table[j], table[i], strict=True)
                ]
    return [row[size:] for row in table]


@pytest.mark.parametrize("damping", DAMPINGS)
@pytest.mark.parametrize("num_gradients", [1, 4, 12])
def test_oracle_equals_exact_rational_arithmetic(
    num_gradients: int, damping: float
) -> None:
    rows = problem(8, num_gradients).rows
    exact = torch.tensor(
        [[float(value) for value in row] for row in exact_inverse(rows, damping)],
        dtype=torch.float64,
    )
    oracle = Oracle(rows, damping)
    assert error(oracle.diagonal() / exact.diagonal(), torch.ones(1)) < 1e-8
    assert error(oracle.dense(), exact) < 1e-8


@pytest.mark.parametrize("damping", DAMPINGS)
@pytest.mark.parametrize("num_gradients", GRADIENTS)
@pytest.mark.parametrize("size", [50, 784])
def test_oracle_inverts_the_dense_matrix(
    size: int, num_gradients: int, damping: float
) -> None:
    rows = problem(size, num_gradients).rows.double()
    identity = torch.eye(size, dtype=torch.float64)
    fisher = damping * identity + rows.mT @ rows / num_gradients
    oracle = Oracle(rows, damping)
    # |X − F⁻¹| <= |F⁻¹| |FX − I|, and one Newton step from X shows how far it was.
    inverse = oracle.dense()
    residual = fisher @ inverse - identity
    assert float(torch.linalg.matrix_norm(residual, 2)) < 1e-6
    assert error(inverse, torch.linalg.inv(fisher)) < 1e-7


# --- the engines against it -----------------------------------------------------------


@pytest.mark.parametrize("form", ["primal", "dual"])
@pytest.mark.parametrize("damping", DAMPINGS)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("num_gradients", GRADIENTS)
def test_blocks_equal_the_dense_inverse(
    form: Form, damping: float, block_size: int, num_gradients: int
) -> None:
    segments = segments_for(block_size)
    for precision in ("auto", "float64"):
        errors = worst_errors(
            form, segments, block_size, num_gradients, damping, precision=precision
        )
        assert all(e <= TOLERANCES[precision] for e in errors.values()), errors


@pytest.mark.parametrize("damping", DAMPINGS)
@pytest.mark.parametrize("num_gradients", GRADIENTS)
@pytest.mark.parametrize("segments", [[1], [9, 4], [60, 1, 30], [700, 84]])
def test_full_fisher_equals_the_dense_inverse(
    segments: list[int], num_gradients: int, damping: float
) -> None:
    chunk = full_column_chunk(segments)
    for precision in ("auto", "float64"):
        errors = worst_errors(
            "full", segments, chunk, num_gradients, damping, precision=precision
        )
        assert all(e <= TOLERANCES[precision] for e in errors.values()), errors


KINDS: tuple[Kind, ...] = ("columns", "normal", "rows", "shared")
# Widths at which float32 products are tried: strips and batches, primal and dual.
WIDTHS: dict[Form, list[tuple[int, int]]] = {
    "primal": [(300, 50), (300, 250)],
    "dual": [(20, 100), (100, 250), (250, 700)],
    "full": [(20, 100), (200, 700)],
}


@pytest.mark.parametrize(
    ("form", "num_gradients", "size"),
    [(form, *width) for form in FORMS for width in WIDTHS[form]],
)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("damping", [1e-6, 1e-4, 1e-2, 1.0, 100.0])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_an_arithmetic_is_used_only_where_it_is_enough(
    form: Form,
    num_gradients: int,
    size: int,
    kind: Kind,
    damping: float,
    precision: Precision,
) -> None:
    errors = worst_errors(form, [size], size, num_gradients, damping, kind, precision)
    assert all(e <= TOLERANCES[precision] for e in errors.values()), errors


@pytest.mark.parametrize(
    ("form", "num_gradients", "size"), [("primal", 300, 50), ("dual", 20, 100)]
)
def test_precision_can_be_chosen(form: Form, num_gradients: int, size: int) -> None:
    rows = problem(size, num_gradients, "normal").rows.clone()
    # Two columns, and two rows, that are nearly parallel.
    rows[:, 1] = rows[:, 0] + 0.01 * rows[:, 2]
    rows[1] = rows[0] + 0.001 * rows[2]

    def worst(precision: Precision, damping: float) -> float:
        inverse = filled(form, rows, [size], size, damping, precision)
        exact = Oracle(rows, damping).diagonal()
        return error(inverse.diagonal() / exact, torch.ones(1))

    # Small damping: float32 loses digits, and "auto" does not use it.
    assert worst("float32", 1e-6) > 1e-7
    assert worst("float32", 1e-6) > 1e-2 or form == "dual"
    assert worst("auto", 1e-6) < 1e-8
    assert worst("split", 1e-6) < 1e-7
    assert worst("float64", 1e-6) < 1e-8
    # Large damping: float32 is enough, and "auto" does use it.
    assert 1e-9 < worst("auto", 1.0) < 1e-4
    assert 1e-12 < worst("split", 1.0) < 1e-7
    assert worst("float64", 1.0) < 1e-12


@pytest.mark.parametrize("form", ["primal", "dual"])
@pytest.mark.parametrize("num_gradients", GRADIENTS)
def test_a_block_larger_than_its_tensor_is_the_tensor(
    form: Form, num_gradients: int
) -> None:
    errors = worst_errors(form, [31, 1, 12], 10_000, num_gradients, 1e-7)
    assert all(e <= TOLERANCES["auto"] for e in errors.values()), errors


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("damping", DAMPINGS)
@pytest.mark.parametrize("num_gradients", GRADIENTS)
def test_to_dense_is_the_block_diagonal_inverse(
    form: Form, damping: float, num_gradients: int
) -> None:
    segments, block_size = [17, 5], 7
    rows = problem(22, num_gradients).rows
    expected = torch.zeros(22, 22, dtype=torch.float64)
    for block in block_slices(form, segments, block_size):
        expected[block, block] = Oracle(rows[:, block], damping).dense()
    dense = to_dense(filled(form, rows, segments, block_size, damping))
    assert error(dense, expected) <= TOLERANCES["auto"]
    assert bool((dense[expected == 0] == 0).all())


@pytest.mark.parametrize("form", FORMS)
def test_multiplying_by_the_fisher_undoes_the_inverse(form: Form) -> None:
    case = problem(45, 20)
    inverse = filled(form, case.rows, [30, 15], 10, 1e-3, "float64")
    assert (
        error(inverse.fisher_matvec(inverse.matvec(case.vector)), case.vector) < 1e-10
    )


@pytest.mark.parametrize("form", FORMS)
def test_float64_rows_keep_their_digits(form: Form) -> None:
    case = problem(24, 30)
    rows = case.rows.double() * (1 + 1e-10 * torch.arange(30.0).double().unsqueeze(1))
    diagonal = filled(form, rows, [24], 24, 1e-3).diagonal()
    rounded = filled(form, rows.float(), [24], 24, 1e-3).diagonal()
    expected = Oracle(rows, 1e-3).diagonal()
    assert error(diagonal, expected) < 1e-11
    assert error(rounded, expected) > 1e-11


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("every", [0, 1])
def test_constrained_solve_of_nothing_and_of_everything(form: Form, every: int) -> None:
    case = problem(45, 20)
    inverse = filled(form, case.rows, [30, 15], 10, 1e-5)
    removed = torch.full((45,), bool(every))
    change = inverse.constrained_solve(case.weights, removed)
    assert torch.equal(change, -case.weights * every)


@pytest.mark.parametrize("form", ["primal", "dual"])
@pytest.mark.parametrize("share", [0.1, 0.6, 0.95])
def test_blocks_of_a_unit_keep_different_weights(form: Form, share: float) -> None:
    """Some blocks keep all or none, and where few are kept, they are gathered."""
    size, segments = 8, [8 * 400]
    case = problem(segments[0], 12, "normal")
    inverse = filled(form, case.rows, segments, size, 1e-2)
    assert any(unit.count > 2 for unit in inverse.units)
    removed = torch.rand(segments, generator=torch.Generator().manual_seed(1)) < share
    removed[: 3 * size] = True
    removed[-size:] = share > 0.5
    change = inverse.constrained_solve(case.weights, removed)
    for block in block_slices(form, segments, size):
        oracle = Oracle(case.rows[:, block], 1e-2)
        expected = oracle.constrained(case.weights[block], removed[block])
        assert error(change[block], expected) < 1e-4


@pytest.mark.parametrize("form", FORMS)
def test_several_vectors_are_solved_as_each_alone(form: Form) -> None:
    """However different their sizes."""
    case = problem(45, 20)
    inverse = filled(form, case.rows, [30, 15], 10, 1e-5, "float64")
    vectors = torch.stack([case.weights, 1e6 * case.vector, 1e-6 * case.vector])
    together = inverse.constrained_solve(vectors, case.removed)
    for vector, found in zip(vectors, together, strict=True):
        alone = inverse.constrained_solve(vector, case.removed)
        assert error(found, alone) < 1e-12
        assert torch.equal(found[case.removed], -vector[case.removed])


@pytest.mark.parametrize("form", FORMS)
def test_constrained_solve_removes_exactly(form: Form) -> None:
    case = problem(45, 20)
    change = filled(form, case.rows, [30, 15], 10, 1e-5).constrained_solve(
        case.weights, case.removed
    )
    assert bool(((case.weights + change)[case.removed] == 0).all())
    assert torch.equal(case.weights, problem(45, 20).weights)


# --- how rows arrive ------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("chunks", [(1,) * 20, (7, 13), (19, 1)])
def test_observing_in_chunks_equals_observing_at_once(
    form: Form, chunks: tuple[int, ...]
) -> None:
    case = problem(45, 20)
    at_once = filled(form, case.rows, [30, 15], 10, 1e-5, "float64")
    inverse = make(form, [30, 15], 10, 20, 1e-5, precision="float64")
    for chunk in case.rows.split(chunks):
        inverse.observe(chunk)
    inverse.factorize()
    assert error(inverse.diagonal(), at_once.diagonal()) < 1e-9
    assert error(inverse.matvec(case.vector), at_once.matvec(case.vector)) < 1e-9


@pytest.mark.parametrize("form", FORMS)
def test_rows_are_copied(form: Form) -> None:
    case = problem(45, 20)
    rows = case.rows.clone()
    inverse = make(form, [30, 15], 10, 20, 1e-5)
    inverse.observe(rows)
    rows.fill_(math.nan)
    inverse.factorize()
    assert torch.equal(
        inverse.diagonal(), filled(form, case.rows, [30, 15], 10, 1e-5).diagonal()
    )


@pytest.mark.parametrize("form", ["primal", "dual"])
@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_shards_of_several_ranks_are_the_bits_of_one(
    form: Form, world_size: int
) -> None:
    case = problem(45, 20)
    alone = filled(form, case.rows, [30, 15], 10, 1e-5)
    partition = make_partition([30, 15], 10, world_size)
    diagonals, changes = [], []
    for rank in range(world_size):
        shard = partition.shard(rank)
        inverse = make(form, [30, 15], 10, 20, 1e-5, ranks=(rank, world_size))
        inverse.observe(case.rows[:, shard])
        inverse.factorize()
        diagonals.append(inverse.diagonal())
        changes.append(
            inverse.constrained_solve(case.weights[shard], case.removed[shard])
        )
    assert torch.equal(torch.cat(diagonals), alone.diagonal())
    assert torch.equal(
        torch.cat(changes), alone.constrained_solve(case.weights, case.removed)
    )


@pytest.mark.parametrize("form", FORMS)
def test_misuse_is_refused(form: Form) -> None:
    rows = problem(45, 20).rows
    inverse = make(form, [30, 15], 10, 20, 1e-5)
    with pytest.raises(ValueError, match=r"observed 0 gradients of 20"):
        inverse.factorize()
    with pytest.raises(ValueError, match=r"width must be 45"):
        inverse.observe(rows[:, :44])
    inverse.observe(rows[:15])
    with pytest.raises(ValueError, match=r"\(6, 45\) after 15 of 20"):
        inverse.observe(rows[:6])
    with pytest.raises(ValueError, match=r"observed 15 gradients of 20"):
        inverse.factorize()


def test_state_bytes() -> None:
    rows = problem(45, 20).rows

    def state(form: Form, rows: Tensor) -> int:
        return filled(form, rows, [30, 15], 10, 1e-5).state_bytes

    # Blocks of 10, 10, 10, 10 and 5; rows in their own precision.
    assert state("primal", rows) == (4 * 10**2 + 5**2) * 8
    assert state("dual", rows) == state("full", rows) == 20 * 45 * 4
    assert state("dual", rows.double()) == 20 * 45 * 8
    assert make("dual", [30, 15], 10, 20, 1e-5).state_bytes == 0


# --- damping --------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["primal", "dual"])
def test_damping_is_raised_for_the_block_that_needs_it_only(form: Form) -> None:
    rows = problem(45, 60).rows.clone()
    # Two equal columns of huge gradients: λ is lost beside their squares.
    rows[:, 10:12] = 1e9 * torch.linspace(1, 2, 60).unsqueeze(1)
    inverse = filled(form, rows, [30, 15], 10, 1e-5)
    assert list(inverse.raised_damping()) == [10]
    raised = inverse.raised_damping()[10]
    assert math.log10(raised / 1e-5) == pytest.approx(round(math.log10(raised / 1e-5)))
    others = torch.tensor([True, False, True, True, True])
    assert inverse.damping[others].tolist() == [1e-5] * 4
    assert float(inverse.damping[1]) == raised
    calm = rows.clone()
    calm[:, 10:20] = 0.0
    expected = filled(form, calm, [30, 15], 10, 1e-5)
    assert expected.raised_damping() == {}
    outside = torch.cat([torch.arange(10), torch.arange(20, 45)])
    assert torch.equal(inverse.diagonal()[outside], expected.diagonal()[outside])


def test_blocks_of_one_unit_are_damped_each_for_itself() -> None:
    # Fewer gradients than columns: every block needs its λ.
    rows = problem(6000, 3).rows.double()
    rows[:, 4:8] *= 1e9
    inverse = filled("primal", rows, [6000], 4, 1e-5, precision="float64")
    assert inverse.units[0].count > 2
    assert list(inverse.raised_damping()) == [4]
    assert inverse.damping[[0, *range(2, 1500)]].eq(1e-5).all()
    for first in (0, 8):
        block = slice(first, first + 4)
        expected = Oracle(rows[:, block], 1e-5).diagonal()
        assert error(inverse.diagonal()[block], expected) <= TOLERANCES["float64"]


@pytest.mark.parametrize("form", ["dual", "full"])
@pytest.mark.parametrize("scale", [1, 10, 30, 100, 300, 1000])
@pytest.mark.parametrize(("num_gradients", "size"), [(300, 7), (50, 20), (10, 7)])
def test_large_gradients_and_tiny_damping_keep_their_digits(
    form: Form, scale: float, num_gradients: int, size: int
) -> None:
    """With more gradients than columns 1 − ΣZ² is λ/(λ + eigenvalue): all digits go."""
    generator = torch.Generator().manual_seed(0)
    rows = scale * torch.randn(num_gradients, 2 * size, generator=generator)
    removed = torch.rand(2 * size, generator=generator) < 0.5
    weights = torch.randn(2 * size, generator=generator, dtype=torch.float64)
    inverse = filled(form, rows, [2 * size], size, 1e-7)
    change = inverse.constrained_solve(weights, removed)
    for number, block in enumerate(block_slices(form, [2 * size], size)):
        oracle = Oracle(rows[:, block], float(inverse.damping[number]))
        expected = oracle.constrained(weights[block], removed[block])
        ratio = inverse.diagonal()[block] / oracle.diagonal()
        assert error(ratio, torch.ones(1)) <= TOLERANCES["auto"]
        # The full form solves for fewer kept columns than gradients less exactly.
        assert error(change[block], expected) <= (1e-2 if form == "full" else 1e-3)
    # Damping is raised only as far as necessary, and this is reported.
    ceiling = 1e-9 * scale**2 * 100
    assert all(1e-7 < value < ceiling for value in inverse.raised_damping().values())
    assert len(inverse.raised_damping()) == int((inverse.damping > 1e-7).sum())
    assert scale < 1000 or num_gradients < 2 * size or inverse.raised_damping()


def test_full_fisher_raises_its_one_damping() -> None:
    rows = problem(45, 60).rows.clone()
    rows[:, 10:12] = 1e9 * torch.linspace(1, 2, 60).unsqueeze(1)
    inverse = filled("full", rows, [30, 15], 10, 1e-5)
    assert list(inverse.raised_damping()) == [0]
    assert inverse.raised_damping()[0] == float(inverse.damping) > 1e-5


def test_raised_blocks_have_global_numbers_on_every_rank() -> None:
    rows = problem(45, 60).rows.clone()
    rows[:, 40:] = 1e9
    for rank in range(3):
        shard = make_partition([30, 15], 10, 3).shard(rank)
        inverse = make("primal", [30, 15], 10, 60, 1e-5, ranks=(rank, 3))
        inverse.observe(rows[:, shard])
        inverse.factorize()
        assert list(inverse.raised_damping()) == ([40] if rank == 2 else [])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("num_gradients", [10, 300])
@pytest.mark.parametrize("scale", [1e2, 1e3, 1e4, 1e5, 1e6, 1e8])
def test_what_is_given_belongs_to_the_damping_that_is_reported(
    form: Form, num_gradients: int, scale: float
) -> None:
    """A factorization may succeed by luck where all digits of λ are lost."""
    rows = problem(50, num_gradients).rows * scale
    inverse = filled(form, rows, [50], 50, 1e-7)
    expected = Oracle(rows, float(inverse.damping[0])).diagonal()
    assert error(inverse.diagonal() / expected, torch.ones(1)) < 1e-3


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_gradients_that_are_not_finite_end_in_an_error(form: Form, bad: float) -> None:
    rows = problem(45, 20).rows.clone()
    rows[3, 5] = bad
    with pytest.raises(PruningError):
        filled(form, rows, [30, 15], 10, 1e-5)


# --- configuration --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("engine", "num_gradients", "block_size", "chosen"),
    [
        ("auto", 50, 50, "primal"),
        ("auto", 49, 50, "dual"),
        ("primal", 1, 50, "primal"),
        ("dual", 500, 50, "dual"),
    ],
)
def test_choose_engine(
    engine: Literal["auto", "primal", "dual"],
    num_gradients: int,
    block_size: int,
    chosen: str,
) -> None:
    fisher = FisherConfig(num_gradients, block_size=block_size, engine=engine)
    assert choose_engine(fisher) == chosen


@pytest.mark.parametrize(
    ("engine", "block_size", "expected"),
    [
        ("auto", 10, PrimalInverseFisher),
        ("auto", 30, DualInverseFisher),
        ("dual", 10, DualInverseFisher),
        ("primal", 30, PrimalInverseFisher),
        ("auto", None, FullInverseFisher),
    ],
)
def test_make_inverse_fisher(
    engine: Literal["auto", "primal", "dual"],
    block_size: int | None,
    expected: type[InverseFisher],
    comm: Communicator,
) -> None:
    partition: Partition = make_partition([60], block_size or 64, 1)
    fisher = FisherConfig(20, block_size=block_size, engine=engine)
    inverse = make_inverse_fisher(partition, fisher, comm)
    assert type(inverse) is expected


def test_block_cost_grows_as_the_engine_does() -> None:
    primal = block_cost(FisherConfig(100, block_size=10))
    assert primal(10) == 100 * 10**2 + 10**3
    dual = block_cost(FisherConfig(100, block_size=200))
    assert dual(200) == 100**2 * 200
    assert block_cost(FisherConfig(100, block_size=None))(7) == 100**2 * 7


def test_full_column_chunk_depends_on_the_model_only() -> None:
    assert full_column_chunk([10, 5]) == 64
    assert full_column_chunk([100_000, 156_000]) == 4000
    assert full_column_chunk([25_000_000]) == 4096
    assert full_column_chunk([256_001]) == 4001


def test_defaults_are_legal() -> None:
    config = FisherConfig()
    assert dataclasses.replace(config, block_size=None).block_size is None
    assert FisherConfig(block_size=1, num_gradients=1, gradient_batch_size=1)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_gradients", 0),
        ("num_gradients", -5),
        ("gradient_batch_size", 0),
        ("block_size", 0),
        ("block_size", -1),
        ("damping", 0.0),
        ("damping", -1e-4),
        ("damping", math.nan),
        ("damping", math.inf),
        ("model_mode", "test"),
        ("engine", "fast"),
    ],
)
def test_bad_values_are_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(ConfigurationError, match=f"fisher.{field}={value!r}"):
        FisherConfig(**{field: value})  # type: ignore[arg-type]
