"""``lightning-woodfisher report``: what a run pruned, as a table or an HTML page."""

from __future__ import annotations

__all__ = ["make_parser", "run_report"]

import argparse
import contextlib
import dataclasses
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_woodfisher.base.errors import ConfigurationError, first_line
from lightning_woodfisher.base.optional_imports import import_optional
from lightning_woodfisher.base.printable import printable
from lightning_woodfisher.base.torch_files import load_plain
from lightning_woodfisher.callbacks.checks import require_writable
from lightning_woodfisher.cli.arguments import SubcommandParser
from lightning_woodfisher.cli.messages import warn_of_missing_steps
from lightning_woodfisher.pruning.report import PruningReport
from lightning_woodfisher.reporting.contents import Reports, collect_contents
from lightning_woodfisher.reporting.page import build_page
from lightning_woodfisher.structured.report import StructureReport
from lightning_woodfisher.weights.checkpoint_state import STATE_KEYS, require_readable

# The file that a sharded strategy saves beside its shards.
_SHARDED_STATE = "meta.pt"


@dataclass(frozen=True)
class _Record:
    """The reports and masks in a file, by the key of their callback in the checkpoint.

    Attributes:
        path: path of the file.
        runs: reports of the steps, in order.
        masks: bool masks of the parameters, True where kept; only in checkpoints.
        steps_left: numbers of planned steps that were not done when a checkpoint was saved.
    """

    path: Path
    runs: dict[str, Reports]
    masks: dict[str, Mapping[str, Tensor]] = field(default_factory=dict)
    steps_left: dict[str, int] = field(default_factory=dict)


def run_report(options: argparse.Namespace) -> int:
    """Print the tables, and write the page if ``--html`` is given.

    Args:
        options: parsed by :func:`make_parser`.

    Returns:
        Exit status 0.
    """
    if options.html is not None:
        import_optional("matplotlib", "--html")
    record = _read(Path(options.path))
    require_writable("--html", options.html)
    sys.stdout.write(f"{printable(str(record.path))}\n")
    for title, reports in record.runs.items():
        if len(record.runs) > 1:
            sys.stdout.write(f"\n{printable(title)}\n")
        sys.stdout.write(_describe(reports, record.steps_left.get(title, 0)))
    steps_left = max(record.steps_left.values(), default=0)
    if steps_left:
        warn_of_missing_steps(record.path, steps_left)
    if options.html is not None:
        page = Path(options.html)
        text = printable(
            build_page(str(record.path), record.runs, record.masks, record.steps_left)
        )
        page.write_text(text, encoding="utf-8")
        sys.stdout.write(f"\nWritten: {page}.\n")
    return 0


def _describe(reports: Reports, steps_left: int) -> str:
    contents = collect_contents(reports, {}, steps_left)
    verdict = printable("\n".join(contents.verdict))
    what = "Channels" if isinstance(reports[-1], StructureReport) else "Layers"
    table = reports[-1].to_table()
    return (
        f"\n{verdict}\n\n{contents.steps.text}\n\n{what} after the last step:\n\n"
        f"{table}\n"
    )


def _read(path: Path) -> _Record:
    if not path.exists():
        raise ConfigurationError(
            f"{path} does not exist; give a checkpoint, the file of report_path, or the "
            "folder of a run."
        )
    if path.is_file():
        return _read_file(path)
    files = [
        file
        for pattern in ("*.ckpt", "*.json", _SHARDED_STATE)
        for file in path.rglob(pattern)
        if file.is_file()
    ]
    files.sort(key=_time_of_change, reverse=True)
    problems: list[str] = []
    for file in files:
        try:
            record = _read_file(file)
            if problems:
                sys.stderr.write(f"warning: skipped newer files:{''.join(problems)}\n")
            return record
        except ConfigurationError as error:
            problems.append(f"\n  {error}")
    found = "".join(problems[:5]) or " no checkpoint (*.ckpt) and no JSON file"
    tables = sorted(path.rglob("pruning_*.csv"))
    if tables:
        names = ", ".join(str(table.relative_to(path)) for table in tables[:5])
        found += f"\n  tables of CSVLogger, which are not enough for a report: {names}"
    raise ConfigurationError(
        f"{path} has no report of pruning. It contains:{found}\nSet report_path in the "
        "callback, or keep a checkpoint that was saved with it."
    )


def _time_of_change(path: Path) -> float:
    # A run may delete a checkpoint at any time.
    with contextlib.suppress(OSError):
        return path.stat().st_mtime
    return 0.0


def _read_file(path: Path) -> _Record:
    record = _read_json(path) if path.suffix == ".json" else _read_checkpoint(path)
    runs = {title: reports for title, reports in record.runs.items() if reports}
    if not runs:
        raise ConfigurationError(
            f"{path} was saved before the first pruning step, so it has nothing to report; "
            "give a later one."
        )
    return dataclasses.replace(record, runs=runs)


def _read_json(path: Path) -> _Record:
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigurationError(
            f"{path} was not written by report_path ({first_line(error)}); give the file "
            "that report_path names, a checkpoint, or the folder of a run."
        ) from error
    return _Record(path, {"": _read_reports(path, plain)})


def _read_checkpoint(path: Path) -> _Record:
    # With mmap only the masks of a large file are read.
    checkpoint = load_plain(path, mmap=True)
    content = checkpoint if isinstance(checkpoint, Mapping) else {}
    states = content.get("callbacks")
    ours = {
        str(key): state
        for key, state in (states.items() if isinstance(states, Mapping) else ())
        if isinstance(state, Mapping) and state.keys() >= STATE_KEYS
    }
    if not ours:
        raise ConfigurationError(
            f"{path} has no state of a pruning callback: it was saved without one, or with "
            "save_weights_only. Give another checkpoint, or the JSON file of report_path."
        )
    for state in ours.values():
        require_readable(state, str(path))
    return _Record(
        path,
        {key: _read_reports(path, s.get("reports", [])) for key, s in ours.items()},
        {key: state["masks"] for key, state in ours.items()},
        {key: state.get("steps_left", 0) for key, state in ours.items()},
    )


def _read_reports(path: Path, plain: Any) -> Reports:
    """Read the reports of one callback, which are all of one kind."""
    try:
        if not isinstance(plain, list):
            raise ConfigurationError("it is not a list of reports.")
        if plain and isinstance(plain[0], Mapping) and "groups" in plain[0]:
            return [StructureReport.from_dict(report) for report in plain]
        return [PruningReport.from_dict(report) for report in plain]
    except ConfigurationError as error:
        raise ConfigurationError(
            f"{path} is damaged, or was not written by report_path: {error}"
        ) from error


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the subcommand."""
    parser = SubcommandParser(
        "report",
        "Print how pruning went in a run: a verdict in words, a table of the steps and one "
        "of the layers. With --html, also write a page with figures.",
    )
    parser.add_argument(
        "path",
        metavar="PATH",
        help="a Lightning checkpoint, the JSON file of report_path, or a folder (its newest "
        "such file is read)",
    )
    parser.add_argument(
        "--html",
        metavar="FILE",
        help="write a self-contained HTML file with figures and tables",
    )
    return parser
