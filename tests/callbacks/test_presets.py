"""Settings by name: they construct, plan and select what they say."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from torch import nn

from lightning_woodfisher import (
    ConfigurationError,
    StepConfig,
    WoodFisherPruningCallback,
    preset,
)
from lightning_woodfisher.callbacks.presets import PRESETS, source
from lightning_woodfisher.cli.estimate import read_run
from lightning_woodfisher.cli.main import main
from lightning_woodfisher.pruning.schedule import Horizon
from lightning_woodfisher.weights.layers import prunable_parameters

# N, m, B, λ, target, epochs of training, epochs of the steps.
EXPECTED = {
    "resnet50_90": (400, 400, 2000, 1e-5, 0.9, 100, list(range(1, 37, 5))),
    "mobilenetv1_75": (400, 2400, 10000, 1e-5, 0.7528, 100, list(range(4, 25, 4))),
    "bert_90": (1024, 8, 50, 1e-7, 0.9, 30, list(range(2, 27, 4))),
    "resnet20_oneshot": (1000, 1, 36864, 1e-5, 0.8, 1, [0]),
}
NAMES = [*EXPECTED, "post_training"]


def test_all_are_tested() -> None:
    assert list(PRESETS) == NAMES


@pytest.mark.parametrize("name", EXPECTED)
def test_they_say_what_was_published(name: str) -> None:
    callback = WoodFisherPruningCallback.from_preset(name)
    fisher = callback.config.fisher
    count, size, block, damping, target, epochs, positions = EXPECTED[name]
    assert (fisher.num_gradients, fisher.gradient_batch_size) == (count, size)
    assert (fisher.block_size, fisher.damping) == (block, damping)
    assert callback.config.step.update == "independent"
    plan = callback.schedule.plan(callback.target_sparsity, Horizon(epochs))
    assert [step.position for step in plan] == positions
    assert plan[-1].sparsity == target
    assert "2020" in source(name) or "2022" in source(name)


def test_the_one_after_training_prunes_a_trained_network_in_its_first_steps() -> None:
    callback = WoodFisherPruningCallback.from_preset(
        "post_training", target_sparsity=0.9
    )
    assert callback.config.criterion == "layerwise"
    plan = callback.schedule.plan(0.9, Horizon(max_steps=480))
    assert [(step.unit, step.position) for step in plan] == [
        ("step", position) for position in range(0, 201, 40)
    ]
    assert plan[-1].sparsity == 0.9
    assert callback.config.fisher.num_gradients * 16 == 512


def test_the_ramp_of_bert_begins_where_its_source_says() -> None:
    callback = WoodFisherPruningCallback.from_preset("bert_90")
    first = callback.schedule.plan(0.9, Horizon(30))[0]
    assert "77.4 %" in source("bert_90")
    assert first.sparsity == pytest.approx(0.774, abs=5e-4)


def test_what_is_given_wins() -> None:
    callback = WoodFisherPruningCallback.from_preset(
        "bert_90", step=StepConfig("joint", seed=3)
    )
    assert (callback.config.step.update, callback.config.step.seed) == ("joint", 3)
    assert callback.config.fisher.block_size == 50


def test_changing_one_does_not_change_the_next() -> None:
    preset("bert_90")["selection"].only.append("other")
    assert len(preset("bert_90")["selection"].only) == 1


def tree(names: list[str]) -> nn.Module:
    """A module with tiny linear layers or convolutions at dotted names."""
    root = nn.Module()
    for name in names:
        *path, last = name.split(".")
        at = root
        for part in path:
            if not hasattr(at, part):
                at.add_module(part, nn.Module())
            at = getattr(at, part)
        at.add_module(last, nn.Conv2d(2, 2, 1) if "conv" in last else nn.Linear(2, 2))
    return root


def test_they_select_by_the_names_of_their_networks() -> None:
    bert = ["bert.encoder.layer.11.attention.self.query", "bert.pooler.dense"]
    inside = [*bert, "bert.encoder.layer.0.output.dense", "qa_outputs"]
    selection = preset("bert_90")["selection"]
    chosen = prunable_parameters(
        tree(inside), exclude=selection.exclude, only=selection.only
    )
    assert list(chosen) == [f"{bert[0]}.weight", f"{inside[2]}.weight"]
    blocks = [
        "conv1",
        "layer1.0.conv1",
        "layer3.2.conv2",
        "layer2.0.downsample.0",
        "fc",
    ]
    selection = preset("resnet20_oneshot")["selection"]
    chosen = prunable_parameters(
        tree(blocks), exclude=selection.exclude, only=selection.only
    )
    assert list(chosen) == ["layer1.0.conv1.weight", "layer3.2.conv2.weight"]


def test_unknown_names_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigurationError, match="mean 'bert_90'"):
        preset("bert90")
    assert main(["preset", "resnet50"]) == 2
    assert "resnet50_90" in capsys.readouterr().err


@pytest.mark.filterwarnings(
    "ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"
)
@pytest.mark.parametrize("name", NAMES)
def test_the_yaml_gives_the_same_callback(
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "preset_network", raising=False)
    Path("preset_network.py").write_text(
        "import lightning.pytorch as pl\n\nclass Net(pl.LightningModule): ...\n"
    )
    Path("run.yaml").write_text(
        "trainer: {max_epochs: 100, callbacks: [{class_path: ModelCheckpoint}]}\n"
        "model: {class_path: preset_network.Net}\n"
    )
    assert main(["preset", name]) == 0
    Path("preset.yaml").write_text(capsys.readouterr().out)
    arguments = ["--config", "run.yaml", "--config", "preset.yaml"]
    callback = read_run(arguments).callback
    expected = WoodFisherPruningCallback.from_preset(name)
    assert repr(callback) == repr(expected)
    assert callback.config == expected.config
