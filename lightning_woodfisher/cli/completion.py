"""``lightning-woodfisher completion``: a script that completes the command in a shell."""

from __future__ import annotations

__all__ = ["run_completion"]

import argparse
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import lightning.pytorch as pl
from jsonargparse import ActionConfigFile, ArgumentParser
from lightning.pytorch.accelerators import AcceleratorRegistry
from lightning.pytorch.cli import LightningCLI, SaveConfigCallback
from lightning.pytorch.strategies import StrategyRegistry

from lightning_woodfisher.callbacks.presets import PRESETS
from lightning_woodfisher.cli.completion_script import (
    SHELLS,
    Command,
    Option,
    to_script,
)
from lightning_woodfisher.criteria import CRITERIA
from lightning_woodfisher.criteria.obs import Update
from lightning_woodfisher.pruning.config import (
    Scope,
)
from lightning_woodfisher.resources.network_shapes import SHAPES

_DESCRIPTION = """\
Print a script with which a shell completes subcommands, options, their values, names of
classes and files. It answers at once, because it does not start this program; print it
again after an update.

  bash    lightning-woodfisher completion bash > ~/.lightning-woodfisher.bash
          echo '. ~/.lightning-woodfisher.bash' >> ~/.bashrc
  zsh     lightning-woodfisher completion zsh > ~/.zfunc/_lightning-woodfisher
          with  fpath+=(~/.zfunc); autoload -Uz compinit; compinit  in ~/.zshrc
"""

# Values that parsers take as any text, and check or hand on.
_WORDS: dict[tuple[str, str], Sequence[str]] = {
    ("estimate", "preset"): tuple(SHAPES),
    ("preset", "name"): tuple(PRESETS),
    ("sweep", "criterion"): tuple(CRITERIA),
    ("sweep", "update"): get_args(Update),
    ("sweep", "scope"): get_args(Scope),
    ("sweep", "block_size"): ("none",),
    ("estimate", "block_size"): ("none",),
}
_FILES = {"FILE", "PATH", "YAML", "CHECKPOINT"}
# Where classes come from whose names may be offered.
_HOMES = ("lightning_woodfisher", "lightning", "torch")
# The first two are the user's: what is imported here says nothing about them.
_NOT_OFFERED = (pl.LightningModule, pl.LightningDataModule, SaveConfigCallback)

Classes = dict[tuple[str, str], Sequence[Option]]


