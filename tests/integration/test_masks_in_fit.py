"""Pruned weights are exactly zero after every optimizer step, whatever the optimizer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from devices import ACCELERATOR
from fits import Classifier, Manual, RawManual, loader, pruning, seed_all, trainer
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor
from torch.optim import Optimizer

from lightning_woodfisher import PolynomialSchedule, WoodFisherPruningCallback


class Inspect(pl.Callback):
    """Looks at every moment a user could, and notes what is wrong."""

    def __init__(self, pruner: WoodFisherPruningCallback) -> None:
        self.pruner = pruner
        self.looks = {"batch": 0, "validation": 0}
        self.zeros: list[int] = []
        self.faults: list[str] = []
        self.scales: list[float] = []

    def on_fit_start(self, trainer: pl.Trainer, module: Any) -> None:
        self.storages = {n: p.data_ptr() for n, p in module.named_parameters()}
        self.keys = list(module.state_dict())

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *args: Any) -> None:
        self.look("batch", module)
        masks = self.pruner.masks
        assert masks is not None
        for name, parameter in masks.parameters.items():
            gone = ~masks.kept(name)
            for optimizer in trainer.optimizers:
                for key, value in optimizer.state.get(parameter, {}).items():
                    if isinstance(value, Tensor) and value.shape == gone.shape:
                        self.require(bool((value[gone] == 0).all()), f"{key} of {name}")
        self.zeros.append(sum(masks.zeros().values()))
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None:
            self.scales.append(float(scaler.get_scale()))

    def on_validation_batch_end(
        self, trainer: pl.Trainer, module: Any, *args: Any
    ) -> None:
        self.look("validation", module)

    def look(self, moment: str, module: Any) -> None:
        self.looks[moment] += 1
        masks = self.pruner.masks
        assert masks is not None
        named = dict(module.named_parameters())
        for name, parameter in masks.parameters.items():
            self.require(named[name] is parameter, f"{name} is another parameter")
            weights = parameter.detach()[~masks.kept(name)]
            # The bits, so that -0.0 counts as a fault too.
            bits = weights.view(torch.int32)
            self.require(bool((bits == 0).all()), f"{moment}: weights of {name}")
        storages = {n: p.data_ptr() for n, p in named.items()}
        self.require(storages == self.storages, "storages")
        self.require(list(module.state_dict()) == self.keys, "keys")

    def require(self, condition: bool, what: str) -> None:
        if not condition and what not in self.faults:
            self.faults.append(what)


@dataclass(frozen=True)
class Case:
    """One way to train."""

    optimizer: Callable[[Any], Optimizer]
    module: Callable[..., Classifier] = Classifier
    options: Callable[[], dict[str, Any]] = dict


def sgd(parameters: Any, **options: Any) -> Optimizer:
    return torch.optim.SGD(
        parameters, lr=0.05, momentum=0.9, weight_decay=0.05, **options
    )


def adam(parameters: Any, **options: Any) -> Optimizer:
    return torch.optim.Adam(parameters, lr=1e-2, weight_decay=0.05, **options)


def adamw(parameters: Any, **options: Any) -> Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.05, **options)


def overflowing_scaler() -> dict[str, Any]:
    scaler = torch.amp.GradScaler(ACCELERATOR, init_scale=2.0**24, growth_interval=2)
    return {"plugins": [MixedPrecision("16-mixed", ACCELERATOR, scaler=scaler)]}


CASES = {
    "sgd": Case(sgd),
    "sgd nesterov": Case(lambda p: sgd(p, nesterov=True)),
    "sgd foreach": Case(lambda p: sgd(p, foreach=True)),
    "sgd fused": Case(lambda p: sgd(p, fused=True)),
    "adam": Case(adam),
    "adam amsgrad": Case(lambda p: adam(p, amsgrad=True)),
    "adamw": Case(adamw),
    "adamw foreach": Case(lambda p: adamw(p, foreach=True)),
    "adamw fused": Case(lambda p: adamw(p, fused=True)),
    "maximising sgd": Case(lambda p: sgd(p, maximize=True)),
    "rmsprop": Case(lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.9)),
    "lbfgs": Case(lambda p: torch.optim.LBFGS(p, lr=1e-2, max_iter=2)),
    "accumulation": Case(adamw, options=lambda: {"accumulate_grad_batches": 4}),
    "clipping by norm": Case(sgd, options=lambda: {"gradient_clip_val": 0.1}),
    "clipping by value": Case(
        adamw,
        options=lambda: {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
    ),
    "manual optimisation": Case(adamw, Manual),
    "manual optimisation, raw optimizer": Case(sgd, RawManual),
    "manual optimisation, raw fused optimizer": Case(
        lambda p: adamw(p, fused=True), RawManual
    ),
    "bf16-mixed": Case(adamw, options=lambda: {"precision": "bf16-mixed"}),
    "GradScaler that skips steps": Case(adamw, options=overflowing_scaler),
    "GradScaler, fused": Case(
        lambda p: adamw(p, fused=True), options=overflowing_scaler
    ),
    "GradScaler, clipping": Case(
        sgd, options=lambda: {**overflowing_scaler(), "gradient_clip_val": 0.1}
    ),
}


def require_no_hooks(fitted: pl.Trainer) -> None:
    """Check that optimizers, layers and parameters carry no hook."""
    for optimizer in fitted.optimizers:
        assert not optimizer._optimizer_step_pre_hooks
        assert not optimizer._optimizer_step_post_hooks
    for module in fitted.lightning_module.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert not module._backward_hooks
        assert not module._backward_pre_hooks
        assert not module._state_dict_hooks
        assert not module._load_state_dict_pre_hooks
    for parameter in fitted.lightning_module.parameters():
        assert not parameter._backward_hooks
        assert not parameter._post_accumulate_grad_hooks


@pytest.mark.parametrize("case", list(CASES))
def test_pruned_weights_stay_zero(case: str) -> None:
    settings = CASES[case]
    seed_all(1)
    pruner = pruning(schedule=PolynomialSchedule(1, 2), target_sparsity=0.8)
    inspect = Inspect(pruner)
    fitted = trainer(inspect, pruner, max_epochs=4, **settings.options())
    module = settings.module(optimizer=settings.optimizer)
    fitted.fit(module, loader(), loader(16, shuffle=False))
    assert inspect.faults == []
    assert inspect.looks == {"batch": 24, "validation": 8}
    # Something is pruned from the second epoch on, and more from the third on.
    weights = sum(p.numel() for p in pruner.masks.parameters.values())
    assert (
        inspect.zeros == [0] * 6 + [inspect.zeros[6]] * 6 + [round(0.8 * weights)] * 12
    )
    assert 0 < inspect.zeros[6] < inspect.zeros[12]
    assert all(bool(p.isfinite().all()) for p in module.parameters())
    require_no_hooks(fitted)
    if inspect.scales:
        # The scale falls when a step is skipped: also after pruning had begun.
        falls = [
            b < a for a, b in zip(inspect.scales, inspect.scales[1:], strict=False)
        ]
        assert any(falls[6:])
        assert not all(falls)


def test_pruned_weights_do_not_count_in_the_clipping_norm() -> None:
    class Norms(pl.Callback):
        """Notes the gradient as it is when clipping is over."""

        def __init__(self) -> None:
            self.kept: list[float] = []
            self.gone: list[float] = []

        def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
            masks, kept, gone = pruner.masks, 0.0, 0.0
            for name, parameter in module.named_parameters():
                squares = parameter.grad.double().square()
                if name in masks.parameters:
                    gone += float(squares[~masks.kept(name)].sum())
                kept += float(squares.sum())
            self.kept.append(kept**0.5)
            self.gone.append(gone)

    seed_all(1)
    pruner, norms = pruning(target_sparsity=0.95), Norms()
    options = {"gradient_clip_val": 1e-3, "max_epochs": 1}
    trainer(pruner, norms, **options).fit(Classifier(), loader())
    assert norms.gone == [0.0] * 6
    # All of the allowed norm goes to the weights that are left.
    assert norms.kept == pytest.approx([1e-3] * 6, rel=1e-2)


class StopError(Exception):
    """Raised by a test."""


def test_an_exception_leaves_no_hooks() -> None:
    class Failing(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if batch_idx == 3 and self.current_epoch == 1:
                assert self.trainer.optimizers[0]._optimizer_step_post_hooks
                raise StopError
            return super().training_step(batch, batch_idx)

    fitted = trainer(pruning())
    with pytest.raises(StopError):
        fitted.fit(Failing(), loader())
    require_no_hooks(fitted)


def test_a_second_fit_prunes_anew() -> None:
    pruner = pruning()
    for _ in range(2):
        seed_all(2)
        fitted = trainer(pruner)
        fitted.fit(Classifier(), loader())
        assert len(pruner.reports) == 1
        require_no_hooks(fitted)
    assert pruner.reports[0].layers[0].zeros_before == 0


def test_fit_goes_on_with_the_same_masks() -> None:
    pruner = pruning()
    inspect = Inspect(pruner)
    fitted, module = trainer(pruner, inspect), Classifier()
    fitted.fit(module, loader())
    before = pruner.masks.state_dict()
    fitted.fit_loop.max_epochs = 4
    fitted.fit(module, loader())
    after = pruner.masks.state_dict()
    assert inspect.faults == []
    assert inspect.looks["batch"] == 24
    assert len(pruner.reports) == 1
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
