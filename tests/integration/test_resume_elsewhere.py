"""A fit goes on with another number of ranks, from every kind of checkpoint.

The optimizer moves weights by rules that know no gradients. Whatever the number of ranks,
the fit must therefore end with the bits of one rank that was never interrupted.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from fits import Classifier, differences, images, pruning, seed_all, trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from rank_pool import RankPool
from structured_fits import CHANNELS, ResidualNet, config, structured
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from lightning_woodfisher import (
    ConfigurationError,
    FisherConfig,
    HAPPruningCallback,
    PolynomialSchedule,
    SOSPPruningCallback,
)
from lightning_woodfisher.callbacks.base import PruningCallback
from lightning_woodfisher.distributed.dtensor import reshard

pytestmark = [
    pytest.mark.slow,
    # Parts of a training end early.
    pytest.mark.filterwarnings("ignore:training ended at"),
]

EPOCHS, BATCHES = 4, 5
# Ranks and last epoch of each part of the training.
PARTS = ((2, 1), (1, 2), (3, EPOCHS))
by_epoch = PolynomialSchedule(0, 3)
by_step = PolynomialSchedule(start_step=1, end_step=17, every_n_steps=4)


class Drift(torch.optim.Optimizer):
    """Moves every weight, with a state for each, and never looks at a gradient."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.01})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        loss = closure() if closure else None
        for group in self.param_groups:
            for weight in group["params"]:
                state = self.state[weight]
                if not state:
                    state["moves"] = torch.zeros(())
                    state["trail"] = torch.zeros_like(weight)
                state["moves"] += 1
                state["trail"].mul_(0.5).add_(weight)
                # Nothing moves with lr=0, with which torch fills states before it loads.
                change = 0.1 * (int(state["moves"]) * 7 % 11 - 5)
                weight.add_(state["trail"].neg().add_(change), alpha=group["lr"])
        return loss


