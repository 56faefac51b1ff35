"""Options of a step in a Trainer: limited data, BatchNorm, weight decay, labels."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from fits import (
    Classifier,
    Reseed,
    differences,
    images,
    loader,
    pruning,
    seed_all,
    trainer,
)
from lightning.pytorch.callbacks import ModelCheckpoint
from rank_pool import RankPool
from step_options import in_step
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lightning_woodfisher import (
    ConfigurationError,
    ConstantSchedule,
    FisherConfig,
    PolynomialSchedule,
    PruningError,
    prune,
)

# The resumed runs do not save; Lightning misses the ModelCheckpoint.
pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")

FISHER = FisherConfig(num_gradients=6, gradient_batch_size=2, block_size=16)
OPTIONS: dict[str, dict[str, Any]] = {
    "reused": {
        "recompute_steps": 3,
        "recompute_spacing": "polynomial",
        "reuse_gradients": True,
    },
    "trust_ratio": {"recompute_steps": 2, "trust_ratio": 1e-6},
    "batchnorm": {"batchnorm_recalibration_batches": 3},
    "repeated": {"fisher": FisherConfig(40, 2, 16, repeat_samples=True)},
    "sampled": {"fisher": FisherConfig(6, 2, 16, sample_labels=True)},
    "centred": {"fisher": FisherConfig(6, 2, 16, centered=True)},
}


class Forward(Classifier):
    """Has the logits for what its forward gives."""

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.net(inputs)
        return outputs


def net_loss(net: nn.Module, batch: Any) -> Tensor:
    return cross_entropy(net(batch[0]), batch[1])


class Snapshot(pl.Callback):
    """The network before and after the first step."""

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        self.before = copy.deepcopy(module.net)

    def on_train_batch_start(
        self, trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == 0:
            self.after = {n: v.clone() for n, v in module.net.state_dict().items()}


@pytest.mark.parametrize("name", list(OPTIONS))
def test_the_callback_does_what_prune_does(name: str) -> None:
    seed_all(4)
    options = {"fisher": FISHER, "seed": 9, **OPTIONS[name]}
    pruner, snapshot = pruning(**options), Snapshot()
    trainer(snapshot, pruner, max_epochs=1).fit(Forward(), loader())
    report = prune(
        snapshot.before, images(), net_loss, target_sparsity=0.75, **in_step(**options)
    )
    (found,) = pruner.reports
    state = snapshot.before.state_dict()
    assert differences(snapshot.after, state) == []
    assert found.stages == report.stages
    assert found.batchnorm_layers == report.batchnorm_layers == (name == "batchnorm")


def test_a_module_without_logits_is_told_before_the_first_batch() -> None:
    module = Classifier()
    fisher = FisherConfig(6, 2, 16, sample_labels=True)
    pruner = pruning(schedule=PolynomialSchedule(1, 2), fisher=fisher)
    fitted = trainer(pruner, max_epochs=3)
    with pytest.raises(PruningError, match="give the model a method sample_labels"):
        fitted.fit(module, loader())
    assert fitted.global_step == 0


def test_short_data_is_told_before_training_unless_it_may_repeat() -> None:
    fisher = FisherConfig(num_gradients=40, gradient_batch_size=2)
    batches = [images()[i : i + 8] for i in range(0, 48, 8)]
    for source in (None, batches):
        with pytest.raises(ConfigurationError, match="num_gradients"):
            trainer(pruning(fisher=fisher, dataloader=source)).fit(
                Classifier(), loader()
            )
        again = FisherConfig(40, 2, repeat_samples=True)
        pruner = pruning(fisher=again, dataloader=source)
        trainer(pruner, max_epochs=1).fit(Classifier(), loader())
        assert pruner.reports[0].num_gradients == 40


# ---------------------------------------------------------------- weight decay


class DecayLog(pl.Callback):
    """Weight decay of all groups in every epoch."""

    def __init__(self) -> None:
        self.seen: list[list[float]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.is_last_batch:
            groups = [g for o in trainer.optimizers for g in o.param_groups]
            self.seen.append([group["weight_decay"] for group in groups])


def two_groups(parameters: Any) -> torch.optim.Optimizer:
    weights = list(parameters)
    groups = [
        {"params": weights[:2], "weight_decay": 0.1},
        {"params": weights[2:], "weight_decay": 0.2},
    ]
    return torch.optim.SGD(groups, lr=0.01)


def decay_fit(
    schedule: Any, resumed: str | None = None, saving: bool = False, **options: Any
) -> tuple[list[list[float]], dict[str, Tensor], list[str]]:
    seed_all(1 if resumed is None else 99)
    log = DecayLog()
    pruner = pruning(
        schedule=schedule, weight_decay_off_after_last_step=True, **options
    )
    callbacks: list[Any] = [Reseed(), pruner, log]
    folder = Path.cwd() / "decay"
    if saving:
        callbacks.append(ModelCheckpoint(folder, "{epoch}", save_top_k=-1))
    fitted = trainer(*callbacks, max_epochs=4, enable_checkpointing=saving)
    module = Classifier(optimizer=two_groups)
    fitted.fit(module, loader(shuffle=False), ckpt_path=resumed)
    files = sorted(map(str, folder.glob("*.ckpt"))) if saving else []
    return log.seen, module.state_dict(), files


def test_weight_decay_ends_with_the_last_step_also_when_resumed() -> None:
    seen, state, files = decay_fit(PolynomialSchedule(0, 2), saving=True)
    on, off = [0.1, 0.2], [0.0, 0.0]
    assert seen == [on, on, off, off]
    assert len(files) == 4
    # Before and after the last step.
    for path, rest in ((files[0], [on, off, off]), (files[2], [off])):
        again, end, _ = decay_fit(PolynomialSchedule(0, 2), resumed=path)
        assert again == rest
        assert differences(end, state) == []


def test_weight_decay_stays_without_the_option_and_without_steps() -> None:
    log = DecayLog()
    trainer(pruning(), log).fit(Classifier(optimizer=two_groups), loader())
    assert log.seen == [[0.1, 0.2]] * 2
    kept, _, _ = decay_fit(ConstantSchedule())
    assert kept == [[0.1, 0.2]] * 4


def test_an_optimizer_without_weight_decay_is_refused() -> None:
    module = Classifier(optimizer=torch.optim.LBFGS)
    pruner = pruning(weight_decay_off_after_last_step=True)
    with pytest.raises(ConfigurationError, match="but there is LBFGS"):
        trainer(pruner).fit(module, loader())
    with pytest.raises(ConfigurationError, match="must be True or False"):
        pruning(weight_decay_off_after_last_step="yes")


# ---------------------------------------------------------------- two processes


def fit_on(world_size: int) -> dict[str, Any]:
    """Job: the network after the first step, for every option."""
    found: dict[str, Any] = {}
    for name, options in OPTIONS.items():
        seed_all(4)
        pruner, snapshot = (
            pruning(**in_step(**{"fisher": FISHER, **options})),
            Snapshot(),
        )
        strategy = {"devices": world_size, "strategy": "ddp"}
        trainer(pruner, snapshot, max_epochs=1, **strategy).fit(Forward(), loader())
        found[name] = snapshot.after
    return found


def test_options_in_ddp(ranks: RankPool) -> None:
    (alone,) = ranks.run(1, fit_on, 1, launch="trainer")
    for found in ranks.run(2, fit_on, 2, launch="trainer"):
        # Buffers too: all ranks have the same BatchNorm statistics.
        assert differences(found, alone) == []
