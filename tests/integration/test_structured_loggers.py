"""Removed channels reach the loggers, the checkpoint and the command."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import wandb
from fits import differences, final_state, loader, pruning, seed_all, trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from offline_run import OfflineRun, read_run
from structured_fits import Module, ResidualNet, config, structured
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

from lightning_woodfisher import (
    HAPPruningCallback,
    PolynomialSchedule,
    StructureReport,
)
from lightning_woodfisher.cli.main import main

# Steps of the Trainer at which channels go: 6 batches make an epoch.
AT = [6, 12]
# Group, its layers, its channels, and the weights of the network, written out by hand.
GROUPS = [("net.stem", "net.stem, net.conv2", 6), ("net.conv1", "net.conv1", 8)]


class Run(NamedTuple):
    """A fit with both callbacks and three loggers."""

    folder: Path
    reports: list[StructureReport]
    weights: list[Any]
    sheet: Path
    board: EventAccumulator
    wandb: OfflineRun


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("run")
    sheet, board = CSVLogger(folder, "csv"), TensorBoardLogger(folder, "board")
    cloud = WandbLogger(project="tests", save_dir=folder, offline=True)
    channels = structured(
        HAPPruningCallback,
        implant_ratio=0.4,
        implant_init="center",
        schedule=PolynomialSchedule(1, 2),
        latency_runs=3,
        config=config(exclude=["fc"]),
    )
    weights = pruning(target_sparsity=0.8, schedule=PolynomialSchedule(2, 2))
    saving = ModelCheckpoint(folder / "checkpoints", "last")
    seed_all(0)
    trainer(
        channels,
        weights,
        saving,
        logger=[sheet, board, cloud],
        enable_checkpointing=True,
        max_epochs=4,
    ).fit(Module(), loader())
    wandb.finish()
    events = EventAccumulator(board.log_dir)
    events.Reload()
    reports = channels.reports
    assert len(reports) == 2
    assert reports[-1].implanted
    path = Path(sheet.log_dir)
    return Run(folder, reports, weights.reports, path, events, read_run(folder))


def rows_of(report: StructureReport) -> list[list[Any]]:
    """The table of a step, put together by hand."""
    found = []
    for (name, layers, size), group in zip(GROUPS, report.groups, strict=True):
        kept = size - len(report.removed.get(name, ()))
        implanted = len(report.implanted.get(name, ()))
        found.append([name, layers, size, kept, implanted, kept / size])
        assert group.name == name
    return found


def test_wandb_has_tables_figures_and_settings(run: Run) -> None:
    entries = [e for e in run.wandb.history if "pruning/channels" in e]
    numbers = [e for e in run.wandb.history if "pruning/macs" in e]
    for entry, other, report, at in zip(entries, numbers, run.reports, AT, strict=True):
        assert entry["trainer/global_step"] == other["trainer/global_step"] == at
        columns, data = run.wandb.table(entry["pruning/channels"])
        names = ["group", "layers", "size", "kept", "implanted", "kept_share"]
        assert columns == names
        assert data == rows_of(report)
        assert other["pruning/macs"] == report.macs < report.macs_dense
        assert other["pruning/parameters"] == report.parameters
        assert other["pruning/latency"] == report.latency > 0
        assert other["pruning/latency_dense"] == report.latency_dense > 0
    (drawn,) = (e for e in run.wandb.history if "pruning/figures/channels" in e)
    for name in ("channels", "network_size"):
        path = drawn[f"pruning/figures/{name}"]["path"]
        picture = run.wandb.folder / "files" / path
        assert picture.read_bytes()[:4] == b"\x89PNG"
    chart = run.wandb.charts["pruning/channels_per_group"]["panel_config"]
    assert chart["fieldSettings"] == {"label": "group", "value": "kept_share"}
    (end,) = (e for e in run.wandb.history if "pruning/channel_steps" in e)
    columns, data = run.wandb.table(end["pruning/channel_steps"])
    steps = [dict(zip(columns, row, strict=True)) for row in data]
    assert [step["macs"] for step in steps] == [r.macs for r in run.reports]
    assert [step["latency"] for step in steps] == [r.latency for r in run.reports]
    last = run.reports[-1]
    assert run.wandb.summary["pruning/macs_left"] == last.macs / last.macs_dense
    assert run.wandb.summary["pruning/latency"] == last.latency
    assert run.wandb.summary["pruning/parameters"] == last.parameters


def test_the_settings_of_both_callbacks_are_there(run: Run) -> None:
    settings = run.wandb.config["channel_pruning"]
    assert settings["class"] == "HAPPruningCallback"
    assert settings["target"] == 0.5
    assert settings["method"] == "hap"
    assert settings["exclude"] == ["fc"]
    assert settings["implants"] == {"ratio": 0.4, "init": "center"}
    assert settings["schedule"]["class"] == "PolynomialSchedule"
    assert run.wandb.config["pruning"]["target_sparsity"] == 0.8
    (layers,) = (e for e in run.wandb.history if "pruning/layers" in e)
    _, data = run.wandb.table(layers["pruning/layers"])
    assert len(data) == len(run.weights[0].layers)
    (event,) = run.board.Tensors("pruning/channel_settings/text_summary")
    assert '"ratio": 0.4' in event.tensor_proto.string_val[0].decode()


def test_tensorboard_has_images_tables_and_numbers(run: Run) -> None:
    for name in ("channels", "network_size"):
        images = run.board.Images(f"pruning/figures/{name}")
        assert [image.step for image in images] == AT[-1:]
        for image in images:
            assert image.encoded_image_string[:4] == b"\x89PNG"
            assert min(image.width, image.height) > 200
    texts = [
        (event.step, event.tensor_proto.string_val[0].decode())
        for event in run.board.Tensors("pruning/channels/text_summary")
    ]
    for (at, text), wanted, report in zip(texts, AT, run.reports, strict=True):
        assert at == wanted
        found = [line.strip() for line in text.splitlines()]
        assert found == [line.strip() for line in report.to_table().splitlines()]
    (event,) = run.board.Tensors("pruning/channel_steps/text_summary")
    assert len(event.tensor_proto.string_val[0].decode().splitlines()) == 2 + len(AT)
    macs = run.board.Scalars("pruning/macs")
    assert [(e.step, e.value) for e in macs] == [
        (at, report.macs) for at, report in zip(AT, run.reports, strict=True)
    ]


def test_sheets_have_all_steps(run: Run) -> None:
    with (run.sheet / "pruning_channels.csv").open() as file:
        rows = list(csv.DictReader(file))
    wanted = [(r, row) for r in run.reports for row in rows_of(r)]
    for found, (report, row) in zip(rows, wanted, strict=True):
        where = (report.epoch, report.step)
        assert (int(found["epoch"]), int(found["step"])) == where
        assert [found["group"], found["layers"]] == row[:2]
        numbers = [float(found[n]) for n in ("size", "kept", "implanted", "kept_share")]
        assert numbers == row[2:]
    with (run.sheet / "pruning_channel_steps.csv").open() as file:
        steps = list(csv.DictReader(file))
    for found, report in zip(steps, run.reports, strict=True):
        assert float(found["latency"]) == report.latency
        assert int(found["parameters"]) == report.parameters
        assert int(found["structures"]) == 14
    assert (run.sheet / "pruning_layers.csv").is_file()


def test_the_command_reads_the_checkpoint(
    run: Run, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    page = tmp_path / "page.html"
    assert main(["report", str(run.folder), "--html", str(page)]) == 0
    told = capsys.readouterr().out
    assert run.reports[-1].to_table() in told
    assert run.weights[-1].to_table() in told
    assert "medians of 3" in told
    assert page.read_text().count("<figure>") == 2 + 6


class Dropping(Module):
    """Draws random numbers in every forward pass, and counts them in a buffer."""

    def __init__(self) -> None:
        super().__init__(build=lambda: nn.Sequential(ResidualNet(), Noise()))


class Noise(nn.Module):
    """Dropout, in evaluation mode, too."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("passes", torch.zeros(()))

    def forward(self, values: Tensor) -> Tensor:
        self.passes += 1
        return nn.functional.dropout(values, 0.1)


def test_training_does_not_notice_the_clock() -> None:
    states = []
    for latency_runs in (0, 3):
        seed_all(3)
        callback = structured(
            schedule=PolynomialSchedule(0, 1), latency_runs=latency_runs
        )
        fitted = trainer(callback, max_epochs=2)
        fitted.fit(Dropping(), loader())
        states.append(final_state(fitted))
        assert (callback.reports[-1].latency is not None) == bool(latency_runs)
    assert differences(*states) == []