def layers() -> nn.Module:
    """Give a network of which two and three ranks hold whole blocks of four."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 12), nn.Linear(12, 6)
    )


def channels() -> nn.Module:
    """Give a network whose BatchNorm statistics only a pruning step changes."""
    net = ResidualNet()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.0
    return net


class Sharded(Classifier):
    def configure_model(self) -> None:
        if any(isinstance(p, DTensor) for p in self.net.parameters()):
            return
        mesh = self.device_mesh["data_parallel"]
        for layer in list(self.net.children())[:-1]:
            if isinstance(layer, nn.Linear):
                fully_shard(layer, mesh=mesh)
        fully_shard(self.net, mesh=mesh)


def unstructured(**options: Any) -> Any:
    fisher = FisherConfig(5, 5, 4, collection="loop")
    return pruning(**{"fisher": fisher, "schedule": by_epoch, **options})


def whole_channels(kind: Any, **options: Any) -> Any:
    settings = config(batchnorm_recalibration_batches=2, num_samples=20, batch_size=5)
    return structured(kind, **{"config": settings, "schedule": by_epoch, **options})


CALLBACKS: dict[str, Callable[..., Any]] = {
    "woodfisher": unstructured,
    "woodfisher by steps": lambda **o: unstructured(**{"schedule": by_step, **o}),
    "magnitude": lambda **o: unstructured(criterion="magnitude", **o),
    "layerwise": lambda **o: unstructured(criterion="layerwise", **o),
    "sosp_i": lambda **o: whole_channels(SOSPPruningCallback, variant="I", **o),
    "sosp_h": lambda **o: whole_channels(SOSPPruningCallback, variant="H", **o),
    "hap": lambda **o: whole_channels(
        HAPPruningCallback, **{"implant_ratio": 0.5, **o}
    ),
}


WHOLE_CHANNELS = ("sosp_i", "sosp_h", "hap")


# Lightning keeps callbacks of one class apart by settings that these share.
class AtEndOfEpoch(ModelCheckpoint):
    """Saves at the end of an epoch."""


class AfterValidation(ModelCheckpoint):
    """Saves after the validation at the end of an epoch."""


class WithinEpoch(ModelCheckpoint):
    """Saves after some batches."""


class Last(ModelCheckpoint):
    """Saves a link or a copy with a fixed name."""


KINDS: dict[str, Callable[[Path], ModelCheckpoint]] = {
    "end of epoch": lambda f: AtEndOfEpoch(
        f / "end of epoch", "{step}", save_top_k=-1, save_on_train_epoch_end=True
    ),
    "after validation": lambda f: AfterValidation(
        f / "after validation", "{step}", save_top_k=-1, save_on_train_epoch_end=False
    ),
    "within an epoch": lambda f: WithinEpoch(
        f / "within an epoch", "{step}", save_top_k=-1, every_n_train_steps=4
    ),
    "save_last": lambda f: Last(
        f / "save_last", save_top_k=0, save_last=True, save_on_train_epoch_end=True
    ),
}


class OnlyWeights(ModelCheckpoint):
    """Saves no state of callbacks and optimizers."""


class Stop(pl.Callback):
    """Ends training after an epoch, and notes the masks that it began with."""

    def __init__(self, last: int) -> None:
        self.last = last
        self.first_masks: dict[str, Tensor] = {}

    def on_train_start(self, trainer: pl.Trainer, *_: Any) -> None:
        (pruner,) = (c for c in trainer.callbacks if isinstance(c, PruningCallback))
        self.first_masks = pruner.masks.state_dict()

    def on_train_epoch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        trainer.should_stop = trainer.current_epoch >= self.last


def whole(value: Any) -> Any:
    """Gather DTensors, and copy the other tensors."""
    if isinstance(value, DTensor):
        return value.detach().full_tensor()
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: whole(item) for key, item in value.items()}
    return value


def options_of(strategy: str, world_size: int) -> dict[str, Any]:
    if strategy.startswith("fsdp2"):
        single = strategy == "fsdp2, one file"
        return {
            "devices": world_size,
            "strategy": ModelParallelStrategy(world_size, 1, not single),
        }
    return {"devices": world_size, "strategy": "ddp" if world_size > 1 else "auto"}


def fit(
    name: str,
    strategy: str,
    last: int,
    savings: list[ModelCheckpoint],
    resumed: str | None = None,
    weights: dict[str, Tensor] | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Train a part, and give all that the number of ranks must not change."""
    seed_all(1)
    if "fsdp2" in strategy and name not in WHOLE_CHANNELS:
        # Larger blocks of the remaining weights would end with a shard.
        settings["fisher"] = FisherConfig(5, 5, block_size=1, collection="loop")
    callback = CALLBACKS[name](**settings)
    module = (Sharded if strategy.startswith("fsdp2") else Classifier)(
        optimizer=Drift, build=channels if callback._removes_channels else layers
    )
    if weights is not None:
        module.load_state_dict(weights)
    seed_all(99 if resumed else 1)
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    stop = Stop(last)
    fitted = trainer(
        callback,
        stop,
        *savings,
        max_epochs=EPOCHS,
        limit_train_batches=BATCHES,
        enable_checkpointing=bool(savings),
        **options_of(strategy, world_size),
    )
    data = DataLoader(images(96), batch_size=3, shuffle=True)
    checked = DataLoader(images(16), batch_size=3)
    fitted.fit(module, data, checked, ckpt_path=resumed)
    reshard(module)
    (optimizer,) = fitted.optimizers
    names = {id(p): name for name, p in module.named_parameters()}
    dropped = {"seconds", "logged_before", "logged_after", "world_size"}
    dropped |= {"bytes_exchanged", "fisher_bytes", "collection"}
    reports = [report.to_dict() for report in callback.reports]
    state = {k: v for k, v in module.state_dict().items() if "num_batches" not in k}
    return {
        "first masks": stop.first_masks,
        "step": fitted.global_step,
        "state": whole(state),
        "optimizer": {names[id(p)]: whole(dict(s)) for p, s in optimizer.state.items()},
        "masks": callback.masks.state_dict(),
        "violations": callback.masks.violations(),
        "done": list(callback._done),
        "reports": [{k: v for k, v in r.items() if k not in dropped} for r in reports],
    }


def part(
    name: str, strategy: str, kinds: list[str], number: int, folder: str
) -> dict[str, Any]:
    """Job: one part of the training, from the checkpoint of each kind."""
    os.chdir(folder)
    _, last = PARTS[number]
    here = Path(folder, f"part {number}")
    if number == 0:
        savings = [KINDS[kind](here) for kind in kinds]
        return {"": fit(name, strategy, last, savings)}
    found = {}
    for kind in kinds:
        saved = Path(folder, f"part {number - 1}", kind).glob("*")
        resumed = str(max(saved, key=lambda p: int("0" + p.stem.partition("=")[2])))
        found[kind] = fit(name, strategy, last, [KINDS[kind](here)], resumed)
    return found


TARGETS = (0.0, 0.25, 0.4, 0.6)


def part_from_weights(
    name: str, strategy: str, number: int, folder: str
) -> dict[str, Any]:
    """Job: a whole training that begins with the weights of the one before."""
    os.chdir(folder)
    initial, target = TARGETS[number : number + 2]
    options = {"target" if name in WHOLE_CHANNELS else "target_sparsity": target}
    if name == "hap":
        # Weights do not tell a 1×1 filter from a sparse one.
        options["implant_ratio"] = 0.0
    weights = None
    if number:
        path = Path(folder, f"{number - 1}", "weights.ckpt")
        checkpoint = torch.load(path, weights_only=True)
        assert "callbacks" not in checkpoint
        assert "optimizer_states" not in checkpoint
        weights = checkpoint["state_dict"]
    saving = OnlyWeights(Path(folder, f"{number}"), "weights", save_weights_only=True)
    schedule = PolynomialSchedule(1, 2, initial_sparsity=initial)
    return fit(
        name,
        strategy,
        EPOCHS,
        [saving],
        weights=weights,
        schedule=schedule,
        **options,
    )


