"""The scripts of ``completion``, in real shells, against what the parsers tell."""

from __future__ import annotations

import io
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout, suppress
from pathlib import Path

import pytest

from lightning_woodfisher.cli.main import main

pytestmark = pytest.mark.spawns

LIGHTNING = ("fit", "validate", "test", "predict")
OTHERS = (
    *("estimate", "sweep", "report", "export", "preset", "benchmark"),
    *("gpu-check", "completion"),
)

# What the shell itself does between a key and the function: it cuts the line into words.
ASK_BASH = """
. {script}
COMP_WORDS=({words})
COMP_CWORD=$(( ${{#COMP_WORDS[@]}} - 1 ))
_shtab_lightning_woodfisher
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
# Registers what the folder of the script has for commands, as a new shell does.
ASK_ZSH = """
fpath=({folder} $fpath)
autoload -Uz compinit && compinit -D -u
print -r -- $_comps[lightning-woodfisher]
"""
needs_zsh = pytest.mark.skipif(shutil.which("zsh") is None, reason="there is no zsh")


def shown(*arguments: str) -> str:
    text = io.StringIO()
    # --help and --print_config leave by SystemExit.
    with redirect_stdout(text), suppress(SystemExit):
        main(arguments)
    return text.getvalue()


@pytest.fixture(scope="module", autouse=True)
def _quiet() -> object:
    patch = pytest.MonkeyPatch()
    # Lightning's use of jsonargparse is behind its time.
    patch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    patch.setattr("sys.argv", ["lightning-woodfisher"])
    yield patch
    patch.undo()


@pytest.fixture(scope="module")
def scripts(_quiet: object, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("shtab")
    folder = tmp_path_factory.mktemp("scripts")
    for shell in ("bash", "zsh"):
        (folder / shell).write_text(shown("completion", shell))
    return folder


def ask(script: Path, words: Sequence[str], folder: Path | None = None) -> list[str]:
    """What bash offers for the last word."""
    given = " ".join(map(shlex.quote, ("lightning-woodfisher", *words)))
    code = ASK_BASH.format(script=shlex.quote(str(script)), words=given)
    # Nothing on the path: the program cannot have been asked, nor any other.
    shell = shutil.which("bash")
    assert shell is not None
    done = subprocess.run(
        [shell, "--norc", "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=folder,
        env={"PATH": ""},
    )
    assert done.stderr == ""
    return done.stdout.split()


def options_of(help_text: str) -> set[str]:
    """Options in the left column of a --help."""
    rows = re.findall(r"^  (-.*)$", help_text, flags=re.M)
    found = set()
    for row in rows:
        for part in re.split(r",\s+", re.split(r"\s{2,}", row)[0]):
            found.add(part.split()[0].rstrip("."))  # a sentence ends with --help
    return found


@pytest.mark.parametrize("command", [*LIGHTNING, *OTHERS])
def test_options_are_those_of_the_help(command: str, scripts: Path) -> None:
    own = options_of(shown(command, "--help"))
    assert {"-h", "--help"} < own or command in ("preset", "completion")
    told = own
    if command in ("estimate", "sweep", "export"):
        told = own | options_of(shown("fit", "--help"))
    offered = ask(scripts / "bash", [command, "-"])
    assert len(offered) == len(set(offered))
    assert set(offered) >= told
    # The others are arguments of the classes that an option accepts.
    for option in set(offered) - told:
        assert any(option.startswith(f"{name}.") for name in told)


def test_subcommands_are_those_of_the_help(scripts: Path) -> None:
    text = shown("--help")
    lightning = re.search(r"\{([\w,]+)\}", text)
    assert lightning is not None
    others = text[text.index("Other commands") :].partition(":")[2]
    told = {*lightning[1].split(","), *re.findall(r"([\w-]+)\s\(", others)}
    assert set(ask(scripts / "bash", [""])) == told == {*LIGHTNING, *OTHERS}
    assert ask(scripts / "bash", ["be"]) == ["benchmark"]
    assert ask(scripts / "bash", ["-c", "run.yaml", "val"]) == ["validate"]
    assert set(ask(scripts / "bash", ["-"])) == options_of(text)


VALUES = {
    "choices": (
        ["export", "last.ckpt", "--format", "s"],
        {"sparse", "shrunk", "semi-structured"},
    ),
    "several values": (
        ["sweep", "--criterion", "magnitude", "woodt"],
        {"woodtaylor"},
    ),
    "literal": (["fit", "--trainer.precision", "bf16-"], {"bf16-true", "bf16-mixed"}),
    "flag": (["fit", "--trainer.detect_anomaly", ""], {"true", "false"}),
    "alias": (["fit", "--trainer.strategy", "au"], {"auto"}),
    "callback": (
        ["fit", "-c", "run.yaml", "--trainer.callbacks", "Wood"],
        {"WoodFisherPruningCallback"},
    ),
    "appended callback": (
        ["estimate", "--trainer.callbacks+", "SOSP"],
        {"SOSPPruningCallback"},
    ),
    "subcommand": (["comp"], {"completion"}),
    "choice of an option without a type": (["sweep", "--mode", "m"], {"min", "max"}),
    "place": (["preset", "resnet50"], {"resnet50_90"}),
    "nothing known": (["fit", "--trainer.max_epochs", ""], set()),
    "option after a flag": (["estimate", "--json", "--spars"], {"--sparsity"}),
    "argument of the class": (
        [
            *("fit", "--trainer.callbacks", "WoodFisherPruningCallback"),
            "--trainer.callbacks.fisher.num",
        ],
        {"--trainer.callbacks.fisher.num_gradients"},
    ),
    "value of such an argument": (
        ["fit", "--trainer.callbacks.criterion", "kf"],
        {"kfac"},
    ),
    "class of such an argument": (
        ["fit", "--trainer.callbacks.schedule", "Poly"],
        {"PolynomialSchedule"},
    ),
    "argument of that class": (
        [
            *("fit", "--trainer.callbacks.schedule", "PolynomialSchedule"),
            "--trainer.callbacks.schedule.end_",
        ],
        {
            "--trainer.callbacks.schedule.end_epoch",
            "--trainer.callbacks.schedule.end_step",
        },
    ),
    "argument of an optimizer": (
        ["fit", "--optimizer", "AdamW", "--optimizer.weight"],
        {"--optimizer.weight_decay"},
    ),
}


@pytest.mark.parametrize(("words", "expected"), VALUES.values(), ids=VALUES)
def test_values(words: list[str], expected: set[str], scripts: Path) -> None:
    assert set(ask(scripts / "bash", words)) == expected


@needs_zsh
def test_zsh_loads_the_script(scripts: Path, tmp_path: Path) -> None:
    """The way of the documentation: a file in a folder of fpath, loaded when needed."""
    shutil.copy(scripts / "zsh", tmp_path / "_lightning-woodfisher")
    subprocess.run(["zsh", "-n", str(scripts / "zsh")], check=True)
    code = ASK_ZSH.format(folder=shlex.quote(str(tmp_path)))
    done = subprocess.run(
        ["zsh", "-f", "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout == "_lightning-woodfisher\n"


@pytest.mark.parametrize(
    "words",
    [
        ["fit", "--config"],
        ["sweep", "--ckpt_path"],
        ["report"],
        ["export"],
        ["export", "last.ckpt", "--format", "sparse", "--out"],
        ["fit", "--trainer.callbacks.report_path"],
    ],
)
def test_files(words: list[str], scripts: Path, tmp_path: Path) -> None:
    for name in ("run.yaml", "last.ckpt", "run.json"):
        (tmp_path / name).touch()
    assert set(ask(scripts / "bash", [*words, "ru"], tmp_path)) == {
        "run.yaml",
        "run.json",
    }
    assert ask(scripts / "bash", [*words, "./l"], tmp_path) == ["./last.ckpt"]


def test_folders(scripts: Path, tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "run.yaml").touch()
    words = ["fit", "--trainer.default_root_dir", "ru"]
    assert ask(scripts / "bash", words, tmp_path) == ["runs"]


def test_bash_itself_knows_the_function(scripts: Path) -> None:
    code = f". {shlex.quote(str(scripts / 'bash'))}; complete -p lightning-woodfisher"
    done = subprocess.run(["bash", "-c", code], stdout=subprocess.PIPE, check=True)
    assert done.stdout.decode().split()[-3:] == [
        "-F",
        "_shtab_lightning_woodfisher",
        "lightning-woodfisher",
    ]


def test_names_of_callbacks_are_understood(
    scripts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An option of a class that the script offers is one that fit takes."""
    callback = "--trainer.callbacks", "WoodFisherPruningCallback"
    flags = ask(scripts / "bash", ["fit", *callback, "--trainer.callbacks.fisher.c"])
    assert flags == [
        "--trainer.callbacks.fisher.collection",
        "--trainer.callbacks.fisher.centered",
    ]
    given = [*callback, f"{flags[1]}=true", f"{flags[0]}=loop"]
    text = shown("fit", *given, "--print_config")
    assert "class_path: lightning_woodfisher.WoodFisherPruningCallback" in text
    assert "centered: true" in text
    assert "collection: loop" in text


def test_an_unknown_shell_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "fish"]) == 2
    assert "invalid choice: 'fish'" in capsys.readouterr().err


def test_without_the_extra_the_command_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["completion", "bash"]) == 2
    written = capsys.readouterr()
    assert written.out == ""
    assert "pip install 'lightning-woodfisher[completion]'" in written.err
    assert len(written.err.splitlines()) == 1