def run_completion(
    arguments: Sequence[str],
    cli: type[LightningCLI],
    parsers: Mapping[str, Callable[[], argparse.ArgumentParser]],
    read_fit: Sequence[str],
) -> int:
    """Print the script.

    Args:
        arguments: of the subcommand.
        cli: whose subcommands share their options.
        parsers: of the other subcommands, by name.
        read_fit: those of them that take the options of ``fit``, too.

    Returns:
        Exit status 0.
    """
    shell = make_parser().parse_args(arguments).shell
    main, lightning = _read_lightning(cli)
    classes: Classes = {}
    shared: dict[str, Option] = {}
    commands: dict[str, Command] = {}
    for name, parser in lightning.items():
        options = _read(parser, name, classes)
        shared.update((option.names[0], option) for option in options)
        commands[name] = Command(tuple(options))
    # What all of them have is written once.
    common = [
        option
        for option in shared.values()
        if all(option in command.options for command in commands.values())
    ]
    for name, command in commands.items():
        own = tuple(option for option in command.options if option not in common)
        commands[name] = Command(own, shared=True)
    for name, make in {**parsers, "completion": make_parser}.items():
        own = tuple(_read(make(), name, {}))
        if name in read_fit:
            own += commands["fit"].options
        commands[name] = Command(own, shared=name in read_fit)
    names = Option((), words=tuple(commands))
    commands[""] = Command((names, *_read(main, "", {})))
    sys.stdout.write(to_script(shell, commands, common, classes))
    return 0


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of the subcommand.

    Returns:
        It.
    """
    parser = argparse.ArgumentParser(
        prog="lightning-woodfisher completion",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("shell", choices=SHELLS, help="which shell to write for")
    return parser


def _read_lightning(cli: type[LightningCLI]) -> tuple[Any, Mapping[str, Any]]:
    """Make the parsers of a LightningCLI, and no more of it."""

    class Reader(cli):  # type: ignore[valid-type, misc]
        def __init__(self) -> None:
            self.made: Any = None
            super().__init__(args=[])

        def parse_arguments(self, parser: Any, args: Any) -> None:
            raise _MadeError(parser, self._subcommand_parsers)

    try:
        Reader()
    except _MadeError as made:
        return made.parser, made.subcommands
    raise AssertionError("LightningCLI has parsed nothing")


class _MadeError(Exception):
    """The parsers are made: LightningCLI does everything in one call."""

    def __init__(self, parser: Any, subcommands: Mapping[str, Any]) -> None:
        super().__init__()
        self.parser, self.subcommands = parser, subcommands


def _read(
    parser: Any, command: str, classes: Classes, prefix: str = "--"
) -> list[Option]:
    """Read the options of a parser; add to ``classes`` what classes bring with them."""
    found = []
    for action in parser._actions:
        if type(action).__name__ == "ActionSubCommands":
            continue
        nested = prefix != "--"
        if nested and action.dest.endswith("help"):
            continue
        names = tuple(
            prefix + name.removeprefix("--") if nested else name
            for name in action.option_strings
        )
        # Within the arguments of a class, only ours: others have a great many.
        offered = _offered(_hint(action), ours=nested)
        found.append(_describe(action, names, command, tuple(offered)))
        if names and names[0].endswith(".help"):
            continue
        for name, cls in offered.items():
            if (names[0], name) in classes:
                continue
            inner = ArgumentParser(exit_on_error=False)
            classes[names[0], name] = ()
            try:
                inner.add_class_arguments(cls, fail_untyped=False)
            except ValueError:
                # What jsonargparse cannot read it cannot take either.
                continue
            classes[names[0], name] = _read(inner, command, classes, f"{names[0]}.")
    return found


def _describe(
    action: Any, names: tuple[str, ...], command: str, classes: tuple[str, ...]
) -> Option:
    """Tell what may follow an option."""
    option = Option(names, words=tuple(_WORDS.get((command, action.dest), ())))
    if action.nargs == 0 or "[=" in str(action.metavar or ""):
        return replace(option, takes="none")
    if action.nargs in {"+", "*"}:
        option = replace(option, takes="many")
    hint = _hint(action)
    if action.choices is not None:
        option = replace(option, words=tuple(map(str, action.choices)))
    elif hint is not None:
        known = () if names[0].endswith(".help") else _words(hint, action.dest)
        option = replace(option, words=(*known, *classes))
    if (
        isinstance(action, ActionConfigFile)
        or type(action).__name__ == "_ActionConfigLoad"
        or (action.metavar in _FILES)
        or action.dest == "ckpt_path"
    ):
        return replace(option, files="file")
    if action.dest.endswith(("_path", "dirpath", "_dir")) or Path in _parts(hint):
        return replace(option, files="folder" if "dir" in action.dest else "file")
    return option


def _hint(action: Any) -> Any:
    """The type that jsonargparse checks, None for a parser of the standard library."""
    return getattr(action, "_typehint", None)


def _parts(hint: Any) -> Iterator[Any]:
    """All types within a type."""
    yield hint
    if get_origin(hint) is not Literal:
        for part in get_args(hint):
            yield from _parts(part)


def _words(hint: Any, name: str) -> Iterator[str]:
    """Values of a type that can be listed."""
    parts = list(_parts(hint))
    known = [
        str(value)
        for part in parts
        if get_origin(part) is Literal
        for value in get_args(part)
    ]
    if bool in parts:
        known += ["true", "false"]
    if known and type(None) in parts:
        known.append("null")
    if name == "trainer.accelerator":
        known += ["auto", *AcceleratorRegistry.available_accelerators()]
    elif name == "trainer.strategy":
        known += ["auto", *StrategyRegistry.available_strategies()]
    elif name == "trainer.gradient_clip_algorithm":
        known += ["norm", "value"]
    elif name == "ckpt_path":
        known += ["best", "last"]
    yield from dict.fromkeys(known)


def _offered(hint: Any, ours: bool) -> dict[str, type]:
    """Classes that a type allows, by the short names with which a YAML may call them."""
    homes = _HOMES[:1] if ours else _HOMES
    found: dict[str, type] = {}
    twice: set[str] = set()
    for base in _parts(hint):
        if not inspect.isclass(base) or _home(base) not in homes:
            continue
        if issubclass(base, _NOT_OFFERED):
            continue
        for cls in _subclasses(base):
            if found.setdefault(cls.__name__, cls) is not cls:
                twice.add(cls.__name__)
    return {name: found[name] for name in sorted(found) if name not in twice}


def _subclasses(base: type) -> Iterator[type]:
    below: list[type] = base.__subclasses__()
    for cls in below:
        private = cls.__name__.startswith("_") or "<locals>" in cls.__qualname__
        private |= issubclass(cls, _NOT_OFFERED)
        if _home(cls) in _HOMES and not private and not inspect.isabstract(cls):
            yield cls
        yield from _subclasses(cls)


def _home(cls: type) -> str:
    return cls.__module__.partition(".")[0]
