"""A sample of the zoo; `make zoo` checks all of it."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from torch import nn

from lightning_woodfisher.weights.masks import Masks
from tests.zoo import run
from tests.zoo.catalogue import Network, catalogue
from tests.zoo.results import read_results
from tests.zoo.tasks import Task

NETWORKS = {network.name: network for network in catalogue()}
REFUSED = {("mamba", "sosp"): "MambaMixer is no Conv, Linear or attention layer"}
SAMPLE = [
    ("squeezenet1_1", "unstructured"),
    ("squeezenet1_1", "sosp"),
    ("mnasnet0_5", "unstructured"),
    ("mnasnet0_5", "sosp"),
    ("mobilenet_v3_small", "unstructured"),
    ("mobilenet_v3_small", "sosp"),
    ("shufflenet_v2_x0_5", "unstructured"),
    ("shufflenet_v2_x0_5", "sosp"),
    ("ssdlite320_mobilenet_v3_large", "unstructured"),
    ("raft_small", "unstructured"),
    ("lraspp_mobilenet_v3_large", "unstructured"),
    ("vit_tiny_patch16_224", "unstructured"),
    ("efficientvit_b0", "sosp"),
    ("gpt2", "sosp"),
    ("mamba", "sosp"),
    ("llama", "unstructured"),
    ("llama", "sosp"),
    ("bert", "unstructured"),
    ("bert", "sosp"),
]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.WARNING)
    yield
    logger.setLevel(level)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "check"), SAMPLE, ids=[" ".join(case) for case in SAMPLE]
)
def test_sample(name: str, check: str) -> None:
    if name not in NETWORKS:
        pytest.skip("its library is not installed")
    if check == "sosp":
        pytest.importorskip("torch_pruning")
    found = run.check(NETWORKS[name], check)
    if (name, check) in REFUSED:
        assert found["status"] == "refused", found
        assert re.search(REFUSED[name, check], found["reason"])
    else:
        assert found["status"] == "passed", found.get("trace", found)


def make(build: type[nn.Module]) -> Network:
    return Network("own", "torch", build, Task((3, 8, 8)))


class Dying(nn.Module):
    """Ends its process."""

    def __init__(self) -> None:
        os._exit(1)


class Norm(nn.Sequential):
    """Has no weights that can be pruned."""

    def __init__(self) -> None:
        super().__init__(nn.BatchNorm2d(3), nn.Flatten())


class Plain(nn.Sequential):
    """Is pruned."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 6, 3), nn.Flatten(), nn.Linear(216, 5))


@pytest.mark.parametrize(
    ("build", "status", "reason"),
    [
        (Plain, "passed", ""),
        (Dying, "failed", "its process died"),
        (Norm, "refused", "no trainable parameter"),
    ],
)
def test_a_check_says_how_it_ends(
    build: type[nn.Module], status: str, reason: str
) -> None:
    found = run.check_apart(make(build), "unstructured")
    assert found["status"] == status
    assert reason in found.get("reason", "")


def test_a_check_notices_weights_without_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Masks, "apply", lambda self: None)
    monkeypatch.setattr(Masks, "apply_to_gradients", lambda self: None)
    found = run.check(make(Plain), "unstructured")
    assert found["status"] == "failed"
    assert "lost its mask" in found["reason"]


def test_a_run_goes_on_where_it_was_killed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    networks = [make(Plain), replace(make(Plain), name="other")]
    monkeypatch.setattr(run, "catalogue", lambda: networks)
    arguments = ["--results", str(tmp_path / "a.jsonl"), "--checks", "unstructured"]
    run.main([*arguments, "--only", "other"])
    assert "other" in capsys.readouterr().out
    run.main(arguments)
    assert "other" not in capsys.readouterr().out
    assert len(read_results(tmp_path / "a.jsonl")) == 2
