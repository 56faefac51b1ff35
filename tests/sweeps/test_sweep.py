"""Sweeps: every setting is the step that `prune` takes, and the model comes back."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_task import batchnorm_network, samples
from step_options import in_step
from torch import Tensor, nn

from lightning_woodfisher import (
    ConfigurationError,
    FisherConfig,
    prune,
    sweep,
)
from lightning_woodfisher.cli.main import main
from lightning_woodfisher.reporting.figures import draw_sweep
from lightning_woodfisher.sweeps.report import SweepReport, SweepResult

# One by one, so that a gradient has the same bits whatever its neighbours are.
LOOP = FisherConfig(12, 4, 20, 1e-3, collection="loop")
GRID = {
    "target_sparsity": [0.5, 0.8],
    "num_gradients": [12, 24],
    "block_size": [None, 20],
    "recompute_steps": [1, 2],
}


def cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


class Evaluation:
    """Remembers the weights that it is asked about, and disturbs the model."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Tensor]] = []

    def __call__(self, model: nn.Module) -> float:
        self.seen.append({k: v.clone() for k, v in model.state_dict().items()})
        model.train()
        inputs, labels = samples().tensors
        correct = model(inputs).argmax(dim=1) == labels
        with torch.no_grad():
            model[0].bias.add_(1.0)
        return float(correct.float().mean())


def run(grid: Mapping[str, Any], **options: Any) -> tuple[SweepReport, Evaluation]:
    evaluation, model = Evaluation(), batchnorm_network()
    options = {"fisher": LOOP, **options}
    report = sweep(model, samples(), cross_entropy, evaluation, grid, **options)
    expected = batchnorm_network().state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    return report, evaluation


def pruned_alone(setting: Mapping[str, Any]) -> dict[str, Tensor]:
    """The same step by `prune`, on a fresh model."""
    names = {field.name for field in dataclasses.fields(FisherConfig)}
    fisher = {k: v for k, v in setting.items() if k in names}
    others = {k: v for k, v in setting.items() if k not in names}
    model = batchnorm_network()
    prune(
        model,
        samples(),
        cross_entropy,
        fisher=dataclasses.replace(LOOP, **fisher),
        **in_step(batchnorm_recalibration_batches=16, **others),
    )
    return model.state_dict()


@pytest.mark.parametrize("row_memory", ["1GB", 1])
def test_every_setting_is_the_step_of_prune(row_memory: str | int) -> None:
    folders = set(Path(tempfile.gettempdir()).glob("lightning-woodfisher-*"))
    report, evaluation = run(GRID, row_memory=row_memory)
    assert set(Path(tempfile.gettempdir()).glob("lightning-woodfisher-*")) == folders
    assert report.collections == 1
    assert len(report.results) == 16
    wanted = [pruned_alone(result.setting) for result in report.results]
    # Settings are tried in another order than they are reported in.
    for state in evaluation.seen[1:]:
        assert any(
            all(torch.equal(state[name], other[name]) for name in state)
            for other in wanted
        )
    for result in report.results:
        assert result.sparsity == pytest.approx(
            result.setting["target_sparsity"], abs=1 / 192
        )


def test_metrics_belong_to_their_setting() -> None:
    report, _ = run({"target_sparsity": [0.3, 0.9], "damping": [1e-4, 1.0]})
    for result in report.results:
        model = batchnorm_network()
        model.load_state_dict(pruned_alone(result.setting))
        assert result.metrics == {"metric": Evaluation()(model)}
    assert report.before == {"metric": Evaluation()(batchnorm_network())}
    assert [r.setting["damping"] for r in report.results] == [1e-4, 1.0, 1e-4, 1.0]


def test_gradients_are_computed_once() -> None:
    calls = []

    def counting(model: nn.Module, batch: Any) -> Tensor:
        loss = cross_entropy(model, batch)
        calls.append(loss.requires_grad)
        return loss

    grid = {
        "damping": [1e-4, 1e-3],
        "num_gradients": [24, 6, 12],
        "block_size": [None, 20],
    }
    sweep(batchnorm_network(), samples(), counting, Evaluation(), grid, fisher=LOOP)
    assert sum(calls) == 24


