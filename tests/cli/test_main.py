"""The command line: whole runs on a toy module, and messages about what is misspelt."""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lightning_woodfisher import __version__
from lightning_woodfisher.cli.main import main

MODULE = """
from dataclasses import dataclass

import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Toy(pl.LightningModule):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 3))

    def training_step(self, batch, batch_idx):
        inputs, labels = batch
        return nn.functional.cross_entropy(self.net(inputs), labels)

    def validation_step(self, batch, batch_idx):
        zeros = sum((m.weight == 0).sum() for m in self.net[::2])
        self.log("zeros", zeros.float())

    def data(self):
        inputs = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))
        return DataLoader(TensorDataset(inputs, inputs[:, :3].argmax(1)), 8)

    train_dataloader = val_dataloader = data

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@dataclass
class Narrow:
    depth: int = 1


@dataclass
class Wide:
    width: int = 8


class EitherWay(Toy):
    def __init__(self, shape: Narrow | Wide = Narrow()) -> None:
        super().__init__(shape.width)


class Buggy(Toy):
    def __init__(self) -> None:
        raise KeyError("a bug of the user's module")


class BuggyAfterPruning(Toy):
    def __init__(self) -> None:
        from lightning_woodfisher import SelectionConfig

        try:
            SelectionConfig(scope="all")
        except ValueError:
            raise KeyError("a bug of the user's handler")
"""

WEIGHTS = 4 * 8 + 8 * 3

CONFIG: dict[str, Any] = {
    "seed_everything": 0,
    "trainer": {
        "max_epochs": 2,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "callbacks": [
            {
                "class_path": "WoodFisherPruningCallback",
                "init_args": {
                    "target_sparsity": 0.5,
                    "criterion": "woodfisher",
                    "schedule": {
                        "class_path": "PolynomialSchedule",
                        "init_args": {"start_epoch": 0, "end_epoch": 1},
                    },
                    "fisher": {"num_gradients": 8, "gradient_batch_size": 2},
                    "selection": {"scope": "global"},
                    "report_path": "report.json",
                },
            }
        ],
    },
    "model": {"class_path": "toy_of_the_cli.Toy"},
}

