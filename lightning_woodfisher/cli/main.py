"""The command ``lightning-woodfisher``: LightningCLI with the callbacks at hand."""

from __future__ import annotations

__all__ = ["condense_error", "explain_wandb", "main"]

import argparse
import dataclasses
import inspect
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import lightning.pytorch as pl
from jsonargparse import ActionConfigFile
from lightning.pytorch.cli import (
    LightningArgumentParser,
    LightningCLI,
    SaveConfigCallback,
)
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_woodfisher.base.errors import ConfigurationError, PruningError, nearest
from lightning_woodfisher.benchmark import command as benchmark
from lightning_woodfisher.callbacks.presets import PRESETS, to_yaml
from lightning_woodfisher.callbacks.structured import (
    HAPPruningCallback,
    SOSPPruningCallback,
    StructuredPruningCallback,
)
from lightning_woodfisher.callbacks.woodfisher import WoodFisherPruningCallback
from lightning_woodfisher.cli import estimate, export, report, sweep
from lightning_woodfisher.cli.completion import run_completion
from lightning_woodfisher.fisher.config import FisherConfig
from lightning_woodfisher.pruning.config import (
    SelectionConfig,
)
from lightning_woodfisher.pruning.schedule import (
    ConstantSchedule,
    OneShotSchedule,
    PolynomialSchedule,
)
from lightning_woodfisher.structured.config import StructureConfig

# Classes whose short name works in YAML, and whose arguments a typo may have meant.
_OUR_CLASSES = (
    WoodFisherPruningCallback,
    StructuredPruningCallback,
    SOSPPruningCallback,
    HAPPruningCallback,
    PolynomialSchedule,
    OneShotSchedule,
    ConstantSchedule,
)
_OUR_CONFIGS = (FisherConfig, SelectionConfig, StructureConfig)

# First words of a saved config.
_SAVED = "lightning.pytorch=="
# Lines of jsonargparse that repeat the question instead of answering it.
_NOISE = re.compile(
    r"\s*((- )?Does not validate against any|Subtypes:|Errors:$|- Not a valid subclass of|"
    r"Subclass types expect one of|- an? (class path|dict)|"
    r"- Expected a <class 'NoneType'>|Given value type:|Given value: [\[{])"
)
# What an unknown name looks like in the messages of jsonargparse.
_UNKNOWN = re.compile(
    r"(?:does not accept option|Expected a dot import path string:) '?([\w.]+)'?"
    r"|Option '([\w.]+)' is not accepted"
    r"|Key '([\w.]+)' is not expected"
    r"|unrecognized arguments: --([\w.]+)"
)
_CHOICE = re.compile(
    r"Expected a typing\.Literal\[(?P<known>.*)\]\. Got value: (?P<value>.*)"
    r"|invalid choice: '(?P<word>.*)' \(choose from (?P<words>.*)\)"
)
# What to write where a message says only what is missing.
_REMEDIES = (
    (
        re.compile(r"arguments are required: (?:\w+\.)?model$"),
        "Name your module, as model: package.module.MyModule in the YAML.",
    ),
    (
        re.compile(r"but lightning_woodfisher\.PruningSchedule is abstract$"),
        "Name one, as class_path: PolynomialSchedule, with its settings in init_args.",
    ),
)
_CLASS_PATH = re.compile(r"Problem with given class_path '([\w.]+)'")
_NO_ATTRIBUTE = re.compile(r"module '([\w.]+)' has no attribute '(\w+)'")

