"""Steps in parts: reused gradients, trust, and BatchNorm statistics afterwards."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_task import samples
from step_options import in_step
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader, Subset, TensorDataset

from lightning_woodfisher import (
    ConfigurationError,
    FisherConfig,
    PruningError,
    PruningReport,
    SelectionConfig,
    StepConfig,
    prune,
)
from lightning_woodfisher.data.isolation import derive_seed
from lightning_woodfisher.data.losses import FunctionLoss
from lightning_woodfisher.pruning import pruner as pruner_module
from lightning_woodfisher.pruning.config import PruningConfig
from lightning_woodfisher.pruning.stages import Stages


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)
    return nn.Sequential(*layers).double()


class Counted:
    """Cross-entropy that counts its differentiable calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        self.calls += torch.is_grad_enabled()
        return F.cross_entropy(model(batch[0]), batch[1])


def fisher(block_size: int | None = 20, **options: Any) -> FisherConfig:
    return FisherConfig(
        **{
            "num_gradients": 24,
            "gradient_batch_size": 4,
            "block_size": block_size,
            "damping": 1e-3,
            "collection": "loop",
            **options,
        }
    )


def pruned(model: nn.Module, loss: Any = None, **options: Any) -> PruningReport:
    options = {"target_sparsity": 0.8, "fisher": fisher(), **options}
    return prune(
        model, samples(dtype=torch.float64), loss or Counted(), **in_step(**options)
    )


OPTION = "batchnorm_recalibration_batches"

# --- the same gradients, a new inverse --------------------------------------------------


def rows_at(model: nn.Module) -> Tensor:
    """The gradients of the first part, one by one, by autograd alone."""
    source = FunctionLoss(model, samples(dtype=torch.float64), Counted())
    batches = source.batches(24, 4, derive_seed(0, 0, 0))
    weights = [p for p in model.parameters() if p.dim() > 1]
    rows = []
    for index in range(24):
        loss = Counted()(model, batches.fetch(index))
        gradients = torch.autograd.grad(loss, weights)
        rows.append(torch.cat([g.flatten() for g in gradients]))
    return torch.stack(rows)


@pytest.mark.parametrize("engine", ["primal", "dual", "full"])
@pytest.mark.parametrize("centered", [False, True])
def test_parts_with_the_same_gradients_end_at_the_minimum_of_one_quadratic(
    engine: Any, centered: bool
) -> None:
    """Minima under more and more constraints are the minimum under all of them.

    So the weights after S parts are those of one joint update that removes the same
    weights, and the predicted rises add up to its rise.
    """
    model, loss = mlp(), Counted()
    before = torch.cat(
        [p.detach().flatten() for p in model.parameters() if p.dim() > 1]
    )
    rows = rows_at(model)
    if centered:
        rows = rows - rows.mean(dim=0)
    options = fisher(
        None if engine == "full" else 20,
        engine="auto" if engine == "full" else engine,
        centered=centered,
    )
    report = pruned(
        model,
        loss,
        fisher=options,
        recompute_steps=4,
        reuse_gradients=True,
        line_search=False,
    )
    assert report.stages == 4
    assert loss.calls == 24
    after = torch.cat([p.detach().flatten() for p in model.parameters() if p.dim() > 1])
    removed = after == 0
    assert int(removed.sum()) == round(0.8 * 192)
    matrix = rows.T @ rows / len(rows)
    ends = [0, 192] if engine == "full" else [*range(0, 128, 20), *range(128, 192, 20)]
    inside = torch.zeros(192, 192, dtype=torch.bool)
    for start, stop in zip(ends, [*ends[1:], 192], strict=True):
        inside[start:stop, start:stop] = True
    matrix = matrix * inside + 1e-3 * torch.eye(192, dtype=torch.float64)
    pull = matrix[~removed][:, removed] @ before[removed]
    expected = torch.linalg.solve(matrix[~removed][:, ~removed], pull)
    change = after - before
    assert torch.allclose(change[~removed], expected, rtol=1e-7, atol=1e-9)
    rise = float(0.5 * change @ matrix @ change)
    assert report.predicted_increase == pytest.approx(rise, rel=1e-7)


