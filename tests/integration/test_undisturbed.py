"""A pass that collects gradients and writes nothing leaves the fit bit-identical."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from devices import ACCELERATOR
from fits import (
    Classifier,
    Manual,
    MemoryLogger,
    Talkative,
    copied,
    differences,
    final_state,
    loader,
    seed_all,
    trainer,
)
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy
from rank_pool import RankPool
from torch import Tensor

from lightning_woodfisher.base.types import ModelMode
from lightning_woodfisher.callbacks.training_step import TrainingStepLoss
from lightning_woodfisher.data.losses import compute_losses
from lightning_woodfisher.distributed.communicator import Communicator
from lightning_woodfisher.gradients.collect import collect_gradients
from lightning_woodfisher.gradients.task import GradientTask
from lightning_woodfisher.weights.layers import prunable_parameters
from lightning_woodfisher.weights.partition import make_partition

MODES: tuple[ModelMode, ...] = ("eval", "train")
COUNT, SIZE = 5, 3


class Collect(pl.Callback):
    """Does what a pruning step does before it writes: at epoch starts, and within one."""

    def __init__(self, mode: ModelMode) -> None:
        self.mode = mode
        self.rows: list[Tensor] = []
        self.losses: list[list[float]] = []

    def on_train_epoch_start(self, trainer: pl.Trainer, module: Any) -> None:
        self.collect(trainer, module)

    def on_train_batch_start(
        self, trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == 1:
            self.collect(trainer, module)

    def collect(self, trainer: pl.Trainer, module: Any) -> None:
        source = TrainingStepLoss(trainer, module)
        parameters = prunable_parameters(module)
        active = {name: torch.arange(p.numel()) for name, p in parameters.items()}
        comm = Communicator(module.device)
        partition = make_partition(
            [len(a) for a in active.values()], 16, comm.world_size
        )
        losses: list[float] = []
        with source.session(self.mode):
            task = GradientTask(source, parameters, active, COUNT, 1, comm, losses)
            batches = source.batches(COUNT, SIZE, seed=1)
            rows = collect_gradients(task, batches, partition.shard_sizes())
            self.rows.append(torch.cat([row.clone() for row in rows]))
            again = compute_losses(
                source, source.batches(COUNT, SIZE, seed=1), range(COUNT), comm, 1
            )
        self.losses += [losses, again]


class Watch(pl.Callback):
    """Notes the batches and the generators of a fit."""

    def __init__(self) -> None:
        self.batches: list[Any] = []
        self.gradients: list[Any] = []

    def on_train_batch_start(
        self, trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int
    ) -> None:
        generators = [torch.get_rng_state(), np.random.get_state(), random.getstate()]
        self.batches.append(copied([batch_idx, batch, generators]))

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *args: Any) -> None:
        # Between the batches of an accumulation window there are gradients.
        self.gradients.append(copied([p.grad for p in module.parameters()]))


@dataclass(frozen=True)
class Case:
    """One way to train."""

    module: Callable[[], pl.LightningModule] = Talkative
    options: Callable[[], dict[str, Any]] = dict
    loader: Callable[[], Any] = loader
    compiled: bool = False


class ByHand(Classifier):
    """Manual accumulation over four batches; a pass comes in between.

    Args:
        clears: what happens after a step.
    """

    def __init__(self, clears: str) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.clears = clears

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        self.manual_backward(self.loss(batch))
        if batch_idx % 4 == 3:
            torch.nn.utils.clip_grad_norm_(self.parameters(), 0.1)
            optimizer.step()
            if self.clears == "module":
                self.zero_grad()
            elif self.clears == "in place":
                self.zero_grad(set_to_none=False)


class FirstBatch(Classifier):
    """Buffers that the first batch makes."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", None)
        self.register_buffer("same", torch.ones(1).expand(4))
        self.scale: Tensor | None

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.scale is None:
            self.scale = batch[0].std()
            self.register_buffer("made", batch[0].mean(), persistent=False)
        pixels = (batch[0] - self.get_buffer("made")) / self.scale
        return super().training_step((pixels, batch[1]), batch_idx)


def gradient_scaler() -> dict[str, Any]:
    scaler = torch.amp.GradScaler(ACCELERATOR, init_scale=2.0**10, growth_interval=3)
    return {"plugins": [MixedPrecision("16-mixed", ACCELERATOR, scaler=scaler)]}


def workers() -> Any:
    generator = torch.Generator().manual_seed(5)
    return loader(num_workers=1, persistent_workers=True, generator=generator)


class HalfPrecision(Classifier):
    """In float16 alone gradients stay finite with a plain optimizer and a small loss."""

    def __init__(self) -> None:
        super().__init__(lambda parameters: torch.optim.SGD(parameters, lr=1e-2))


