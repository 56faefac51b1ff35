"""Lightning has two names; a fit under either gives the same, bit for bit."""

from __future__ import annotations

import csv
import importlib
import importlib.util
import inspect
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import lightning.pytorch
import pytest
import torchmetrics
import wandb
from devices import ACCELERATOR
from fits import (
    CLASSES,
    Classifier,
    Manual,
    Reseed,
    Talkative,
    adamw,
    convolutional,
    differences,
    final_state,
    loader,
    pruning,
    seed_all,
)
from lightning.pytorch.callbacks import BaseFinetuning
from lightning_utilities.core import rank_zero
from offline_run import read_run
from rank_pool import RankPool
from structured_fits import ResidualNet, WithForward, config

from lightning_woodfisher import (
    ConfigurationError,
    PolynomialSchedule,
    SOSPPruningCallback,
    WoodFisherPruningCallback,
)
from lightning_woodfisher.base.lightning_names import (
    either_name,
    from_package_of,
    has_callback,
)
from lightning_woodfisher.callbacks.progress import progress_bar

NAMES = ("lightning.pytorch", "pytorch_lightning")

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("pytorch_lightning") is None,
        reason="pytorch_lightning is not installed",
    ),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step"),
]


def package(name: str) -> Any:
    """Import Lightning by a name; messages stay with the logger they had."""
    log = rank_zero.log
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found: ModuleType = importlib.import_module(name)
        from lightning_fabric.utilities.warnings import PossibleUserWarning
    # pyproject.toml ignores that of lightning.fabric; pytest takes this back.
    warnings.simplefilter("ignore", PossibleUserWarning)
    rank_zero.log = log
    return found


def under(base: type, *kinds: type) -> type:
    """Make a class with the methods of others, derived from a class of one name."""
    methods = {
        name: function
        for kind in kinds
        for name, function in vars(kind).items()
        if inspect.isfunction(function) and name != "__init__"
    }
    return type(kinds[-1].__name__, (base,), methods)


def make(pl: Any, *kinds: type, build: Any = convolutional) -> Any:
    """Make a module of tests under one name of Lightning."""
    module = under(pl.LightningModule, *kinds)()
    module.make_optimizer, module.net = adamw, build()
    if Talkative in kinds:
        module.accuracy = torchmetrics.Accuracy("multiclass", num_classes=CLASSES)
        module.mean = torchmetrics.MeanMetric()
    module.automatic_optimization = Manual not in kinds
    return module


def trainer(pl: Any, *callbacks: Any, **options: Any) -> Any:
    settings = {
        "accelerator": ACCELERATOR,
        "devices": 1,
        "max_epochs": 3,
        "callbacks": [under(pl.Callback, Reseed)(), *callbacks],
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
        "num_sanity_val_steps": 0,
    }
    return pl.Trainer(**{**settings, **options})


def outcome(fitted: Any, pruner: Any) -> dict[str, Any]:
    """Collect what a fit has made; seconds are never the same."""
    return {
        **final_state(fitted),
        "masks": pruner.masks.state_dict(),
        "reports": [{**r.to_dict(), "seconds": {}} for r in pruner.reports],
    }


# ---------------------------------------------------------------- single weights


def fit(name: str, folder: Path, origin: Path | None = None) -> dict[str, Any]:
    """Prune twice with loggers and checkpoints, or from the first checkpoint on."""
    pl = package(name)
    seed_all(0)
    pruner = pruning(schedule=PolynomialSchedule(0, 2, 2), log_masks=True)
    loggers = origin is None and [
        pl.loggers.CSVLogger(folder, "csv"),
        pl.loggers.TensorBoardLogger(folder, "board"),
        pl.loggers.WandbLogger("tests", folder, offline=True),
    ]
    fitted = trainer(
        pl,
        pruner,
        pl.callbacks.ModelCheckpoint(
            folder / "kept", "{epoch}", save_top_k=-1, save_on_train_epoch_end=True
        ),
        logger=loggers,
        enable_checkpointing=True,
    )
    # In one order: a resumed run does not know how the data was shuffled.
    data = loader(shuffle=False), loader(16, shuffle=False)
    path = None if origin is None else origin / "kept" / "epoch=0.ckpt"
    fitted.fit(make(pl, Classifier), *data, ckpt_path=path)
    if origin is None:
        wandb.finish()
    return outcome(fitted, pruner)


_FITS: dict[str, tuple[dict[str, Any], Path]] = {}