def test_another_inverse_on_the_way_is_another_choice_of_weights() -> None:
    masks = []
    for parts in (1, 6):
        model = mlp()
        pruned(model, recompute_steps=parts, reuse_gradients=True)
        masks.append(torch.cat([p.flatten() == 0 for p in model.parameters()]))
    assert not torch.equal(*masks)


@pytest.mark.parametrize("update", ["joint", "independent", "none"])
@pytest.mark.parametrize("block_size", [20, None])
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_pruned_weights_stay_zero_from_part_to_part(
    update: Any, block_size: int | None, scope: Any
) -> None:
    model = mlp()
    report = pruned(
        model,
        target_sparsity=0.9,
        fisher=fisher(block_size),
        selection=SelectionConfig(scope=scope),
        update=update,
        recompute_steps=5,
        reuse_gradients=True,
    )
    zeros = sum(int((p == 0).sum()) for p in model.parameters() if p.dim() > 1)
    wanted = round(0.9 * 192) if scope == "global" else round(115.2) + round(57.6)
    assert zeros == sum(layer.zeros_after for layer in report.layers) == wanted
    assert report.loss_before is not None
    assert report.measured_increase == pytest.approx(
        report.loss_after - report.loss_before  # type: ignore[operator]
    )


def test_one_part_with_reused_gradients_is_the_plain_step() -> None:
    models = [mlp(), mlp()]
    pruned(models[0])
    pruned(models[1], reuse_gradients=True)
    assert all(map(torch.equal, *(m.parameters() for m in models)))


# --- trust ------------------------------------------------------------------------------


def test_parts_are_halved_from_where_they_are() -> None:
    way = Stages(4)
    assert way.advance() == 0.25
    way.halve()
    assert way.advance() == 0.375
    for _ in range(9):
        way.halve()
    assert way.halvings == 3
    fractions = []
    while not way.is_done:
        fractions.append(way.advance())
    # An eighth of a quarter, down to the very end.
    assert fractions == [part / 32 for part in range(13, 33)]
    way.halve()
    assert way.halvings == 3
    thirds = Stages(3)
    assert [thirds.advance() for _ in range(3)] == [1 / 3, 2 / 3, 1.0]
    assert thirds.is_done


@pytest.mark.parametrize("spacing", ["geometric", "linear", "polynomial"])
def test_lost_trust_makes_parts_smaller_and_the_sparsity_is_reached(
    spacing: Any,
) -> None:
    for target in (0.0, 0.8):
        report = pruned(
            mlp(),
            target_sparsity=target,
            recompute_steps=2,
            recompute_spacing=spacing,
            trust_ratio=1e-9,
            line_search=False,
        )
        assert sum(layer.zeros_after for layer in report.layers) == round(target * 192)
        if target:
            # The first part of two; what follows is cut finer and finer.
            assert report.stage_halvings >= 1
            assert report.stages > 2


def test_kept_trust_changes_nothing() -> None:
    models, reports = [mlp(), mlp()], []
    for model, trust in zip(models, (None, 1e9), strict=True):
        reports.append(pruned(model, recompute_steps=3, trust_ratio=trust))
    assert all(map(torch.equal, *(m.parameters() for m in models)))
    assert reports[1].stage_halvings == 0
    assert reports[1].stages == 3


def test_trust_is_judged_by_measured_over_predicted() -> None:
    plain: dict[str, Any] = {"line_search": False}
    first = pruned(mlp(), target_sparsity=0.8, recompute_steps=2, **plain)
    # The rises of the first part alone: the same seed, weights and number of zeros.
    share = 1 - 0.2**0.5
    part = pruned(mlp(), target_sparsity=round(192 * share) / 192, **plain)
    assert first.stages == 2
    assert part.measured_increase is not None
    assert part.predicted_increase is not None
    ratio = part.measured_increase / part.predicted_increase
    assert ratio > 0
    for factor, parts in ((0.99, 3), (1.01, 2)):
        report = pruned(
            mlp(),
            target_sparsity=0.8,
            recompute_steps=2,
            trust_ratio=factor * ratio,
            **plain,
        )
        assert (report.stages >= 3) == (parts == 3)
        assert (report.stage_halvings > 0) == (parts == 3)


