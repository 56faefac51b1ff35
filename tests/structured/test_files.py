"""Shrunk networks from folders and checkpoints: complete, or refused in a sentence."""

from __future__ import annotations

import copy
import json
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from coupled_networks import chain, chain_groups, images
from torch import nn

from lightning_woodfisher import ConfigurationError, load_shrunk
from lightning_woodfisher.structured.graph.groups import channel_masks
from lightning_woodfisher.structured.shrink.files import save_shrunk
from lightning_woodfisher.structured.shrink.removal import (
    Cut,
    RemovalPlan,
    plan_removal,
    shrink,
)


class Holder(nn.Module):
    """A module that holds the network, as a LightningModule does."""

    def __init__(self) -> None:
        super().__init__()
        self.net = chain()
        self.scale = nn.Parameter(torch.ones(3))


def write_folder(folder: Path) -> nn.Module:
    model = chain()
    plan = shrink(model, chain_groups(), {"0": [1], "3": [0, 2]})
    save_shrunk(folder, model.state_dict(), plan)
    return model


def write_checkpoint(path: Path, **changes: Any) -> nn.Module:
    """What a structured callback saves, and the network that must come back."""
    module = Holder()
    groups, removed = chain_groups(), {"0": [1], "3": [0, 2]}
    gone = channel_masks(module.net, groups, removed)
    with torch.no_grad():
        for name, zeros in gone.items():
            module.net.get_parameter(name)[zeros] = 0.0
    plan = plan_removal(module.net, groups, removed)
    state = {
        "version": 1,
        "masks": {f"net.{name}": ~zeros for name, zeros in gone.items()},
        "done": [["epoch", 0, 0.5]],
        "reports": [],
        "network": "net",
        "removal_plan": plan.with_prefix("net.").to_dict(),
    }
    content = {"state_dict": module.state_dict(), "callbacks": {"A": state | changes}}
    torch.save(content, path)
    plan.apply(module.net)
    return module


def assert_same(one: nn.Module, other: nn.Module) -> None:
    assert repr(one) == repr(other)
    expected = other.state_dict()
    assert {*one.state_dict()} == {*expected}
    assert all(torch.equal(v, expected[n]) for n, v in one.state_dict().items())


def test_a_folder_gives_the_network_and_leaves_the_dense_one(tmp_path: Path) -> None:
    expected = write_folder(tmp_path / "small")
    dense = chain()
    with torch.no_grad():
        for parameter in dense.parameters():
            parameter.fill_(7.0)
    before = copy.deepcopy(dense)
    found = load_shrunk(tmp_path / "small", dense)
    assert_same(found, expected)
    assert_same(dense, before)
    assert torch.equal(found(images()), expected(images()))


class Versioned(nn.Sequential):
    """Loads a state of its own version only, as torchvision's MNASNet does."""

    _version = 2

    def _load_from_state_dict(
        self, state: Any, prefix: str, local_metadata: dict[str, Any], *rest: Any
    ) -> None:
        assert local_metadata.get("version") == self._version
        super()._load_from_state_dict(state, prefix, local_metadata, *rest)


def test_layers_are_loaded_with_their_versions(tmp_path: Path) -> None:
    model = Versioned(*chain())
    plan = shrink(model, chain_groups(), {"0": [1]})
    save_shrunk(tmp_path / "small", model.state_dict(), plan)
    assert_same(load_shrunk(tmp_path / "small", Versioned(*chain())), model)


def test_a_checkpoint_gives_the_network_or_the_whole_module(tmp_path: Path) -> None:
    expected = write_checkpoint(tmp_path / "a.ckpt")
    assert_same(load_shrunk(tmp_path / "a.ckpt", chain()), expected.net)
    assert_same(load_shrunk(str(tmp_path / "a.ckpt"), Holder()), expected)


def test_what_two_callbacks_cut_is_combined() -> None:
    one = plan_removal(chain(), chain_groups(), {"0": [1]})
    other = plan_removal(chain(), chain_groups(), {"3": [0, 2], "0": [4]})
    both = plan_removal(chain(), chain_groups(), {"0": [1, 4], "3": [0, 2]})
    assert RemovalPlan.combine([one, other]) == both


