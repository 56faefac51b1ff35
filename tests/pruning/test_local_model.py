"""Predicted against measured loss along the pruning direction."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_task import batchnorm_network, samples
from step_options import in_step
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_woodfisher import (
    ConfigurationError,
    FisherConfig,
    PruningError,
    PruningReport,
    StepConfig,
    prune,
)
from lightning_woodfisher.criteria.obs import Update
from lightning_woodfisher.reporting.figures import draw_local_model

DAMPING = 1e-2
FISHER = FisherConfig(num_gradients=24, gradient_batch_size=4, block_size=20)


class Quadratic:
    """A loss whose mean is ½(w − w₀)ᵀF(w − w₀): gradients ±a_i at w₀ cancel out."""

    def __init__(self, model: nn.Linear) -> None:
        generator = torch.Generator().manual_seed(5)
        rows = torch.randn(15, 12, generator=generator, dtype=torch.float64)
        self.data = TensorDataset(torch.cat([rows, -rows]))
        self.matrix = rows.T @ rows / len(rows)
        self.matrix += DAMPING * torch.eye(12, dtype=torch.float64)
        self.start = model.weight.detach().clone().reshape(-1)

    def __call__(self, model: nn.Linear, batch: Any) -> Tensor:
        moved = model.weight.reshape(-1) - self.start
        return batch[0].mean(0) @ moved + 0.5 * moved @ self.matrix @ moved


@pytest.mark.parametrize("update", ["joint", "independent", "none"])
def test_on_a_quadratic_the_prediction_is_the_measurement(update: Update) -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3, bias=False, dtype=torch.float64)
    loss = Quadratic(model)
    fisher = FisherConfig(30, 1, None, DAMPING)
    report = prune(
        model,
        loss.data,
        loss,
        target_sparsity=0.5,
        fisher=fisher,
        step=StepConfig(update=update, local_model_points=6),
    )
    moved = model.weight.detach().reshape(-1) - loss.start
    whole = float(0.5 * moved @ loss.matrix @ moved)
    (points,) = report.local_model
    assert [point.fraction for point in points] == [i / 5 for i in range(6)]
    for point in points:
        expected = point.fraction**2 * whole
        assert point.predicted == pytest.approx(expected, rel=1e-9, abs=1e-15)
        assert point.measured == pytest.approx(expected, rel=1e-9, abs=1e-15)


def cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]).float(), batch[1])


def pruned(dtype: torch.dtype, **options: Any) -> tuple[nn.Module, PruningReport]:
    model, data = batchnorm_network().to(dtype), samples()
    data = TensorDataset(data.tensors[0].to(dtype), data.tensors[1])
    report = prune(
        model,
        data,
        cross_entropy,
        target_sparsity=0.7,
        fisher=FISHER,
        **in_step(**options),
    )
    return model, report


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_final_weights_are_those_without_it(dtype: torch.dtype) -> None:
    with_points, report = pruned(dtype, local_model_points=5, recompute_steps=3)
    without, _ = pruned(dtype, recompute_steps=3)
    for name, tensor in without.state_dict().items():
        assert torch.equal(tensor, with_points.state_dict()[name]), name
    assert len(report.local_model) == 3
    (only,) = pruned(dtype, local_model_points=5)[1].local_model
    assert all(math.isfinite(point.measured) for point in only)


def test_the_ends_are_the_rises_of_the_report() -> None:
    _, report = pruned(torch.float32, local_model_points=3)
    ((first, _, last),) = report.local_model
    assert (first.predicted, first.measured) == (0.0, 0.0)
    assert last.predicted == report.predicted_increase
    assert last.measured == report.measured_increase


def test_between_the_ends_the_weights_lie_on_the_line() -> None:
    start = batchnorm_network()
    # 40 mini-batches of 4 are the whole dataset.
    fisher = FisherConfig(num_gradients=40, gradient_batch_size=4, block_size=20)
    end = copy.deepcopy(start)
    report = prune(
        end,
        samples(),
        cross_entropy,
        target_sparsity=0.7,
        fisher=fisher,
        step=StepConfig(local_model_points=3),
    )
    half = copy.deepcopy(start).eval()
    with torch.no_grad():
        for name, parameter in half.named_parameters():
            parameter.copy_((parameter + end.get_parameter(name)) / 2)
        data = samples().tensors
        rise = cross_entropy(half, data) - cross_entropy(start.eval(), data)
    assert report.local_model[0][1].measured == pytest.approx(float(rise), rel=1e-4)


def test_without_a_model_of_the_loss_only_the_measurement_is_there() -> None:
    _, report = pruned(torch.float32, local_model_points=3, criterion="magnitude")
    assert [point.predicted for point in report.local_model[0]] == [None] * 3
    assert report.local_model[0][2].measured == report.measured_increase


def test_a_loss_that_fails_on_the_way_leaves_the_model_as_it_was() -> None:
    model = batchnorm_network()
    before = {k: v.clone() for k, v in model.state_dict().items()}

    def fails_between(model: nn.Module, batch: Any) -> Tensor:
        loss = cross_entropy(model, batch)
        moved = not torch.equal(model[0].weight.detach(), before["0.weight"])
        between = moved and bool((model[0].weight != 0).all())
        return loss * math.nan if between else loss

    with pytest.raises(PruningError, match="nan"):
        prune(
            model,
            samples(),
            fails_between,
            target_sparsity=0.7,
            fisher=FISHER,
            step=StepConfig(local_model_points=3),
        )
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_reports_keep_it_and_loggers_get_it() -> None:
    _, report = pruned(torch.float32, local_model_points=3, recompute_steps=2)
    assert PruningReport.from_dict(report.to_dict()) == report
    plain = report.to_dict()
    del plain["local_model"]
    assert PruningReport.from_dict(plain).local_model == ()
    metrics = report.metrics()
    for number, part in enumerate(report.local_model):
        for point, where in zip(part, ("0", "0.5", "1"), strict=True):
            key = f"stage_{number}/at_{where}"
            assert metrics[f"pruning/local_model/measured/{key}"] == point.measured
            assert metrics[f"pruning/local_model/predicted/{key}"] == point.predicted


def test_the_figure_shows_the_points() -> None:
    _, report = pruned(torch.float32, local_model_points=4, recompute_steps=2)
    dots, curve, *others = draw_local_model(report).axes[0].lines
    part = report.local_model[0]
    assert list(dots.get_ydata()) == [point.measured for point in part]
    assert list(curve.get_ydata()) == [point.predicted for point in part]
    assert len(others) == 2
    with pytest.raises(ConfigurationError, match="local_model_points=5"):
        draw_local_model(pruned(torch.float32)[1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"local_model_points": 1}, "at least 2"),
        ({"local_model_points": -3}, "at least 0"),
        ({"local_model_points": 2.5}, "local_model_points"),
        ({"local_model_points": 5, "measure_loss": False}, "measure_loss=True"),
    ],
)
def test_bad_numbers_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        pruned(torch.float32, **options)