Change = Callable[[dict[str, Any]], object]


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Work in a folder with the module, which only the command makes importable."""
    (tmp_path / "toy_of_the_cli.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    # Lightning's use of jsonargparse is behind its time.
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    monkeypatch.setattr(sys, "argv", ["lightning-woodfisher"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    sys.modules.pop("toy_of_the_cli", None)


def pruning(config: dict[str, Any]) -> dict[str, Any]:
    return config["trainer"]["callbacks"][0]["init_args"]


def ramp(config: dict[str, Any]) -> dict[str, Any]:
    return pruning(config)["schedule"]["init_args"]


def rename(settings: dict[str, Any], key: str, new: str) -> None:
    settings[new] = settings.pop(key)


def write(change: Change = lambda config: None, path: str = "run.yaml") -> str:
    config = copy.deepcopy(CONFIG)
    change(config)
    Path(path).write_text("# by hand\n" + yaml.safe_dump(config))
    return path


def status(*arguments: str) -> object:
    try:
        return main(arguments)
    except SystemExit as end:
        return end.code


# ---------------------------------------------------------------- whole runs


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"lightning-woodfisher {__version__}\n"


def test_fit_reaches_the_sparsity_and_validate_reads_its_checkpoint() -> None:
    def checkpoint(config: dict[str, Any]) -> None:
        logger = {"class_path": "CSVLogger", "init_args": {"save_dir": "logs"}}
        config["trainer"]["logger"] = logger
        config["trainer"]["enable_checkpointing"] = True
        options = {"dirpath": "kept", "filename": "last"}
        callback = {"class_path": "ModelCheckpoint", "init_args": options}
        config["trainer"]["callbacks"].append(callback)

    path = write(checkpoint)
    assert status("fit", "--config", path) == 0
    weights = torch.load("kept/last.ckpt", weights_only=True)["state_dict"]
    zeros = sum(int((weights[f"net.{i}.weight"] == 0).sum()) for i in (0, 2))
    assert zeros == WEIGHTS // 2
    reports = json.loads(Path("report.json").read_text())
    assert [report["epoch"] for report in reports] == [0, 1]
    assert sum(layer["zeros_after"] for layer in reports[-1]["layers"]) == zeros

    before = Path("report.json").read_bytes()
    assert status("validate", "--config", path, "--ckpt_path", "kept/last.ckpt") == 0
    logged = max(Path("logs").rglob("metrics.csv"), key=str)
    assert f"{float(zeros)}" in logged.read_text()
    assert Path("report.json").read_bytes() == before


@pytest.mark.parametrize("criterion", ["kfac", "diagonal_fisher", "hessian_diagonal"])
def test_a_baseline_is_chosen_by_name(criterion: str) -> None:
    def choose(config: dict[str, Any]) -> None:
        pruning(config)["criterion"] = criterion

    assert status("fit", "--config", write(choose)) == 0
    reports = json.loads(Path("report.json").read_text())
    assert [report["criterion"] for report in reports] == [criterion] * 2
    assert sum(layer["zeros_after"] for layer in reports[-1]["layers"]) == WEIGHTS // 2


def test_an_option_of_the_command_line_overrides_the_file() -> None:
    trainer = ["--trainer.max_epochs", "3", "--model.width", "16"]
    assert status("fit", "--config", write(), *trainer) == 0
    report = json.loads(Path("report.json").read_text())[-1]
    assert report["layers"][0]["shape"] == [16, 4]
    saved = yaml.safe_load(Path("config.yaml").read_text())
    assert saved["trainer"]["max_epochs"] == 3


# The words of each --help without which a newcomer could not use the command.
HELP = {
    "": ["--config CONFIG", "{fit,validate,test,predict}"],
    "fit": ["--config CONFIG", "--trainer.max_epochs", "--ckpt_path", "--model"],
    "validate": ["--config CONFIG", "--trainer.devices", "--ckpt_path"],
    "test": ["--config CONFIG", "--trainer.devices", "--ckpt_path"],
    "predict": ["--config CONFIG", "--trainer.devices", "--return_predictions"],
    "estimate": [
        "estimate --config run.yaml",
        "--memory",
        "as 80GB",
        "options of `fit`",
    ],
    "sweep": [
        "sweep --config run.yaml --ckpt_path best.ckpt",
        "--metric",
        "options of `fit`",
    ],
    "report": ["a Lightning checkpoint", "--html FILE"],
    "export": ["export best.ckpt --format sparse", "--out FILE"],
    "preset": ["resnet50_90", "second --config of fit"],
    "benchmark": ["Measure", "--scaling R", "default: 3"],
    "gpu-check": ["10 SOSP and HAP", "status is 1", "as 1,4", "gpu-check.json"],
    "completion": ["completion bash > ~/", "completion zsh > ~/"],
}


@pytest.mark.parametrize("command", HELP)
def test_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert status(*command.split(), "--help") == 0
    text = capsys.readouterr().out
    shown = " ".join(text.replace("\\\n", "").split())
    assert [part for part in HELP[command] if part not in shown] == []
    if not command:
        assert [name for name in HELP if name not in shown] == []
    # Options about which nothing is said, neither beside them nor in the next line.
    assert not re.findall(r"^  (-\S+(?: \S+)*)(?<!\.)\n(?=  \S|\n|$)", text, flags=re.M)


def test_every_alternative_of_a_union_is_tried() -> None:
    def either(config: dict[str, Any]) -> None:
        path, options = "toy_of_the_cli.EitherWay", {"shape": {"width": 12}}
        config["model"] = {"class_path": path, "init_args": options}

    assert status("fit", "--config", write(either)) == 0
    report = json.loads(Path("report.json").read_text())[-1]
    assert report["layers"][0]["shape"] == [12, 4]


@pytest.mark.spawns
@pytest.mark.parametrize(
    "misspelt", [pytest.param(False, marks=pytest.mark.slow), True]
)
def test_the_status_of_a_real_process(misspelt: bool) -> None:
    path = write(
        lambda c: misspelt and rename(pruning(c), "target_sparsity", "target_sparsty")
    )
    # As the console script does, Python does not put the working folder on its path.
    done = subprocess.run(
        [sys.executable, "-m", "lightning_woodfisher", "fit", "--config", path],
        env={**os.environ, "PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == (2 if misspelt else 0), done.stderr
    assert Path("report.json").exists() is not misspelt
    assert "Traceback" not in done.stderr
    assert ("Did you mean 'target_sparsity'?" in done.stderr) is misspelt


# ---------------------------------------------------------------- misspelt and wrong

WRONG: dict[str, tuple[Change, list[str]]] = {
    "key of the callback": (
        lambda c: rename(pruning(c), "target_sparsity", "target_sparsty"),
        ["'target_sparsty'", "Did you mean 'target_sparsity'?"],
    ),
    "key of a group": (
        lambda c: rename(pruning(c), "fisher", "fischer"),
        ["'fischer.", "Did you mean 'fisher'?"],
    ),
    "key of fisher": (
        lambda c: pruning(c)["fisher"].update(dampin=1e-3),
        ["'fisher'", "'dampin'", "Did you mean 'damping'?"],
    ),
    "key of fisher in the callback": (
        lambda c: pruning(c).update(num_gradients=8),
        ["'num_gradients'", "setting of FisherConfig. Give fisher.num_gradients."],
    ),
    "key of step in fisher": (
        lambda c: pruning(c)["fisher"].update(recompute_steps=8),
        ["'fisher'", "setting of StepConfig. Give step.recompute_steps."],
    ),
    "key of selection": (
        lambda c: rename(pruning(c)["selection"], "scope", "scop"),
        ["'selection'", "'scop'", "Did you mean 'scope'?"],
    ),
    "key of the schedule": (
        lambda c: rename(ramp(c), "end_epoch", "end_epoc"),
        ["PolynomialSchedule", "'end_epoc'", "Did you mean 'end_epoch'?"],
    ),
    "key beside class_path": (
        lambda c: rename(c["trainer"]["callbacks"][0], "init_args", "init_arg"),
        ["'init_arg.", "Did you mean 'init_args'?"],
    ),
    "key of the trainer": (
        lambda c: rename(c["trainer"], "max_epochs", "max_epoch"),
        ["'trainer.max_epoch'", "Did you mean 'max_epochs'?"],
    ),
    "key at the top": (
        lambda c: rename(c, "trainer", "trainr"),
        ["'trainr.", "Did you mean 'trainer'?"],
    ),
    "key of the user's module": (
        lambda c: c["model"].update(init_args={"widht": 9}),
        ["toy_of_the_cli.Toy", "'widht'", "Did you mean 'width'?"],
    ),
    "key of another callback": (
        lambda c: c["trainer"].update(
            callbacks={"class_path": "ModelCheckpoint", "init_args": {"dirpth": "."}}
        ),
        ["ModelCheckpoint", "'dirpth'", "Did you mean 'dirpath'?"],
    ),
    "class of the callback": (
        lambda c: c["trainer"]["callbacks"][0].update(
            class_path="WoodFischerPruningCallback"
        ),
        ["WoodFischerPruningCallback", "Did you mean 'WoodFisherPruningCallback'?"],
    ),
    "class with its module": (
        lambda c: c["trainer"]["callbacks"][0].update(
            class_path="lightning_woodfisher.WoodFisherPruningCalback"
        ),
        ["WoodFisherPruningCalback'", "Did you mean 'WoodFisherPruningCallback'?"],
    ),
    "class of the schedule": (
        lambda c: pruning(c)["schedule"].update(class_path="PolynomalSchedule"),
        ["PolynomalSchedule", "Did you mean 'PolynomialSchedule'?"],
    ),
    "class of the user": (
        lambda c: c["model"].update(class_path="toy_of_the_cli.Toyy"),
        ["'toy_of_the_cli.Toyy'", "Did you mean 'Toy'?"],
    ),
    "module of the user": (
        lambda c: c["model"].update(class_path="toy_of_the_cly.Toy"),
        ["No module named 'toy_of_the_cly'"],
    ),
    "settings of the schedule without its class": (
        lambda c: pruning(c).update(schedule={"start_epoch": 0, "end_epoch": 1}),
        ['"schedule"', "abstract. Name one, as class_path: PolynomialSchedule"],
    ),
    "no model": (
        lambda c: c.pop("model"),
        ["required: fit.model. Name your module, as model: package.module.MyModule"],
    ),
    "word for a number": (
        lambda c: pruning(c).update(target_sparsity="high"),
        ['"target_sparsity"', "<class 'float'>", "value: high"],
    ),
    "word for an optional number": (
        lambda c: ramp(c).update(end_epoch="late"),
        ['"end_epoch"', "<class 'int'>", "value: late"],
    ),
    "fraction for a count": (
        lambda c: pruning(c)["fisher"].update(num_gradients=1.5),
        ['"fisher.num_gradients"', "<class 'int'>", "value: 1.5"],
    ),
    "number for a list": (
        lambda c: c["trainer"].update(callbacks=5),
        ['"trainer.callbacks"', "<class 'list'>", "value: 5"],
    ),
    "sparsity in per cent": (
        lambda c: pruning(c).update(target_sparsity=90),
        ["target_sparsity=90", "90 % is 0.9"],
    ),
    "sparsity of a callback without a list around it": (
        lambda c: (
            pruning(c).update(target_sparsity=90),
            c["trainer"].update(callbacks=c["trainer"]["callbacks"][0]),
        ),
        ["target_sparsity=90", "90 % is 0.9"],
    ),
    "negative damping": (
        lambda c: pruning(c)["fisher"].update(damping=-1.0),
        ["fisher.damping=-1.0 is outside"],
    ),
    "start after the end": (
        lambda c: ramp(c).update(start_epoch=2),
        ["end_epoch=1 < start_epoch=2"],
    ),
    "end after training": (
        lambda c: ramp(c).update(end_epoch=7),
        ["epoch 7, but training has only 2 epochs"],
    ),
    "criterion": (
        lambda c: pruning(c).update(criterion="woodfischer"),
        ['"criterion"', "value: woodfischer. Did you mean 'woodfisher'?"],
    ),
    "update": (
        lambda c: pruning(c).update(step={"update": "jiont"}),
        ['"step.update"', "value: jiont. Did you mean 'joint'?"],
    ),
    "scope": (
        lambda c: pruning(c)["selection"].update(scope="globl"),
        ['"selection.scope"', "value: globl. Did you mean 'global'?"],
    ),
    "a list for a group": (
        lambda c: pruning(c).update(selection=["head"]),
        ["selection=['head'] is not a group of settings; write selection: {exclude: ["],
    ),
    "a number for a group": (
        lambda c: pruning(c).update(fisher=64),
        ["fisher=64 is not a group of settings; write fisher: {num_gradients: 256}."],
    ),
    "a number for the Trainer": (
        lambda c: c.update(trainer=3),
        ["trainer=3 is not a group of settings; write trainer: {max_epochs: 90}."],
    ),
    "escape sequence": (
        lambda c: pruning(c).update(criterion="\x1b[2J"),
        ["value: \\x1b[2J"],
    ),
}


def short_message(capsys: pytest.CaptureFixture[str]) -> str:
    """What the command wrote to stderr about the error; a few lines, no traceback."""
    _, found, message = capsys.readouterr().err.partition(
        "lightning-woodfisher: error: "
    )
    assert found
    assert "Traceback" not in message
    assert "Union subtypes" not in message
    assert len(message.splitlines()) <= 8
    return message


@pytest.mark.parametrize(("change", "parts"), WRONG.values(), ids=WRONG)
def test_a_wrong_config_is_explained(
    change: Change, parts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert status("fit", "--config", write(change)) == 2
    message = short_message(capsys)
    assert [part for part in parts if part not in message] == []
    assert message.count("Did you mean") == sum("Did you mean" in p for p in parts)
    assert not Path("report.json").exists()


# A call that any of them would make leaves a file.
MAKE_A_FILE = {
    "class_path": "subprocess.Popen",
    "init_args": {"args": ["touch", "ran"]},
}


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (
            lambda c: pruning(c).update(schedule=MAKE_A_FILE),
            ["subprocess.Popen", "PruningSchedule"],
        ),
        (
            lambda c: pruning(c).update(schedule={"class_path": "os.system"}),
            ["os.system", "PruningSchedule"],
        ),
        (lambda c: c["trainer"].update(callbacks=[MAKE_A_FILE]), ["subprocess.Popen"]),
        (lambda c: pruning(c).update(fisher=MAKE_A_FILE), ["fisher"]),
        (lambda c: c.update(model=MAKE_A_FILE), ["subprocess.Popen"]),
    ],
    ids=["schedule", "function", "callback", "fisher", "model"],
)
def test_a_config_makes_only_what_is_of_the_expected_class(
    change: Change, parts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert status("fit", "--config", write(change)) == 2
    message = short_message(capsys)
    assert [part for part in parts if part not in message] == []
    assert not Path("ran").exists()


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["fti"], "invalid choice: 'fti'"),
        (["fti"], "Did you mean 'fit'?"),
        (
            ["fit", "--config", "run.yaml", "--trainer.max_epocs=3"],
            "--trainer.max_epocs=3. Did you mean 'max_epochs'?",
        ),
        (["fit", "--config", "absent.yaml"], "absent.yaml"),
    ],
)
def test_a_wrong_command_line_is_explained(
    arguments: list[str], part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write()
    assert status(*arguments) == 2
    assert part in short_message(capsys)


def test_a_checkpoint_in_place_of_a_config_is_explained(
    capsys: pytest.CaptureFixture[str],
) -> None:
    Path("best.ckpt").write_bytes(b"PK\x03\x04\x80")
    assert status("fit", "--config", "best.ckpt") == 2
    assert "--config takes a YAML file, and --ckpt_path a checkpoint" in short_message(
        capsys
    )


def test_a_known_name_in_the_wrong_place_gets_no_suggestion(
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = write(lambda c: pruning(c)["selection"].update(damping=0.1))
    assert status("fit", "--config", path) == 2
    message = short_message(capsys)
    assert "'selection' does not accept option 'damping'" in message
    assert "Did you mean" not in message


@pytest.mark.parametrize("name", ["Buggy", "BuggyAfterPruning"])
def test_a_bug_of_the_user_keeps_its_traceback(name: str) -> None:
    path = write(lambda c: c["model"].update(class_path=f"toy_of_the_cli.{name}"))
    with pytest.raises(Exception, match="a bug of the user's"):
        main(["fit", "--config", path])


# ---------------------------------------------------------------- the saved config


@pytest.mark.filterwarnings("ignore:.*left as it is:UserWarning")
def test_a_config_of_the_user_is_never_written_over() -> None:
    path = write()
    for before in (Path(path).read_bytes(), b"\x80 is not text"):
        Path("config.yaml").write_bytes(before)
        assert status("fit", "--config", path, "--trainer.max_epochs", "3") == 0
        assert Path("config.yaml").read_bytes() == before
    saved = yaml.safe_load(Path("config.saved.yaml").read_text())
    assert saved["trainer"]["max_epochs"] == 3


def test_the_config_of_an_earlier_run_is_written_over_and_can_be_run_again() -> None:
    assert status("fit", "--config", write()) == 0
    assert status("fit", "--config", "config.yaml", "--trainer.max_epochs", "3") == 0
    saved = yaml.safe_load(Path("config.yaml").read_text())
    assert saved["trainer"]["max_epochs"] == 3
    assert not Path("config.saved.yaml").exists()
