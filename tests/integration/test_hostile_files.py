"""Every file that is read, damaged at random: it is valid, or refused in a sentence.

Never another error, an escape sequence on the terminal, much memory, or a half-changed
object. Each change follows from its number, which a failing test prints.
"""

from __future__ import annotations

import contextlib
import copy
import json
import random
import struct
import tracemalloc
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from allocations import AllocationMeter
from coupled_networks import chain, chain_groups
from hostile_data import change, damage
from report_samples import step
from torch import nn

from lightning_woodfisher import (
    ConfigurationError,
    StructuredPruningCallback,
    StructureReport,
    WoodFisherPruningCallback,
    load_shrunk,
)
from lightning_woodfisher.cli.main import main
from lightning_woodfisher.export import load_sparse, save_sparse
from lightning_woodfisher.structured.graph.groups import channel_masks
from lightning_woodfisher.structured.report import GroupReport
from lightning_woodfisher.structured.shrink.files import save_shrunk
from lightning_woodfisher.structured.shrink.removal import plan_removal

NUMBER = 30
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


@contextlib.contextmanager
def little_memory() -> Iterator[None]:
    """Fail if tensors or arrays take much memory."""
    meter = AllocationMeter()
    tracemalloc.start()
    try:
        with meter:
            yield
        assert max(meter.peak_bytes, tracemalloc.get_traced_memory()[1]) < ENOUGH
    finally:
        tracemalloc.stop()


def assert_safe(text: str) -> None:
    text.encode()
    assert not {c for c in text if c != "\n" and not c.isprintable() and c < "\xa0"}
    assert "\u202e" not in text


def command_is_safe(capsys: pytest.CaptureFixture[str], *arguments: str) -> None:
    with little_memory(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert main(arguments) in {0, 2}
    shown = capsys.readouterr()
    assert_safe(shown.out)
    assert_safe(shown.err)


def is_safe(read: Callable[[], object]) -> None:
    try:
        with little_memory():
            read()
    except ConfigurationError as error:
        assert_safe(str(error))


def write_checkpoint(generator: random.Random, whole: Any) -> str:
    if generator.random() < 0.2:
        torch.save(whole, "a.ckpt")
        Path("a.ckpt").write_bytes(damage(generator, Path("a.ckpt").read_bytes()))
    else:
        torch.save(change(generator, whole), "a.ckpt")
    return "a.ckpt"


def test_checkpoints(capsys: pytest.CaptureFixture[str]) -> None:
    whole, dense = content(), chain()
    for seed in range(NUMBER):
        generator = random.Random(seed)
        print(f"seed {seed}")
        capsys.readouterr()
        path = write_checkpoint(generator, whole)
        command_is_safe(capsys, "report", path)
        is_safe(lambda path=path: load_shrunk(path, dense))
        options = {"sparse": "a.safetensors", "dense": "a.pt", "shrunk": "small"}
        form, out = generator.choice([*options.items()])
        command_is_safe(capsys, "export", path, "--format", form, "--out", out)
    expected = chain().state_dict()
    assert all(torch.equal(v, expected[n]) for n, v in dense.state_dict().items())


@pytest.mark.parametrize("kind", [StructuredPruningCallback, WoodFisherPruningCallback])
def test_states_of_callbacks(kind: Any) -> None:
    states = content()["callbacks"].values()
    valid = next(s for s in states if ("network" in s) == kind._removes_channels)
    for seed in range(2 * NUMBER):
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


def test_reports(capsys: pytest.CaptureFixture[str]) -> None:
    for seed in range(2 * NUMBER):
        generator = random.Random(seed)
        state = generator.choice([*content()["callbacks"].values()])
        text = json.dumps(change(generator, state["reports"], json_only=True))
        Path("a.json").write_text(text)
        html = ["--html", "a.html"] if seed < 3 else []
        command_is_safe(capsys, "report", "a.json", *html)


def test_shrunk_folders() -> None:
    state, model = structured_state()
    plan = plan_removal(model, chain_groups(), {"0": [1], "3": [0, 2]})
    weights = plan.cut(model.state_dict())
    dense = chain()
    for seed in range(NUMBER):
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


def test_sparse_files() -> None:
    weight = torch.zeros(64, 32)
    weight[::7] = torch.arange(32.0)
    state = {
        "w": weight,
        "part": weight[:3],
        "more": weight.t() + 1,
        "b": torch.ones(5),
    }
    save_sparse(state, "valid.safetensors")
    valid = Path("valid.safetensors").read_bytes()
    (size,) = struct.unpack("<Q", valid[:8])
    header, body = json.loads(valid[8 : 8 + size]), valid[8 + size :]
    layout = json.loads(header["__metadata__"]["woodfisher.layout"])
    for seed in range(3 * NUMBER):
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
