"""Optimal Brain Surgeon on a quadratic loss, where its predictions are the truth."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from dense_inverse import constrained_minimizer
from devices import DEVICE, called_from_cpu
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_woodfisher.criteria.obs import Update, saliency, weight_update
from lightning_woodfisher.distributed.communicator import Communicator
from lightning_woodfisher.fisher.config import FisherConfig
from lightning_woodfisher.fisher.inverse import InverseFisher, make_inverse_fisher
from lightning_woodfisher.weights.partition import make_partition

SIZE = 24
UPDATES: tuple[Update, ...] = ("joint", "independent", "none")
FORMS = ["primal", "dual", "full"]

removals = st.lists(st.booleans(), min_size=SIZE, max_size=SIZE).map(torch.tensor)


def normal(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def gradients(seed: int, number: int = 40) -> Tensor:
    """Correlated columns: what is removed can be made up for."""
    return normal(seed, number, SIZE) @ normal(seed + 1, SIZE, SIZE) / SIZE**0.5


def inverse_of(
    rows: Tensor, damping: float = 1e-3, form: str = "primal", block_size: int = 10
) -> InverseFisher:
    engine: Literal["primal", "dual"] = "primal" if form == "primal" else "dual"
    inverse = make_inverse_fisher(
        make_partition([SIZE], block_size, 1),
        FisherConfig(
            len(rows),
            damping=damping,
            block_size=None if form == "full" else block_size,
            engine=engine,
        ),
        Communicator(DEVICE),
    )
    inverse = called_from_cpu(inverse)
    inverse.observe(rows)
    inverse.factorize()
    return inverse


def dense_fisher(
    rows: Tensor, damping: float = 1e-3, form: str = "primal", block_size: int = 10
) -> Tensor:
    """F from its definition, zero between blocks."""
    fisher = rows.mT @ rows / len(rows)
    if form != "full":
        block = torch.arange(SIZE) // block_size
        fisher = fisher * (block.unsqueeze(0) == block.unsqueeze(1))
    return fisher + damping * torch.eye(SIZE, dtype=torch.float64)


def rise(change: Tensor, fisher: Tensor) -> float:
    return float(0.5 * change @ fisher @ change)


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm().clamp(min=1e-300))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("number", [8, 40])
def test_predicted_rise_is_the_true_rise(
    form: str, update: Update, number: int
) -> None:
    """L(w) = L* + ½(w − w*)ᵀF(w − w*): measured from its definition, sample by sample."""
    rows, weights = gradients(0, number), normal(2, SIZE)
    damping = 1e-3

    def loss(at: Tensor) -> Tensor:
        away = at - weights
        pieces = away.split(10) if form != "full" else (away,)
        columns = rows.split(10, dim=1) if form != "full" else (rows,)
        slopes = [g @ d for g, d in zip(columns, pieces, strict=True)]
        curved = sum(0.5 * slope.square().mean() for slope in slopes)
        return 3.0 + curved + 0.5 * damping * away.square().sum()

    removed = normal(3, SIZE) > 0
    inverse = inverse_of(rows, damping, form)
    change = weight_update(weights, removed, inverse, update)
    predicted = float((0.5 * change * inverse.fisher_matvec(change)).sum())
    measured = float(loss(weights + change) - loss(weights))
    assert predicted == pytest.approx(measured, rel=1e-6)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("damping", [1e-6, 1e-3, 1.0])
@pytest.mark.parametrize("number", [8, 40])
def test_joint_update_is_the_constrained_minimizer(
    form: str, damping: float, number: int
) -> None:
    rows, weights = gradients(4, number), normal(5, SIZE)
    removed = normal(6, SIZE) > 0
    fisher = dense_fisher(rows, damping, form)
    change = weight_update(weights, removed, inverse_of(rows, damping, form), "joint")
    assert relative(change, constrained_minimizer(fisher, weights, removed)) < 1e-7
    best = rise(change, fisher)
    for seed in range(50):
        for size in (1e-3, 1e-1, 1.0):
            other = change + size * normal(seed, SIZE) * ~removed
            assert rise(other, fisher) >= best


@given(removed=removals, seed=st.integers(0, 50), form=st.sampled_from(FORMS))
def test_joint_never_costs_more_than_the_other_updates(
    removed: Tensor, seed: int, form: str
) -> None:
    rows, weights = gradients(seed), normal(seed + 100, SIZE)
    inverse, fisher = inverse_of(rows, form=form), dense_fisher(rows, form=form)
    costs = {
        update: rise(weight_update(weights, removed, inverse, update), fisher)
        for update in UPDATES
    }
    slack = 1 + 1e-9
    assert 0.0 <= costs["joint"] <= costs["independent"] * slack
    assert costs["joint"] <= costs["none"] * slack


@pytest.mark.parametrize("form", FORMS)
def test_saliency_is_the_true_cost_of_removing_one_weight(form: str) -> None:
    rows, weights = gradients(7), normal(8, SIZE)
    fisher = dense_fisher(rows, form=form)
    inverse = inverse_of(rows, form=form)
    scores = saliency(weights, inverse.diagonal())
    for index in range(SIZE):
        removed = torch.arange(SIZE) == index
        best = constrained_minimizer(fisher, weights, removed)
        assert float(scores[index]) == pytest.approx(rise(best, fisher), rel=1e-9)
        for update in ("joint", "independent"):
            change = weight_update(weights, removed, inverse, update)
            assert relative(change, best) < 1e-9


@pytest.mark.parametrize("form", FORMS)
def test_infinite_damping_gives_the_order_of_magnitudes(form: str) -> None:
    rows, weights = gradients(9), normal(10, SIZE)

    def order(damping: float) -> list[int]:
        scores = saliency(weights, inverse_of(rows, damping, form).diagonal())
        return scores.argsort().tolist()

    assert order(1e8) == weights.abs().argsort().tolist()
    assert order(1e-3) != weights.abs().argsort().tolist()


@pytest.mark.parametrize("form", FORMS)
def test_independent_update_is_the_published_sum(form: str) -> None:
    rows, weights = gradients(11), normal(12, SIZE)
    removed = normal(13, SIZE) > 0
    inverse = torch.linalg.inv(dense_fisher(rows, form=form))
    expected = torch.zeros_like(weights)
    for q in range(SIZE):
        if removed[q]:
            expected -= inverse[:, q] * weights[q] / inverse[q, q]
    expected[removed] = -weights[removed]
    change = weight_update(weights, removed, inverse_of(rows, form=form), "independent")
    assert relative(change, expected) < 1e-9


def test_no_update_leaves_the_other_weights_alone() -> None:
    weights, removed = normal(14, SIZE), normal(15, SIZE) > 0
    change = weight_update(weights, removed, inverse_of(gradients(16)), "none")
    assert torch.equal(weights + change, torch.where(removed, 0.0, weights))


@given(removed=removals, update=st.sampled_from(UPDATES), form=st.sampled_from(FORMS))
def test_removed_weights_become_exactly_zero(
    removed: Tensor, update: Update, form: str
) -> None:
    weights = normal(17, SIZE)
    change = weight_update(
        weights, removed, inverse_of(gradients(18), form=form), update
    )
    assert bool(((weights + change)[removed] == 0).all())
    if not bool(removed.any()):
        assert bool((change == 0).all())


def test_updates_do_not_reach_into_other_blocks() -> None:
    weights = normal(19, SIZE)
    removed = torch.arange(SIZE) < 5
    for update in UPDATES:
        change = weight_update(weights, removed, inverse_of(gradients(20)), update)
        assert bool((change[10:] == 0).all())


@pytest.mark.parametrize("update", UPDATES)
def test_engines_give_the_same_update(update: Update) -> None:
    weights, removed = normal(21, SIZE), normal(22, SIZE) > 0
    rows = gradients(23)
    primal, dual = (
        weight_update(weights, removed, inverse_of(rows, form=form), update)
        for form in ("primal", "dual")
    )
    assert relative(primal, dual) < 1e-9
    one_block = inverse_of(rows, form="primal", block_size=SIZE)
    full = inverse_of(rows, form="full")
    assert (
        relative(
            weight_update(weights, removed, one_block, update),
            weight_update(weights, removed, full, update),
        )
        < 1e-9
    )


def test_saliency_by_hand() -> None:
    scores = saliency(torch.tensor([2.0, -3.0, 0.0]), torch.tensor([0.5, 1.0, 7.0]))
    assert scores.tolist() == [4.0, 4.5, 0.0]
