"""The command ``lightning-woodfisher``: LightningCLI and further subcommands."""

from __future__ import annotations

__all__ = ["Subcommand", "entry_point", "main"]

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple, NoReturn

from lightning_woodfisher import __version__
from lightning_woodfisher.base.printable import printable
from lightning_woodfisher.benchmark import command as benchmark
from lightning_woodfisher.benchmark import gpu_check
from lightning_woodfisher.callbacks.presets import PRESETS, to_yaml
from lightning_woodfisher.cli import completion, estimate, export, report, sweep
from lightning_woodfisher.cli.arguments import SubcommandParser
from lightning_woodfisher.cli.lightning_cli import PruningCLI
from lightning_woodfisher.cli.messages import explain_error


class Subcommand(NamedTuple):
    """A subcommand that LightningCLI does not have.

    Attributes:
        summary: what it does, for ``--help``.
        make_parser: returns its parser.
        run: runs it with the parsed options and returns the exit status. What the parser
            does not know is in ``options.fit_arguments``.
        reads_fit: whether it also accepts the options of ``fit``.
    """

    summary: str
    make_parser: Callable[[], argparse.ArgumentParser]
    run: Callable[[argparse.Namespace], int]
    reads_fit: bool = False


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: the arguments after the name of the command; None for ``sys.argv``.

    Returns:
        Exit status: 0, or 2 after an error of this package, which a message explains.
        ``--help`` and rejected arguments raise SystemExit, as in argparse.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given == ["--version"]:
        sys.stdout.write(f"lightning-woodfisher {__version__}\n")
        return 0
    # Like `python -m`: classes of a config are often in the working folder.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        if given and given[0] in _SUBCOMMANDS:
            return _run_subcommand(_SUBCOMMANDS[given[0]], given[1:])
        PruningCLI(
            # Lightning warns about arguments that differ from those of the process.
            args=None if arguments is None else given,
            parser_kwargs={
                "description": "Train a LightningModule, and prune it with the callbacks.",
                "epilog": _describe_subcommands(),
            },
        )
    except Exception as error:
        message = explain_error(error)
        if message is None:
            raise
        sys.stderr.write(f"lightning-woodfisher: error: {printable(message)}\n")
        return 2
    return 0


def _run_subcommand(subcommand: Subcommand, arguments: Sequence[str]) -> int:
    parser = subcommand.make_parser()
    if subcommand.reads_fit:
        options, rest = parser.parse_known_args(arguments)
        options.fit_arguments = rest
    else:
        options = parser.parse_args(arguments)
    return subcommand.run(options)


def _describe_subcommands() -> str:
    names = [f"{name} ({each.summary})" for name, each in _SUBCOMMANDS.items()]
    return f"Other commands, each with its own --help: {', '.join(names)}."


def _make_preset_parser() -> argparse.ArgumentParser:
    parser = SubcommandParser(
        "preset",
        "Print settings as YAML, to be passed as a second --config of fit: those of a "
        "published result, or post_training, for a trained network and ten minutes. "
        "lightning-woodfisher preset post_training > preset.yaml",
    )
    parser.add_argument("name", choices=list(PRESETS), help="name of the settings")
    return parser


def _run_preset(options: argparse.Namespace) -> int:
    sys.stdout.write(to_yaml(options.name))
    return 0


def _run_completion(options: argparse.Namespace) -> int:
    parsers = {name: each.make_parser() for name, each in _SUBCOMMANDS.items()}
    reading_fit = [name for name, each in _SUBCOMMANDS.items() if each.reads_fit]
    script = completion.write_script(options.shell, parsers, reading_fit)
    sys.stdout.write(f"{script}\n")
    return 0


_SUBCOMMANDS = {
    "estimate": Subcommand(
        "what a pruning step will cost",
        estimate.make_parser,
        estimate.run_estimate,
        reads_fit=True,
    ),
    "sweep": Subcommand(
        "a comparison of one-shot settings on a checkpoint",
        sweep.make_parser,
        sweep.run_sweep_command,
        reads_fit=True,
    ),
    "report": Subcommand(
        "what a run has pruned, as a table or an HTML page",
        report.make_parser,
        report.run_report,
    ),
    "export": Subcommand(
        "a pruned checkpoint as sparse, dense or smaller network, ONNX or torch.export",
        export.make_parser,
        export.run_export,
        reads_fit=True,
    ),
    "preset": Subcommand("settings by name, as YAML", _make_preset_parser, _run_preset),
    "benchmark": Subcommand(
        "timings on this machine", benchmark.make_parser, benchmark.run_benchmark
    ),
    "gpu-check": Subcommand(
        "whether pruning works on this GPU",
        gpu_check.make_parser,
        gpu_check.run_gpu_check,
    ),
    "completion": Subcommand(
        "a completion script for bash or zsh",
        completion.make_parser,
        _run_completion,
    ),
}


def entry_point() -> NoReturn:
    """Run :func:`main` and exit with its status; the console script calls this."""
    sys.exit(main())
