"""Random configurations prune exactly, or are refused before any weight has changed."""

from __future__ import annotations

import collections
import contextlib
import copy
import os
import random
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
import yaml
from config_fuzzer import draw_callback, draw_schedule, draw_step
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_woodfisher import (
    ConfigurationError,
    ConstantSchedule,
    FisherConfig,
    OneShotSchedule,
    PolynomialSchedule,
    PruningReport,
    SelectionConfig,
    StepConfig,
    WoodFisherPruningCallback,
    prune,
)
from lightning_woodfisher.cli.main import main
from lightning_woodfisher.pruning.schedule import Horizon

SCHEDULES = {
    cls.__name__: cls for cls in (ConstantSchedule, OneShotSchedule, PolynomialSchedule)
}
SAMPLES = 40

Batch = tuple[Tensor, Tensor]


class Net(nn.Module):
    """Small, with what settings speak of: layers, BatchNorm, an even number of inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 6)
        self.norm = nn.BatchNorm1d(6)
        self.head = nn.Linear(6, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(torch.tanh(self.norm(self.body(inputs))))


def network() -> Net:
    torch.manual_seed(0)
    return Net()


def samples() -> TensorDataset:
    inputs = torch.randn(SAMPLES, 4, generator=torch.Generator().manual_seed(1))
    return TensorDataset(inputs, inputs[:, :3].argmax(dim=1))


def cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


class Module(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return cross_entropy(self.net, batch)

    compute_loss = training_step

    def forward(self, inputs: Tensor) -> Tensor:
        return self.net(inputs)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(samples(), 8)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def zeros_in(model: nn.Module) -> int:
    return sum(int((p == 0).sum()) for n, p in model.named_parameters() if p.dim() > 1)


def require_same(model: nn.Module, before: dict[str, Tensor]) -> None:
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def require_sound(
    model: nn.Module, report: PruningReport, settings: dict[str, Any]
) -> None:
    """Finite, and pruned by as much as the settings say."""
    for name, value in model.state_dict().items():
        assert bool(value.isfinite().all()), name
    layers = {layer.name: layer for layer in report.layers}
    for name, parameter in model.named_parameters():
        zeros = int((parameter == 0).sum())
        assert name not in layers or zeros == layers[name].zeros_after, name
    selection = settings["selection"]
    pattern = selection.get("pattern", "unstructured")
    if settings.get("flops_target") is not None or pattern != "unstructured":
        # Rounded to what FLOPs or groups allow.
        return
    target = settings["target_sparsity"]
    if selection.get("scope") == "layer" and not selection.get("layer_targets"):
        assert all(
            layer.zeros_after == round(target * layer.weights)
            for layer in report.layers
        )
    elif not selection.get("layer_targets"):
        assert report.zeros == round(target * report.weights)


def try_step(settings: dict[str, Any]) -> str:
    """Prune with the settings; tell what came of it."""
    model = network()
    before = copy.deepcopy(model.state_dict())
    report = None
    with contextlib.suppress(ConfigurationError):
        fisher = FisherConfig(**settings["fisher"])
        selection = SelectionConfig(**settings["selection"])
        step = StepConfig(**settings["step"])
        parts = {"fisher": fisher, "selection": selection, "step": step}
        arguments = {**settings, **parts}
        if arguments.get("flops_target") is not None:
            del arguments["target_sparsity"]
        report = prune(model, samples(), cross_entropy, **arguments)
    if report is None:
        require_same(model, before)
        return "refused"
    require_sound(model, report, settings)
    assert PruningReport.from_dict(report.to_dict()) == report
    return "pruned"


def try_schedule(given: dict[str, Any], chance: random.Random) -> str:
    """Plan with a schedule; a plan that is not refused is monotone and in range."""
    target = chance.choice((0.0, 0.3, 0.9))
    horizon = Horizon(
        chance.choice((None, 1, 3, 10)), chance.choice((None, 2, 50)), "unlimited"
    )
    try:
        schedule = SCHEDULES[given["class_path"]](**given["init_args"])
        text = repr(schedule)
        plan = schedule.plan(target, horizon)
    except ConfigurationError:
        return "refused"
    positions = [step.position for step in plan]
    sparsities = [step.sparsity for step in plan]
    assert positions == sorted(set(positions))
    assert sparsities == sorted(sparsities)
    assert all(0.0 <= sparsity <= target for sparsity in sparsities)
    assert not plan or sparsities[-1] == target
    # The text makes an equal one.
    again = eval(text, dict(SCHEDULES))
    assert again.plan(target, horizon) == plan
    return "planned"


def try_fit(settings: dict[str, Any], folder: Path) -> str:
    """Make the callback and fit a few batches with it."""
    module = Module()
    before = copy.deepcopy(module.state_dict())
    given, trained, callback = dict(settings), [], None

    class Trained(pl.Callback):
        def on_before_optimizer_step(self, *_: Any) -> None:
            trained.append(True)

    done = False
    with contextlib.suppress(ConfigurationError):
        schedule = given.pop("schedule", None)
        if schedule is not None:
            kind = SCHEDULES[schedule["class_path"]]
            given["schedule"] = kind(**schedule["init_args"])
        given["fisher"] = FisherConfig(**given["fisher"])
        given["selection"] = SelectionConfig(**given["selection"])
        given["step"] = StepConfig(**given["step"])
        callback = WoodFisherPruningCallback(**given)
        trainer = pl.Trainer(
            max_epochs=3,
            limit_train_batches=2,
            accelerator="cpu",
            devices=1,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            callbacks=[callback, Trained()],
            default_root_dir=folder,
        )
        trainer.fit(module)
        done = True
    if not done:
        if not trained:
            require_same(module, before)
        return "refused"
    assert all(bool(value.isfinite().all()) for value in module.state_dict().values())
    if callback is not None and callback.reports:
        assert zeros_in(module) == callback.reports[-1].zeros
    return "fitted"


def try_yaml(number: int, settings: dict[str, Any]) -> str:
    """Give the settings to the command; an error must have become a message."""
    config = {
        "trainer": {
            "fast_dev_run": 2,
            "accelerator": "cpu",
            "devices": 1,
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "callbacks": {
                "class_path": "WoodFisherPruningCallback",
                "init_args": plain(settings),
            },
        },
        "model": {"class_path": "module_of_the_fuzzer.Module"},
    }
    path = Path(f"{number}.yaml")
    path.write_text(yaml.safe_dump(config))
    try:
        status = main(["fit", "--config", str(path)])
    except SystemExit as end:
        status = end.code  # type: ignore[assignment]
    assert status in {0, 2}
    return "fitted" if status == 0 else "refused"


def plain(value: Any) -> Any:
    """What YAML can hold of a value."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value if isinstance(value, bool | int | float | str | None) else str(value)


