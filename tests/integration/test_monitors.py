"""ModelCheckpoint and EarlyStopping of users, whose metric is best for a dense network."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from fits import Classifier, loader, pruning, trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from lightning_woodfisher import (
    ConfigurationError,
    PolynomialSchedule,
    WoodFisherPruningCallback,
)
from lightning_woodfisher.cli.main import main


class DenseIsBest(Classifier):
    """A module whose validation loss is its sparsity, and grows a little with time."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        weights = torch.cat([p.detach().flatten() for p in self.net.parameters()])
        zeros = float((weights == 0).float().mean())
        self.log("val_loss", zeros + 1e-4 * self.current_epoch)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", self.loss(batch))


def ramp(**options: Any) -> WoodFisherPruningCallback:
    """Return a callback with steps at epochs 1, 2 and 3."""
    return pruning(schedule=PolynomialSchedule(1, 3), **options)


def fit(*callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    """Fit with validation for six epochs."""
    options = {"max_epochs": 6, "enable_checkpointing": True, **options}
    ckpt_path = options.pop("ckpt_path", None)
    fitted = trainer(*callbacks, **options)
    fitted.fit(DenseIsBest(), loader(), loader(16), ckpt_path=ckpt_path)
    return fitted


def sparsity_of(path: str) -> float:
    """Return the sparsity that the masks in a checkpoint promise, found in its weights."""
    saved = torch.load(path, weights_only=True)
    (state,) = [s for s in saved["callbacks"].values() if "masks" in s]
    weights = [saved["state_dict"][name] for name in state["masks"]]
    zeros = sum(int((weight == 0).sum()) for weight in weights)
    return zeros / sum(weight.numel() for weight in weights)


class Stopper(pl.Callback):
    """Ask the Trainer to stop after an epoch."""

    def __init__(self, last: int = 0) -> None:
        self.last = last

    def on_train_epoch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule
    ) -> None:
        trainer.should_stop = trainer.current_epoch >= self.last


def best(tmp_path: Path, **options: Any) -> ModelCheckpoint:
    """Return a checkpoint callback that monitors the validation loss."""
    return ModelCheckpoint(tmp_path, "best", monitor="val_loss", **options)


def test_the_best_checkpoint_is_pruned(tmp_path: Path) -> None:
    checkpoint = best(tmp_path)
    fitted = fit(ramp(), checkpoint)
    # The file of the dense network is replaced, under its own name.
    assert [path.name for path in tmp_path.iterdir()] == ["best.ckpt"]
    assert sparsity_of(checkpoint.best_model_path) == pytest.approx(0.75, abs=1e-3)
    assert torch.load(checkpoint.best_model_path, weights_only=True)["epoch"] == 3
    fitted.test(dataloaders=loader(16), ckpt_path="best", verbose=False)


def test_without_the_hold_the_best_is_dense(tmp_path: Path) -> None:
    callback, checkpoint = ramp(), best(tmp_path)
    callback.hold_monitors = False
    fit(callback, checkpoint)
    assert torch.load(checkpoint.best_model_path, weights_only=True)["epoch"] == 0


@pytest.mark.parametrize("last", [1, 4])
@pytest.mark.filterwarnings("ignore:training ended at", "ignore:Checkpoint directory")
def test_the_best_is_pruned_after_resuming(tmp_path: Path, last: int) -> None:
    whole = best(tmp_path / "whole", save_top_k=2)
    fit(ramp(), whole)
    first = best(tmp_path / "parts", save_top_k=2, save_last=True)
    fit(ramp(), first, Stopper(last))
    second = best(tmp_path / "parts", save_top_k=2, save_last=True)
    fit(ramp(), second, ckpt_path=first.last_model_path)
    scores = [sorted(map(float, c.best_k_models.values())) for c in (whole, second)]
    assert scores[0] == pytest.approx(scores[1])
    for path in second.best_k_models:
        assert sparsity_of(path) == pytest.approx(0.75, abs=1e-3)


def test_early_stopping_waits_for_the_last_step(tmp_path: Path) -> None:
    stopping = EarlyStopping("val_loss", patience=1, stopping_threshold=1e-6)
    callback = ramp()
    fitted = fit(callback, stopping, max_epochs=20, enable_checkpointing=False)
    assert len(callback.reports) == 3
    # Epoch 3 is the first that counts, and epoch 4 is worse.
    assert stopping.stopped_epoch == 4
    assert fitted.current_epoch == 5
    assert stopping.stopping_threshold == 1e-6