@pytest.fixture
def fits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What both names give, and where they have written; made once, on one thread."""
    for name in NAMES if not _FITS else ():
        folder = tmp_path_factory.mktemp(name)
        _FITS[name] = (fit(name, folder), folder)
    return _FITS


def test_the_same_bits_under_both_names(fits: dict[str, Any]) -> None:
    (first, _), (second, _) = (fits[name] for name in NAMES)
    assert [report["epoch"] for report in first["reports"]] == [0, 2]
    assert differences(first, second) == []


def written(folder: Path) -> dict[str, Any]:
    """Read what the loggers have written, without times and random names."""
    sheets = {}
    for path in sorted(folder.rglob("*.csv")):
        with path.open() as file:
            sheets[path.name] = [
                {k: v for k, v in row.items() if "seconds" not in k}
                for row in csv.DictReader(file)
            ]
    run = read_run(folder)
    history = [
        {k: v if isinstance(v, float) else None for k, v in sorted(entry.items())}
        for entry in run.history
    ]
    for entry in history:
        for key in entry:
            if "seconds" in key or key in {"_timestamp", "_runtime"}:
                entry[key] = None
    return {
        "sheets": sheets,
        "history": history,
        "charts": sorted(run.charts),
        "config": run.config["pruning"],
        "artifacts": {kind: len(files) for kind, files in run.artifacts.items()},
    }


def test_the_same_reaches_the_loggers(fits: dict[str, Any]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    first, second = (written(fits[name][1]) for name in NAMES)
    assert {"metrics.csv", "pruning_layers.csv", "pruning_steps.csv"} <= set(
        first["sheets"]
    )
    assert len(first["sheets"]["pruning_steps.csv"]) == 2
    assert sum("pruning/layers" in entry for entry in first["history"]) == 2
    assert first["artifacts"]["masks"] == 1
    assert differences(first, second) == []
    tags = []
    for name in NAMES:
        (folder,) = (fits[name][1] / "board").iterdir()
        events = EventAccumulator(str(folder))
        events.Reload()
        tags.append(events.Tags())
    assert "pruning/figures/layers" in tags[0]["images"]
    assert "pruning/settings/text_summary" in tags[0]["tensors"]
    assert tags[0] == tags[1]


@pytest.mark.parametrize(("of", "by"), [NAMES, NAMES[::-1]])
def test_a_checkpoint_of_one_name_is_resumed_by_the_other(
    fits: dict[str, Any], tmp_path: Path, of: str, by: str
) -> None:
    whole, origin = fits[of]
    assert differences(whole, fit(by, tmp_path, origin)) == []


def fit_by_hand(name: str, **options: Any) -> dict[str, Any]:
    """Prune in manual optimisation with two optimizers that are toggled."""
    pl = package(name)
    seed_all(1)
    pruner = pruning(schedule=PolynomialSchedule(0, 1))
    fitted = trainer(pl, pruner, max_epochs=2, **options)
    fitted.fit(make(pl, Classifier, Talkative, Manual), loader())
    return outcome(fitted, pruner)


def test_manual_optimisation() -> None:
    first, second = (fit_by_hand(name) for name in NAMES)
    assert len(first["reports"]) == 2
    assert differences(first, second) == []


def fit_in_ddp(world_size: int) -> list[dict[str, Any]]:
    """Job: the same fit under both names."""
    options = {"devices": world_size, "strategy": "ddp_find_unused_parameters_true"}
    return [fit_by_hand(name, **options) for name in NAMES]


def test_two_processes(ranks: RankPool) -> None:
    for first, second in ranks.run(2, fit_in_ddp, 2, launch="trainer"):
        assert first["reports"][0]["world_size"] == 2
        assert differences(first, second) == []


# ---------------------------------------------------------------- channels


def remove_channels(name: str, variant: Any, *kinds: type) -> dict[str, Any]:
    """Remove channels under mixed precision, which the scores leave out.

    SWA adds an epoch for BatchNorm, which the schedule must not count.
    """
    pl = package(name)
    seed_all(2)
    pruner = SOSPPruningCallback(0.5, variant, config(), schedule=PolynomialSchedule(0))
    averaging = pl.callbacks.StochasticWeightAveraging(1e-2, swa_epoch_start=1)
    module = make(pl, Classifier, *kinds, build=ResidualNet)
    fitted = trainer(pl, pruner, averaging, max_epochs=2, precision="bf16-mixed")
    fitted.fit(module, loader())
    smaller = pruner.shrunk_model(module)
    return {**outcome(fitted, pruner), "smaller": smaller.state_dict()}


# Without a forward the network gives the logits; with one the module is the network.
@pytest.mark.parametrize(("variant", "kinds"), [("I", ()), ("H", (WithForward,))])
def test_channels(variant: str, kinds: tuple[type, ...]) -> None:
    first, second = (remove_channels(name, variant, *kinds) for name in NAMES)
    assert len(first["reports"]) == 2
    assert sum(v.numel() for v in first["smaller"].values()) < sum(
        v.numel() for v in first["model"].values()
    )
    assert differences(first, second) == []


# ---------------------------------------------------------------- refused, shown, found


@pytest.mark.parametrize(("of", "by"), [NAMES, NAMES[::-1]])
def test_a_mixture_is_refused_by_lightning(of: str, by: str) -> None:
    module = make(package(of), Classifier)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(TypeError, match="must be a `LightningModule`"):
        trainer(package(by), pruning()).fit(module, loader())
    assert differences(before, module.state_dict()) == []


def test_what_holds_parameters_differently_is_refused_under_the_other_name() -> None:
    pl = package("pytorch_lightning")
    other = pl.callbacks.ModelPruning("l1_unstructured", amount=0.3)
    with pytest.raises(ConfigurationError, match="Lightning's ModelPruning"):
        trainer(pl, pruning(), other).fit(make(pl, Classifier), loader())
    pruner = pruning()
    fitted = trainer(pl, pruner)
    fitted.strategy.__class__ = pl.strategies.DeepSpeedStrategy
    with pytest.raises(ConfigurationError, match="DeepSpeedStrategy shards"):
        pruner.setup(fitted, make(pl, Classifier), "fit")
    fitted = trainer(pl, pruner, pl.callbacks.EMAWeightAveraging())
    fitted.strategy.__class__ = pl.strategies.ModelParallelStrategy
    with pytest.raises(ConfigurationError, match="averages whole tensors"):
        pruner.setup(fitted, make(pl, Classifier), "fit")


@pytest.mark.parametrize("name", NAMES)
def test_callbacks_that_change_what_is_planned_are_known(name: str) -> None:
    pl = package(name)
    assert has_callback(trainer(pl, pl.callbacks.BackboneFinetuning()), BaseFinetuning)
    varying = pl.callbacks.GradientAccumulationScheduler({0: 2})
    pruner = pruning(schedule=PolynomialSchedule(0))
    fitted = trainer(pl, varying, pruner, max_epochs=-1, max_steps=8)
    with pytest.raises(ConfigurationError, match="no known number of epochs"):
        fitted.fit(make(pl, Classifier), loader())


class Looking(Classifier):
    """Notes the loggers that a training step sees."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.seen.update(type(logger) for logger in self.loggers)
        return self.loss(batch)