def try_many(
    kind: str, seed: int, count: int, attempt: Callable[[int, random.Random], str]
) -> collections.Counter[str]:
    """Draw so many and count what came of them; an error says of which it is."""
    outcomes: collections.Counter[str] = collections.Counter()
    for number in range(count):
        chance = random.Random(f"{kind} {seed} {number}")
        try:
            outcomes[attempt(number, chance)] += 1
        except Exception as error:
            again = random.Random(f"{kind} {seed} {number}")
            raise AssertionError(
                f"{kind} {number} of seed {seed}: {type(error).__name__}: {error}; first "
                f"number drawn {again.random()}"
            ) from error
    return outcomes


def fuzz_steps(count: int, seed: int) -> None:
    found = try_many("step", seed, count, lambda _, c: try_step(draw_step(c)))
    # Neither all legal nor all illegal: both ways are tried.
    assert min(found["pruned"], found["refused"]) > count // 5, found


def fuzz_schedules(count: int, seed: int) -> None:
    found = try_many(
        "schedule", seed, count, lambda _, c: try_schedule(draw_schedule(c), c)
    )
    assert min(found["planned"], found["refused"]) > count // 6, found


def fuzz_fits(count: int, seed: int, folder: Path) -> None:
    found = try_many("fit", seed, count, lambda _, c: try_fit(draw_callback(c), folder))
    assert min(found["fitted"], found["refused"]) > count // 8, found


def fuzz_yaml(count: int, seed: int) -> None:
    found = try_many("yaml", seed, count, lambda i, c: try_yaml(i, draw_callback(c)))
    assert min(found["fitted"], found["refused"]) > count // 12, found


@pytest.fixture
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An empty folder, and the module under a name that YAML can give."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    monkeypatch.setattr(sys, "argv", ["lightning-woodfisher"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    there = types.ModuleType("module_of_the_fuzzer")
    there.Module = Module  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "module_of_the_fuzzer", there)
    monkeypatch.setattr(Module, "__module__", "module_of_the_fuzzer")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("_folder")
@pytest.mark.filterwarnings("ignore")
class TestFuzz:
    """As many as fit into a few seconds."""

    def test_steps(self) -> None:
        fuzz_steps(240, seed=0)

    def test_schedules(self) -> None:
        fuzz_schedules(300, seed=0)

    def test_fits(self, tmp_path: Path) -> None:
        fuzz_fits(60, 0, tmp_path)

    def test_yaml(self) -> None:
        fuzz_yaml(40, seed=0)


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.usefixtures("_folder")
@pytest.mark.filterwarnings("ignore")
class TestSoak:
    """Many more, of another seed: ``make soak SOAK_SEED=...``."""

    seed = int(os.environ.get("SOAK_SEED", "1"))

    def test_steps(self) -> None:
        fuzz_steps(3000, self.seed)

    def test_schedules(self) -> None:
        fuzz_schedules(5000, self.seed)

    def test_fits(self, tmp_path: Path) -> None:
        fuzz_fits(600, self.seed, tmp_path)

    def test_yaml(self) -> None:
        fuzz_yaml(200, self.seed)