_OTHER_COMMANDS = (
    "Other commands, each with a --help of its own: estimate (what a pruning step will "
    "cost), sweep (one-shot settings compared on a checkpoint), report (what a run has "
    "pruned, as a table and as a page), export (a pruned checkpoint as sparse or dense "
    "file, ONNX or torch.export), preset (settings of published results, as YAML), "
    "benchmark (the engines on this machine), completion (of this command in bash or zsh)."
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: what follows the command's name; None for ``sys.argv``.

    Returns:
        Exit status: 0, or 2 after an error of this package, which a message explains.
        ``--help`` and refused arguments leave by SystemExit, as they do in argparse.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    # Like `python -m`: classes of a config are often in the folder one works in.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        if given[:1] == ["benchmark"]:
            return benchmark.main(given[1:])
        if given[:1] == ["estimate"]:
            return estimate.run_estimate(given[1:], _CLI)
        if given[:1] == ["sweep"]:
            return sweep.run_sweep_command(given[1:], _CLI)
        if given[:1] == ["export"]:
            return export.run_export(given[1:], _CLI)
        if given[:1] == ["report"]:
            return report.run_report_command(given[1:])
        if given[:1] == ["preset"]:
            return _run_preset(given[1:])
        if given[:1] == ["completion"]:
            return run_completion(given[1:], _CLI, _PARSERS, _READ_FIT)
        _CLI(
            # Lightning warns of arguments that are given beside those of the process.
            args=None if arguments is None else given,
            parser_kwargs={"epilog": _OTHER_COMMANDS},
            save_config_callback=_SaveConfig,
            save_config_kwargs={"overwrite": True},
        )
    except Exception as error:
        ours = _find_ours(error) or explain_wandb(error)
        if ours is None:
            raise
        sys.stderr.write(f"lightning-woodfisher: error: {ours}\n")
        return 2
    return 0


def _make_preset_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lightning-woodfisher preset",
        description="Print settings of a published result as YAML, to be passed as a "
        "second --config of fit: lightning-woodfisher preset resnet50_90 > preset.yaml",
    )
    parser.add_argument("name", nargs="?", default="", help=", ".join(PRESETS))
    return parser


def _run_preset(arguments: Sequence[str]) -> int:
    sys.stdout.write(to_yaml(_make_preset_parser().parse_args(arguments).name))
    return 0


_PARSERS = {
    "estimate": estimate.make_parser,
    "sweep": sweep.make_parser,
    "report": report.make_parser,
    "export": export.make_parser,
    "preset": _make_preset_parser,
    "benchmark": benchmark.make_parser,
}
# Commands that hand on what they do not know themselves to the parser of fit.
_READ_FIT = ("estimate", "sweep", "export")


def _find_ours(error: BaseException | None) -> BaseException | None:
    """Look for an error of this package among the causes; jsonargparse wraps them."""
    while error is not None and not isinstance(
        error, ConfigurationError | PruningError
    ):
        for other in _of_alternatives(error):
            ours = _find_ours(other)
            if ours is not None:
                return ours
        # Not __context__: an error in the handler of ours is a bug of somebody else.
        error = error.__cause__
    return error


def explain_wandb(error: BaseException | None) -> str | None:
    """Say what to do when W&B cannot be reached, or is not there.

    Args:
        error: as the logger raises it.

    Returns:
        What it says, and the remedy; None for an error of something else.
    """
    while error is not None:
        told = next(iter(str(error).splitlines()), type(error).__name__)
        if isinstance(error, ModuleNotFoundError) and "wandb" in told:
            return (
                f"WandbLogger: {told}. pip install 'lightning-woodfisher[wandb]', or take "
                "another logger, such as CSVLogger."
            )
        if type(error).__module__.partition(".")[0] == "wandb":
            return (
                f"W&B: {told} Without an account or a connection set WANDB_MODE=offline (or "
                "offline: true of the WandbLogger); `wandb sync` sends the run later."
            )
        error = error.__cause__
    return None


def _of_alternatives(error: BaseException) -> list[BaseException]:
    """Errors of the alternatives of a union, of which jsonargparse names one as cause."""
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    if last is None or last.tb_frame.f_code.co_name != "raise_union_unexpected_value":
        return []
    found = last.tb_frame.f_locals.get("exceptions", ())
    # The first one is the cause.
    return [each for each in found[1:] if isinstance(each, BaseException)]