def edit_plan(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    plan = json.loads((folder / "plan.json").read_text())
    edit(plan)
    (folder / "plan.json").write_text(json.dumps(plan))


def edit_weights(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    weights = torch.load(folder / "weights.pt", weights_only=True)
    torch.save(edit(weights) or weights, folder / "weights.pt")


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def with_attributes(weights: dict[str, Any]) -> OrderedDict[str, Any]:
    """Weights whose methods are numbers."""
    found = OrderedDict(weights)
    found.copy = found.keys = found.get = 5  # type: ignore[method-assign, assignment]
    return found


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no plan": (lambda f: (f / "plan.json").unlink(), "has no file plan.json"),
    "no weights": (lambda f: (f / "weights.pt").unlink(), "has no file weights.pt"),
    "plan cut off": (lambda f: cut_off(f / "plan.json"), "plan.json is damaged"),
    "plan of bytes": (
        lambda f: (f / "plan.json").write_bytes(b"\xff\xfe\x00"),
        "plan.json is damaged",
    ),
    "plan of brackets": (
        lambda f: (f / "plan.json").write_text("[" * 5_000),
        "plan.json is damaged",
    ),
    "plan is a list": (
        lambda f: (f / "plan.json").write_text("[]"),
        "plan.json is damaged",
    ),
    "later plan": (lambda f: edit_plan(f, lambda p: p.update(version=2)), "version 2"),
    "plan without tensors": (
        lambda f: edit_plan(f, lambda p: p.pop("tensors")),
        "not a removal plan",
    ),
    "float": (
        lambda f: edit_plan(
            f, lambda p: p["tensors"]["0.weight"]["0"]["kept"].append(2.5)
        ),
        "kept is 2.5, not a count",
    ),
    "negative": (
        lambda f: edit_plan(
            f, lambda p: p["tensors"]["0.weight"]["0"].update(kept=[-1, 0])
        ),
        "kept is -1, not a count",
    ),
    "twice": (
        lambda f: edit_plan(
            f, lambda p: p["tensors"]["0.weight"]["0"].update(kept=[0, 0, 1, 2])
        ),
        "not ascending and in 0 to 4",
    ),
    "beyond": (
        lambda f: edit_plan(
            f, lambda p: p["tensors"]["0.weight"]["0"].update(kept=[1, 5])
        ),
        "not ascending and in 0 to 4",
    ),
    "negative axis": (
        lambda f: edit_plan(
            f,
            lambda p: p["tensors"].update({"5.bias": {"-1": {"size": 2, "kept": [0]}}}),
        ),
        "is '-1', not a count",
    ),
    "implants in nothing": (
        lambda f: edit_plan(f, lambda p: p["implants"].update({"9.x": [1]})),
        "1x1 filters into '9.x'",
    ),
    "implants in a norm": (
        lambda f: edit_plan(f, lambda p: p["implants"].update({"1": [1]})),
        "1x1 filters into '1'",
    ),
    "weights cut off": (lambda f: cut_off(f / "weights.pt"), "weights.pt is not a"),
    "weights empty": (
        lambda f: (f / "weights.pt").write_bytes(b""),
        "weights.pt is not a",
    ),
    "weights are a list": (
        lambda f: edit_weights(f, lambda _: [1]),
        "is not a state_dict",
    ),
    "weights are a list of names": (
        lambda f: edit_weights(f, list),
        "weights.pt is not a state_dict",
    ),
    "weights have numbers for names": (
        lambda f: edit_weights(f, lambda w: dict(enumerate(w.values()))),
        "weights.pt is not a state_dict",
    ),
    "code": (
        lambda f: edit_weights(f, lambda w: {**w, "a": Path()}),
        "no code in the file is run",
    ),
    "a weight is missing": (
        lambda f: edit_weights(f, lambda w: {n: w[n] for n in w if n != "5.bias"}),
        "the model has 5.bias that the file lacks",
    ),
    "a weight too many": (
        lambda f: edit_weights(f, lambda w: w.update(extra=torch.ones(1))),
        "the file has extra that the model lacks",
    ),
    "a weight is a number": (
        lambda f: edit_weights(f, lambda w: w.update({"5.bias": 3})),
        "5.bias is not a dense tensor",
    ),
    "a weight has no memory": (
        lambda f: edit_weights(
            f, lambda w: w.update({"5.bias": torch.ones(2, device="meta")})
        ),
        "5.bias is not a dense tensor",
    ),
    "another shape": (
        lambda f: edit_weights(f, lambda w: w.update({"5.bias": torch.ones(3)})),
        r"5.bias has shape \(3,\), not \(2,\)",
    ),
    "another kind": (
        lambda f: edit_weights(f, lambda w: w.update({"5.bias": torch.ones(2) * 1j})),
        "5.bias has dtype torch.complex64",
    ),
    "huge": (
        lambda f: edit_weights(
            f, lambda w: w.update({"5.bias": torch.ones(1).expand(2**40)})
        ),
        "is larger than the file",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_damage_is_one_sentence_and_changes_nothing(name: str, tmp_path: Path) -> None:
    write_folder(tmp_path)
    damage, message = FAULTS[name]
    damage(tmp_path)
    model = chain()
    with pytest.raises(ConfigurationError, match=message) as caught:
        load_shrunk(tmp_path, model)
    assert "\n" not in str(caught.value)
    assert_same(model, chain())


def test_attributes_that_a_pickle_sets_are_dropped(tmp_path: Path) -> None:
    expected = write_folder(tmp_path)
    edit_weights(tmp_path, with_attributes)
    assert_same(load_shrunk(tmp_path, chain()), expected)


def test_a_network_of_another_kind(tmp_path: Path) -> None:
    write_folder(tmp_path / "small")
    with pytest.raises(ConfigurationError, match=r"network alone: pass model\.net "):
        load_shrunk(tmp_path / "small", Holder())
    with pytest.raises(ConfigurationError, match="Build the dense network as in"):
        load_shrunk(tmp_path / "small", nn.Sequential(nn.Linear(2, 2)))
    done = load_shrunk(tmp_path / "small", chain())
    with pytest.raises(ConfigurationError, match="or has been applied already"):
        load_shrunk(tmp_path / "small", done)
    with pytest.raises(ConfigurationError, match="is not a file"):
        load_shrunk(tmp_path / "absent.ckpt", chain())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"removal_plan": {"version": 1}}, "not a removal plan"),
        ({"removal_plan": 3}, "is damaged: its plan"),
        ({"network": 3}, "is damaged: its name of the network"),
        ({"version": -1}, "its version is -1"),
        ({"steps_left": "x"}, "its number of remaining steps is 'x'"),
        ({"masks": {"net.0.bias": torch.zeros(5, dtype=torch.bool)}}, "are not zero"),
        (
            {
                "removal_plan": RemovalPlan(
                    {"net.9.bias": {0: Cut(5, (0,))}}, {}
                ).to_dict()
            },
            "no tensor 'net.9.bias'",
        ),
    ],
)
def test_a_checkpoint_that_is_damaged(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    write_checkpoint(tmp_path / "a.ckpt", **changes)
    with pytest.raises(ConfigurationError, match=message):
        load_shrunk(tmp_path / "a.ckpt", chain())


def test_a_checkpoint_without_a_plan(tmp_path: Path) -> None:
    torch.save({"state_dict": chain().state_dict()}, tmp_path / "a.ckpt")
    with pytest.raises(ConfigurationError, match="no plan of removed channels"):
        load_shrunk(tmp_path / "a.ckpt", chain())


def test_saving_that_fails_leaves_the_old_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = write_folder(tmp_path)

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        save_shrunk(tmp_path, {"a": torch.ones(1)}, RemovalPlan({}, {}))
    monkeypatch.undo()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["plan.json", "weights.pt"]
    assert_same(load_shrunk(tmp_path, chain()), expected)