@pytest.mark.parametrize("name", NAMES)
def test_idle_loggers_are_loggers_of_the_trainer(name: str, tmp_path: Path) -> None:
    pl = package(name)
    module = make(pl, Classifier, Looking)
    module.seen = set()
    logger = pl.loggers.CSVLogger(tmp_path)
    trainer(pl, pruning(), max_epochs=1, logger=logger).fit(module, loader())
    assert module.seen == {pl.loggers.CSVLogger, pl.loggers.logger.DummyLogger}


@pytest.mark.parametrize("name", NAMES)
def test_a_row_in_the_rich_display(name: str) -> None:
    pytest.importorskip("rich")
    pl = package(name)
    bar = pl.callbacks.RichProgressBar()
    shown: Any = progress_bar(trainer(pl, bar, enable_progress_bar=True))
    assert shown.args == (bar,)


class Pruning(WoodFisherPruningCallback):
    """Stands for a user's own class."""


def test_the_command_line_of_the_other_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pl = package("pytorch_lightning")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from pytorch_lightning.cli import LightningCLI
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    monkeypatch.setattr(sys, "argv", ["train.py"])
    # As documented: its parser takes classes that are derived from its own Callback.
    monkeypatch.setattr(
        sys.modules[__name__],
        "Both",
        type("Both", (Pruning, pl.Callback), {"__module__": __name__}),
        raising=False,
    )
    cli = LightningCLI(
        under(pl.LightningModule, Classifier),
        args={"trainer": {"callbacks": [{"class_path": f"{__name__}.Both"}]}},
        run=False,
        seed_everything_default=0,
        save_config_callback=None,
    )
    assert any(isinstance(c, WoodFisherPruningCallback) for c in cli.trainer.callbacks)


def test_namesakes(monkeypatch: pytest.MonkeyPatch) -> None:
    pl, own = package("pytorch_lightning"), lightning.pytorch
    assert either_name(own.Trainer, own.callbacks.ModelPruning) == (
        own.Trainer,
        own.callbacks.ModelPruning,
        pl.Trainer,
        pl.callbacks.ModelPruning,
    )
    derived = type("Derived", (pl.Trainer,), {})
    logger = own.loggers.logger.DummyLogger
    assert (
        from_package_of(derived(logger=False), logger) is pl.loggers.logger.DummyLogger
    )
    assert from_package_of(trainer(own), logger) is logger
    for name in list(sys.modules):
        if name.partition(".")[0] == "pytorch_lightning":
            monkeypatch.delitem(sys.modules, name)
    assert either_name(own.Trainer) == (own.Trainer,)
    assert "pytorch_lightning" not in sys.modules
