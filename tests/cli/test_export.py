"""``lightning-woodfisher export``: whole runs from a checkpoint, and what it refuses."""

from __future__ import annotations

import copy
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
import yaml
from documentation import ROOT, read_blocks, split_commands
from torch import Tensor, nn

from lightning_woodfisher.cli.main import main
from lightning_woodfisher.export import load_sparse, read_checkpoint, read_metadata

MODULE = """
import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Toy(pl.LightningModule):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(8, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 3)
        )
        self.loss = nn.CrossEntropyLoss(torch.ones(3))

    def forward(self, inputs):
        return self.net(inputs)

    def training_step(self, batch, batch_idx):
        return self.loss(self(batch[0]), batch[1])

    def train_dataloader(self):
        inputs = torch.randn(32, 8, generator=torch.Generator().manual_seed(0))
        return DataLoader(TensorDataset(inputs, inputs[:, :3].argmax(1)), 8)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class WithExample(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.example_input_array = torch.rand(2, 8)
"""
CONFIG: dict[str, Any] = {
    "seed_everything": 0,
    "trainer": {
        "max_epochs": 1,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "callbacks": [
            {
                "class_path": "WoodFisherPruningCallback",
                "init_args": {
                    "target_sparsity": 0.75,
                    "criterion": "magnitude",
                    "schedule": {"class_path": "OneShotSchedule"},
                    "fisher": {"num_gradients": 8, "gradient_batch_size": 2},
                },
            },
            {
                "class_path": "ModelCheckpoint",
                "init_args": {"dirpath": "kept", "filename": "best"},
            },
        ],
    },
    "model": {"class_path": "toy_of_export.Toy"},
}
PRUNED = ("net.0.weight", "net.3.weight")
WEIGHTS = 8 * 32 + 32 * 3


def status(*arguments: str) -> object:
    try:
        return main(arguments)
    except SystemExit as end:
        return end.code


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a module, a config, and the checkpoint of a pruned network."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "toy_of_export.py").write_text(MODULE)
    (folder / "run.yaml").write_text(yaml.safe_dump(CONFIG))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
        patch.setattr(sys, "argv", ["lightning-woodfisher"])
        patch.setattr(sys, "path", list(sys.path))
        assert status("fit", "--config", "run.yaml") == 0
        shutil.move("kept/best.ckpt", "best.ckpt")
    yield folder
    sys.modules.pop("toy_of_export", None)