def test_a_monitor_of_sparsity_works(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(
        tmp_path, "{epoch}", monitor="pruning/sparsity", mode="max"
    )
    fitted = fit(ramp(), checkpoint)
    assert sparsity_of(checkpoint.best_model_path) == pytest.approx(0.75, abs=1e-3)
    metrics = fitted.callback_metrics
    assert float(metrics["pruning/sparsity"]) == pytest.approx(0.75, abs=1e-3)
    assert float(metrics["pruning/target_reached"]) == 1.0


def _stopping() -> tuple[pl.Callback, dict[str, Any]]:
    return EarlyStopping("val_loss", patience=1), {}


def _timer() -> tuple[pl.Callback, dict[str, Any]]:
    return pl.Callback(), {"max_time": timedelta(microseconds=1)}


def _should_stop() -> tuple[pl.Callback, dict[str, Any]]:
    return Stopper(), {}


@pytest.mark.parametrize(
    ("make", "cause"),
    [
        (_stopping, r"EarlyStopping\(monitor='val_loss'\) stopped training"),
        (_timer, "max_time was reached"),
        (_should_stop, r"trainer.should_stop was set"),
    ],
)
def test_an_early_end_is_a_warning_with_its_cause(
    make: Callable[[], tuple[pl.Callback, dict[str, Any]]], cause: str
) -> None:
    callback, (other, options) = ramp(), make()
    callback.hold_monitors = False
    with pytest.warns(UserWarning, match=f"not at the target 0.75: .*{cause}"):
        fit(callback, other, enable_checkpointing=False, **options)


@pytest.mark.filterwarnings("ignore:training ended at")
def test_commands_warn_of_a_missed_target(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for last, missing in ((1, 2), (4, 0)):
        path = tmp_path / f"{last}.ckpt"
        fitted = fit(ramp(), Stopper(last), enable_checkpointing=False)
        fitted.save_checkpoint(path)
        warning = f"{path} was saved before {missing} planned pruning step"
        out = f"--out={tmp_path / str(last)}.safetensors"
        for command in (["report"], ["export", "--format=sparse", out]):
            assert main([*command, str(path)]) == 0
            assert (warning in capsys.readouterr().err) == bool(missing)


def test_a_report_of_a_folder_skips_a_damaged_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(ramp()).save_checkpoint(tmp_path / "good.ckpt")
    content = (tmp_path / "good.ckpt").read_bytes()
    damaged = tmp_path / "newest.ckpt"
    damaged.write_bytes(content[: len(content) // 2])
    os.utime(damaged, (2e9, 2e9))
    assert main(["report", str(tmp_path)]) == 0
    told = capsys.readouterr()
    assert "warning: skipped newer files" in told.err
    assert "newest.ckpt" in told.err
    assert told.out.startswith(str(tmp_path / "good.ckpt"))


@pytest.mark.parametrize(
    ("state", "fault"),
    [
        (None, "it is not a dictionary with done, masks, version"),
        ({"version": 1}, "it is not a dictionary"),
        ({"version": "1", "masks": {}, "done": []}, "its version is '1'"),
        ({"version": 1, "masks": {"a": [1]}, "done": []}, "masks are not bool tensors"),
        (
            {"version": 1, "masks": {"a": torch.ones(2)}, "done": []},
            "masks are not bool tensors",
        ),
        (
            {"version": 1, "masks": {}, "done": [3]},
            "not lists of unit, position and spa",
        ),
    ],
)
def test_a_damaged_state_is_refused(tmp_path: Path, state: Any, fault: str) -> None:
    callback = ramp()
    path = tmp_path / "run.ckpt"
    fit(callback, enable_checkpointing=False).save_checkpoint(path)
    checkpoint = torch.load(path, weights_only=False)
    checkpoint["callbacks"][callback.state_key] = state
    torch.save(checkpoint, path)
    with pytest.raises(ConfigurationError, match=f"is damaged: .*{fault}"):
        fit(ramp(), max_epochs=8, enable_checkpointing=False, ckpt_path=str(path))
