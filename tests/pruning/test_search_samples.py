"""On which samples a step measures losses, and how often."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_woodfisher import FisherConfig, PruningReport, StepConfig, prune
from tests.support.small_task import samples


class Recorder:
    """A loss that records its inputs in passes without gradient."""

    def __init__(self) -> None:
        self.measured: list[Tensor] = []

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        if not torch.is_grad_enabled():
            self.measured.append(batch[0])
        return F.cross_entropy(model(batch[0]), batch[1])


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


def measure(
    fisher: FisherConfig, step: StepConfig
) -> tuple[Tensor, PruningReport, nn.Module]:
    """Prune a network; return the samples of all measured losses, and the result."""
    recorder, model = Recorder(), network()
    report = prune(
        model, samples(640), recorder, target_sparsity=0.5, fisher=fisher, step=step
    )
    return torch.cat(recorder.measured), report, model


def mean_loss(model: nn.Module, inputs: Tensor) -> float:
    return F.cross_entropy(model(inputs), inputs[:, :4].argmax(dim=1)).item()


@pytest.mark.parametrize(
    ("count", "size", "collection", "checked"),
    [
        (8, 64, "auto", 0),
        (8, 64, "loop", 0),
        # Mini-batches are measured together, and their loss might be no mean.
        (512, 1, "auto", 64),
        (64, 8, "auto", 64),
        (64, 8, "loop", 64),
    ],
)
@pytest.mark.parametrize("line_search", [True, False])
def test_losses_are_measured_on_some_samples_of_the_gradients(
    count: int, size: int, collection: Any, checked: int, line_search: bool
) -> None:
    fisher = FisherConfig(count, size, 64, collection=collection)
    step = StepConfig(search_samples=200, line_search=line_search)
    measured, report, model = measure(fisher, step)
    number = 192
    inputs = measured[checked:]
    # Three scales and the independent update; the loss of the last weights is known.
    trials = 4 if line_search else 1
    assert len(inputs) == trials * number
    parts = inputs.split(number)
    assert all(torch.equal(part, parts[0]) for part in parts)
    assert len(parts[0].unique(dim=0)) == number
    before, after = (mean_loss(m, parts[0]) for m in (network(), model))
    assert report.loss_before == pytest.approx(before, rel=1e-5)
    assert report.loss_after == pytest.approx(after, rel=1e-5)


def test_only_the_two_best_trials_are_measured_on_all_samples() -> None:
    measured, report, model = measure(
        FisherConfig(80, 8, 64), StepConfig(search_samples=600)
    )
    inputs = measured[64:]
    assert len(inputs) == 4 * 256 + 2 * (576 - 256)
    *first, rest = inputs.split([256] * 4 + [2 * 320])
    assert all(torch.equal(part, first[0]) for part in first)
    assert torch.equal(*rest.split(320))
    whole = torch.cat([first[0], rest[:320]])
    assert len(whole.unique(dim=0)) == 576
    before, after = (mean_loss(m, whole) for m in (network(), model))
    assert report.loss_before == pytest.approx(before, rel=1e-5)
    assert report.loss_after == pytest.approx(after, rel=1e-5)


def test_a_loss_that_is_no_mean_is_measured_in_the_same_batches_before_and_after() -> (
    None
):
    weights = torch.tensor([1.0, 40.0, 1.0, 5.0])
    groups: list[Any] = []

    def loss(model: nn.Module, batch: Any) -> Tensor:
        if not torch.is_grad_enabled():
            groups.append(batch)
        return F.cross_entropy(model(batch[0]), batch[1], weights)

    model, dense = network(), network()
    report = prune(
        model,
        samples(640),
        loss,
        target_sparsity=0.5,
        fisher=FisherConfig(64, 8, 64),
        step=StepConfig(search_samples=200),
    )
    # One that is compared with the mean of the gradients' losses, and four trials more.
    assert [len(group[0]) for group in groups] == [64] * (1 + 3 + 4 * 3)
    assert report.collection == "per-sample"
    for network_, expected in ((dense, report.loss_before), (model, report.loss_after)):
        losses = [float(loss(network_, group).detach()) for group in groups[1:4]]
        assert sum(losses) / 3 == pytest.approx(expected, rel=1e-5)


def test_fewer_samples_than_a_mini_batch_are_one_mini_batch() -> None:
    recorder = Recorder()
    prune(
        network(),
        samples(),
        recorder,
        target_sparsity=0.5,
        fisher=FisherConfig(2, 80, 64),
        step=StepConfig(search_samples=1),
    )
    assert {len(inputs) for inputs in recorder.measured} == {80}
    assert len(recorder.measured) == 4


def trained() -> nn.Sequential:
    model, data = network(), samples()
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(200):
        optimizer.zero_grad()
        F.cross_entropy(model(data.tensors[0]), data.tensors[1]).backward()
        optimizer.step()
    return model


def test_a_step_that_ruins_the_network_is_said() -> None:
    model = trained()
    dense = [p.detach().clone() for p in model.parameters()]
    data = samples()
    with torch.no_grad():
        model[0].weight.zero_()
        model[2].weight.zero_()
        nothing = F.cross_entropy(model(data.tensors[0]), data.tensors[1]).item()
        for parameter, weights in zip(model.parameters(), dense, strict=True):
            parameter.copy_(weights)
    fisher, step = FisherConfig(40, 4, 64), StepConfig(line_search=False)
    told = rf"all selected weights zero it is {nothing:.3g}, .*recompute_steps=8"
    with pytest.warns(UserWarning, match=told):
        report = prune(
            model, data, Recorder(), target_sparsity=0.97, fisher=fisher, step=step
        )
    assert report.loss_after > 0.5 * nothing
    assert report.sparsity == pytest.approx(0.97, abs=0.005)


def test_a_step_that_the_network_survives_is_not() -> None:
    fisher = FisherConfig(40, 4, 64)
    report = prune(trained(), samples(), Recorder(), target_sparsity=0.3, fisher=fisher)
    assert report.loss_after is not None