def go_on(
    ranks: RankPool,
    name: str,
    strategy: str,
    folder: Path,
    compare: Callable[[Any, Any], list[str]] = differences,
) -> None:
    kinds = list(KINDS)
    for number, (world_size, last) in enumerate(PARTS):
        alone = f"one rank, {strategy}"
        undisturbed = fit(name, alone, last, [])
        job = part, name, strategy, kinds, number, str(folder)
        results = ranks.run(world_size, *job, launch="trainer")
        for result in results:
            assert differences(result, results[0]) == []
        for kind, found in results[0].items():
            same = differences if world_size < 3 else compare
            undisturbed["first masks"] = found["first masks"]
            assert same(found, undisturbed) == [], (kind, world_size)
            assert bool(found["first masks"]) == (number > 0)
    assert undisturbed["violations"] == {}
    assert undisturbed["step"] == EPOCHS * BATCHES
    assert len(undisturbed["reports"]) >= EPOCHS


@pytest.mark.parametrize("name", CALLBACKS)
def test_ddp(ranks: RankPool, tmp_path: Path, name: str) -> None:
    go_on(ranks, name, "ddp", tmp_path)


def different_masks(left: dict[str, Any], right: dict[str, Any]) -> list[str]:
    """Compare all but the numbers that depend on gradients, and weights by rounding."""
    torch.testing.assert_close(left["state"], right["state"], rtol=1e-4, atol=1e-6)
    kinds = ("step", "masks", "violations", "done")
    return [d for key in kinds for d in differences(left[key], right[key])]


@pytest.mark.parametrize(
    ("name", "strategy"),
    [
        ("woodfisher", "fsdp2"),
        ("woodfisher by steps", "fsdp2"),
        ("woodfisher", "fsdp2, one file"),
        ("magnitude", "fsdp2"),
    ],
)
def test_fsdp2(ranks: RankPool, tmp_path: Path, name: str, strategy: str) -> None:
    # FSDP divides the sum of three equal gradients by three, which rounds.
    compare = differences if name == "magnitude" else different_masks
    go_on(ranks, name, strategy, tmp_path, compare)


@pytest.mark.parametrize("name", [n for n in CALLBACKS if n != "woodfisher by steps"])
def test_weights_alone(ranks: RankPool, tmp_path: Path, name: str) -> None:
    go_on_from_weights(ranks, name, "ddp", tmp_path)


def test_weights_alone_fsdp2(ranks: RankPool, tmp_path: Path) -> None:
    go_on_from_weights(
        ranks, "woodfisher", "fsdp2, one file", tmp_path, different_masks
    )


def go_on_from_weights(
    ranks: RankPool,
    name: str,
    strategy: str,
    folder: Path,
    compare: Callable[[Any, Any], list[str]] = differences,
) -> None:
    before: dict[str, Tensor] = {}
    for number, (world_size, _) in enumerate(PARTS):
        (folder / "alone").mkdir(exist_ok=True)
        undisturbed = part_from_weights(
            name, f"one rank, {strategy}", number, str(folder / "alone")
        )
        job = part_from_weights, name, strategy, number, str(folder)
        results = ranks.run(world_size, *job, launch="trainer")
        for result in results:
            assert differences(result, results[0]) == []
        same = differences if world_size < 3 else compare
        assert same(results[0], undisturbed) == []
        assert differences(results[0]["first masks"], before) == []
        before = results[0]["masks"]
    gone = sum(int((~kept).sum()) for kept in before.values())
    if name in WHOLE_CHANNELS:
        groups = results[0]["reports"][-1]["groups"]
        assert sum(len(g["removed"]) for g in groups) == round(TARGETS[-1] * CHANNELS)
    else:
        assert gone == round(TARGETS[-1] * (64 * 12 + 12 * 12 + 12 * 6))


def refused(folder: str) -> list[str]:
    """Job: the errors of callbacks that need whole parameters."""
    os.chdir(folder)
    texts = []
    for name in ("layerwise", *WHOLE_CHANNELS):
        with pytest.raises(ConfigurationError) as caught:
            fit(name, "fsdp2", EPOCHS, [])
        texts.append(str(caught.value))
    return texts


def test_fsdp2_is_refused(ranks: RankPool, tmp_path: Path) -> None:
    for layerwise, *others in ranks.run(2, refused, str(tmp_path), launch="trainer"):
        assert "criterion='layerwise' needs whole parameters on every rank" in layerwise
        for text in others:
            assert "channels cannot be removed from parameters that are sharded" in text
