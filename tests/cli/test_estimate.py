"""``lightning-woodfisher estimate``: reads what ``fit`` reads and runs nothing."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from lightning_woodfisher import FisherConfig, estimate
from lightning_woodfisher.cli.main import main
from lightning_woodfisher.resources.network_shapes import SHAPES

# Lightning's own use of jsonargparse.
pytestmark = pytest.mark.filterwarnings(
    "ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"
)

MODULE = """
import lightning.pytorch as pl
import torch
from torch import nn

DEVICES = []

class Net(pl.LightningModule):
    def __init__(self, width: int = 12, stubborn: bool = False) -> None:
        super().__init__()
        self.fc = nn.Linear(20, width)
        DEVICES.append(self.fc.weight.device.type)
        if stubborn:
            float(self.fc.weight.detach().sum())

    def training_step(self, batch, batch_idx):
        raise AssertionError("nothing may run")

class Data(pl.LightningDataModule):
    def __init__(self) -> None:
        raise AssertionError("no data may be made")
"""

CONFIG = """
trainer:
  max_epochs: 4
  devices: 3
  accelerator: cpu
  logger:
    class_path: lightning.pytorch.loggers.CSVLogger
    init_args: {save_dir: nowhere}
  callbacks:
    - class_path: ModelCheckpoint
    - class_path: WoodFisherPruningCallback
      init_args:
        target_sparsity: 0.75
        step: {recompute_steps: 2}
        schedule:
          class_path: PolynomialSchedule
          init_args: {start_epoch: 0, end_epoch: 2, degree: 1}
        fisher: {num_gradients: 30, block_size: 16}
model:
  class_path: small_network.Net
data:
  class_path: small_network.Data
"""


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A run whose model can be imported from the folder it is in."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "small_network", raising=False)
    Path("small_network.py").write_text(MODULE)
    Path("run.yaml").write_text(CONFIG)
    return "run.yaml"


def run(*arguments: str) -> int:
    return main(["estimate", "--flops_per_second", "1e9", *arguments])


def test_a_configuration_is_read_and_nothing_is_made(
    config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--config", config, "--json") == 0
    first, last = json.loads(capsys.readouterr().out)
    settings = FisherConfig(num_gradients=30, block_size=16)
    shapes = {"fc": (12, 20)}
    expected = estimate(shapes, fisher=settings, world_size=3)
    assert first["peak_bytes"] == expected.peak_bytes
    assert first["world_size"] == 3
    # Steps to 0.25, 0.5 and 0.75: the last one starts from 0.5.
    assert last["active"] == 240 - 120
    assert sys.modules["small_network"].DEVICES == ["meta"]
    assert not Path("nowhere").exists()


def test_a_model_that_needs_values_is_made_with_them(
    config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--config", config, "--model.init_args.stubborn", "true") == 0
    assert sys.modules["small_network"].DEVICES == ["meta", "cpu"]
    assert "240 weights" in capsys.readouterr().out


def test_the_command_line_wins_over_the_file(
    config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--devices", "4", "--num_nodes", "2", "--sparsity", "0.5")
    assert run("--config", config, *options, "--model.init_args.width", "24") == 0
    out = capsys.readouterr().out
    assert "480 weights, 50.00% pruned" in out
    assert "8 ranks" in out
    assert "recompute_steps=2" in out


def test_the_status_says_whether_it_fits(
    config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--config", config, "--memory", "1GB") == 0
    assert "fits: " in capsys.readouterr().out
    assert run("--config", config, "--memory", "10KB") == 1
    assert "does not fit" in capsys.readouterr().out


def test_presets_need_no_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--num_gradients", "400", "--block_size", "2000", "--devices", "8")
    assert run("--preset", "resnet50", *options, "--json") == 0
    settings = FisherConfig(num_gradients=400, block_size=2000)
    cost = estimate(SHAPES["resnet50"], fisher=settings, world_size=8)
    (written,) = json.loads(capsys.readouterr().out)
    assert written["peak_bytes"] == cost.peak_bytes
    assert run("--preset", "resnet20", "--block_size", "none") == 0
    assert "full" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "resnet51"], "mean 'resnet50'"),
        (["--preset", "resnet50", "--config", "x"], "--config x has no effect"),
        (["--preset", "resnet50", "--memory", "80 apples"], "'80 apples' is not"),
        (["--config", "run.yaml", "--trainer.max_epochs", "2"], "only 2 epochs"),
    ],
)
def test_errors_are_short(
    config: str, arguments: list[str], message: str, capsys: Any
) -> None:
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


def test_a_run_without_pruning_has_nothing_to_estimate(
    config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = Path(config).read_text()
    start, stop = text.index("    - class_path: Wood"), text.index("model:")
    Path(config).write_text(text[:start] + text[stop:])
    assert run("--config", config) == 2
    assert "no WoodFisherPruningCallback" in capsys.readouterr().err