def test_other_sizes_and_seeds_need_other_gradients() -> None:
    grid = {"gradient_batch_size": [2, 4], "seed": [0, 1], "damping": [1e-4, 1e-3]}
    assert run(grid)[0].collections == 4


def test_without_room_gradients_are_collected_each_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    grid = {"num_gradients": [12, 24], "damping": [1e-4, 1e-3]}
    full = shutil.disk_usage("/")._replace(free=0)
    with_room, _ = run(grid)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    without, _ = run(grid, row_memory=1)
    assert (with_room.collections, without.collections) == (1, 0)
    for one, other in zip(with_room.results, without.results, strict=True):
        # Losses of stored rows are measured in larger batches.
        assert one.measured_increase == pytest.approx(other.measured_increase, rel=1e-4)
        same = {"seconds": 0.0, "measured_increase": None}
        assert dataclasses.replace(one, **same) == dataclasses.replace(other, **same)


def test_a_setting_that_fails_does_not_stop_the_others() -> None:
    def picky(model: nn.Module, batch: Any) -> Tensor:
        return cross_entropy(model, batch) * (torch.nan if model.training else 1.0)

    model = batchnorm_network()
    grid = {"model_mode": ["train", "eval"]}
    report = sweep(model, samples(), picky, Evaluation(), grid, fisher=LOOP)
    failed, done = report.results
    assert "nan" in str(failed.error)
    assert failed.metrics == {}
    assert done.error is None
    assert done.metrics
    assert "failed: " in report.to_table()
    assert report.best() == (done,)


def test_magnitude_appears_once() -> None:
    grid = {"criterion": ["woodfisher", "magnitude"], "damping": [1e-4, 1e-3]}
    report, _ = run(grid)
    settings = [dict(result.setting) for result in report.results]
    assert settings == [
        {"target_sparsity": 0.9, "criterion": "woodfisher", "damping": 1e-4},
        {"target_sparsity": 0.9, "criterion": "woodfisher", "damping": 1e-3},
        {"target_sparsity": 0.9, "criterion": "magnitude"},
    ]


def made_by_hand() -> SweepReport:
    def result(target: float, damping: float, loss: float, acc: float) -> SweepResult:
        setting = {"target_sparsity": target, "damping": damping}
        return SweepResult(setting, {"val_loss": loss, "acc": acc}, target, 0.1, 0.2, 1)

    results = (
        result(0.5, 1e-4, 0.3, 0.9),
        result(0.5, 1e-3, 0.2, 0.8),
        result(0.9, 1e-4, float("nan"), 0.7),
        result(0.9, 1e-3, 0.5, 0.75),
    )
    return SweepReport({"val_loss": 0.1, "acc": 0.95}, results, 1)


def test_the_given_network_may_be_pruned_already() -> None:
    table = made_by_hand().to_table()
    assert table.splitlines()[2].split()[:3] == ["before", "0.1", "0.95"]
    assert "dense" not in table


def test_the_best_of_each_sparsity() -> None:
    report = made_by_hand()
    one, two, _, four = report.results
    assert report.best() == (two, four)
    assert report.best("acc") == (one, four)
    assert report.best("acc", larger_is_better=False)[0] == two
    with pytest.raises(ConfigurationError, match="mean 'val_loss'"):
        report.best("val_los")


