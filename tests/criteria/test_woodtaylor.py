"""WoodTaylor on its local model, where predictions are the truth, and in a step."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from dense_inverse import constrained_minimizer
from devices import DEVICE, called_from_cpu
from step_options import in_step
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from lightning_woodfisher import (
    ConfigurationError,
    FisherConfig,
    PruningReport,
    StepConfig,
    prune,
)
from lightning_woodfisher.criteria import make_criterion
from lightning_woodfisher.criteria.woodtaylor import WoodTaylor
from lightning_woodfisher.data.losses import FunctionLoss
from lightning_woodfisher.distributed.communicator import Communicator
from lightning_woodfisher.pruning.config import PruningConfig
from lightning_woodfisher.pruning.pruner import Pruner
from lightning_woodfisher.weights.layers import prunable_parameters
from lightning_woodfisher.weights.masks import Masks

SIZE = 24
FORMS = {
    "primal": FisherConfig(block_size=10, engine="primal"),
    "dual": FisherConfig(block_size=10, engine="dual"),
    "full": FisherConfig(block_size=None),
}
FISHER = FisherConfig(num_gradients=24, gradient_batch_size=4, block_size=20)


def normal(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def gradients(number: int) -> Tensor:
    """With a mean that is far from zero."""
    return 0.3 + normal(0, number, SIZE) @ normal(1, SIZE, SIZE) / SIZE**0.5


def criterion_of(form: str, rows: Tensor, damping: float, update: Any) -> WoodTaylor:
    fisher = dataclasses.replace(
        FORMS[form], num_gradients=len(rows), damping=damping, gradient_batch_size=1
    )
    criterion = make_criterion("woodtaylor", fisher, update)
    assert isinstance(criterion, WoodTaylor)
    criterion.begin(criterion.layout([SIZE], 1), Communicator(DEVICE))
    criterion = called_from_cpu(criterion)
    criterion.observe(rows)
    return criterion


def dense_fisher(form: str, rows: Tensor, damping: float) -> Tensor:
    fisher = rows.mT @ rows / len(rows)
    if form != "full":
        block = torch.arange(SIZE) // 10
        fisher = fisher * (block.unsqueeze(0) == block.unsqueeze(1))
    return fisher + damping * torch.eye(SIZE, dtype=torch.float64)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("damping", [1e-6, 1e-3, 1.0])
@pytest.mark.parametrize("number", [8, 40])
def test_the_step_is_the_constrained_minimizer(
    form: str, damping: float, number: int
) -> None:
    rows, weights = gradients(number), normal(2, SIZE)
    removed = normal(3, SIZE) > 0
    criterion = criterion_of(form, rows, damping, "joint")
    criterion.score(weights)
    change = criterion.compensate(weights, removed)
    fisher, mean = dense_fisher(form, rows, damping), rows.mean(dim=0)
    expected = constrained_minimizer(fisher, weights, removed, mean)
    assert torch.equal(change[removed], -weights[removed])
    assert float((change - expected).norm() / expected.norm()) < 1e-5
    predicted = float(criterion.predicted_increase(change).sum())
    wanted = float(mean @ expected + 0.5 * expected @ fisher @ expected)
    assert predicted == pytest.approx(wanted, rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("number", [8, 40])
def test_saliency_is_what_removing_one_weight_costs(form: str, number: int) -> None:
    """Above the loss at the unconstrained minimum, for every weight on its own."""
    rows, weights = gradients(number), normal(4, SIZE)
    criterion = criterion_of(form, rows, 1e-3, "joint")
    scores = criterion.score(weights)
    fisher, mean = dense_fisher(form, rows, 1e-3), rows.mean(dim=0)
    lowest = -0.5 * float(mean @ torch.linalg.solve(fisher, mean))
    costs = []
    for index in range(SIZE):
        removed = torch.arange(SIZE) == index
        step = constrained_minimizer(fisher, weights, removed, mean)
        costs.append(float(mean @ step + 0.5 * step @ fisher @ step) - lowest)
    assert scores.tolist() == pytest.approx(costs, rel=1e-4, abs=1e-7)


def test_directions_are_taken_apart_rightly() -> None:
    """a = F_RR⁻¹F_RS w_S and −b = −F_RR⁻¹g_R, each on its own."""
    rows, weights = gradients(40), normal(5, SIZE)
    removed = normal(6, SIZE) > 0
    kept = ~removed
    criterion = criterion_of("full", rows, 1e-3, "joint")
    criterion.score(weights)
    compensation, descent = criterion.directions(weights, removed)
    fisher = dense_fisher("full", rows, 1e-3)
    inner, coupling = fisher[kept][:, kept], fisher[kept][:, removed]
    a = torch.linalg.solve(inner, coupling @ weights[removed])
    b = torch.linalg.solve(inner, rows.mean(dim=0)[kept])
    assert torch.allclose(compensation[kept], a, rtol=1e-6, atol=1e-9)
    assert torch.allclose(descent[kept], -b, rtol=1e-6, atol=1e-9)
    assert not compensation[removed].any()
    assert not descent[removed].any()


def test_without_gradient_it_is_woodfisher() -> None:
    half, weights = normal(7, 20, SIZE), normal(8, SIZE)
    rows, removed = torch.cat([half, -half]), normal(9, SIZE) > 0
    taylor = criterion_of("primal", rows, 1e-3, "independent")
    fisher = make_criterion("woodfisher", taylor.fisher, "independent")
    fisher.begin(fisher.layout([SIZE], 1), Communicator(DEVICE))
    fisher = called_from_cpu(fisher)
    fisher.observe(rows)
    assert torch.allclose(taylor.score(weights), fisher.score(weights), rtol=1e-9)
    change = taylor.compensate(weights, removed)
    assert torch.allclose(change, fisher.compensate(weights, removed), rtol=1e-9)


# --- in a step ------------------------------------------------------------------------


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


def samples() -> TensorDataset:
    inputs = normal(10, 160, 8).float()
    return TensorDataset(inputs, inputs[:, :4].argmax(dim=1))


def cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def pruned(model: nn.Module, **options: Any) -> PruningReport:
    options = {"target_sparsity": 0.7, "fisher": FISHER, **options}
    return prune(model, samples(), cross_entropy, **in_step(**options))


def loss_of(model: nn.Module, seed: int, fisher: FisherConfig) -> float:
    """The loss on the samples of the step, as a step that changes nothing measures it."""
    report = prune(
        model,
        samples(),
        cross_entropy,
        target_sparsity=float(
            sum(int((p == 0).sum()) for p in model.parameters() if p.dim() > 1) / 192
        ),
        fisher=fisher,
        criterion="magnitude",
        step=StepConfig(seed=seed),
    )
    assert report.loss_after is not None
    return report.loss_after


@pytest.mark.parametrize("damping", [1e-9, 1e-6, 1e-3])
@pytest.mark.parametrize("target", [0.5, 0.9])
@pytest.mark.parametrize("criterion", ["woodfisher", "woodtaylor"])
def test_a_searched_step_is_never_worse_than_zeroing(
    criterion: str, target: float, damping: float
) -> None:
    """Also where the plain one diverges."""
    fisher = dataclasses.replace(FISHER, damping=damping)
    model = mlp()
    before = [p.detach().clone() for p in model.parameters()]
    report = pruned(
        model,
        criterion=criterion,
        fisher=fisher,
        target_sparsity=target,
        line_search=True,
    )
    zeroed = mlp()
    with torch.no_grad():
        for weight, old, new in zip(
            zeroed.parameters(), before, model.parameters(), strict=True
        ):
            weight.copy_(torch.where((new == 0) & (new.dim() > 1), 0.0, old))
    assert report.loss_after is not None
    assert report.loss_after <= loss_of(zeroed, 0, fisher) + 1e-6
    assert report.zeros == round(target * 192)
    assert sum(int((p == 0).sum()) for p in model.parameters() if p.dim() > 1) == (
        report.zeros
    )


@pytest.mark.filterwarnings("ignore:this pruning step raised the loss")
def test_the_plain_first_order_step_diverges_where_the_searched_one_does_not() -> None:
    fisher = dataclasses.replace(FISHER, num_gradients=8, damping=1e-9)
    plain = pruned(mlp(), criterion="woodtaylor", fisher=fisher, line_search=False)
    searched = pruned(mlp(), criterion="woodtaylor", fisher=fisher)
    assert plain.loss_after is not None
    assert searched.loss_after is not None
    assert plain.loss_after > 2 * searched.loss_after


def test_the_report_predicts_the_step_that_was_taken() -> None:
    """Less than the whole update predicts another rise, and is what is in the model."""
    models = {scale: mlp() for scale in (1.0, 0.5, 0.0)}
    reports = {
        s: pruned(m, update_scale=s, line_search=False) for s, m in models.items()
    }
    for scale, report in reports.items():
        assert report.update_scales == (scale,)
        assert report.metrics()["pruning/update_scale"] == scale
    rises = [reports[s].predicted_increase or 0.0 for s in (1.0, 0.5, 0.0)]
    assert rises == sorted(rises)
    # A parabola with its minimum at the whole update.
    assert rises[1] - rises[0] == pytest.approx((rises[2] - rises[0]) / 4, rel=1e-4)
    alone = mlp()
    pruned(alone, update="none")
    for a, b in zip(models[0.0].parameters(), alone.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_larger_sample_gives_the_mean_gradient() -> None:
    fisher = dataclasses.replace(FISHER, first_order_samples=160)
    model, seen = mlp(), []
    original = WoodTaylor.score

    def score(self: WoodTaylor, weights: Tensor) -> Tensor:
        seen.append(self.mean_gradient)
        return original(self, weights)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WoodTaylor, "score", score)
        pruned(model, criterion="woodtaylor", fisher=fisher)
    fresh = mlp()
    parameters = [p for p in fresh.parameters() if p.dim() > 1]
    loss = cross_entropy(fresh, samples().tensors)
    expected = torch.autograd.grad(loss, parameters)
    flat = torch.cat([g.reshape(-1) for g in expected]).double()
    assert torch.allclose(seen[0], flat, rtol=1e-4, atol=1e-7)


class Read(Dataset[tuple[Tensor, Tensor]]):
    """Samples that know how often each was asked for."""

    def __init__(self) -> None:
        self.data = samples()
        self.times = [0] * len(self.data)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        self.times[index] += 1
        return self.data[index]


def test_trials_are_measured_on_the_samples_of_the_gradients_and_read_them_once() -> (
    None
):
    """On those of the first order a step along their own gradient looks too good."""
    fisher = dataclasses.replace(FISHER, num_gradients=8, first_order_samples=160)
    measured: list[Tensor] = []

    def loss(network: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        if not torch.is_grad_enabled():
            measured.append(batch[0])
        return cross_entropy(network, batch)

    data = Read()
    options: dict[str, Any] = {"target_sparsity": 0.5, "criterion": "woodtaylor"}
    report = prune(mlp(), data, loss, fisher=fisher, **in_step(**options))
    assert report.first_order_scales
    used = 8 * fisher.gradient_batch_size
    trials = torch.cat(measured).unique(dim=0)
    assert len(trials) == used < 160
    # For the mean gradient, and for gradients and losses.
    assert sum(data.times) == 160 + 2 * used


def test_a_sample_that_is_not_there_is_refused_by_its_name() -> None:
    fisher = dataclasses.replace(FISHER, first_order_samples=161)
    with pytest.raises(ConfigurationError, match="first_order_samples=161"):
        pruned(mlp(), criterion="woodtaylor", fisher=fisher)
    fisher = dataclasses.replace(FISHER, first_order_samples=16)
    batches = [samples()[i : i + 4] for i in range(0, 160, 4)]
    with pytest.raises(ConfigurationError, match="needs a map-style dataset"):
        prune(
            mlp(),
            batches,
            cross_entropy,
            target_sparsity=0.5,
            fisher=fisher,
            criterion="woodtaylor",
        )
    for scale in (-0.1, 1.5):
        with pytest.raises(ConfigurationError, match="update_scale"):
            pruned(mlp(), update_scale=scale)


def test_a_rehearsal_refuses_it_too() -> None:
    model, asked = mlp(), []

    def loss(network: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        asked.append(len(batch[0]))
        return cross_entropy(network, batch)

    for number, works in ((160, True), (161, False)):
        fisher = dataclasses.replace(FISHER, first_order_samples=number)
        config = PruningConfig("woodtaylor", fisher)
        pruner = Pruner(Masks(prunable_parameters(model)), config, Communicator())
        source = FunctionLoss(model, samples(), loss)
        asked.clear()
        if works:
            pruner.rehearse(source)
            assert asked
            continue
        with pytest.raises(ConfigurationError, match="first_order_samples=161"):
            pruner.rehearse(source)
        assert not asked


@pytest.mark.parametrize("criterion", ["woodfisher", "kfac"])
@pytest.mark.parametrize("best", ["joint", "independent", "none"])
def test_the_update_of_smaller_measured_loss_is_taken(
    best: Any, criterion: str
) -> None:
    """With gradients of one loss, and another that is measured: how far from a target."""
    target = mlp()
    options: dict[str, Any] = {"criterion": criterion}
    pruned(target, update=best, line_search=False, **options)
    goal = [p.detach().clone() for p in target.parameters()]

    def loss(network: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        if torch.is_grad_enabled():
            return cross_entropy(network, batch)
        pairs = zip(network.parameters(), goal, strict=True)
        return torch.stack([(p - g).square().sum() for p, g in pairs]).sum()

    model = mlp()
    report = prune(
        model,
        samples(),
        loss,
        target_sparsity=0.7,
        fisher=FISHER,
        **in_step(**options),
    )
    assert report.updates == (best,)
    assert report.update_scales == (0.0 if best == "none" else 1.0,)
    assert report.loss_after == 0.0
    assert all(map(torch.equal, model.parameters(), goal))


def test_another_update_of_woodtaylor_goes_with_the_descent_as_it_was_found() -> None:
    rows, weights = gradients(40), normal(5, SIZE)
    removed = normal(6, SIZE) > 0
    taylor = criterion_of("dual", rows, 1e-3, "joint")
    taylor.score(weights)
    fisher = make_criterion("woodfisher", taylor.fisher, "independent")
    fisher.begin(fisher.layout([SIZE], 1), Communicator(DEVICE))
    fisher = called_from_cpu(fisher)
    fisher.observe(rows)
    fisher.score(weights)
    (other,) = taylor.alternatives(weights, removed).values()
    (expected,) = fisher.directions(weights, removed)
    assert torch.equal(other, expected)
    assert not criterion_of("dual", rows, 1e-3, "independent").alternatives(
        weights, removed
    )


def test_a_failing_trial_leaves_the_model_as_it_was() -> None:
    model = mlp()
    before = [p.detach().clone() for p in model.parameters()]

    def loss(network: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        if any(bool((p == 0).any()) for p in network.parameters()):
            raise LookupError("stumbled")
        return cross_entropy(network, batch)

    with pytest.raises(LookupError, match="stumbled"):
        prune(
            model,
            samples(),
            loss,
            target_sparsity=0.5,
            fisher=FISHER,
            criterion="woodtaylor",
            step=StepConfig(line_search=True),
        )
    assert all(
        torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)
    )