# --- BatchNorm --------------------------------------------------------------------------


def convolutional() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(144, 12),
        nn.BatchNorm1d(12, momentum=0.3),
        nn.ReLU(),
        nn.Linear(12, 4),
        nn.BatchNorm1d(4, track_running_stats=False),
    )


def images(number: int = 400) -> TensorDataset:
    generator = torch.Generator().manual_seed(2)
    pixels = 2.0 + torch.randn(number, 1, 8, 8, generator=generator)
    return TensorDataset(pixels, torch.randint(0, 4, (number,), generator=generator))


@pytest.mark.parametrize(("number", "count"), [(400, 5), (100, 7)])
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_recalibrated_statistics_are_those_of_torch(
    number: int, count: int, mode: Any
) -> None:
    model = convolutional()
    model.train(mode == "eval")
    data = images(number)
    report = prune(
        model,
        data,
        Counted(),
        target_sparsity=0.6,
        fisher=FisherConfig(
            num_gradients=20, gradient_batch_size=2, model_mode=mode, block_size=16
        ),
        step=StepConfig(batchnorm_recalibration_batches=count),
    )
    assert report.batchnorm_layers == 2
    assert model.training == (mode == "eval")
    other = copy.deepcopy(model)
    chosen = FunctionLoss(model, data, Counted()).batches(
        count, 64, derive_seed(0, 0, "batchnorm"), True
    )
    update_bn([chosen.fetch(index)[0] for index in range(count)], other)
    for index in (1, 5):
        for name in ("running_mean", "running_var"):
            mine, theirs = getattr(model[index], name), getattr(other[index], name)
            assert torch.allclose(mine, theirs, rtol=1e-5, atol=1e-6)
            assert mine.dtype == torch.float32
        assert model[index].num_batches_tracked == 0
    # A session leaves nothing else behind.
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("count", [0, None])
@pytest.mark.parametrize("frozen", ["nothing", "one layer"])
def test_frozen_layers_keep_their_statistics(count: int | None, frozen: str) -> None:
    model = convolutional().train()
    if frozen == "one layer":
        model[1].eval()
    before = {name: value.clone() for name, value in model.named_buffers()}
    report = prune(
        model,
        images(),
        Counted(),
        target_sparsity=0.6,
        fisher=FisherConfig(num_gradients=8, gradient_batch_size=2),
        step=StepConfig() if count is None else StepConfig(**{OPTION: count}),
    )
    changed = {n for n, value in model.named_buffers() if not value.equal(before[n])}
    expected = [] if count == 0 else [1, 5] if frozen == "nothing" else [5]
    assert report.batchnorm_layers == len(expected)
    # By default they are estimated anew.
    names = ("running_mean", "running_var")
    assert changed == {f"{layer}.{name}" for layer in expected for name in names}
    assert (report.loss_recalibrated is None) == (not expected)


def test_the_loss_with_new_statistics_is_that_of_the_network() -> None:
    model, data = convolutional(), images(48)
    report = prune(
        model,
        data,
        Counted(),
        target_sparsity=0.6,
        fisher=FisherConfig(num_gradients=24, gradient_batch_size=2, block_size=16),
    )
    with torch.no_grad():
        loss = Counted()(model.eval(), data.tensors)
    assert report.loss_recalibrated == pytest.approx(loss.item(), rel=1e-5)
    assert report.loss_recalibrated != report.loss_after


