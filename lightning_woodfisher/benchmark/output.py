"""Results as text, as JSON and as a figure."""

from __future__ import annotations

__all__ = [
    "BUSY_NOTE",
    "Machine",
    "describe_machine",
    "format_table",
    "to_json",
    "write_figure",
]

import contextlib
import dataclasses
import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lightning_woodfisher.base.optional_imports import import_optional
from lightning_woodfisher.benchmark.inverse import InverseRow

_HEADERS = {
    "num_gradients": "N",
    "block_size": "B",
    "weights": "D",
    "seconds": "seconds",
    "cores": "cores",
    "ratio": "ratio",
    "processor_ratio": "cpu ratio",
    "floor_seconds": "floor s",
    "floor_share": "of floor",
    "peak_bytes": "peak",
    "error": "error",
    "update_seconds": "update s",
    "equal_mask": "equal mask",
    "plain_seconds": "plain s",
    "masked_seconds": "masked s",
    "mask_seconds": "masks s",
    "silent_seconds": "silent s",
    "exchange_share": "exchange",
    "state_bytes": "state of each rank",
    "world_size": "R",
    "structures": "S",
    "samples": "N",
    "pair_bytes": "pairs",
    "squared_bytes": "S²",
}
_HIDDEN = {"runs", "total_weights", "scaled_seconds", "how"}
_SHARES = {"floor_share", "exchange_share", "equal_mask"}
_FAR = 1e4
# Engines are made of large products, which keep more than this share of the threads busy.
_BUSY_SHARE = 0.6
_SHORT = 0.1
BUSY_NOTE = (
    "WARNING: the threads did not get the processors to themselves (see 'cores'). The "
    "recursion suffers most from that, so the ratios flatter this package: do not quote "
    "them; measure again on an idle machine."
)


@dataclass(frozen=True)
class Machine:
    """Where the numbers come from.

    Attributes:
        device: name of the processor or GPU.
        threads: of torch.
        cores_allowed: processors that this process may run on.
        load: average of running processes in the last minute, before the start.
        torch: version.
        gemm_rate: float32, operations per second; None when not measured.
        memory: what the peak counts.
        busy: whether an action got so little processor time that others must have been
            at work; the ratios are then worth nothing.
    """

    device: str
    threads: int
    cores_allowed: int
    load: float | None
    torch: str
    gemm_rate: float | None
    memory: str
    busy: bool


def describe_machine(
    device: torch.device,
    gemm_rate: float | None,
    load: float | None,
    memory: str,
    tables: Mapping[str, Sequence[Any]],
) -> Machine:
    """Collect what a reader must know to judge the numbers.

    Args:
        device: that was measured.
        gemm_rate: of the floor.
        load: average load before the start.
        memory: what the peak counts.
        tables: all rows, to judge whether others were at work.

    Returns:
        The description.
    """
    # Without rivals every action keeps at least one thread busy; engines most of them.
    busy = device.type != "cuda" and any(
        row.cores
        < _BUSY_SHARE * (1 if _is_sequential(row) else torch.get_num_threads())
        for row in tables.get("inverse", ())
    )
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    return Machine(
        device=name,
        threads=torch.get_num_threads(),
        cores_allowed=_count_allowed_cores(),
        load=load,
        torch=torch.__version__,
        gemm_rate=gemm_rate,
        memory=memory,
        busy=busy,
    )


def _is_sequential(row: Any) -> bool:
    """Whether a row may well have kept only one thread busy: the rest is too small."""
    return bool(row.engine == "recursion" or row.seconds < _SHORT)


def _count_allowed_cores() -> int:
    """Processors of all threads together: OpenMP may have bound each to one of them."""
    tasks = Path("/proc/self/task")
    if not (hasattr(os, "sched_getaffinity") and tasks.exists()):
        return os.cpu_count() or 1
    allowed: set[int] = set()
    for task in tasks.iterdir():
        # A thread may end while we look.
        with contextlib.suppress(OSError):
            allowed |= os.sched_getaffinity(int(task.name))
    return len(allowed)


