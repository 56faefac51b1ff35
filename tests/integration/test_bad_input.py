"""Bad input gets a clear error before the first batch."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from fits import (
    Classifier,
    Counting,
    convolutional,
    differences,
    images,
    loader,
    pruning,
    trainer,
)
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import (
    DeepSpeedStrategy,
    FSDPStrategy,
)
from rank_pool import RankPool
from structured_fits import ResidualNet, config, structured
from torch import nn

from lightning_woodfisher import (
    ConfigurationError,
    FisherConfig,
    OneShotSchedule,
    PolynomialSchedule,
    PruningError,
    PruningSchedule,
    SelectionConfig,
    StepConfig,
    StructureConfig,
    prune,
    prune_structures,
    sweep,
)
from lightning_woodfisher.distributed.communicator import Communicator
from lightning_woodfisher.pruning.schedule import PlannedStep


class Bare(Counting):
    """Has nothing that could be pruned."""

    def __init__(self) -> None:
        super().__init__(build=lambda: nn.Sequential(nn.Flatten(), nn.LayerNorm(64)))


class Frozen(Counting):
    def __init__(self) -> None:
        super().__init__()
        for parameter in self.parameters():
            parameter.requires_grad_(parameter.dim() == 1)


class Sparse(Counting):
    def __init__(self) -> None:
        super().__init__()
        self.net[5].weight.data[:10] = 0.0


def fisher(**options: Any) -> dict[str, Any]:
    config = {"num_gradients": 6, "gradient_batch_size": 2, "block_size": 16}
    return {"fisher": FisherConfig(**{**config, **options})}


def selection(**options: Any) -> dict[str, Any]:
    return {"selection": SelectionConfig(**options)}


def ramp(*arguments: Any, **options: Any) -> dict[str, Any]:
    return {"schedule": PolynomialSchedule(*arguments, **options)}


def shot(*arguments: Any, **options: Any) -> dict[str, Any]:
    return {"schedule": OneShotSchedule(*arguments, **options)}


BAD: list[tuple[str, Callable[[], dict[str, Any]], Any, str]] = [
    ("sparsity 1", lambda: {"target_sparsity": 1.0}, Counting, r"target_sparsity=1\.0"),
    ("per cent", lambda: {"target_sparsity": 90}, Counting, "target_sparsity=90"),
    ("negative", lambda: {"target_sparsity": -0.1}, Counting, r"target_sparsity=-0\.1"),
    ("nan", lambda: {"target_sparsity": float("nan")}, Counting, "target_sparsity=nan"),
    ("text", lambda: {"target_sparsity": "0.9"}, Counting, "'0.9' is not a number"),
    ("dict", lambda: {"schedule": {"start_epoch": 1}}, Counting, "is not a schedule"),
    ("N is None", lambda: fisher(num_gradients=None), Counting, "num_gradients=None"),
    ("N = 2.5", lambda: fisher(num_gradients=2.5), Counting, r"num_gradients=2\.5"),
    ("N is True", lambda: fisher(num_gradients=True), Counting, "num_gradients=True"),
    ("m = '4'", lambda: fisher(gradient_batch_size="4"), Counting, "batch_size='4'"),
    ("B = 8.0", lambda: fisher(block_size=8.0), Counting, r"block_size=8\.0 is not"),
    ("λ is text", lambda: fisher(damping="1e-4"), Counting, "damping='1e-4' is not a"),
    ("λ is True", lambda: fisher(damping=True), Counting, "damping=True is not a"),
    (
        "full primal",
        lambda: fisher(block_size=None, engine="primal"),
        Counting,
        "engine='primal' cannot be combined with fisher.block_size=None",
    ),
    ("parts = 1.5", lambda: {"recompute_steps": 1.5}, Counting, r"steps=1\.5 is not"),
    (
        "include is text",
        lambda: selection(include="net.5"),
        Counting,
        r"selection.include='net\.5' is a single string; .* include=\['net\.5'\]",
    ),
    ("exclude is text", lambda: selection(exclude="x"), Counting, r"exclude=\['x'\]"),
    ("include of numbers", lambda: selection(include=[5]), Counting, r"\[5\] is not a"),
    ("include is None", lambda: selection(include=None), Counting, "include=None is n"),
    ("epoch 1.5", lambda: shot(1.5), Counting, r"epoch=1\.5 is not a whole number"),
    ("epoch True", lambda: shot(True), Counting, "epoch=True is not a whole number"),
    ("ramp from 0.5", lambda: ramp(0.5), Counting, r"start_epoch=0\.5 is not"),
    ("ramp to '2'", lambda: ramp(0, "2"), Counting, "end_epoch='2' is not"),
    ("every 1.5", lambda: ramp(every_n_steps=1.5), Counting, r"n_steps=1\.5 is not"),
    ("N = 0", lambda: fisher(num_gradients=0), Counting, "fisher.num_gradients=0"),
    ("N < 0", lambda: fisher(num_gradients=-3), Counting, "fisher.num_gradients=-3"),
    ("m = 0", lambda: fisher(gradient_batch_size=0), Counting, "gradient_batch_size=0"),
    ("B = 0", lambda: fisher(block_size=0), Counting, "fisher.block_size=0"),
    ("λ = 0", lambda: fisher(damping=0.0), Counting, r"fisher.damping=0\.0"),
    ("λ < 0", lambda: fisher(damping=-1e-3), Counting, r"fisher.damping=-0\.001"),
    ("λ = inf", lambda: fisher(damping=float("inf")), Counting, "fisher.damping=inf"),
    ("λ = nan", lambda: fisher(damping=float("nan")), Counting, "fisher.damping=nan"),
    ("mode", lambda: fisher(model_mode="test"), Counting, "model_mode='test'"),
    ("engine", lambda: fisher(engine="fast"), Counting, "fisher.engine='fast'"),
    ("scope", lambda: selection(scope="all"), Counting, "selection.scope='all'"),
    ("criterion", lambda: {"criterion": "woodfischer"}, Counting, "mean 'woodfisher'"),
    ("update", lambda: {"update": "jiont"}, Counting, "'jiont'.*mean 'joint'"),
    ("parts", lambda: {"recompute_steps": 0}, Counting, "recompute_steps=0"),
    ("include", lambda: selection(include=["nte.5"]), Counting, "'nte.5' matches no"),
    ("only", lambda: selection(only=["nte.5"]), Counting, "'nte.5' matches no"),
    (
        "include and only",
        lambda: selection(only=["net.0"], include=["net.5"]),
        Counting,
        "only=.* replaces the default .* put all patterns into one",
    ),
    ("exclude", lambda: selection(exclude=["LSTM"]), Counting, "'LSTM' matches no"),
    ("pattern", lambda: selection(include=["net.("]), Counting, "regular expression"),
    ("all excluded", lambda: selection(exclude=["net"]), Counting, "Nothing to prune"),
    ("no matrix", dict, Bare, "Bare has no trainable parameter"),
    ("frozen", dict, Frozen, "Frozen has no trainable parameter"),
    ("no method", lambda: {"loss_method": "lossy"}, Counting, "loss_method='lossy'"),
    ("ends first", lambda: ramp(3, 1), Counting, "end_epoch=1 < start_epoch=3"),
    ("interval", lambda: ramp(0, 1, 0), Counting, "every_n_epochs=0"),
    ("degree", lambda: ramp(0, 1, degree=0), Counting, "degree=0"),
    ("start", lambda: ramp(-1), Counting, "start_epoch=-1"),
    ("initial", lambda: ramp(initial_sparsity=1.5), Counting, r"initial_sparsity=1\.5"),
    (
        "units",
        lambda: ramp(0, end_step=5),
        Counting,
        "either epochs or optimizer steps",
    ),
    ("both", lambda: shot(1, step=2), Counting, "epoch=1 and step=2"),
    ("before", lambda: shot(-1), Counting, "epoch=-1"),
    ("too late", lambda: shot(2), Counting, r"epoch 2, but training has only 2 epochs"),
    ("ends too late", lambda: ramp(0, 9), Counting, "epoch 9, but .* only 2 epochs"),
    ("step too late", lambda: shot(step=12), Counting, "step 12, but .* only 12 steps"),
    (
        "steps too late",
        lambda: ramp(end_step=40),
        Counting,
        "step 40, but training has only 12 steps",
    ),
    (
        "less than initial",
        lambda: ramp(initial_sparsity=0.8),
        Counting,
        r"target_sparsity=0\.75 is below initial_sparsity=0\.8",
    ),
    (
        "less than is there",
        lambda: {**ramp(initial_sparsity=0.1), "target_sparsity": 0.2},
        Sparse,
        r"sparsity 0\.2, but .* have 0\.7877 already",
    ),
    (
        "too few samples",
        lambda: fisher(num_gradients=20, gradient_batch_size=3),
        Counting,
        r"num_gradients=20 times gradient_batch_size=3 needs 60 samples, .* has 48",
    ),
    (
        "batch of more than all",
        lambda: fisher(gradient_batch_size=50),
        Counting,
        "gradient_batch_size=50 exceeds the 48 samples",
    ),
]


@pytest.mark.parametrize(
    ("options", "module", "message"),
    [case[1:] for case in BAD],
    ids=[case[0] for case in BAD],
)
def test_bad_input_is_refused_before_the_first_batch(
    options: Callable[[], dict[str, Any]], module: Any, message: str
) -> None:
    made = module()
    with pytest.raises(ConfigurationError, match=message):
        trainer(pruning(**options())).fit(made, loader())
    assert made.steps == 0


def test_an_endless_training_needs_an_end_of_the_ramp() -> None:
    made = Counting()
    with pytest.raises(ConfigurationError, match="set end_epoch or limit the training"):
        trainer(pruning(schedule=None), max_epochs=-1).fit(made, loader())
    assert made.steps == 0


def test_two_callbacks_on_the_same_weights_are_refused() -> None:
    pruners = [
        pruning(selection=SelectionConfig(only=include))
        for include in (["Conv2d", "net.5"], ["Linear"])
    ]
    module = Counting()
    with pytest.raises(
        ConfigurationError, match=r"same weights: net\.5\.weight; .*exclude"
    ):
        trainer(*pruners).fit(module, loader())
    assert module.steps == 0


class Sharded(FSDPStrategy):
    """A strategy of somebody else."""


@pytest.mark.parametrize("kind", [FSDPStrategy, DeepSpeedStrategy, Sharded])
def test_a_strategy_that_shards_parameters_is_refused(kind: Any) -> None:
    # They cannot run here, DeepSpeed is not even installed: the class decides.
    fake = SimpleNamespace(strategy=kind.__new__(kind), global_step=0)
    expected = f"strategy {kind.__name__} .*single device or 'ddp'.*FSDP2"
    with pytest.raises(ConfigurationError, match=expected):
        pruning().setup(fake, Classifier(), "fit")
    pruning().setup(fake, Classifier(), "validate")


# ---------------------------------------------------------------- a step that cannot work


def broken(kind: str) -> Classifier:
    """A module whose training step is of no use."""

    class Broken(Counting):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            if kind == "none":
                return None
            if kind == "detached":
                return loss.detach().requires_grad_(False)
            if kind == "vector":
                return batch[0].flatten(1).mean(dim=1)
            if kind == "text":
                return {"los": loss}
            if kind == "nan":
                return loss * float("nan")
            zero = (self.net[5].weight * 0.0).square().sum()
            return loss + zero.sqrt()

    return Broken()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("none", r"Broken.training_step returned NoneType .*loss_method="),
        ("detached", "loss of gradient 0 has no graph"),
        ("vector", r"returned a tensor of shape \(2,\) for gradient 0"),
        ("text", "returned NoneType for gradient 0"),
        ("nan", r"the loss of gradient 0 \(samples \d+, \d+\) is nan"),
        (
            "gradient",
            r"gradient 0 \(samples \d+, \d+\) is not finite in net\.5\.weight$",
        ),
    ],
)
def test_a_useless_training_step_is_named(kind: str, message: str) -> None:
    module = broken(kind)
    with pytest.raises(PruningError, match=message):
        trainer(pruning()).fit(module, loader())
    # With the network shared, where that works compared with the first alone; then alone.
    assert module.steps < 24


class Duck:
    """An optimizer that works in a Trainer without being a ``torch.optim.Optimizer``."""

    def __init__(self, parameters: Any) -> None:
        self._inner = torch.optim.SGD(parameters, lr=0.1)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("register_step"):
            raise AttributeError(name)
        return getattr(self._inner, name)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        return self._inner.step(closure)


def test_an_optimizer_without_hooks_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="Duck has no step hooks.*derive it"):
        trainer(pruning()).fit(Classifier(optimizer=Duck), loader())


# ---------------------------------------------------------------- ranks that differ


class Drifting(Classifier):
    """On rank 1, a weight changes in training."""

    def on_train_batch_end(self, *_: Any) -> None:
        if os.environ["RANK"] == "1":
            with torch.no_grad():
                next(self.parameters()).view(-1)[0] += 1e-3


# A callback, what differs on rank 1, and the error of all ranks.
FITS: list[tuple[Callable[..., Any], dict[str, Any], str]] = [
    (
        pruning,
        {"target_sparsity": 0.5},
        "target_sparsity is 0.5 on rank 1, but 0.75 on rank 0",
    ),
    (
        pruning,
        {"criterion": "magnitude"},
        "criterion is 'magnitude' on rank 1, but 'woodfisher' on rank 0",
    ),
    (
        pruning,
        {"schedule": PolynomialSchedule(1, 2)},
        "schedule is PolynomialSchedule(start_epoch=1",
    ),
    (
        pruning,
        selection(exclude=["Conv2d"]),
        "selection.exclude is ['Conv2d'] on rank 1, but [] on rank 0",
    ),
    (
        pruning,
        {"fisher": FisherConfig(6, 2, 16, damping=0.1)},
        "fisher.damping is 0.1 on rank 1, but",
    ),
    (pruning, {"seed": 3}, "step.seed is 3 on rank 1, but 0 on rank 0"),
    (
        pruning,
        {"count": 40},
        "length of the training data is 40 on rank 1, but 48 on rank 0",
    ),
    (pruning, {"drifts": True}, "the weights of 'net.0.weight' (rank 1 differs from"),
    (structured, {"target": 0.4}, "target is 0.4 on rank 1, but 0.5 on rank 0"),
    (
        structured,
        {"schedule": OneShotSchedule(2)},
        "schedule is OneShotSchedule(",
    ),
    (
        structured,
        {"config": config(seed=7)},
        "config.seed is 7 on rank 1, but 0 on rank 0",
    ),
    (
        structured,
        {"config": config(exclude=["net.conv1"])},
        "config.exclude is ['net.conv1'] on rank 1, but [] on rank 0",
    ),
    (
        structured,
        {"count": 40},
        "length of the training data is 40 on rank 1, but 48 on rank 0",
    ),
    (structured, {"drifts": True}, "the weights of 'net.stem.weight' (rank 1 differs"),
]


def fit_differently() -> list[tuple[str, int]]:
    """Job: fit on two ranks with one difference.

    Returns:
        For each difference the error and the number of training steps.
    """
    found = []
    for make, change, _ in FITS:
        mine = dict(change) if os.environ["RANK"] == "1" else {}
        count = mine.pop("count", 48)
        mine.pop("drifts", None)
        channels = make is structured
        # What drifts is noticed before the second step.
        schedule = OneShotSchedule(1) if channels else PolynomialSchedule(0, 2)
        callback = make(**{"schedule": schedule, **mine})
        kind = Drifting if "drifts" in change else Classifier
        module = kind(build=ResidualNet) if channels else kind()
        fitted = trainer(callback, max_epochs=4, devices=2, strategy="ddp")
        text = ""
        try:
            fitted.fit(module, loader(count, shuffle=False))
        except (ConfigurationError, PruningError) as error:
            text = str(error)
        found.append((text, fitted.global_step))
    return found


def test_ranks_with_other_settings_end_before_training(ranks: RankPool) -> None:
    for found in ranks.run(2, fit_differently, launch="trainer"):
        for (text, steps), (_, change, expected) in zip(found, FITS, strict=True):
            assert expected in text, change
            assert steps == (3 if "drifts" in change else 0)


# What rank 1 loads, with the position and the masks of another checkpoint than rank 0.
OTHER_CHECKPOINTS = {
    "older": "position (epoch, optimizer steps) in the checkpoint is (0, 3) on rank 1, "
    "but (1, 6) on rank 0",
    "none": "position (epoch, optimizer steps) in the checkpoint is None on rank 1, but "
    "(1, 6) on rank 0",
    "other masks": "hash of the mask of 'net.0.weight' in the checkpoint is ",
    "fewer steps": "list of pruning steps in the checkpoint is [('epoch', 0)] on rank 1, "
    "but [('epoch', 0), ('epoch', 1)] on rank 0",
}


def resume_differently(folder: str) -> list[str]:
    """Job: resume on two ranks from different checkpoints; return the errors."""
    os.chdir(folder)
    rank = os.environ["RANK"]

    def make(**options: Any) -> pl.Trainer:
        many = {"devices": 2, "strategy": "ddp", "max_epochs": 4}
        return trainer(pruning(schedule=PolynomialSchedule(0, 2)), **many, **options)

    saving = ModelCheckpoint(folder, "{epoch}", save_top_k=-1)
    first = make(enable_checkpointing=True)
    first.callbacks.append(saving)
    first.fit(Classifier(), loader(shuffle=False))
    checkpoint = torch.load("epoch=1.ckpt", weights_only=True)
    (state,) = [v for k, v in checkpoint["callbacks"].items() if "WoodFisher" in k]
    whole = list(state["done"])
    state["done"] = whole[:1]
    torch.save(checkpoint, f"fewer steps {rank}.ckpt")
    state["done"] = whole
    kept = state["masks"]["net.0.weight"]
    kept[kept.nonzero()[0].tolist()] = False
    torch.save(checkpoint, f"other masks {rank}.ckpt")
    texts = []
    for name in OTHER_CHECKPOINTS:
        path: str | None = f"{name} {rank}.ckpt"
        if name in {"older", "none"}:
            path = "epoch=0.ckpt" if name == "older" else None
        if rank == "0":
            path = "epoch=1.ckpt"
        try:
            make().fit(Classifier(), loader(shuffle=False), ckpt_path=path)
            texts.append("")
        except (ConfigurationError, PruningError) as error:
            texts.append(str(error))
    return texts


def test_ranks_with_other_checkpoints_end_before_training(
    ranks: RankPool, tmp_path: Path
) -> None:
    for texts in ranks.run(2, resume_differently, str(tmp_path), launch="trainer"):
        for text, expected in zip(texts, OTHER_CHECKPOINTS.values(), strict=True):
            assert expected in text
            assert text.endswith("; let all ranks load the same checkpoint.")


class Endless(PruningSchedule):
    """A schedule whose ``repr`` is its address in memory."""

    def plan(self, target_sparsity: float, horizon: Any) -> tuple[PlannedStep, ...]:
        return (PlannedStep("epoch", 0, target_sparsity),)


def fit_with_own_schedule() -> int:
    """Job: the addresses of objects differ between ranks."""
    kept = [object() for _ in range(int(os.environ["RANK"]))]
    pruner = pruning(schedule=Endless())
    fitted = trainer(pruner, max_epochs=1, devices=2, strategy="ddp")
    fitted.fit(Classifier(), loader(shuffle=False))
    return len(pruner.reports) + 0 * len(kept)


def test_settings_are_compared_without_addresses(ranks: RankPool) -> None:
    assert ranks.run(2, fit_with_own_schedule, launch="trainer") == [1, 1]


def small_loss(model: nn.Module, batch: Any) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(model(batch[0]), batch[1])


def prune_once(model: nn.Module, data: Any, **options: Any) -> None:
    settings = {"target_sparsity": 0.5, "fisher": FisherConfig(6, 2, 16)}
    prune(model, data, small_loss, **{**settings, **options})


def prune_layers(model: nn.Module, data: Any, **options: Any) -> None:
    prune_once(model, data, **{"criterion": "layerwise", **options})


def prune_channels(model: nn.Module, data: Any, target: float = 0.5, **o: Any) -> None:
    settings = StructureConfig(**{"num_samples": 6, "batch_size": 2, **o})
    inputs = torch.zeros(2, 1, 8, 8)
    options = {"config": settings, "example_inputs": inputs}
    prune_structures(model, data, small_loss, target=target, **options)


def sweep_twice(model: nn.Module, data: Any, **options: Any) -> None:
    grid = options.pop("grid", {"target_sparsity": [0.5, 0.75]})
    settings = {"fisher": FisherConfig(6, 2, 16), **options}
    sweep(model, data, small_loss, lambda m: 0.0, grid, **settings)


# A function, what differs on rank 1, and the error of all ranks.
CALLS: list[tuple[Callable[..., None], dict[str, Any], str]] = [
    (prune_once, {"target_sparsity": 0.6}, "target_sparsity is 0.6 on rank 1, but 0.5"),
    (prune_once, fisher(num_gradients=9), "fisher.num_gradients is 9 on rank 1, but 6"),
    (prune_once, {"step": StepConfig(seed=3)}, "step.seed is 3 on rank 1, but 0"),
    (prune_once, {"count": 40}, "length of the data is 40 on rank 1, but 48"),
    (
        prune_once,
        {"classes": 5},
        "shape of '7.weight' is (5, 12) on rank 1, but (4, 12)",
    ),
    (
        prune_once,
        selection(exclude=["0"]),
        "selection.exclude is ['0'] on rank 1, but []",
    ),
    (prune_once, {"weight": "7.weight"}, "weights of '7.weight' (rank 1 differs from"),
    (
        prune_layers,
        {"weight": "5.weight"},
        "weights of '5.weight' (rank 1 differs from",
    ),
    (prune_layers, {"step": StepConfig(seed=3)}, "step.seed is 3 on rank 1, but 0"),
    (prune_channels, {"target": 0.4}, "target is 0.4 on rank 1, but 0.5"),
    (prune_channels, {"seed": 7}, "config.seed is 7 on rank 1, but 0"),
    (prune_channels, {"num_samples": 8}, "config.num_samples is 8 on rank 1, but 6"),
    (prune_channels, {"count": 40}, "length of the data is 40 on rank 1, but 48"),
    (prune_channels, {"weight": "0.weight"}, "weights of '0.weight' (rank 1 differs"),
    (
        sweep_twice,
        {"grid": {"damping": [1.0]}},
        "number of settings is 1 on rank 1, but 2",
    ),
    (sweep_twice, {"step": StepConfig(seed=3)}, "setting 0.step.seed is 3 on rank 1"),
    (sweep_twice, {"count": 40}, "length of the data is 40 on rank 1, but 48"),
]


def call_differently() -> list[str]:
    """Job: call functions on two ranks with one difference; return the errors."""
    texts = []
    for function, change, _ in CALLS:
        torch.manual_seed(2)
        mine = dict(change) if Communicator().rank == 1 else {}
        model = convolutional()
        if "classes" in mine:
            model[7] = nn.Linear(12, mine.pop("classes"))
        if "weight" in mine:
            with torch.no_grad():
                model.get_parameter(mine.pop("weight")).view(-1)[3] += 1e-3
        data = images(mine.pop("count", 48))
        before = {name: value.clone() for name, value in model.state_dict().items()}
        try:
            function(model, data, **mine)
            texts.append("")
        except (ConfigurationError, PruningError) as error:
            texts.append(str(error))
        assert differences(model.state_dict(), before) == []
    return texts


def test_ranks_that_call_functions_differently_end_before_the_step(
    ranks: RankPool,
) -> None:
    for texts in ranks.run(2, call_differently):
        for text, (_, change, expected) in zip(texts, CALLS, strict=True):
            assert expected in text, change