def test_the_figure_has_a_line_for_each_setting() -> None:
    axes = draw_sweep(made_by_hand(), "acc").axes[0]
    small, large, dense = axes.lines
    assert list(small.get_xdata()) == [0.5, 0.9]
    assert list(small.get_ydata()) == [0.9, 0.7]
    assert list(large.get_ydata()) == [0.8, 0.75]
    assert list(dense.get_ydata()) == [0.95, 0.95]
    assert axes.get_ylabel() == "acc"


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ({"dampin": [1.0]}, "mean 'damping'"),
        ({"damping": []}, "list of values"),
        ({"damping": 1e-4}, "list of values"),
        ({"update": "joint"}, "list of values"),
        ({"damping": [1e-4, -1.0]}, "damping=-1.0 is outside"),
        ({"target_sparsity": [0.5, 90]}, "outside"),
        ({"num_gradients": [10, 1000]}, "needs 4000 samples"),
        ({"include": [["nothing"]]}, "nothing"),
    ],
)
def test_bad_grids_are_refused_before_anything_is_tried(
    grid: dict[str, Any], message: str
) -> None:
    evaluation = Evaluation()
    with pytest.raises(ConfigurationError, match=message):
        sweep(
            batchnorm_network(), samples(), cross_entropy, evaluation, grid, fisher=LOOP
        )
    assert evaluation.seen == []


def test_an_iterator_and_a_network_that_is_too_sparse_are_refused() -> None:
    batches = [tuple(t[:4] for t in samples().tensors)] * 30
    grid = {"target_sparsity": [0.5]}
    with pytest.raises(ConfigurationError, match="only once"):
        sweep(batchnorm_network(), iter(batches), cross_entropy, Evaluation(), grid)
    sparse = batchnorm_network()
    with torch.no_grad():
        sparse[0].weight.zero_()
    with pytest.raises(ConfigurationError, match="only add zeros"):
        sweep(sparse, samples(), cross_entropy, Evaluation(), grid, fisher=LOOP)


# ---------------------------------------------------------------- the command

# Lightning's own use of jsonargparse.
command = pytest.mark.filterwarnings(
    "ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"
)

MODULE = """
import lightning.pytorch as pl
import torch
from torch import nn
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

class Net(pl.LightningModule):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, 4))

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        scores = self.net(batch[0])
        self.log("val_loss", F.cross_entropy(scores, batch[1]))
        self.log("val_acc", (scores.argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

class Mute(Net):
    validation_step = pl.LightningModule.validation_step

class Silent(Net):
    def validation_step(self, batch, batch_idx):
        pass

class Data(pl.LightningDataModule):
    def setup(self, stage):
        inputs = torch.randn(260, 8, generator=torch.Generator().manual_seed(1))
        labels = inputs[:, :4].argmax(1)
        self.train = TensorDataset(inputs[:200], labels[:200])
        self.val = TensorDataset(inputs[200:], labels[200:])

    def train_dataloader(self):
        return DataLoader(self.train, 20, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.val, 20)
"""