def format_table(rows: Sequence[Any]) -> str:
    """Lay rows out in columns.

    Args:
        rows: instances of one frozen dataclass.

    Returns:
        Lines with a header; fields that are None in every row are left out. A slice of a
        network is followed by the figure scaled to all of it.
    """
    names = [
        field.name
        for field in dataclasses.fields(rows[0])
        if field.name not in _HIDDEN
        and any(getattr(row, field.name) is not None for row in rows)
    ]
    cells = [[_HEADERS.get(name, name) for name in names]]
    cells += [[_format(name, getattr(row, name)) for name in names] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(names))]
    lines = [
        "  ".join(cell.rjust(w) for cell, w in zip(line, widths, strict=True))
        for line in cells
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:], *_notes(rows)])


def _notes(rows: Sequence[Any]) -> list[str]:
    notes = []
    for row in rows:
        if isinstance(row, InverseRow) and row.how:
            notes.append(f"{row.engine} of {row.case}, B={row.block_size}: {row.how}")
        if isinstance(row, InverseRow) and row.total_weights > row.weights:
            notes.append(
                f"{row.case}, B={row.block_size or 'D'}, {row.engine}: a slice of "
                f"{row.weights:,} of {row.total_weights:,} weights; scaled to all "
                f"(not measured): {row.scaled_seconds:.3g} s"
            )
    return notes


def _format(name: str, value: Any) -> str:
    if name == "block_size":
        return "D" if value is None else str(value)
    if value is None:
        return "–"
    if name in _SHARES:
        return f"{100 * value:.1f} %"
    if name.endswith("bytes"):
        values = value if isinstance(value, tuple) else (value,)
        return ", ".join(f"{v / 1e6:.1f} MB" for v in values)
    if isinstance(value, float):
        if name in {"error"}:
            return f"{value:.1e}"
        return f"{value:.0f}" if value > _FAR else f"{value:.4g}"
    return str(value)


def to_json(machine: Machine, tables: Mapping[str, Sequence[Any]]) -> str:
    """Write everything down, nothing rounded.

    Args:
        machine: where it was measured.
        tables: rows by name of the table.

    Returns:
        JSON with the keys ``machine`` and ``tables``.
    """
    content = {
        "machine": dataclasses.asdict(machine),
        "tables": {
            name: [dataclasses.asdict(row) for row in rows]
            for name, rows in tables.items()
        },
    }
    return json.dumps(content, indent=2)


def write_figure(rows: Sequence[InverseRow], machine: Machine, path: Path) -> None:
    """Draw seconds of every engine as bars on a logarithmic scale.

    Args:
        rows: the table of the inverse.
        machine: named in the title.
        path: of the PNG.
    """
    figure_class = import_optional("matplotlib.figure", "--png").Figure
    labels, seconds, colors, texts = [], [], [], []
    for row in rows:
        block = "B = D" if row.block_size is None else f"B = {row.block_size}"
        size = f"N = {row.num_gradients}, {block}, D = {row.weights:,}"
        labels.append(f"{row.engine}\n{row.case}: {size}")
        seconds.append(row.seconds)
        colors.append("#9aa3ad" if row.engine == "recursion" else "#1f77b4")
        ratio = (
            ""
            if row.ratio is None or row.engine == "recursion"
            else (
                f"{row.ratio:.3g}× faster, "
                if row.ratio >= 1
                else f"{row.ratio:.2g}×, "
            )
        )
        share = f"{100 * row.floor_share:.0f} % of the GEMM floor"
        texts.append(f" {row.seconds:.3g} s  ({ratio}{share})")
    figure = figure_class(figsize=(11, 1.2 + 0.6 * len(rows)), layout="constrained")
    axes = figure.subplots()
    places = range(len(rows))
    axes.barh(places, seconds, color=colors, height=0.7)
    for place, value, text in zip(places, seconds, texts, strict=True):
        axes.text(value, place, text, va="center", fontsize=9)
    axes.set_yticks(places, labels, fontsize=9)
    axes.invert_yaxis()
    axes.set_xscale("log")
    # Room for the labels right of the bars: a fixed part of the logarithmic axis.
    low, high = min(seconds) / 3, max(seconds)
    axes.set_xlim(low, high * (high / low) ** 0.8)
    axes.set_xlabel("seconds (median), logarithmic")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(
        f"Inverse Fisher and its diagonal: {machine.device}, {machine.threads} threads",
        fontsize=11,
    )
    figure.savefig(path, dpi=150)
