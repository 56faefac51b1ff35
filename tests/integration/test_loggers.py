"""The reports reach the loggers: what was written is read back from its files."""

from __future__ import annotations

import csv
import math
import os
from pathlib import Path
from typing import Any

import pytest
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

from lightning_woodfisher import PolynomialSchedule, PruningReport

# Steps of the Trainer at which the callback below prunes: 6 batches make an epoch.
AT = {1: (6, 12), 2: (3, 6)}
NAMES = ["net.0.weight", "net.5.weight", "net.7.weight"]


def fit(*loggers: Any, **options: Any) -> list[PruningReport]:
    seed_all(0)
    pruner = pruning(schedule=PolynomialSchedule(1, 2), target_sparsity=0.8)
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
        chart = other["pruning/sparsity_per_layer_table"]
        columns, data = run.table(chart)
        bars = [dict(zip(columns, row, strict=True)) for row in data]
        assert [(bar["layer"], bar["sparsity"]) for bar in bars] == [
            (row["layer"], row["sparsity"]) for row in rows
        ]
    chart = run.charts["pruning/sparsity_per_layer"]["panel_config"]
    assert chart["panelDefId"] == "wandb/bar/v0"
    assert chart["fieldSettings"] == {"label": "layer", "value": "sparsity"}
    assert "pruning/sparsity_per_layer_table" in str(chart["userQuery"])
    assert run.summary["pruning/sparsity"] == reports[-1].sparsity
    # Training was logged before, between and after the pruning steps.
    losses = [e["trainer/global_step"] for e in run.history if "train_loss" in e]
    assert losses == list(range(2 * at[1]))


def test_wandb_offline(tmp_path: Path) -> None:
    logger = WandbLogger(project="tests", save_dir=tmp_path, offline=True)
    reports = fit(logger)
    wandb.finish()
    require_wandb(read_run(tmp_path), reports, AT[1])


def test_the_local_model_reaches_wandb(tmp_path: Path) -> None:
    logger = WandbLogger(project="tests", save_dir=tmp_path, offline=True)
    seed_all(0)
    pruner = pruning(
        schedule=PolynomialSchedule(1, 2), local_model_points=3, recompute_steps=2
    )
    trainer(pruner, logger=logger, max_epochs=4).fit(Classifier(), loader())
    wandb.finish()
    run = read_run(tmp_path)
    entries = [e for e in run.history if "pruning/local_model_points" in e]
    assert len(entries) == len(pruner.reports) == 2
    for entry, report in zip(entries, pruner.reports, strict=True):
        columns, rows = run.table(entry["pruning/local_model_points"])
        assert columns == ["part", "fraction", "predicted", "measured"]
        assert rows == [
            [number, point.fraction, point.predicted, point.measured]
            for number, part in enumerate(report.local_model)
            for point in part
        ]
        picture = run.folder / "files" / entry["pruning/local_model"]["path"]
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