CONFIG = """
seed_everything: 0
trainer:
  max_epochs: 4
  min_epochs: 3
  accelerator: cpu
  devices: 1
  logger:
    class_path: lightning.pytorch.loggers.CSVLogger
    init_args: {save_dir: nowhere}
  callbacks:
    - class_path: ModelCheckpoint
      init_args: {dirpath: nowhere}
    - class_path: WoodFisherPruningCallback
      init_args:
        target_sparsity: 0.75
        fisher: {num_gradients: 30, gradient_batch_size: 2, block_size: 16}
model:
  class_path: swept_network.Net
data:
  class_path: swept_network.Data
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run, a module, and a checkpoint of weights that the module is not made with."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "swept_network", raising=False)
    Path("swept_network.py").write_text(MODULE)
    Path("run.yaml").write_text(CONFIG)
    torch.manual_seed(9)
    state = {
        "net.0.weight": torch.cat([3 * torch.eye(8), -3 * torch.eye(8)]),
        "net.0.bias": torch.zeros(16),
        "net.2.weight": torch.randn(4, 16) / 10,
        "net.2.bias": torch.zeros(4),
    }
    for i in range(4):
        state["net.2.weight"][i, i] += 1.0
        state["net.2.weight"][i, i + 8] -= 1.0
    state["net.0.weight"] += torch.randn(16, 8) / 10
    torch.save({"state_dict": state}, "best.ckpt")
    return tmp_path


def validate(state: dict[str, Tensor]) -> tuple[float, float]:
    """Accuracy and loss on the validation data, by hand."""
    inputs = torch.randn(260, 8, generator=torch.Generator().manual_seed(1))
    labels = inputs[:, :4].argmax(1)[200:]
    hidden = F.relu(F.linear(inputs[200:], state["net.0.weight"], state["net.0.bias"]))
    scores = F.linear(hidden, state["net.2.weight"], state["net.2.bias"])
    accuracy = (scores.argmax(1) == labels).float().mean()
    return float(accuracy), float(F.cross_entropy(scores, labels))


@command
def test_the_command_from_end_to_end(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = Path("best.ckpt").read_bytes()
    arguments = ["sweep", "--config", "run.yaml", "--ckpt_path", "best.ckpt"]
    options = ["--target_sparsity", "0.5", "0.9", "--damping", "1e-4", "1e-2"]
    others = ["--criterion", "woodfisher", "magnitude", "--metric", "val_acc"]
    assert main([*arguments, *options, *others, "--output", "out/found.json"]) == 0
    table = capsys.readouterr().out
    found = json.loads(Path("out/found.json").read_text())
    assert Path("out/found.png").read_bytes()[:4] == b"\x89PNG"
    assert Path("best.ckpt").read_bytes() == before
    assert not Path("nowhere").exists()
    assert not Path("lightning_logs").exists()

    state = torch.load("best.ckpt", weights_only=True)["state_dict"]
    accuracy, loss = validate(state)
    assert found["before"]["val_acc"] == pytest.approx(accuracy)
    assert found["before"]["val_loss"] == pytest.approx(loss, rel=1e-5)
    assert found["collections"] == 1
    assert len(found["results"]) == 6
    assert table.count("best") == 2
    names = ["net.0.weight", "net.2.weight"]
    for result in found["results"]:
        setting = result["setting"]
        count = round(setting["target_sparsity"] * 192)
        assert result["sparsity"] == pytest.approx(count / 192)
        if setting["criterion"] == "magnitude":
            pruned = copy.deepcopy(state)
            sizes = torch.cat([pruned[name].abs().flatten() for name in names])
            largest = sizes.kthvalue(count).values
            for name in names:
                pruned[name][pruned[name].abs() <= largest] = 0.0
            accuracy, loss = validate(pruned)
            assert result["metrics"]["val_acc"] == pytest.approx(accuracy)
            assert result["metrics"]["val_loss"] == pytest.approx(loss, rel=1e-5)
        else:
            assert result["measured_increase"] is not None


@command
def test_without_a_grid_dampings_are_tried_with_the_settings_of_the_callback(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sweep", "--config", "run.yaml"]) == 0
    found = json.loads(Path("sweep.json").read_text())
    assert [r["setting"] for r in found["results"]] == [
        {"target_sparsity": 0.75, "damping": damping} for damping in (1e-5, 1e-4, 1e-3)
    ]


@command
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--metric", "val_ac"], "mean 'val_acc'"),
        (["--output", "found.txt"], "must end in .json"),
        (["--ckpt_path", "run.yaml"], "is not a checkpoint"),
        (["--ckpt_path", "other.ckpt"], "does not fit the model"),
        (["--damping", "-1"], "damping=-1.0 is outside"),
        (["--update", "joined"], "mean 'joint'"),
        (["--model", "swept_network.Mute"], "no validation_step"),
        (["--model", "swept_network.Silent"], "logs no metric"),
        (["--num_gradients", "500"], "needs 1000 samples"),
    ],
)
def test_errors_say_what_to_do(
    folder: Path,
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    torch.save({"net.1.weight": torch.zeros(3)}, "other.ckpt")
    assert main(["sweep", "--config", "run.yaml", *arguments]) == 2
    error = capsys.readouterr().err.splitlines()
    (line,) = [one for one in error if one.startswith("lightning-woodfisher: error:")]
    assert message in "\n".join(error[error.index(line) :])
    assert not Path("sweep.json").exists()


def test_help_explains(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["sweep", "--help"])
    text = capsys.readouterr().out
    for word in ("--damping", "--ckpt_path best.ckpt", "validation loop", "--metric"):
        assert word in text
