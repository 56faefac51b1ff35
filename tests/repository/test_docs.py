"""The documentation is true: its code runs, its commands and links lead somewhere."""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import inspect
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml
from documentation import (
    PAGES,
    ROOT,
    Block,
    anchors,
    read_blocks,
    read_commands,
    read_links,
    read_prose,
)
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_woodfisher import FisherConfig, WoodFisherPruningCallback, prune
from lightning_woodfisher.cli.main import main

# What a reader has: a module, data, and a loss. Small, but with enough samples for the
# default of 256 gradients of 16.
MODULE = """
import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def samples(count=4096):
    inputs = torch.randn(count, 8, generator=torch.Generator().manual_seed(0))
    return TensorDataset(inputs, inputs[:, :3].argmax(1))


class MyModule(pl.LightningModule):
    def __init__(self, width: int = 16, learning_rate: float = 0.1):
        super().__init__()
        self.learning_rate = learning_rate
        self.body = nn.Sequential(nn.Linear(8, width), nn.ReLU())
        self.classifier = nn.Linear(width, 3)

    def forward(self, inputs):
        return self.classifier(self.body(inputs))

    def compute_loss(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def training_step(self, batch, batch_idx):
        loss = self.compute_loss(batch, batch_idx)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        accuracy = (self(batch[0]).argmax(1) == batch[1]).float().mean()
        self.log("val_acc", accuracy)

    def train_dataloader(self):
        return DataLoader(samples(), 1024)

    def val_dataloader(self):
        return DataLoader(samples(64), 64)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.learning_rate)


class MyData(pl.LightningDataModule):
    def train_dataloader(self):
        return DataLoader(samples(), 1024)

    def val_dataloader(self):
        return DataLoader(samples(64), 64)
"""
# Run with checkpoints of their own, in the test of that command.
RUN_ELSEWHERE = {"export.md": "cli/test_export.py"}
QUIET = [
    "--seed_everything=0",
    *("--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.logger=false"),
    *("--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"),
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A reader's folder."""
    (tmp_path / "my_project.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    monkeypatch.setattr(sys, "argv", ["lightning-woodfisher"])
    monkeypatch.setattr(sys, "path", [str(tmp_path), str(ROOT), *sys.path])
    yield tmp_path
    sys.modules.pop("my_project", None)


def stand_ins() -> dict[str, Any]:
    """What the pages take for granted: names that the reader has already."""
    import my_project

    torch.manual_seed(0)
    data: TensorDataset = my_project.samples()
    model = my_project.MyModule()

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    def evaluate(model: nn.Module) -> float:
        inputs, labels = data.tensors
        return float((model(inputs).argmax(1) == labels).float().mean())

    return {
        "model": model,
        "module": model,
        "data": my_project.MyData(),
        "dataset": data,
        "loss_fn": loss_fn,
        "evaluate": evaluate,
    }


def pages(language: str) -> list[Any]:
    return [
        pytest.param(page, id=page.relative_to(ROOT).as_posix())
        for page in PAGES
        if page.exists() and any(b.language == language for b in read_blocks(page))
    ]


def to_run(page: Path, language: str) -> list[Block]:
    blocks = read_blocks(page)
    return [b for b in blocks if b.language == language and b.reason is None]


# ---------------------------------------------------------------- code


def quiet_trainer(**settings: Any) -> pl.Trainer:
    fixed = {"accelerator": "cpu", "devices": 1, "logger": False}
    quiet: dict[str, Any] = {
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    # Lightning warns of a folder that an earlier Trainer has written to.
    quiet["default_root_dir"] = tempfile.mkdtemp(dir=Path.cwd())
    return _Trainer(**{**quiet, **settings, **fixed})


_Trainer = pl.Trainer


@pytest.mark.usefixtures("own_criteria")
@pytest.mark.parametrize("page", pages("python"))
def test_python_runs(page: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of a page share their names; what a page does not make itself is fresh."""
    if page.name in RUN_ELSEWHERE:
        assert page.name in (ROOT / "tests" / RUN_ELSEWHERE[page.name]).read_text()
        return
    for package in ("lightning", "lightning.pytorch"):
        monkeypatch.setattr(f"{package}.Trainer", quiet_trainer)
    names: dict[str, Any] = {}
    given: dict[str, Any] = {}
    for block in to_run(page, "python"):
        for name, value in stand_ins().items():
            if names.get(name) is given.get(name):
                names[name] = given[name] = value
        try:
            exec(compile(block.text, str(block), "exec"), names)
        except BaseException as error:
            raise AssertionError(f"{block}: {error!r}") from error


@pytest.mark.parametrize("page", pages("yaml"))
def test_yaml_is_read(page: Path, folder: Path) -> None:
    """What configures a Trainer is run; the rest must at least be YAML."""
    for block in to_run(page, "yaml"):
        read = yaml.compose(block.text)
        keys = {key.value for key, _ in read.value} if read.id == "mapping" else set()
        if "trainer" not in keys:
            continue
        Path("page.yaml").write_text(block.text)
        model = [] if "model" in keys else ["--model=my_project.MyModule"]
        if "WoodFisherPruningCallback" not in block.text:
            with pytest.raises(SystemExit) as end:
                main(["fit", "--config=page.yaml", *model, "--print_config"])
            assert end.value.code in (0, None), str(block)
            continue
        # The last callback is the pruning one, on all pages.
        few = ["--trainer.callbacks.init_args.fisher.num_gradients=8"]
        done = main(["fit", "--config=page.yaml", *model, *few, *QUIET])
        assert done == 0, str(block)


# ---------------------------------------------------------------- commands


def known_options(command: str, capsys: pytest.CaptureFixture[str]) -> set[str]:
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0
    return set(re.findall(r"(?<![\w-])--?[a-zA-Z][\w.-]*", capsys.readouterr().out))


# Of a class that only the configuration names.
_OF_A_CLASS = re.compile(
    r"--(model|data|optimizer|lr_scheduler|trainer\.callbacks)[.+]"
)
# Commands that hand on what they do not know themselves to the parser of fit.
_READ_FIT = {"sweep", "estimate", "export"}
# Names of the reader's files in commands of the pages.
_OF_THE_READER = {"run.yaml", "config.yaml", "preset.yaml", "best.ckpt", "last.ckpt"}


def test_commands_exist(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    """Subcommands, their options, and the files of the repository that they name."""
    options: dict[str, set[str]] = {}
    wrong: list[str] = []
    for page in PAGES:
        for words in read_commands(page) if page.exists() else []:
            if words[0] != "lightning-woodfisher" or len(words) < 2:
                continue
            name = words[1]
            for command in {name, "fit"} if name in _READ_FIT else {name}:
                if command not in options and not command.startswith("-"):
                    options[command] = known_options(command, capsys)
            known = options.get(name, {"--help"}) | {"--help"}
            known |= options["fit"] if name in _READ_FIT else set()
            for word in words[1:]:
                option = word.partition("=")[0]
                is_ours = "/" in word and word.endswith((".yaml", ".py", ".sh"))
                ours = {word} if is_ours else set()
                if option.startswith("-") and option.lstrip("-")[:1].isalpha():
                    if option not in known and not _OF_A_CLASS.match(option):
                        wrong.append(f"{page.name}: {name} has no {option}")
                elif is_ours and not (ROOT / word).is_file():
                    wrong.append(f"{page.name}: there is no {word}")
                elif word.endswith(".yaml") and word not in _OF_THE_READER | ours:
                    wrong.append(f"{page.name}: {word} of {words}")
    assert wrong == []
    assert {"fit", "estimate", "sweep", "export", "preset", "benchmark"} <= set(options)


def _source(words: list[str]) -> Path:
    """The script that ``python`` is asked to run."""
    if words[1] == "-m":
        return ROOT / (words[2].replace(".", "/") + ".py")
    return ROOT / words[1]


def test_scripts_and_targets_exist() -> None:
    """``python examples/…``, ``make …`` and ``pip install``, with options and extras."""
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
    project = (ROOT / "pyproject.toml").read_text()
    listed = project.partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    known = re.findall(r"^([\w-]+) = \[", listed, re.M)
    wrong, seen = [], set()
    for page in PAGES:
        for words in read_commands(page) if page.exists() else []:
            seen.add(words[0])
            if words[0] == "make":
                plain = [w for w in words[1:] if "=" not in w]
                wrong += [f"make {w}" for w in plain if w not in targets]
            elif words[0] == "python" and len(words) > 1:
                if words[1] == "-m" and not words[2].startswith("examples"):
                    continue
                path = _source(words)
                if not path.is_file():
                    wrong.append(f"{page.name}: there is no {path}")
                    continue
                # Scripts share their options with modules beside them.
                shared = [
                    ROOT / "examples" / "comparison.py",
                    *path.parent.glob("*.py"),
                ]
                text = "".join(file.read_text() for file in {path, *shared})
                given = [w.partition("=")[0] for w in words if w.startswith("--")]
                wrong += [f"{path}: {o}" for o in given if o not in text]
            elif words[:2] == ["pip", "install"]:
                for extras in re.findall(r"\[([\w,]+)\]", " ".join(words)):
                    wrong += [e for e in extras.split(",") if e not in known]
    assert wrong == []
    assert {"make", "python", "pip"} <= seen


# ---------------------------------------------------------------- messages


def message_templates() -> list[str]:
    """Texts of the package, with … for what is put in."""
    found = []
    for path in sorted((ROOT / "lightning_woodfisher").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [
                    p.value if isinstance(p, ast.Constant) else "…" for p in node.values
                ]
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def test_messages_of_the_troubleshooting_are_those_of_the_package() -> None:
    text = (ROOT / "docs" / "how-to" / "troubleshooting.md").read_text()
    cells = re.findall(r"^\| (`.*?`) \|", text, re.M)
    messages = [m for cell in cells for m in re.findall(r"`([^`]+)`", cell)]
    templates = message_templates()
    absent = []
    for message in messages:
        parts = [re.escape(part) for part in message.split("…")]
        wanted = re.compile(".*".join(parts), re.S)
        if not any(wanted.search(template) for template in templates):
            absent.append(message)
    assert absent == []
    assert len(messages) > 20


@pytest.mark.parametrize(
    "settings",
    [
        {"fisher": {"num_gradient": 8}},
        {"target_sparsity": 90},
        {
            "schedule": {
                "class_path": "PolynomialSchedule",
                "init_args": {"start_epoch": 2, "end_epoch": 1},
            }
        },
    ],
    ids=["misspelt", "per cent", "end before start"],
)
def test_answers_to_frequent_mistakes_are_quoted(
    settings: dict[str, Any], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    callback = {"class_path": "WoodFisherPruningCallback", "init_args": settings}
    config = {"trainer": {"callbacks": [callback]}, "model": "my_project.MyModule"}
    Path("run.yaml").write_text(yaml.safe_dump(config))
    # Some are found by the parser, which leaves by SystemExit.
    with contextlib.suppress(SystemExit):
        main(["fit", "--config=run.yaml", *QUIET])
    said = capsys.readouterr().err.strip().splitlines()
    page = (ROOT / "docs" / "how-to" / "troubleshooting.md").read_text()
    answer = said[-1].strip().removeprefix("lightning-woodfisher: error: ")
    assert len(answer) > 30
    assert answer in page


# ---------------------------------------------------------------- links


def broken_links(page: Path, pages: Callable[[Path], set[str]]) -> list[str]:
    broken = []
    for link in read_links(page):
        target, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", link):
            continue
        path = (page.parent / target).resolve() if target else page
        if not path.exists():
            broken.append(f"{page.name}: {link} leads nowhere")
        elif anchor and anchor not in pages(path):
            broken.append(f"{page.name}: {path.name} has no heading #{anchor}")
    return broken


def test_links_lead_somewhere(tmp_path: Path) -> None:
    pages = [page for page in PAGES if page.exists()]
    assert [link for page in pages for link in broken_links(page, anchors)] == []
    assert sum(len(read_links(page)) for page in pages) > 10

    page = tmp_path / "page.md"
    page.write_text("# One `x` two\n[a](absent.md) [b](#one-x-two) [c](#three)\n")
    found = broken_links(page, anchors)
    assert [link.split(": ")[1] for link in found] == [
        "absent.md leads nowhere",
        "page.md has no heading #three",
    ]


def test_pages_read_well_where_sphinx_is_missing() -> None:
    """GitHub shows roles, such as {class}, and labels as they are written."""
    roles = r"\{(?:py:)?(?:class|func|meth|mod|attr|data|exc|ref|doc|term)\}`"
    found = [
        f"{page.name}: {text}"
        for page in PAGES
        for text in re.findall(rf"{roles}|^\([\w-]+\)=$", read_prose(page), re.M)
    ]
    assert found == []


def test_the_tables_of_settings_are_those_of_the_code() -> None:
    path = ROOT / "docs" / "write_settings.py"
    spec = importlib.util.spec_from_file_location("write_settings", path)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    page = (ROOT / "docs" / "reference" / "settings.md").read_text("utf-8")
    assert page == script.render(), "run python docs/write_settings.py"
    for public in (WoodFisherPruningCallback, FisherConfig, prune):
        for name in inspect.signature(public).parameters:
            assert re.search(rf"^\| `{name}` \| [^|]+ \| \S[^|]{{9}}", page, re.M), name


def test_prose_has_short_lines() -> None:
    """Tables, figures and blocks cannot be wrapped."""
    long = [
        f"{page.name}: {line}"
        for page in (*PAGES, ROOT / "CHANGELOG.md")
        for line in read_prose(page).splitlines()
        if len(line) > 100 and not re.match(r"\||\s*<|!\[[^]]*\]\(\S*\)$", line)
    ]
    assert long == []


def test_what_is_not_run_has_a_reason() -> None:
    blocks = [b for page in PAGES if page.exists() for b in read_blocks(page)]
    code = [b for b in blocks if b.language in {"python", "yaml", "bash", "shell"}]
    exempt = [b for b in code if b.reason is not None]
    assert len(code) > 20
    assert len(exempt) <= len(code) // 10, [str(b) for b in exempt]
    assert all(b.reason for b in exempt)
    known = {"python", "yaml", "bash", "shell", "text", "{eval-rst}", "{toctree}", ""}
    assert {b.language for b in blocks} <= known | {"{include}", "toml", "dockerfile"}
