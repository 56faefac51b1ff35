"""What is read runs no code, and an import loads no more than it must."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import lightning_woodfisher
from lightning_woodfisher.cli.main import main

PACKAGE = Path(lightning_woodfisher.__file__).parent

# Of a pickle only the error may be named: it is what torch.load raises.
ALLOWED = {"pickle.UnpicklingError"}
PICKLES = {"pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
CALLS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen"}
YAML = {
    "load",
    "load_all",
    "unsafe_load",
    "unsafe_load_all",
    "full_load",
    "full_load_all",
}


def unsafe(source: str) -> Iterator[str]:
    """Find what could run code that comes from a file.

    Args:
        source: of a module.

    Yields:
        Line and full name of each use.
    """
    tree = ast.parse(source)
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                bound = alias.asname or alias.name.partition(".")[0]
                names[bound] = alias.name if alias.asname else bound
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                path = f"{node.module}.{alias.name}"
                names[alias.asname or alias.name] = path
                if node.module in PICKLES and path not in ALLOWED:
                    yield f"{node.lineno}: {path}"

    def resolve(node: ast.expr) -> str:
        if isinstance(node, ast.Attribute):
            return f"{resolve(node.value)}.{node.attr}"
        return names.get(node.id, node.id) if isinstance(node, ast.Name) else ""

    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            path = resolve(node)
            if path.partition(".")[0] in PICKLES and path not in ALLOWED:
                yield f"{node.lineno}: {path}"
        if isinstance(node, ast.Call):
            path = resolve(node.func)
            given = {
                each.arg: each.value.value
                for each in node.keywords
                if isinstance(each.value, ast.Constant)
            }
            module, _, name = path.rpartition(".")
            if (
                path in CALLS
                or (path == "torch.load" and given.get("weights_only") is not True)
                or (module == "yaml" and name in YAML)
                or (path == "numpy.load" and given.get("allow_pickle", False))
                or given.get("shell", False)
            ):
                yield f"{node.lineno}: {path}"


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.load('f')",
        "import torch as t\nt.load('f', weights_only=False)",
        "import torch\ntorch.load('f', weights_only=flag)",
        "from torch import load as read\nread('f')",
        "import pickle\npickle.loads(b'')",
        "import pickle as p\nf = p.Unpickler",
        "from pickle import load",
        "import marshal\nmarshal.loads(b'')",
        "import yaml\nyaml.load(text, Loader)",
        "from yaml import unsafe_load\nunsafe_load(text)",
        "def f():\n    import numpy as np\n    np.load('f', allow_pickle=True)",
        "eval(text)",
        "exec(text)",
        "import os\nos.system(text)",
        "import subprocess\nsubprocess.run(text, shell=True)",
    ],
)
def test_the_scan_finds(source: str) -> None:
    assert list(unsafe(source))


def test_the_scan_lets_pass_what_is_safe() -> None:
    source = (
        "import pickle, re, torch, yaml\n"
        "try:\n    torch.load('f', weights_only=True)\n"
        "except pickle.UnpicklingError:\n    yaml.safe_load(re.compile('a').pattern)\n"
        "model.eval()\n"
    )
    assert list(unsafe(source)) == []


def test_nothing_in_the_package_runs_what_it_reads() -> None:
    files = sorted(PACKAGE.rglob("*.py"))
    assert len(files) > 50
    found = {
        str(file.relative_to(PACKAGE)): uses
        for file in files
        if (uses := list(unsafe(file.read_text(encoding="utf-8"))))
    }
    assert found == {}


class _Touch:
    """Unpickled by whoever trusts its file, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize(
    "arguments",
    [["report"], ["export", "--format", "dense", "--out", "out.pt"]],
    ids=["report", "export"],
)
def test_a_checkpoint_that_runs_code_is_refused(
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"callbacks": {"evil": _Touch(tmp_path / "ran")}}, "evil.ckpt")
    torch.load("evil.ckpt", weights_only=False)
    assert Path("ran").exists(), "the checkpoint is harmless: it would prove nothing"
    Path("ran").unlink()
    command, *options = arguments
    assert main([command, "evil.ckpt", *options]) == 2
    assert not Path("ran").exists()
    assert "evil.ckpt" in capsys.readouterr().err


OPTIONAL = [
    "wandb",
    "matplotlib",
    "torch_pruning",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "safetensors",
    "sklearn",
    "tensorboard",
]
_IMPORT = """
import json, sys
import lightning.pytorch
before = set(sys.modules)
import warnings
warnings.simplefilter("error")
import lightning_woodfisher
print(json.dumps(sorted(set(sys.modules) - before)))
"""


@pytest.mark.spawns
def test_the_package_imports_without_warnings_and_without_extras() -> None:
    # Lightning imports some of them itself, where they are installed.
    done = subprocess.run(
        [sys.executable, "-c", _IMPORT], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    loaded = {name.partition(".")[0] for name in json.loads(done.stdout)}
    assert "lightning_woodfisher" in loaded
    assert loaded.isdisjoint(OPTIONAL)