def condense_error(message: str) -> str:
    """Keep what a user can act on of a parser's message, and suggest the nearest name.

    Args:
        message: as jsonargparse words it, often a page long.

    Returns:
        The lines that say what is wrong; the whole message when none does.
    """
    lines = [line for line in message.splitlines() if line.strip()]
    lines = [line for line in lines if not _NOISE.match(line)] or message.splitlines()
    indents = sorted({_indent(line) for line in lines})
    told, owner = [], ""
    for line in lines:
        path = _CLASS_PATH.search(line)
        owner = path.group(1) if path else owner
        depth = "  " * indents.index(_indent(line))
        told.append(depth + line.strip().removeprefix("- ") + _suggest(line, owner))
    return "\n".join(told)


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def _suggest(line: str, owner: str) -> str:
    """Find what a line of a message may have meant; ``owner`` is the class it is about."""
    hint = ""
    if unknown := _UNKNOWN.search(line):
        name = next(group for group in unknown.groups() if group)
        known = [*_parameters(_import(owner)), *_known_names()]
        # Of a dotted name, the first part that nobody knows is the misspelt one.
        parts = [part for part in name.split(".") if part not in known]
        hint = nearest(parts[0], known) if parts else ""
    elif choice := _CHOICE.search(line):
        known = re.findall(r"[\w.-]+", choice["known"] or choice["words"])
        hint = nearest(choice["value"] or choice["word"], known)
    elif absent := _NO_ATTRIBUTE.search(line):
        module, name = absent.groups()
        hint = nearest(name, dir(sys.modules.get(module)))
    for missing, remedy in _REMEDIES:
        if missing.search(line):
            hint = f" {remedy}"
    return f".{hint}" if hint else ""


def _import(path: str) -> Any:
    """Give the class of a path that the parser has imported, None when it has not."""
    module, _, name = path.rpartition(".")
    return getattr(sys.modules.get(module), name, None)


def _parameters(owner: Any) -> Iterator[str]:
    for cls in inspect.getmro(owner) if inspect.isclass(owner) else ():
        if "__init__" in vars(cls) and cls is not object:
            yield from inspect.signature(vars(cls)["__init__"]).parameters


class _CLI(LightningCLI):
    """LightningCLI with short error messages."""

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        kwargs.setdefault("dump_header", [f"{_SAVED}{pl.__version__}"])
        parser = _Parser(**kwargs)
        parser.add_argument(
            "-c",
            "--config",
            action=ActionConfigFile,
            help="Path to a configuration file in json or yaml format.",
        )
        return parser


class _SaveConfig(SaveConfigCallback):
    """Writes over what an earlier run has saved, but not over a file of the user's."""

    def setup(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str
    ) -> None:
        folder = trainer.log_dir  # a collective: every rank must ask
        if folder is not None and trainer.is_global_zero:
            path = Path(folder, self.config_filename)
            if path.is_file() and not path.read_text().startswith(f"# {_SAVED}"):
                self.config_filename = "config.saved.yaml"
                rank_zero_warn(
                    f"{path} was not saved by a run and is left as it is; the "
                    f"configuration of this run is in {path.parent / self.config_filename}."
                )
        super().setup(trainer, pl_module, stage)


class _Parser(LightningArgumentParser):
    """Says what is wrong in a few lines, with the nearest valid name."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:
            # The parser of one alternative of a union: another may fit.
            super().error(message, ex)
        sys.stderr.write(f"lightning-woodfisher: error: {condense_error(message)}\n")
        self.exit(2)
        raise SystemExit(2)


def _known_names() -> Iterator[str]:
    yield from ("seed_everything", "trainer", "model", "data", "ckpt_path")
    yield from ("class_path", "init_args", "dict_kwargs")
    yield from _parameters(pl.Trainer)
    yield from pl.callbacks.__all__
    for cls in _OUR_CLASSES:
        yield cls.__name__
        yield from _parameters(cls)
    for config in _OUR_CONFIGS:
        yield from (field.name for field in dataclasses.fields(config))


def entry_point() -> NoReturn:
    """Run :func:`main` and exit with its status; the console script calls this."""
    sys.exit(main())
