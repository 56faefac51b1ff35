"""Every file that is read, damaged at random: it is valid, or refused in a sentence.

Never another error, code that runs, an escape sequence on the terminal, much memory, or a
half-changed object. Each change follows from its number, which a failing test prints.
``make soak`` tries many more, from another SOAK_SEED.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import pickle
import random
import struct
import tracemalloc
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from allocations import AllocationMeter
from coupled_networks import chain, chain_groups
from fits import Counting, differences, loader, pruning, trainer
from hostile_data import ESCAPE, RAN, change, damage
from lightning.pytorch.callbacks import ModelCheckpoint
from report_samples import step
from structured_fits import ResidualNet, structured
from torch import nn

from lightning_woodfisher import (
    ConfigurationError,
    PolynomialSchedule,
    StructuredPruningCallback,
    StructureReport,
    WoodFisherPruningCallback,
    load_shrunk,
)
from lightning_woodfisher.cli.lightning_cli import load_weights
from lightning_woodfisher.cli.main import main
from lightning_woodfisher.export import load_sparse, read_checkpoint, save_sparse
from lightning_woodfisher.export.state_dict_files import read_metadata
from lightning_woodfisher.structured.graph.groups import channel_masks
from lightning_woodfisher.structured.report import GroupReport
from lightning_woodfisher.structured.shrink.files import save_shrunk
from lightning_woodfisher.structured.shrink.removal import RemovalPlan, plan_removal

FEW, MANY = 30, 150
# Small files cannot need more, whatever they claim.
ENOUGH = 2**25


def structured_state() -> tuple[dict[str, Any], nn.Module]:
    """The state of a structured callback, and its masked network."""
    model, groups, removed = chain(), chain_groups(), {"0": (1,), "3": (0, 2)}
    gone = channel_masks(model, groups, removed)
    with torch.no_grad():
        for name, zeros in gone.items():
            model.get_parameter(name)[zeros] = 0.0
    found = tuple(
        GroupReport(group.name, group.layers, group.size, 0, removed[group.name])
        for group in groups
    )
    report = StructureReport(
        "hap", "conv", "macs", 0.5, found, 400, 200, 4000, 2000, 1.0, 1.5
    )
    state = {
        "version": 1,
        "masks": {name: ~zeros for name, zeros in gone.items()},
        "done": [["epoch", 0, 0.5]],
        "steps_left": 1,
        "reports": [json.loads(json.dumps(report.to_dict()))],
        "network": "",
        "removal_plan": plan_removal(model, groups, removed).to_dict(),
    }
    return state, model


def content() -> dict[str, Any]:
    """A checkpoint of both kinds of callbacks."""
    channels, model = structured_state()
    weights = {
        "version": 1,
        "masks": {"5.weight": torch.ones(2, 64, dtype=torch.bool)},
        "done": [["epoch", 0, 0.5], ["step", 7, 0.75]],
        "steps_left": 0,
        "reports": [
            step(number, logged_after={"val_acc": 0.5}).to_dict() for number in (1, 2)
        ],
        "logged": {"val_acc": 0.5},
    }
    callbacks = {"Channels": channels, "Weights": weights}
    return {"state_dict": dict(model.state_dict()), "callbacks": callbacks}


@pytest.fixture(
    params=[
        "few",
        pytest.param("many", marks=[pytest.mark.soak, pytest.mark.timeout(3600)]),
    ]
)
def seeds(request: pytest.FixtureRequest) -> range:
    """Numbers of changes."""
    if request.param == "few":
        return range(FEW)
    start = int(os.environ.get("SOAK_SEED", "1")) * 1_000_000
    return range(start, start + MANY)


@pytest.fixture(autouse=True)
def _no_code_runs() -> Iterator[None]:
    yield
    assert not Path(RAN).exists()


def resident_bytes(field: str) -> int:
    """Read memory of this process: ``VmRSS`` is that of now, ``VmHWM`` the peak."""
    text = Path("/proc/self/status").read_text()
    return 1024 * int(text.partition(f"{field}:")[2].split()[0])


@contextlib.contextmanager
def little_memory() -> Iterator[None]:
    """Fail if tensors, Python's objects or other libraries take much memory."""
    meter = AllocationMeter()
    tracemalloc.start()
    reset_peak = Path("/proc/self/clear_refs")
    has_peak = reset_peak.exists()
    if has_peak:
        reset_peak.write_text("5")
        before = resident_bytes("VmRSS")
    try:
        with meter:
            yield
        assert max(meter.peak_bytes, tracemalloc.get_traced_memory()[1]) < ENOUGH
        if has_peak:
            assert resident_bytes("VmHWM") - before < 2 * ENOUGH
    finally:
        tracemalloc.stop()


def assert_safe(text: str) -> None:
    text.encode()
    assert not {
        c for c in text if c not in "\n\t" and not c.isprintable() and c < "\xa0"
    }
    assert "\u202e" not in text


