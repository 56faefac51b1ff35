"""Centered gradients and restricted inverses against dense float64 matrices."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from devices import DEVICE, called_from_cpu
from torch import Tensor

from lightning_woodfisher.distributed.communicator import Communicator
from lightning_woodfisher.fisher.config import FisherConfig
from lightning_woodfisher.fisher.inverse import InverseFisher, make_inverse_fisher
from lightning_woodfisher.weights.partition import make_partition

Form = Literal["primal", "dual", "full"]
FORMS: tuple[Form, ...] = ("primal", "dual", "full")
SEGMENTS = [70, 13]
BLOCK = 20
SIZE = sum(SEGMENTS)


def blocks(form: Form) -> list[slice]:
    if form == "full":
        return [slice(0, SIZE)]
    ends = [0, 20, 40, 60, 70, 83]
    return [slice(a, b) for a, b in zip(ends, ends[1:], strict=False)]


def make(form: Form, number: int, damping: float, **options: Any) -> InverseFisher:
    inverse = make_inverse_fisher(
        make_partition(SEGMENTS, BLOCK, 1),
        FisherConfig(
            number,
            damping=damping,
            block_size=None if form == "full" else BLOCK,
            engine="auto" if form == "full" else form,
            **{"precision": "float64", **options},
        ),
        Communicator(DEVICE),
    )
    return called_from_cpu(inverse)


def gradients(number: int, mean: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(number)
    rows = torch.randn(number, SIZE, generator=generator)
    rows *= 10.0 ** (-2.0 * torch.rand(SIZE, generator=generator))
    return rows + mean * torch.randn(SIZE, generator=generator)


def vectors() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(SIZE, generator=generator, dtype=torch.float64)
    vector = torch.randn(SIZE, generator=generator, dtype=torch.float64)
    return weights, vector, torch.rand(SIZE, generator=generator) < 0.4


def dense(rows: Tensor, form: Form, damping: float, centered: bool) -> Tensor:
    """F as one matrix, from the definition, one row after the other."""
    rows = rows.double()
    mean = rows.mean(dim=0) if centered else torch.zeros(SIZE, dtype=torch.float64)
    matrix = torch.zeros(SIZE, SIZE, dtype=torch.float64)
    for row in rows:
        matrix += torch.outer(row - mean, row - mean) / len(rows)
    inside = torch.zeros(SIZE, SIZE, dtype=torch.bool)
    for block in blocks(form):
        inside[block, block] = True
    return matrix * inside + damping * torch.eye(SIZE, dtype=torch.float64)


def solved(matrix: Tensor, weights: Tensor, removed: Tensor, kept: Tensor) -> Tensor:
    """The minimizer of ½δᵀFδ under δ_S = −w_S, over the weights that are kept."""
    change = torch.where(removed, -weights, 0.0)
    left = (kept & ~removed).nonzero().squeeze(1)
    gone = removed.nonzero().squeeze(1)
    pull = matrix[left][:, gone] @ weights[gone]
    change[left] = torch.linalg.solve(matrix[left][:, left], pull)
    return change


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    error = float((actual - expected).abs().max() / expected.abs().max())
    assert error < tolerance


def fed(inverse: InverseFisher, rows: Tensor, chunk: int = 7) -> InverseFisher:
    for part in rows.split(chunk):
        inverse.observe(part)
    inverse.factorize()
    return inverse


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("damping", [1e-5, 1e-3, 1e-1])
@pytest.mark.parametrize("number", [1, 12, 150])
@pytest.mark.parametrize("mean", [0.0, 1.0, 100.0])
def test_centered_fisher_equals_the_dense_one(
    form: Form, damping: float, number: int, mean: float
) -> None:
    rows = gradients(number, mean)
    weights, vector, removed = vectors()
    inverse = fed(make(form, number, damping, centered=True), rows)
    assert inverse.raised_damping() == {}
    matrix = dense(rows, form, damping, centered=True)
    inverted = torch.linalg.inv(matrix)
    assert_close(inverse.diagonal(), inverted.diagonal())
    assert_close(inverse.matvec(vector), inverted @ vector)
    assert_close(inverse.fisher_matvec(vector), matrix @ vector)
    everything = torch.ones(SIZE, dtype=torch.bool)
    change = solved(matrix, weights, removed, everything)
    assert_close(inverse.constrained_solve(weights, removed), change)


@pytest.mark.parametrize("form", FORMS)
def test_centering_ignores_what_all_gradients_share(form: Form) -> None:
    rows = gradients(30).double()
    plain = fed(make(form, 30, 1e-3, centered=True), rows)
    moved = fed(make(form, 30, 1e-3, centered=True), rows + 5.0)
    assert_close(moved.diagonal(), plain.diagonal(), 1e-9)
    # Which it would not, had nothing been subtracted.
    other = fed(make(form, 30, 1e-3), rows + 5.0)
    assert float((other.diagonal() / plain.diagonal()).min()) < 0.99


def test_a_large_mean_does_not_cost_the_primal_form_its_float32() -> None:
    rows = gradients(150)
    sizes = [
        fed(
            make("primal", 150, 1.0, centered=centered, precision="auto"),
            rows + mean,
            50,
        ).state_bytes
        for centered, mean in ((False, 0.0), (True, 100.0), (False, 100.0))
    ]
    assert sizes[0] == sizes[1] == 4 * (3 * 20**2 + 10**2 + 13**2)
    assert sizes[2] == 2 * sizes[0]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("damping", [1e-5, 1e-3])
@pytest.mark.parametrize("number", [12, 150])
@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("share", [0.5, 0.05])
def test_restricted_inverse_is_that_of_the_kept_weights(
    form: Form, damping: float, number: int, centered: bool, share: float
) -> None:
    rows = gradients(number, 0.5)
    weights, vector, _ = vectors()
    inverse = fed(make(form, number, damping, centered=centered), rows)
    kept = torch.ones(SIZE, dtype=torch.bool)
    # Twice: what was dropped once stays dropped.
    for seed in (3, 4):
        generator = torch.Generator().manual_seed(seed)
        marked = torch.rand(SIZE, generator=generator) < share**0.5
        kept &= marked
        inverse.restrict(marked)
        inverse.factorize()
    assert 0 < int(kept.sum()) < SIZE
    matrix = dense(rows, form, damping, centered)
    inverted = torch.linalg.inv(matrix[kept][:, kept])
    vector = torch.where(kept, vector, 0.0)
    weights, removed = torch.where(kept, weights, 0.0), kept & (kept.cumsum(0) % 2 == 0)
    assert removed.any()
    assert_close(inverse.diagonal()[kept], inverted.diagonal())
    assert_close(inverse.matvec(vector)[kept], inverted @ vector[kept])
    product = matrix[kept][:, kept] @ vector[kept]
    assert_close(inverse.fisher_matvec(vector)[kept], product)
    change = inverse.constrained_solve(weights, removed)
    assert_close(change, solved(matrix, weights, removed, kept))
    for result in (inverse.matvec(vector), inverse.fisher_matvec(vector), change):
        assert not result[~kept].any()


@pytest.mark.parametrize("form", ["primal", "dual"])
@pytest.mark.parametrize("centered", [False, True])
def test_restricting_equals_a_fresh_inverse_of_the_columns_that_are_left(
    form: Form, centered: bool
) -> None:
    rows = gradients(25, 0.5)
    _, _, dropped = vectors()
    inverse = fed(make(form, 25, 1e-3, centered=centered), rows)
    inverse.restrict(~dropped)
    inverse.factorize()
    for block in blocks(form):
        columns = torch.arange(SIZE)[block][~dropped[block]]
        fresh = make_inverse_fisher(
            make_partition([len(columns)], BLOCK, 1),
            FisherConfig(
                25,
                damping=1e-3,
                block_size=BLOCK,
                engine=form,  # type: ignore[arg-type]
                precision="float64",
                centered=centered,
            ),
            Communicator(),
        )
        assert_close(
            inverse.diagonal()[columns], fed(fresh, rows[:, columns]).diagonal()
        )


@pytest.mark.parametrize("form", FORMS)
def test_restricting_gives_back_the_damping_that_was_raised(form: Form) -> None:
    rows = gradients(12)
    # Primal: equal columns; dual: equal rows. Neither can be told from singular.
    rows[:, 0] = 1e8
    rows[:, 1] = 1e8
    inverse = fed(make(form, 12, 1e-7), rows)
    assert inverse.raised_damping()
    kept = torch.ones(SIZE, dtype=torch.bool)
    kept[:2] = False
    inverse.restrict(kept)
    inverse.factorize()
    assert inverse.raised_damping() == {}
    matrix = dense(rows, form, 1e-7, centered=False)[2:, 2:]
    assert_close(inverse.diagonal()[2:], torch.linalg.inv(matrix).diagonal(), 1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_restricting_too_early_or_wrongly_is_refused(form: Form) -> None:
    inverse = make(form, 2, 1e-3)
    with pytest.raises(ValueError, match="factorize first"):
        inverse.restrict(torch.ones(SIZE, dtype=torch.bool))
    fed(inverse, gradients(2))
    with pytest.raises(ValueError, match=r"restrict to \(82,\)"):
        inverse.restrict(torch.ones(SIZE - 1, dtype=torch.bool))


@pytest.mark.parametrize("form", ["primal", "dual"])
@pytest.mark.parametrize("precision", ["auto", "float64"])
def test_kept_factors_save_a_factorization_and_change_no_bit(
    form: Form, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, (_, vector, _) = gradients(12 if form == "dual" else 30), vectors()
    kept = fed(make(form, len(rows), 1e-3, precision=precision), rows)
    monkeypatch.setattr("lightning_woodfisher.fisher.config._BYTES_OF_FACTORS", 0)
    again = fed(make(form, len(rows), 1e-3, precision=precision), rows)
    expected = again.matvec(vector)
    name = f"lightning_woodfisher.fisher.{form}.cholesky"
    monkeypatch.setattr(name, lambda _: pytest.fail("factorized again"))
    assert torch.equal(kept.matvec(vector), expected)
    with pytest.raises(pytest.fail.Exception, match="factorized again"):
        again.matvec(vector)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("precision", "damping", "expected"),
    [
        ("auto", 1.0, {"float32": SIZE}),
        ("auto", 1e-12, {"float64": SIZE}),
        ("split", 1.0, {"split": SIZE}),
        ("float64", 1.0, {"float64": SIZE}),
    ],
)
def test_weights_are_counted_by_arithmetic(
    form: Form, precision: str, damping: float, expected: dict[str, int]
) -> None:
    rows = gradients(12 if form == "dual" else 100, 1.0)
    inverse = fed(make(form, len(rows), damping, precision=precision), rows)
    assert inverse.count_arithmetics() == expected
