"""The reports reach the loggers: what was written is read back from its files."""

from __future__ import annotations

import csv
import logging
import math
import os
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import wandb
from fits import (
    WEIGHTS,
    Classifier,
    MemoryLogger,
    differences,
    loader,
    pruning,
    seed_all,
    trainer,
)
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from offline_run import OfflineRun, read_run
from rank_pool import RankPool
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_woodfisher import PolynomialSchedule, PruningReport, StepConfig
from lightning_woodfisher.reporting import figures

# Steps of the Trainer at which the callback below prunes: 6 batches make an epoch.
AT = {1: (6, 12), 2: (3, 6)}
NAMES = ["net.0.weight", "net.5.weight", "net.7.weight"]


FIGURES = ("layers", "schedule", "loss_increase", "progress", "saliencies", "masks")


def fit(*loggers: Any, **options: Any) -> list[PruningReport]:
    seed_all(0)
    pruner = pruning(
        schedule=PolynomialSchedule(1, 2), target_sparsity=0.8, log_masks=True
    )
    fitted = trainer(pruner, logger=list(loggers), max_epochs=4, **options)
    fitted.fit(Classifier(), loader())
    return pruner.reports


def scalars(report: PruningReport) -> dict[str, float]:
    """What a logger must have got, put together from the report by hand."""
    values = {
        "pruning/sparsity": report.zeros / WEIGHTS,
        "pruning/target_sparsity": report.target_sparsity,
        "pruning/threshold": report.threshold,
        "pruning/damping": 1e-4,
        "pruning/blocks_with_raised_damping": 0.0,
        "pruning/predicted_loss_increase": report.predicted_increase,
        "pruning/measured_loss_increase": report.loss_after - report.loss_before,
        "pruning/bytes_exchanged": report.bytes_exchanged,
    }
    for layer in report.layers:
        share = layer.zeros_after / math.prod(layer.shape)
        values[f"pruning/sparsity/{layer.name}"] = share
    for phase in ("collect", "accumulate", "factorize", "select", "update", "write"):
        values[f"pruning/seconds/{phase}"] = report.seconds[phase]
    return values


def require_same(found: dict[str, Any], expected: dict[str, float], rel: float) -> None:
    for key, value in expected.items():
        assert float(found[key]) == pytest.approx(value, rel=rel, abs=1e-12), key