def command_is_safe(capsys: pytest.CaptureFixture[str], *arguments: str) -> None:
    with little_memory(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            status = main(arguments)
        except SystemExit as end:
            # The parsers of ``fit`` and its options end this way.
            status = end.code
        assert status in {0, 2}
    shown = capsys.readouterr()
    assert_safe(shown.out)
    assert_safe(shown.err)


def is_safe(read: Callable[[], object]) -> bool:
    """Return whether the file is valid."""
    try:
        with little_memory():
            read()
    except ConfigurationError as error:
        assert_safe(str(error))
        return False
    return True


def write_checkpoint(generator: random.Random, whole: Any) -> str:
    if generator.random() < 0.2:
        torch.save(whole, "a.ckpt")
        Path("a.ckpt").write_bytes(damage(generator, Path("a.ckpt").read_bytes()))
    else:
        torch.save(change(generator, whole), "a.ckpt")
    return "a.ckpt"


def test_checkpoints(seeds: range, capsys: pytest.CaptureFixture[str]) -> None:
    whole, dense, module = content(), chain(), pl.LightningModule()
    for name, layer in chain().named_children():
        module.add_module(name, layer)
    for seed in seeds:
        generator = random.Random(seed)
        print(f"seed {seed}")
        capsys.readouterr()
        path = write_checkpoint(generator, whole)
        command_is_safe(capsys, "report", path)
        is_safe(lambda path=path: load_shrunk(path, dense))
        is_safe(lambda path=path: load_weights(module, read_checkpoint(path)))
        options = {"sparse": "a.safetensors", "dense": "a.pt", "shrunk": "small"}
        form, out = generator.choice([*options.items()])
        command_is_safe(capsys, "export", path, "--format", form, "--out", out)
    expected = chain().state_dict()
    assert all(torch.equal(v, expected[n]) for n, v in dense.state_dict().items())


@pytest.mark.parametrize("kind", [StructuredPruningCallback, WoodFisherPruningCallback])
def test_states_of_callbacks(seeds: range, kind: Any) -> None:
    states = content()["callbacks"].values()
    valid = next(s for s in states if ("network" in s) == kind._removes_channels)
    for seed in seeds:
        callback = kind(0.5)
        before = copy.deepcopy(callback.state_dict())
        state = change(random.Random(seed), valid)
        try:
            callback.load_state_dict(state)
        except ConfigurationError as error:
            assert_safe(str(error))
            assert callback.state_dict() == before, seed
        else:
            assert callback.state_dict()["done"] == state["done"]


def make_fit(channels: bool, *more: Any, **options: Any) -> tuple[Any, Any, Any]:
    """Return a Trainer, its pruning callback and its module."""
    schedule = PolynomialSchedule(0, 2)
    if channels:
        callback, module = structured(schedule=schedule), Counting(build=ResidualNet)
    else:
        callback, module = pruning(schedule=schedule), Counting(build=perceptron)
    return trainer(callback, *more, max_epochs=3, **options), callback, module


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("channels", [False, True], ids=["weights", "channels"])
def test_fits_from_changed_states(
    seeds: range,
    channels: bool,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A fit continues with masks that hold, or is refused before the first batch."""
    saving = ModelCheckpoint(Path.cwd(), "{epoch}", save_top_k=-1)
    first, callback, module = make_fit(channels, saving, enable_checkpointing=True)
    first.fit(module, loader())
    valid = torch.load("epoch=1.ckpt", weights_only=True)
    key, saved_weights = callback.state_key, valid["state_dict"]
    for seed in [*seeds][:: 1 if len(seeds) > FEW else 2]:
        print(f"seed {seed}")
        state = change(random.Random(seed), valid["callbacks"][key])
        torch.save({**valid, "callbacks": {key: state}}, "a.ckpt")
        second, callback, module = make_fit(channels)
        fresh = copy.deepcopy(module.state_dict())
        caplog.clear()
        capsys.readouterr()
        try:
            # Reading the file is up to Lightning; here it may not run code, either.
            second.fit(module, loader(), ckpt_path="a.ckpt", weights_only=True)
        except pickle.UnpicklingError:
            continue
        except ConfigurationError as error:
            assert_safe(str(error))
            # Nothing was trained or pruned: the weights are the first ones or those saved.
            wrong = [
                differences(module.state_dict(), w) for w in (fresh, saved_weights)
            ]
            assert [] in wrong, seed
        else:
            assert callback.masks.violations() == {}, seed
        shown = capsys.readouterr()
        for text in (shown.out, shown.err, caplog.text):
            assert_safe(text)


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.ReLU(), nn.Linear(10, 4))


def test_reports(seeds: range, capsys: pytest.CaptureFixture[str]) -> None:
    for seed in seeds:
        generator = random.Random(seed)
        state = generator.choice([*content()["callbacks"].values()])
        text = json.dumps(change(generator, state["reports"], json_only=True))
        Path("a.json").write_text(text)
        if generator.random() < 0.2:
            valid = json.dumps(state["reports"]).encode()
            Path("a.json").write_bytes(damage(generator, valid))
        html = ["--html", "a.html"] if seed % 10 == 0 else []
        command_is_safe(capsys, "report", "a.json", *html)


def test_shrunk_folders(seeds: range) -> None:
    state, model = structured_state()
    plan = plan_removal(model, chain_groups(), {"0": [1], "3": [0, 2]})
    weights = plan.cut(model.state_dict())
    dense = chain()
    for seed in seeds:
        generator = random.Random(seed)
        save_shrunk("small", weights, plan)
        file = Path("small", generator.choice(["plan.json", "weights.pt"]))
        if generator.random() < 0.2:
            file.write_bytes(damage(generator, file.read_bytes()))
        elif file.suffix == ".json":
            plain = json.loads(file.read_text())
            file.write_text(json.dumps(change(generator, plain, json_only=True)))
        else:
            torch.save(change(generator, weights), file)
        is_safe(lambda: load_shrunk("small", dense))
    expected = chain().state_dict()
    assert all(torch.equal(v, expected[n]) for n, v in dense.state_dict().items())


def test_plans(seeds: range) -> None:
    """A plan fits the network wholly, or changes nothing of it."""
    _, model = structured_state()
    plan = plan_removal(model, chain_groups(), {"0": [1], "3": [0, 2]}).to_dict()
    for seed in seeds:
        network = copy.deepcopy(model)
        changed = change(random.Random(seed), plan)

        def apply(changed: Any = changed, network: nn.Module = network) -> None:
            RemovalPlan.from_dict(changed).apply(network)

        if not is_safe(apply):
            assert differences(network.state_dict(), model.state_dict()) == [], seed


def test_sparse_files(seeds: range) -> None:
    weight = torch.zeros(64, 32)
    weight[::7] = torch.arange(32.0)
    state = {
        "w": weight,
        "part": weight[:3],
        "more": weight.t() + 1,
        "b": torch.ones(5),
    }
    save_sparse(state, "valid.safetensors", {"note": "a text"})
    valid = Path("valid.safetensors").read_bytes()
    (size,) = struct.unpack("<Q", valid[:8])
    header, body = json.loads(valid[8 : 8 + size]), valid[8 + size :]
    layout = json.loads(header["__metadata__"]["woodfisher.layout"])
    for seed in (3 * s + i for s in seeds for i in range(3)):
        generator = random.Random(seed)
        changed = copy.deepcopy(header)
        if generator.random() < 0.7:
            found = json.dumps(change(generator, layout, json_only=True))
            changed["__metadata__"]["woodfisher.layout"] = found
        else:
            changed = change(generator, header, json_only=True)
        text = json.dumps(changed).encode()
        whole = struct.pack("<Q", len(text)) + text + body
        if generator.random() < 0.2:
            whole = damage(generator, valid)
        Path("a.safetensors").write_bytes(whole)
        is_safe(lambda: load_sparse("a.safetensors"))
        is_safe(lambda: read_metadata("a.safetensors"))


CONFIGURATION = {
    "trainer": {
        "max_epochs": 4,
        "accelerator": "cpu",
        "callbacks": [
            {
                "class_path": "WoodFisherPruningCallback",
                "init_args": {
                    "target_sparsity": 0.5,
                    "criterion": "woodfisher",
                    "fisher": {"num_gradients": 6, "gradient_batch_size": 2},
                    "selection": {"exclude": ["bn"], "layer_targets": {"fc": 0.1}},
                    "step": {"update": "joint"},
                    "schedule": {
                        "class_path": "PolynomialSchedule",
                        "init_args": {"start_epoch": 0, "end_epoch": 2},
                    },
                },
            }
        ],
    },
    "model": {"class_path": "structured_fits.Module"},
    "data": {"class_path": "structured_fits.Data"},
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_configurations(seeds: range, capsys: pytest.CaptureFixture[str]) -> None:
    """A configuration can name classes, so it runs code; its values must not."""
    for seed in [*seeds][:: 1 if len(seeds) > FEW else 6]:
        print(f"seed {seed}")
        changed = change(random.Random(seed), CONFIGURATION, json_only=True)
        Path("a.yaml").write_text(json.dumps(changed))
        capsys.readouterr()
        rate = ("--flops_per_second", "1e9")
        command_is_safe(capsys, "estimate", *rate, "--config", "a.yaml")


def test_names_of_files(capsys: pytest.CaptureFixture[str]) -> None:
    """A folder from elsewhere may have files of any names."""
    names = (f"a{ESCAPE}", "\udcff")
    for name in names:
        folder = Path(f"run {name}")
        folder.mkdir()
        torch.save(content(), folder / f"{name}.ckpt")
        (folder / f"{name}.json").write_text("{")
        (folder / f"lost {name}.json").symlink_to("nowhere")
        command_is_safe(capsys, "report", str(folder))
        command_is_safe(capsys, "report", str(folder / f"{name}.ckpt"))
        (folder / f"{name}.ckpt").unlink()
        (folder / f"pruning_{name}.csv").write_text("")
        command_is_safe(capsys, "report", str(folder))