@pytest.fixture(autouse=True)
def folder(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to work in."""
    shutil.copytree(run, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    monkeypatch.setattr(sys, "argv", ["lightning-woodfisher"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


def trained() -> dict[str, Any]:
    return torch.load("best.ckpt", weights_only=True)


def change(edit: Any, path: str = "changed.ckpt") -> str:
    content = copy.deepcopy(trained())
    torch.save(edit(content) or content, path)
    return path


def callback_state(content: dict[str, Any]) -> dict[str, Any]:
    (key,) = (k for k in content["callbacks"] if k.startswith("WoodFisher"))
    return content["callbacks"][key]


def bare() -> dict[str, Tensor]:
    """Weights of the network, by what Lightning has saved."""
    weights = trained()["state_dict"]
    return {k.removeprefix("net."): w for k, w in weights.items() if k[:4] == "net."}


def assert_bare(found: dict[str, Tensor]) -> None:
    assert list(found) == list(bare())
    assert all(torch.equal(found[name], weight) for name, weight in bare().items())


def expected_outputs(inputs: Tensor) -> Tensor:
    net = nn.Sequential(
        nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 3)
    )
    net.load_state_dict(bare())
    with torch.no_grad():
        return net.eval()(inputs)


INPUTS = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))


def export(
    file_format: str, out: str, *more: str, checkpoint: str = "best.ckpt"
) -> object:
    return status("export", checkpoint, "--format", file_format, "--out", out, *more)


# ---------------------------------------------------------------- files


def test_sparse(capsys: pytest.CaptureFixture[str]) -> None:
    assert export("sparse", "new/net.safetensors", "--network", "net") == 0
    assert_bare(load_sparse("new/net.safetensors"))
    assert read_metadata("new/net.safetensors") == {"network": "net"}
    shown = capsys.readouterr().out
    zeros = sum(int((trained()["state_dict"][n] == 0).sum()) for n in PRUNED)
    assert zeros == WEIGHTS * 3 // 4
    assert f"Masks of 2 layers: {zeros} of {WEIGHTS} weights pruned" in shown
    row = re.search(
        r"^0\.weight +32×8 +([\d.]+)% +1.02 kB +(\d+) B +sparse$", shown, re.M
    )
    assert row is not None
    first = int((bare()["0.weight"] == 0).sum())
    assert float(row[1]) == pytest.approx(100 * first / 256, abs=0.01)
    assert int(row[2]) == 256 // 8 + 4 * (256 - first)
    assert re.search(r"^file .* [\d.]+%$", shown, re.M)
    assert "Written: new/net.safetensors." in shown


def test_dense_with_and_without_the_prefix() -> None:
    assert export("dense", "net.pt", "--network", "net.") == 0
    assert_bare(torch.load("net.pt", weights_only=True))
    assert export("dense", "all.pt") == 0
    whole = torch.load("all.pt", weights_only=True)
    assert list(whole) == list(trained()["state_dict"])


def test_torch_export_of_the_whole_module_with_its_own_example() -> None:
    example = ["--config", "run.yaml", "--model", "toy_of_export.WithExample"]
    assert export("torch-export", "net.pt2", *example) == 0
    loaded = torch.export.load("net.pt2").module()
    assert torch.equal(loaded(INPUTS[:2]), expected_outputs(INPUTS[:2]))


# ---------------------------------------------------------------- refused


def short_message(capsys: pytest.CaptureFixture[str]) -> str:
    _, found, message = capsys.readouterr().err.partition(
        "lightning-woodfisher: error: "
    )
    assert found
    assert "Traceback" not in message
    assert len(message.splitlines()) <= 3
    return message


CONFIGURED = ["--config", "run.yaml", "--network", "net", "--input_shape", "2", "8"]


@pytest.mark.parametrize(
    ("file_format", "out", "more", "parts"),
    [
        ("sparse", "a.pt", [], ["--out a.pt must end in .safetensors"]),
        ("dense", "best.ckpt", [], ["must end in .pt or .pth or .bin"]),
        ("dense", "run.yaml/a.pt", [], ["--out='run.yaml/a.pt' cannot be written"]),
        (
            "sparse",
            "a.safetensors",
            ["--netwrok", "net"],
            ["--netwrok net has no effect", "Did you mean '--network'?"],
        ),
        ("sparse", "a.safetensors", ["--network", "nett"], ["Did you mean 'net'?"]),
        ("onnx", "a.onnx", [], ["add --config run.yaml"]),
        ("onnx", "a.onnx", CONFIGURED[:2], ["--input_shape", "example_input_array"]),
        (
            "torch-export",
            "a.pt2",
            [*CONFIGURED, "--model.width", "16"],
            ["best.ckpt does not fit the model", "net.0.weight"],
        ),
        (
            "semi-structured",
            "a.pt",
            CONFIGURED[:4],
            ["0 is not 2:4: row", 'selection.pattern="2:4"'],
        ),
    ],
)
def test_what_cannot_be_written(
    file_format: str,
    out: str,
    more: list[str],
    parts: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert export(file_format, out, *more) == 2
    message = capsys.readouterr().err.partition("lightning-woodfisher: error: ")[2]
    assert [part for part in parts if part not in message] == []
    assert "Traceback" not in message
    assert not Path(out).exists() or out == "best.ckpt"


def test_two_of_four_needs_a_gpu(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def keep_two(content: dict[str, Any]) -> None:
        for name, kept in callback_state(content)["masks"].items():
            kept.fill_(True)
            kept[:, 1::4] = kept[:, 2::4] = False
            content["state_dict"][name].masked_fill_(~kept, 0.0)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    path = change(keep_two)
    given = ["--config", "run.yaml", "--network", "net"]
    assert export("semi-structured", "a.pt", *given, checkpoint=path) == 2
    assert "0 is on cpu: 2:4 products need an NVIDIA GPU" in short_message(capsys)
    assert not Path("a.pt").exists()


class Foreign:
    """Not a plain value; unpickling it would run code."""

    def __reduce__(self) -> Any:
        return (os.mkdir, ("code_was_run",))


def test_no_code_of_a_checkpoint_is_run(capsys: pytest.CaptureFixture[str]) -> None:
    path = change(lambda content: content.update(hyper_parameters={"x": Foreign()}))
    assert export("sparse", "a.safetensors", checkpoint=path) == 2
    message = short_message(capsys)
    assert "contains an object of posix.mkdir" in message
    assert "save_hyperparameters(ignore=" in message
    assert not Path("code_was_run").exists()


def test_what_is_no_checkpoint(capsys: pytest.CaptureFixture[str]) -> None:
    Path("folder.ckpt").mkdir()
    Path("text.ckpt").write_text("hello world")
    Path("cut.ckpt").write_bytes(Path("best.ckpt").read_bytes()[:3000])
    Path("a.pt").write_text("from an earlier export")
    torch.save([1, 2], "list.ckpt")
    torch.save({"epoch": 3}, "numbers.ckpt")
    for name, part in {
        "absent.ckpt": "absent.ckpt is not a file",
        "folder.ckpt": "consolidate_checkpoint folder.ckpt",
        "text.ckpt": "text.ckpt is not a checkpoint",
        "cut.ckpt": "cut.ckpt is not a checkpoint, or it is cut off",
        "list.ckpt": "it neither is nor contains a state_dict",
        "numbers.ckpt": "it neither is nor contains a state_dict",
    }.items():
        assert export("dense", "a.pt", checkpoint=name) == 2
        assert part in short_message(capsys)
    assert Path("a.pt").read_text() == "from an earlier export"


def test_a_checkpoint_without_masks_is_exported_from_its_zeros(
    capsys: pytest.CaptureFixture[str],
) -> None:
    paths = [
        change(lambda content: content["callbacks"].clear(), "no_callback.ckpt"),
        change(lambda content: callback_state(content)["masks"].clear(), "dense.ckpt"),
        change(lambda content: content["state_dict"], "weights.ckpt"),
    ]
    for path in paths:
        assert export("sparse", "a.safetensors", checkpoint=path) == 2
        message = short_message(capsys)
        assert f"{path} has no masks" in message
        assert "--from_zeros" in message
        more = ["--from_zeros", "--network", "net"]
        assert export("sparse", "a.safetensors", *more, checkpoint=path) == 0
        assert "Masks were not read" in capsys.readouterr().out
        assert_bare(load_sparse("a.safetensors"))
        Path("a.safetensors").unlink()


def test_weights_and_masks_that_disagree(capsys: pytest.CaptureFixture[str]) -> None:
    def disturb(content: dict[str, Any]) -> None:
        weights, masks = content["state_dict"], callback_state(content)["masks"]
        first = weights[PRUNED[0]]
        gone = (~masks[PRUNED[0]]).nonzero()
        first[tuple(gone[0])], first[tuple(gone[1])] = 0.5, float("nan")
        # Zero all the same.
        first[tuple(gone[2])] = -0.0
        masks["net.1.weight"] = torch.ones(3, dtype=torch.bool)
        masks["gone.weight"] = torch.ones(3, dtype=torch.bool)
        masks["gone.too"] = torch.ones(3, dtype=torch.bool)

    path = change(disturb)
    pruned = int((~callback_state(trained())["masks"][PRUNED[0]]).sum())
    assert export("dense", "a.pt", checkpoint=path) == 2
    message = short_message(capsys)
    assert "disagree in 4 of 5 layers" in message
    assert f"net.0.weight: 2 of {pruned} pruned weights are not zero" in message
    assert "net.1.weight: mask has shape (3,), not (32,)" in message
    assert "gone.weight: no weight of this name and 1 more" in message
    assert export("dense", "a.pt", "--from_zeros", checkpoint=path) == 0


def test_a_later_state_of_the_callback(capsys: pytest.CaptureFixture[str]) -> None:
    path = change(lambda content: callback_state(content).update(version=2))
    assert export("dense", "a.pt", checkpoint=path) == 2
    assert "has version 2; this package reads up to 1" in short_message(capsys)


def test_what_is_no_tensor_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    path = change(lambda c: c["state_dict"].update({"metric._extra_state": {"n": 3}}))
    assert export("sparse", "a.safetensors", checkpoint=path) == 0
    assert "not tensors: metric._extra_state." in capsys.readouterr().out
    assert list(load_sparse("a.safetensors")) == list(trained()["state_dict"])


def test_a_config_may_stand_before_the_checkpoint() -> None:
    given = ["--config", "run.yaml", "best.ckpt", "--format", "dense", "--out", "a.pt"]
    assert status("export", *given) == 0
    written = torch.load("a.pt", weights_only=True)
    assert list(written) == list(trained()["state_dict"])


def test_masks_of_two_callbacks_are_joined() -> None:
    def split(content: dict[str, Any]) -> None:
        state = callback_state(content)
        content["callbacks"]["Another{}"] = {
            **state,
            "masks": {
                PRUNED[0]: torch.ones_like(state["masks"][PRUNED[0]]),
                PRUNED[1]: state["masks"].pop(PRUNED[1]),
            },
        }

    masks = read_checkpoint(change(split)).masks
    expected = callback_state(trained())["masks"]
    assert masks.keys() == expected.keys() == set(PRUNED)
    assert all(torch.equal(masks[name], expected[name]) for name in PRUNED)


def test_help_is_for_newcomers(capsys: pytest.CaptureFixture[str]) -> None:
    assert status("export", "--help") == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "{sparse,dense,shrunk,onnx,torch-export,semi-structured}" in shown
    assert "export best.ckpt --format onnx --config run.yaml" in shown
    assert status("export") == 2
    assert status("--help") == 0
    assert "export (a pruned checkpoint" in " ".join(capsys.readouterr().out.split())


# ---------------------------------------------------------------- the documentation


def test_every_block_of_the_page_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """The files that its commands write are those of the network, too."""
    blocks = read_blocks(ROOT / "docs" / "how-to" / "export.md")
    assert {block.language for block in blocks} == {"bash", "python", "text"}
    for block in blocks:
        if block.language == "python":
            exec(compile(block.text, str(block), "exec"), {})
        elif block.language == "bash":
            for words in split_commands(block.text):
                assert words[:2] == ["lightning-woodfisher", "export"]
                assert status(*words[1:]) == 0, capsys.readouterr().err
    assert_bare(load_sparse("model.safetensors"))
    assert_bare(torch.load("model.pt", weights_only=True))
    shown = capsys.readouterr().out
    assert "Largest difference to PyTorch's outputs:" in shown
    assert not Path("model.onnx.data").exists()
    session = onnxruntime.InferenceSession(
        "model.onnx", providers=["CPUExecutionProvider"]
    )
    (found,) = session.run(None, {session.get_inputs()[0].name: INPUTS.numpy()})
    assert torch.allclose(torch.from_numpy(found), expected_outputs(INPUTS), atol=1e-5)
    program = torch.export.load("model.pt2").module()
    assert torch.equal(program(INPUTS[:1]), expected_outputs(INPUTS[:1]))