def test_an_iterator_needs_no_more_batches_for_the_statistics() -> None:
    model = convolutional()
    batches = list(DataLoader(images(64), 8))
    fisher = FisherConfig(8, block_size=16)
    prune(model, iter(batches), Counted(), target_sparsity=0.6, fisher=fisher)
    other = copy.deepcopy(model)
    update_bn([pixels for pixels, _ in batches], other)
    torch.testing.assert_close(model[5].running_var, other[5].running_var)


def test_recalibration_of_a_network_without_batchnorm_does_nothing() -> None:
    models = [mlp(), mlp()]
    pruned(models[0])
    report = pruned(models[1], batchnorm_recalibration_batches=3)
    assert report.batchnorm_layers == 0
    assert all(map(torch.equal, *(m.parameters() for m in models)))


class Breaking(nn.Module):
    """Fails, or gives what is not finite, once there are pruned weights."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.net = convolutional()
        self.kind = kind

    def forward(self, inputs: Tensor) -> Tensor:
        if len(inputs) == 64 and (self.net[0].weight == 0).any():
            if self.kind == "raises":
                raise RuntimeError("no")
            inputs = inputs * torch.inf
        outputs: Tensor = self.net(inputs)
        return outputs


@pytest.mark.parametrize("kind", ["raises", "infinite"])
def test_a_failing_recalibration_takes_the_step_back(kind: str) -> None:
    model = Breaking(kind)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises((RuntimeError, PruningError), match=r"no|not finite"):
        prune(
            model,
            images(),
            Counted(),
            target_sparsity=0.6,
            fisher=FisherConfig(num_gradients=9, gradient_batch_size=5),
            step=StepConfig(batchnorm_recalibration_batches=2),
        )
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_a_failure_after_recalibration_takes_the_statistics_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = convolutional()
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def fail(*_: Any, **__: Any) -> None:
        assert not torch.equal(model[1].running_mean, before["1.running_mean"])
        raise LookupError("too late")

    monkeypatch.setattr(pruner_module, "summarize", fail)
    with pytest.raises(LookupError, match="too late"):
        prune(
            model,
            images(),
            Counted(),
            target_sparsity=0.6,
            fisher=FisherConfig(num_gradients=8, gradient_batch_size=2),
            step=StepConfig(batchnorm_recalibration_batches=2),
        )
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_batches_of_one_value_have_no_variance() -> None:
    model = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Linear(6, 4))
    model = model.double()
    ones = DataLoader(Subset(samples(dtype=torch.float64), range(30)), batch_size=1)
    report = prune(
        model,
        list(ones),
        Counted(),
        target_sparsity=0.5,
        fisher=FisherConfig(num_gradients=20),
        step=StepConfig(batchnorm_recalibration_batches=3),
    )
    assert report.batchnorm_layers == 0
    assert torch.equal(model[1].running_mean, torch.zeros(6).double())


# --- bad values -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recompute_spacing": "cubic"}, "recompute_spacing='cubic'"),
        ({"recompute_spacing": "polynomal"}, "Did you mean 'polynomial'"),
        ({"reuse_gradients": 1}, "reuse_gradients=1 must be True or"),
        (
            {"trust_ratio": 0.0, "recompute_steps": 2},
            r"trust_ratio=0\.0 is outside \(0, inf\)",
        ),
        ({"trust_ratio": float("nan"), "recompute_steps": 2}, "trust_ratio=nan"),
        ({"trust_ratio": "much", "recompute_steps": 2}, "is not a number"),
        ({"trust_ratio": 2.0}, "recompute_steps=1 has none"),
        (
            {"trust_ratio": 2.0, "recompute_steps": 2, "measure_loss": False},
            "measure_loss",
        ),
        (
            {"trust_ratio": 2.0, "recompute_steps": 2, "criterion": "magnitude"},
            "a criterion that predicts one",
        ),
        ({"batchnorm_recalibration_batches": -1}, "must be at least 0"),
        ({"batchnorm_recalibration_batches": 1.5}, "not a whole number"),
    ],
)
def test_what_cannot_work_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        PruningConfig(**in_step(**options))
