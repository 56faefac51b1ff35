"""Every example starts, prunes one step on small data, and leaves the promised zeros."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_woodfisher.cli.main import main

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.precision=32"]
SMALL += ["--trainer.enable_model_summary=false", "--trainer.fast_dev_run=true"]
PRUNING = "--trainer.callbacks.init_args"


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty folder in which ``examples`` is importable."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    monkeypatch.setattr(sys, "argv", ["lightning-woodfisher"])
    monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path])


def fit(config: str, *overrides: str) -> None:
    assert main(["fit", f"--config={ROOT / 'examples' / config}", *overrides]) == 0


def one_step(config: str, *overrides: str, gradients: int = 2) -> dict[str, Any]:
    """Run an example with few gradients of single samples; give its report."""
    few = [f"{PRUNING}.fisher.num_gradients={gradients}"]
    few += [f"{PRUNING}.fisher.gradient_batch_size=1"]
    few += [f"{PRUNING}.fisher.block_size=64", f"{PRUNING}.report_path=report.json"]
    fit(config, *SMALL, *few, *overrides)
    (report,) = json.loads(Path("report.json").read_text())
    return report


def sparsity(report: dict[str, Any]) -> float:
    layers = report["layers"]
    zeros = sum(layer["zeros_after"] for layer in layers)
    return zeros / sum(layer["weights"] for layer in layers)


FAKE = ["--data.init_args.fake=true", "--data.init_args.workers=0"]
FAKE += ["--data.init_args.image_size=32", "--data.init_args.classes=4"]
FAKE += ["--data.init_args.fake_images=8", "--data.init_args.batch_size=4"]
FAKE += ["--model.init_args.classes=4", "--model.init_args.width=0.125"]


@pytest.mark.parametrize(
    ("config", "more", "layers", "target"),
    [
        ("resnet50.yaml", ["--model.init_args.depth=1"], 1 + 4 * 4 + 1, 0.9),
        ("mobilenetv1.yaml", [], 1 + 2 * 13 + 1, 0.7528),
    ],
)
def test_imagenet(config: str, more: list[str], layers: int, target: float) -> None:
    report = one_step(f"imagenet/{config}", *FAKE, *more)
    assert len(report["layers"]) == layers
    assert sparsity(report) == pytest.approx(target, abs=1e-4)


def test_networks_have_the_size_of_the_papers() -> None:
    from examples.imagenet.model import mobilenetv1, resnet50

    with torch.device("meta"):
        sizes = [
            sum(p.numel() for p in network.parameters())
            for network in (resnet50(), mobilenetv1())
        ]
    assert sizes == [25_557_032, 4_231_976]


def test_transformer() -> None:
    small = ["--model.init_args.width=16", "--data.init_args.rows=64"]
    report = one_step("transformer/woodfisher.yaml", *small)
    names = [layer["name"] for layer in report["layers"]]
    assert any(name.endswith("in_proj_weight") for name in names)
    assert not any("embedding" in name or "net.decoder" in name for name in names)
    assert sparsity(report) == pytest.approx(0.7, abs=1e-3)


def test_finetune_keeps_the_zeros() -> None:
    from examples.digits.model import DigitsClassifier

    torch.manual_seed(0)
    module = DigitsClassifier()
    weights = module.state_dict()
    zero = {
        name: torch.rand(tensor.shape) < 0.9
        for name, tensor in weights.items()
        if tensor.dim() > 1
    }
    for name, gone in zero.items():
        weights[name].masked_fill_(gone, 0.0)
    torch.save({"state_dict": weights}, "pruned.ckpt")
    fit(
        "finetune/constant.yaml",
        "--model.init_args.weights=pruned.ckpt",
        *("--trainer.max_epochs=1", "--trainer.limit_train_batches=3"),
        *("--trainer.enable_progress_bar=false", "--trainer.limit_val_batches=1"),
    )
    after = torch.load("runs/digits/finetune/kept/last.ckpt", weights_only=True)
    for name, gone in zero.items():
        trained = after["state_dict"][name]
        assert torch.equal(trained == 0, gone)
        assert not torch.equal(trained, weights[name])


@pytest.mark.parametrize("name", ["digits", "fabric"])
def test_plain_pytorch(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    example = importlib.import_module(f"examples.plain_pytorch.{name}")
    small = ["example", "--epochs", "3", "--gradients", "32"]
    monkeypatch.setattr(sys, "argv", small)
    example.main()
    shown = capsys.readouterr().out
    assert "9,520    80.00%" in shown
    assert "dense" in shown


def test_parts_of_the_character_demo() -> None:
    """On a text that a tiny transformer learns in seconds."""
    from examples.characters.demo import compare
    from examples.characters.model import CharacterModel, continue_text
    from examples.characters.train import make_optimizer, take_step

    line = "for index in range(10):\n    print(index)\n"
    text = torch.tensor(list((line * 1000).encode()), dtype=torch.uint8)
    torch.manual_seed(0)
    model = CharacterModel(width=64, depth=1)
    optimizer = make_optimizer(model)
    losses = [
        take_step(model, optimizer, text, step, 150, batch_size=8, learning_rate=0.02)
        for step in range(150)
    ]
    assert losses[-1] < 0.5 < 4 < losses[0]

    # Nearly without chance, each byte is the most likely one.
    written = continue_text(model, "for ", 60, temperature=1e-3)
    expected = list(b"for ")
    for _ in range(60):
        with torch.no_grad():
            expected.append(int(model(torch.tensor([expected]))[0, -1].argmax()))
    assert written.encode() == bytes(expected)
    assert "index" in written

    dense = {name: value.clone() for name, value in model.state_dict().items()}
    results = compare(model, text, text, 0.5)
    assert [name for name, *_ in results] == ["dense", "magnitude", "layerwise"]
    assert all(torch.equal(dense[name], v) for name, v in model.state_dict().items())
    for _, network, _, _ in results[1:]:
        weights = [m.weight for m in network.modules() if isinstance(m, nn.Linear)]
        zeros = sum(int((weight == 0).sum()) for weight in weights)
        assert zeros == round(0.5 * sum(weight.numel() for weight in weights))
    losses = [loss for _, _, loss, _ in results]
    assert losses[2] < losses[1]
