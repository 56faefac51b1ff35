"""The command ``lightning-woodfisher``: LightningCLI with the callbacks at hand."""

from __future__ import annotations

__all__ = ["condense_error", "main"]

import dataclasses
import inspect
import os
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import lightning.pytorch as pl
from jsonargparse import ActionConfigFile
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from lightning_woodfisher import schedule
from lightning_woodfisher.callback import WoodFisherPruningCallback
from lightning_woodfisher.errors import ConfigurationError, PruningError, nearest
from lightning_woodfisher.estimate_command import run_estimate
from lightning_woodfisher.fisher import FisherConfig
from lightning_woodfisher.selection import SelectionConfig

# Classes whose short name works in YAML, and whose arguments a typo may have meant.
_OUR_CLASSES = (
    WoodFisherPruningCallback,
    schedule.PolynomialSchedule,
    schedule.OneShotSchedule,
    schedule.ConstantSchedule,
)
_OUR_CONFIGS = (FisherConfig, SelectionConfig)

# Lines of jsonargparse that repeat the question instead of answering it.
_NOISE = re.compile(
    r"Does not validate against any|Subtypes:|Errors:|Not a valid subclass of|"
    r"Subclass types expect one of|- an? (class path|dict)|"
    r"- Expected a <class 'NoneType'>|Given value"
)
# What an unknown name looks like in the messages of jsonargparse.
_UNKNOWN = re.compile(
    r"(?:does not accept option|Expected a dot import path string:) '?([\w.]+)'?"
    r"|Option '([\w.]+)' is not accepted"
    r"|Key '([\w.]+)' is not expected"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: what follows the command's name; None for ``sys.argv``.

    Returns:
        Exit status: 0, or 2 after an error that a message explains.
    """
    # Like `python -m`: classes of a config are often in the folder one works in.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if given[:1] == ["estimate"]:
            return run_estimate(given[1:], _CLI)
        _CLI(
            args=list(arguments) if arguments is not None else None,
            save_config_kwargs={"overwrite": True},
        )
    except Exception as error:
        ours = _find_ours(error)
        if ours is None:
            raise
        sys.stderr.write(f"lightning-woodfisher: error: {ours}\n")
        return 2
    return 0


def _find_ours(error: BaseException | None) -> BaseException | None:
    """Look for an error of this package among the causes; jsonargparse wraps them."""
    while error is not None and not isinstance(
        error, ConfigurationError | PruningError
    ):
        error = error.__cause__ or error.__context__
    return error


def condense_error(message: str) -> str:
    """Keep what a user can act on of a parser's message, and suggest the nearest name.

    Args:
        message: as jsonargparse words it, often a page long.

    Returns:
        The lines that say what is wrong; the whole message when none does.
    """
    lines = [line for line in message.splitlines() if line.strip()]
    telling = [line for line in lines if not _NOISE.search(line)]
    text = "\n".join(telling) if telling else message
    for match in _UNKNOWN.finditer(text):
        name = next(group for group in match.groups() if group)
        text += nearest(name, _known_names()) or nearest(
            name.rpartition(".")[2], _known_names()
        )
    return text


class _CLI(LightningCLI):
    """LightningCLI with short error messages."""

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        parser = _Parser(**kwargs)
        parser.add_argument(
            "-c",
            "--config",
            action=ActionConfigFile,
            help="Path to a configuration file in json or yaml format.",
        )
        return parser


class _Parser(LightningArgumentParser):
    """Says what is wrong in a few lines, with the nearest valid name."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        sys.stderr.write(f"lightning-woodfisher: error: {condense_error(message)}\n")
        self.exit(2)
        raise SystemExit(2)


def _known_names() -> Iterator[str]:
    yield from ("seed_everything", "trainer", "model", "data", "ckpt_path")
    yield from inspect.signature(pl.Trainer.__init__).parameters
    for cls in _OUR_CLASSES:
        yield cls.__name__
        yield from inspect.signature(cls.__init__).parameters
    for config in _OUR_CONFIGS:
        yield from (field.name for field in dataclasses.fields(config))


def entry_point() -> NoReturn:
    """Run :func:`main` and exit with its status; the console script calls this."""
    sys.exit(main())
