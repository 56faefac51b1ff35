"""``lightning-woodfisher completion``: a script that completes the command in a shell.

``shtab`` writes the script from a parser. This module builds one parser of all
subcommands, with the values and class names that jsonargparse checks but does not list.
"""

from __future__ import annotations

__all__ = ["make_parser", "write_script"]

import argparse
import contextlib
import functools
import inspect
from collections.abc import Collection, Iterator, Mapping
from typing import Any, Literal, get_args, get_origin

from jsonargparse import ArgumentParser
from lightning.pytorch.accelerators import AcceleratorRegistry
from lightning.pytorch.strategies import StrategyRegistry

from lightning_woodfisher.base.optional_imports import import_optional
from lightning_woodfisher.cli.arguments import SubcommandParser
from lightning_woodfisher.cli.lightning_cli import PruningCLI

# Values that the types of these options do not list.
_VALUES = {
    "trainer.accelerator": ("auto", *AcceleratorRegistry.available_accelerators()),
    "trainer.strategy": ("auto", *StrategyRegistry.available_strategies()),
}
_FILES = {"CHECKPOINT", "CONFIG", "FILE", "PATH", "YAML"}
# Packages whose classes are offered by name.
_PACKAGES = ("lightning_woodfisher", "lightning", "torch")


def write_script(
    shell: str,
    parsers: Mapping[str, argparse.ArgumentParser],
    reading_fit: Collection[str],
) -> str:
    """Write a script that completes the command without starting it.

    Args:
        shell: ``"bash"`` or ``"zsh"``.
        parsers: parsers of the subcommands that Lightning does not have, by name.
        reading_fit: names of the subcommands that also accept the options of ``fit``.

    Returns:
        The script.
    """
    shtab = import_optional("shtab", "completion")
    lightning = _lightning_parsers()
    root = argparse.ArgumentParser("lightning-woodfisher", add_help=False)
    _copy_actions(lightning.pop(""), root)
    subparsers = root.add_subparsers()
    for name, parser in {**lightning, **parsers}.items():
        summary = (parser.description or "").partition(".")[0]
        subparser = subparsers.add_parser(name, help=summary, add_help=False)
        _copy_actions(parser, subparser)
        if name in reading_fit:
            _copy_actions(lightning["fit"], subparser)
    script: str = shtab.complete(root, shell)
    return script


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the subcommand."""
    parser = SubcommandParser(
        "completion",
        "Print a script that completes subcommands, options, values, class names and "
        "files. Print it again after an update.",
        "bash: lightning-woodfisher completion bash > ~/.lightning-woodfisher.bash\n"
        "      echo '. ~/.lightning-woodfisher.bash' >> ~/.bashrc\n"
        "zsh:  lightning-woodfisher completion zsh > ~/.zfunc/_lightning-woodfisher\n"
        "      with ~/.zfunc in fpath before compinit",
    )
    parser.add_argument("shell", choices=["bash", "zsh"], help="shell of the script")
    return parser


def _lightning_parsers() -> dict[str, Any]:
    """Return the parsers of Lightning's subcommands by name, and the root parser as ""."""
    parsers: dict[str, Any] = {}

    class Reader(PruningCLI):
        def parse_arguments(self, parser: Any, args: Any) -> None:
            parsers.update({"": parser, **self._subcommand_parsers})
            raise SystemExit

    with contextlib.suppress(SystemExit):
        Reader(args=[])
    return parsers


def _copy_actions(source: Any, target: argparse.ArgumentParser) -> None:
    """Add the actions of a parser to another one, except for names that it has."""
    for action in _actions(source, _PACKAGES):
        if not target._option_string_actions.keys() & set(action.option_strings):
            target._add_action(action)


def _actions(parser: Any, packages: Collection[str]) -> Iterator[argparse.Action]:
    """Yield the actions of a parser, with their values, and of the classes it accepts.

    Args:
        parser: a parser of argparse or jsonargparse.
        packages: packages whose classes are offered.
    """
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            continue
        values = [*dict.fromkeys(_values(getattr(action, "_typehint", None), packages))]
        if action.dest.endswith(("dirpath", "_dir")):
            action.complete = "directory"
        elif action.metavar in _FILES or action.dest.endswith(("config", "_path")):
            action.complete = "file"
        elif action.choices is None:
            names = [getattr(value, "__name__", value) for value in values]
            action.choices = [*names, *_VALUES.get(action.dest, ())] or None
        yield action
        for cls in values if not action.dest.endswith("help") else ():
            if isinstance(cls, type):
                yield from _class_actions(cls, action.dest)


@functools.cache
def _class_actions(cls: type, name: str) -> list[argparse.Action]:
    """Return the actions for the arguments of a class that an option accepts."""
    parser = ArgumentParser(exit_on_error=False, add_help=False)
    # A class that jsonargparse cannot read cannot be configured either.
    with contextlib.suppress(ValueError):
        parser.add_class_arguments(cls, name, fail_untyped=False)
    # Lightning's types are nested without end: follow those of this package.
    actions = _actions(parser, _PACKAGES[:1])
    return [action for action in actions if not action.dest.endswith("help")]


def _values(hint: Any, packages: Collection[str]) -> Iterator[str | type]:
    """Yield the literals and classes that a type accepts."""
    if hint is bool:
        yield from ("true", "false")
    elif get_origin(hint) is Literal:
        yield from map(str, get_args(hint))
    elif inspect.isclass(hint) and hint.__module__.partition(".")[0] in packages:
        for cls in hint.__subclasses__():
            if not cls.__name__.startswith("_") and not inspect.isabstract(cls):
                yield cls
            yield from _values(cls, packages)
    for part in get_args(hint):
        yield from _values(part, packages)