CASES = {
    "single device": Case(),
    "16-mixed with GradScaler": Case(options=gradient_scaler),
    "bf16-mixed": Case(options=lambda: {"precision": "bf16-mixed"}),
    "bf16-true": Case(options=lambda: {"precision": "bf16-true"}, module=Classifier),
    "16-true": Case(options=lambda: {"precision": "16-true"}, module=HalfPrecision),
    "64-true": Case(options=lambda: {"precision": "64-true"}, module=Classifier),
    "accumulation": Case(options=lambda: {"accumulate_grad_batches": 4}),
    "clipping": Case(options=lambda: {"gradient_clip_val": 0.1}),
    "manual optimisation": Case(module=Manual),
    "manual optimisation with GradScaler": Case(module=Manual, options=gradient_scaler),
    "clipping by hand": Case(lambda: ByHand("nothing")),
    "zero_grad of the module": Case(lambda: ByHand("module")),
    "zero_grad in place": Case(lambda: ByHand("in place")),
    "buffers made by the first batch": Case(FirstBatch),
    "persistent workers": Case(loader=workers),
    "torch.compile": Case(Classifier, compiled=True),
    "no validation, several loggers": Case(
        options=lambda: {"logger": [MemoryLogger(), MemoryLogger()]}
    ),
}


@dataclass
class Outcome:
    """What a fit left behind, and what a pass saw."""

    state: Any
    rows: list[Tensor] = field(default_factory=list)
    losses: list[list[float]] = field(default_factory=list)


def fit(case: Case, mode: ModelMode | None, **options: Any) -> Outcome:
    seed_all(3)
    watch = Watch()
    callbacks: list[pl.Callback] = [watch]
    collect = None
    if mode is not None:
        collect = Collect(mode)
        callbacks.append(collect)
    memory = MemoryLogger()
    module: Any = case.module()
    fitted = trainer(*callbacks, **{"logger": memory, **case.options(), **options})
    if case.compiled:
        torch._dynamo.reset()
        module = torch.compile(module, backend="aot_eager")
    fitted.fit(module, case.loader(), loader(16, shuffle=False))
    generators = [torch.get_rng_state(), np.random.get_state(), random.getstate()]
    metrics = [
        {key: value for key, value in vars(m).items() if key in m._defaults}
        for m in fitted.lightning_module.modules()
        if hasattr(m, "_defaults")
    ]
    state = {
        "final": final_state(fitted),
        "batches": watch.batches,
        "gradients": watch.gradients,
        "history": [logger.history for logger in fitted.loggers],
        "callback metrics": copied(dict(fitted.callback_metrics)),
        "generators": copied(generators),
        "metrics": copied(metrics),
        "attributes": sorted(vars(fitted.lightning_module)),
    }
    return Outcome(state, *((collect.rows, collect.losses) if collect else ()))


@functools.cache
def without(case: str) -> Outcome:
    return fit(CASES[case], None)


def require_a_real_pass(outcome: Outcome, mode: ModelMode) -> None:
    """Check that the pass has seen gradients that change with the weights."""
    assert len(outcome.rows) == 4
    for rows in outcome.rows:
        assert len(rows) == COUNT
        assert bool(rows.isfinite().all())
        assert bool((rows.abs().sum(dim=1) > 0).all())
    assert not torch.equal(outcome.rows[0], outcome.rows[2])
    # Without gradients the losses are the same: same samples, same seeds. Of gradients
    # computed together only the mean loss is known.
    for first, second in zip(outcome.losses[::2], outcome.losses[1::2], strict=True):
        assert len(first) == COUNT
        assert first == second or (
            mode == "eval" and sum(first) == pytest.approx(sum(second), rel=1e-2)
        )


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(name, marks=pytest.mark.slow if case.compiled else ())
        for name, case in CASES.items()
    ],
)
def test_a_collection_pass_leaves_no_trace(case: str, mode: ModelMode) -> None:
    expected = without(case)
    outcome = fit(CASES[case], mode)
    require_a_real_pass(outcome, mode)
    assert len(expected.state["batches"]) == 12
    assert differences(outcome.state, expected.state) == []


# ---------------------------------------------------------------- two processes

DDP_CASES: dict[str, tuple[Case, Callable[[], dict[str, Any]]]] = {
    "ddp": (Case(), lambda: {"strategy": "ddp"}),
    "static graph": (
        Case(Classifier),
        lambda: {"strategy": DDPStrategy(static_graph=True)},
    ),
    "accumulation": (
        Case(options=lambda: {"accumulate_grad_batches": 2}),
        lambda: {"strategy": "ddp"},
    ),
    "manual optimisation": (
        Case(Manual),
        lambda: {"strategy": DDPStrategy(find_unused_parameters=True)},
    ),
}


def ddp_differences() -> dict[str, list[str]]:
    """Job: every case and mode, compared with the fit that has no pass."""
    found = {}
    for name, (case, options) in DDP_CASES.items():
        expected = fit(case, None, devices=2, **options())
        assert len(expected.state["batches"]) == 6
        for mode in MODES:
            outcome = fit(case, mode, devices=2, **options())
            require_rows(outcome, mode)
            found[f"{name}, {mode}"] = differences(outcome.state, expected.state)
    return found


def require_rows(outcome: Outcome, mode: ModelMode) -> None:
    """Like above, for a pass that each rank sees its shard of."""
    assert len(outcome.rows) == 4
    assert all(len(rows) == COUNT and rows.abs().sum() > 0 for rows in outcome.rows)
    first, second = outcome.losses[:2]
    assert first == second or (
        mode == "eval" and sum(first) == pytest.approx(sum(second), rel=1e-2)
    )


def test_a_collection_pass_leaves_no_trace_on_two_processes(ranks: RankPool) -> None:
    for found in ranks.run(2, ddp_differences, launch="trainer"):
        assert len(found) == 2 * len(DDP_CASES)
        assert found == dict.fromkeys(found, [])