def test_scalars_reach_files(tmp_path: Path) -> None:
    sheet, board = CSVLogger(tmp_path, "csv"), TensorBoardLogger(tmp_path, "board")
    memory = MemoryLogger()
    reports = fit(sheet, board, memory)
    assert len(reports) == 2

    with Path(sheet.log_dir, "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row.get("pruning/sparsity")]
    assert [int(row["step"]) for row in rows] == list(AT[1])
    assert [int(row["epoch"]) for row in rows] == [report.epoch for report in reports]

    events = EventAccumulator(board.log_dir)
    events.Reload()
    kept = [entry for entry in memory.history if "pruning/sparsity" in entry[1]]
    assert [step for step, _ in kept] == list(AT[1])

    for index, report in enumerate(reports):
        expected = scalars(report)
        require_same(rows[index], expected, 1e-6)
        require_same(kept[index][1], expected, 1e-12)
        for key, value in expected.items():
            event = events.Scalars(key)[index]
            assert event.step == AT[1][index]
            assert event.value == pytest.approx(value, rel=1e-6, abs=1e-12), key
    # The training's own numbers are there too.
    assert any("train_loss" in metrics for _, metrics in memory.history)
    require_figures_in_tensorboard(events, reports)
    require_sheets(Path(sheet.log_dir), reports)


@pytest.mark.parametrize("log_figures", [True, False])
def test_figures_are_drawn_once_counted_and_optional(
    log_figures: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[float] = []

    def draw(figure: Any) -> Any:
        drawn.append(time.perf_counter())
        time.sleep(0.02)
        return np.zeros((4, 4, 3), np.uint8)

    monkeypatch.setattr(figures, "to_pixels", draw)
    pruner = pruning(schedule=PolynomialSchedule(0, 2), log_figures=log_figures)
    trainer(pruner, logger=TensorBoardLogger("."), max_epochs=3).fit(
        Classifier(), loader()
    )
    assert len(pruner.reports) == 3
    assert len(drawn) == (len(FIGURES) if log_figures else 0)
    seconds = [report.seconds["log"] for report in pruner.reports]
    assert all(spent > 0 for spent in seconds)
    assert (seconds[-1] > 0.02 * len(FIGURES)) or not log_figures
    stored = pruner.state_dict()["reports"]
    assert [report["seconds"]["log"] for report in stored] == seconds


@pytest.mark.filterwarnings("ignore:training ended at")
def test_figures_of_a_run_that_ends_early() -> None:
    class Stop(pl.Callback):
        def on_train_epoch_end(self, trainer: Any, *_: Any) -> None:
            trainer.should_stop = True

    board = TensorBoardLogger(".")
    pruner = pruning(schedule=PolynomialSchedule(0, 2))
    trainer(pruner, Stop(), logger=board, max_epochs=3).fit(Classifier(), loader())
    assert len(pruner.reports) == 1
    events = EventAccumulator(board.log_dir)
    events.Reload()
    assert f"pruning/figures/{FIGURES[0]}" in events.Tags()["images"]


def require_figures_in_tensorboard(
    events: EventAccumulator, reports: list[PruningReport]
) -> None:
    assert set(events.Tags()["images"]) == {f"pruning/figures/{n}" for n in FIGURES}
    for name in FIGURES:
        images = events.Images(f"pruning/figures/{name}")
        assert [image.step for image in images] == list(AT[1])[-1:]
        for image in images:
            assert image.encoded_image_string[:4] == b"\x89PNG"
            assert min(image.width, image.height) > 200
    texts = {
        name: [event.tensor_proto.string_val[0].decode() for event in found]
        for name in ("settings", "layers", "steps")
        if (found := events.Tensors(f"pruning/{name}/text_summary"))
    }
    assert '"num_gradients": 6' in texts["settings"][0]
    for text, report in zip(texts["layers"], reports, strict=True):
        assert [line.strip() for line in text.splitlines()] == [
            line.strip() for line in report.to_table().splitlines()
        ]
    assert len(texts["steps"][0].splitlines()) == 2 + len(reports)


def require_sheets(folder: Path, reports: list[PruningReport]) -> None:
    with (folder / "pruning_layers.csv").open() as file:
        rows = list(csv.DictReader(file))
    layers = [(report, layer) for report in reports for layer in report.layers]
    for row, (report, layer) in zip(rows, layers, strict=True):
        assert (int(row["epoch"]), int(row["step"])) == (report.epoch, report.step)
        assert row["layer"] == layer.name
        assert int(row["zeros"]) == layer.zeros_after
        assert float(row["saliency_50%"]) == layer.saliency_quantiles[2]
    with (folder / "pruning_steps.csv").open() as file:
        steps = list(csv.DictReader(file))
    assert [float(step["sparsity"]) for step in steps] == [r.sparsity for r in reports]


def require_wandb(run: OfflineRun, reports: list[PruningReport], at: Any) -> None:
    """Compare an offline run with the reports."""
    entries = [entry for entry in run.history if "pruning/sparsity" in entry]
    tables = [entry for entry in run.history if "pruning/layers" in entry]
    assert [entry["trainer/global_step"] for entry in entries] == list(at)
    assert [entry["trainer/global_step"] for entry in tables] == list(at)
    # No step was dropped because W&B's own counter had gone on.
    counters = [entry["_step"] for entry in run.history]
    assert counters == sorted(set(counters))
    for entry, other, report in zip(entries, tables, reports, strict=True):
        require_same(entry, scalars(report), 1e-12)
        columns, data = run.table(other["pruning/layers"])
        rows = [dict(zip(columns, row, strict=True)) for row in data]
        assert [row["layer"] for row in rows] == NAMES
        assert [row["shape"] for row in rows] == ["3x1x3x3", "12x108", "4x12"]
        assert [row["weights"] for row in rows] == [27, 1296, 48]
        for row, layer in zip(rows, report.layers, strict=True):
            assert row["zeros"] == layer.zeros_after
            assert row["sparsity"] == layer.zeros_after / row["weights"]
            assert row["threshold"] == layer.threshold
            assert row["predicted_increase"] == layer.predicted_increase
            assert row["damping"] == 1e-4
            quantiles = [row[f"saliency_{q}%"] for q in (5, 25, 50, 75, 95)]
            assert quantiles == sorted(layer.saliency_quantiles)
            assert quantiles[0] > 0
        chart = other["pruning/sparsity_per_layer_table"]
        columns, data = run.table(chart)
        bars = [dict(zip(columns, row, strict=True)) for row in data]
        assert [(bar["layer"], bar["sparsity"]) for bar in bars] == [
            (row["layer"], row["sparsity"]) for row in rows
        ]
    (drawn,) = (e for e in run.history if "pruning/figures/layers" in e)
    for name in FIGURES:
        picture = run.folder / "files" / drawn[f"pruning/figures/{name}"]["path"]
        assert picture.read_bytes()[:4] == b"\x89PNG"
    chart = run.charts["pruning/sparsity_per_layer"]["panel_config"]
    assert chart["panelDefId"] == "wandb/bar/v0"
    assert chart["fieldSettings"] == {"label": "layer", "value": "sparsity"}
    assert "pruning/sparsity_per_layer_table" in str(chart["userQuery"])
    (end,) = (entry for entry in run.history if "pruning/steps" in entry)
    columns, data = run.table(end["pruning/steps"])
    steps = [dict(zip(columns, row, strict=True)) for row in data]
    assert [step["sparsity"] for step in steps] == [r.sparsity for r in reports]
    assert [step["step"] for step in steps] == list(at)
    settings = run.config["pruning"]
    assert settings["target_sparsity"] == 0.8
    assert settings["fisher"]["block_size"] == 16
    assert settings["selection"]["scope"] == "global"
    assert settings["schedule"]["class"] == "PolynomialSchedule"
    assert settings["schedule"]["start"] == 1
    require_masks(run, reports[-1])
    assert run.summary["pruning/sparsity"] == reports[-1].sparsity
    # Training was logged before, between and after the pruning steps.
    losses = [e["trainer/global_step"] for e in run.history if "train_loss" in e]
    assert losses == list(range(2 * at[1]))


def require_masks(run: OfflineRun, report: PruningReport) -> None:
    """Compare the artifact with the last report."""
    (path,) = run.artifacts["masks"]
    masks = torch.load(path, weights_only=True)
    assert {name: int((~kept).sum()) for name, kept in masks.items()} == {
        layer.name: layer.zeros_after for layer in report.layers if layer.zeros_after
    }
    assert all(masks[layer.name].shape == layer.shape for layer in report.layers)


def test_wandb_offline(tmp_path: Path) -> None:
    logger = WandbLogger(project="tests", save_dir=tmp_path, offline=True)
    reports = fit(logger)
    wandb.finish()
    require_wandb(read_run(tmp_path), reports, AT[1])


def test_the_local_model_reaches_wandb(tmp_path: Path) -> None:
    logger = WandbLogger(project="tests", save_dir=tmp_path, offline=True)
    seed_all(0)
    pruner = pruning(
        schedule=PolynomialSchedule(1, 2),
        step=StepConfig(local_model_points=3, recompute_steps=2),
    )
    trainer(pruner, logger=logger, max_epochs=4).fit(Classifier(), loader())
    wandb.finish()
    run = read_run(tmp_path)
    entries = [e for e in run.history if "pruning/local_model_points" in e]
    assert len(entries) == len(pruner.reports) == 2
    for entry, report in zip(entries, pruner.reports, strict=True):
        columns, rows = run.table(entry["pruning/local_model_points"])
        assert columns == ["stage", "fraction", "predicted", "measured"]
        assert rows == [
            [number, point.fraction, point.predicted, point.measured]
            for number, stage in enumerate(report.local_model)
            for point in stage
        ]
    (drawn,) = (e for e in run.history if "pruning/figures/local_model" in e)
    picture = run.folder / "files" / drawn["pruning/figures/local_model"]["path"]
    assert picture.read_bytes()[:4] == b"\x89PNG"


def fit_with_wandb(folder: str) -> list[dict[str, Any]]:
    """Job: a fit on two processes, logged to W&B and to a sheet."""
    os.chdir(folder)
    loggers = [
        WandbLogger(project="tests", save_dir=folder, offline=True),
        CSVLogger(folder, "csv"),
    ]
    reports = fit(*loggers, devices=2, strategy="ddp")
    wandb.finish()
    return [report.to_dict() for report in reports]


def test_two_processes_make_one_run(ranks: RankPool, tmp_path: Path) -> None:
    plain, others = ranks.run(2, fit_with_wandb, str(tmp_path), launch="trainer")
    reports = [PruningReport.from_dict(report) for report in plain]
    assert [report.world_size for report in reports] == [2, 2]
    assert all(report.bytes_exchanged > 0 for report in reports)
    for mine, theirs in zip(plain, others, strict=True):
        assert differences({**mine, "seconds": 0}, {**theirs, "seconds": 0}) == []
    require_wandb(read_run(tmp_path), reports, AT[2])
    (sheet,) = tmp_path.glob("csv/*/metrics.csv")
    with sheet.open() as file:
        rows = [row for row in csv.DictReader(file) if row.get("pruning/sparsity")]
    assert [int(row["step"]) for row in rows] == list(AT[2])


def told(world_size: int) -> list[str]:
    """Job: what a rank says while it prunes."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    logger.addHandler(handler)
    try:
        fit(devices=world_size, strategy="ddp")
    finally:
        logger.removeHandler(handler)
    return [text for text in said if "prun" in text.lower()]


def test_rank_0_alone_tells_the_plan_and_each_step(ranks: RankPool) -> None:
    first, second = ranks.run(2, told, 2, launch="trainer")
    assert first[0].startswith(f"Pruning {WEIGHTS:,} weights of 3 tensors")
    assert sum(text.startswith("Pruned to") for text in first) == 2
    assert second == []
