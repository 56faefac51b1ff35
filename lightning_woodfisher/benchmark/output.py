"""Format results as text and JSON, and draw them as a figure."""

from __future__ import annotations

__all__ = [
    "Machine",
    "describe_machine",
    "flatten",
    "format_results",
    "format_rows",
    "format_value",
    "require_folder",
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

from lightning_woodfisher.base.errors import ConfigurationError
from lightning_woodfisher.base.text_table import format_table
from lightning_woodfisher.benchmark.cases import Case
from lightning_woodfisher.benchmark.inverse import InverseRow
from lightning_woodfisher.benchmark.timing import Timing, describe_memory_measure

# Headers of columns; by default the name of the column.
_HEADERS = {
    "num_gradients": "N",
    "block_size": "B",
    "weights": "D",
    "processor_ratio": "cpu ratio",
    "gradient_batch_size": "m",
    "processor_passes": "cpu passes",
    "batchnorm_passes": "of them BatchNorm",
    "floor_share": "of floor",
    "peak_bytes": "peak",
    "exchange_share": "exchange",
    "state_bytes": "state of each rank",
    "world_size": "R",
    "structures": "S",
    "samples": "N",
    "pair_bytes": "pairs",
    "squared_bytes": "S²",
}
_HIDDEN = {"name", "segments", "total_weights", "runs", "plan"}
_SHARES = {"floor_share", "exchange_share", "equal_mask"}
_LARGE = 1e4
# On an idle machine the large products of the engines keep more than this share of the
# threads busy.
_BUSY_SHARE = 0.6
_SHORT = 0.1
_BUSY_NOTE = (
    "WARNING: other processes used the cores during the measurement (see the column "
    "'cores'). This slows the recursion most, so the ratios overstate the speed of this "
    "package. Do not quote them; measure again on an idle machine."
)


@dataclass(frozen=True)
class Machine:
    """The machine of the measurement.

    Attributes:
        device: name of the processor or GPU.
        threads: number of torch threads.
        cores_allowed: number of processors that this process may use.
        load: average number of running processes in the minute before the start.
        torch: version of PyTorch.
        gemm_rate: float32 operations per second; None if not measured.
        memory: how the peak memory was measured.
        busy: whether an action got so little processor time that other processes must have
            been running; ratios are then unreliable.
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
    rows: Sequence[InverseRow] = (),
) -> Machine:
    """Describe the machine, and detect whether it was busy.

    Args:
        device: the measured device.
        gemm_rate: GEMM rate of the floor.
        load: average load before the start.
        rows: measurements to check for a busy machine.

    Returns:
        The description.
    """
    threads = torch.get_num_threads()
    if device.type == "cuda":
        name, busy = torch.cuda.get_device_name(device), False
    else:
        name = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
        # On an idle machine short actions and the recursion keep at least one thread busy,
        # and engines keep most threads busy.
        busy = any(
            row.timing.cores < _BUSY_SHARE * (1 if _is_sequential(row) else threads)
            for row in rows
        )
    return Machine(
        device=name,
        threads=threads,
        cores_allowed=_count_allowed_cores(),
        load=load,
        torch=torch.__version__,
        gemm_rate=gemm_rate,
        memory=describe_memory_measure(device),
        busy=busy,
    )


def _is_sequential(row: InverseRow) -> bool:
    return row.engine == "recursion" or row.timing.seconds < _SHORT


def _count_allowed_cores() -> int:
    """Count the processors of all threads, because OpenMP may bind each thread to one."""
    tasks = Path("/proc/self/task")
    if not tasks.exists():
        return os.cpu_count() or 1
    allowed: set[int] = set()
    for task in tasks.iterdir():
        # A thread may end during the loop.
        with contextlib.suppress(OSError):
            allowed |= os.sched_getaffinity(int(task.name))
    return len(allowed)


def format_results(machine: Machine, tables: Mapping[str, Sequence[Any]]) -> str:
    """Format all results as text.

    Args:
        machine: the measured machine.
        tables: rows by name of the table.

    Returns:
        Lines: the machine, the tables, and a warning if the machine was busy.
    """
    lines = [
        f"{machine.device}, {machine.threads} threads on {machine.cores_allowed} cores, "
        f"torch {machine.torch}, memory: {machine.memory}"
    ]
    if machine.load is not None:
        lines.append(f"load before the start: {machine.load:.2f} running processes")
    if machine.gemm_rate is not None:
        lines.append(f"float32 GEMM: {machine.gemm_rate / 1e9:.1f} GFLOP/s (the floor)")
    for name, rows in tables.items():
        lines += ["", f"[{name}]", format_rows(rows)]
    if machine.busy:
        lines += ["", _BUSY_NOTE]
    return "\n".join(lines) + "\n"


def format_rows(rows: Sequence[Any]) -> str:
    """Format rows as a table.

    Args:
        rows: instances of one of the row classes.

    Returns:
        A table without columns that are None in every row, and notes on the plan of a
        recursion and on the time of a slice scaled to the whole network.
    """
    flat = [flatten(row) for row in rows]
    names = [
        name
        for name in flat[0]
        if name not in _HIDDEN and any(row[name] is not None for row in flat)
    ]
    head = [
        _HEADERS.get(name, name.replace("_seconds", " s").replace("_", " "))
        for name in names
    ]
    cells = [[format_value(name, row[name]) for name in names] for row in flat]
    lines = [format_table(head, cells)]
    for row in rows:
        if not isinstance(row, InverseRow):
            continue
        case, seconds = row.case, row.timing.seconds
        name = f"{row.engine} of {case.name}, B={case.block_size or 'D'}"
        if row.plan:
            lines.append(f"{name}: {row.plan}")
        if case.total_weights > case.weights:
            lines.append(
                f"{name}: a slice of {case.weights:,} of {case.total_weights:,} weights; "
                "scaled to all (not measured): "
                f"{seconds * case.total_weights / case.weights:.3g} s"
            )
    return "\n".join(lines)


def flatten(row: Any) -> dict[str, Any]:
    """Convert a row to a dict with the columns of its case and of its timing.

    Args:
        row: instance of one of the row classes.

    Returns:
        Values by name of the column.
    """
    flat: dict[str, Any] = {}
    for field in dataclasses.fields(row):
        value = getattr(row, field.name)
        if isinstance(value, Timing):
            flat |= {"seconds": value.seconds, **dataclasses.asdict(value)}
        elif isinstance(value, Case):
            flat |= {"case": value.name, **dataclasses.asdict(value)}
            flat["weights"] = value.weights
        else:
            flat[field.name] = value
    return flat


def format_value(name: str, value: Any) -> str:
    """Format one cell of a table.

    Args:
        name: name of the column, which tells the unit.
        value: of the cell.

    Returns:
        The text.
    """
    if value is None:
        return "D" if name == "block_size" else "–"
    if name in _SHARES:
        return f"{100 * value:.1f} %"
    if name.endswith("bytes"):
        values = value if isinstance(value, tuple) else (value,)
        return ", ".join(f"{v / 1e6:.1f} MB" for v in values)
    if name == "error":
        return f"{value:.1e}"
    if isinstance(value, float):
        return f"{value:.0f}" if value > _LARGE else f"{value:.4g}"
    return str(value)


def to_json(machine: Machine, tables: Mapping[str, Sequence[Any]]) -> str:
    """Convert all results to JSON, without rounding.

    Args:
        machine: the measured machine.
        tables: rows by name of the table.

    Returns:
        JSON with the keys ``machine`` and ``tables``.
    """
    plain = {name: [flatten(row) for row in rows] for name, rows in tables.items()}
    content = {"machine": dataclasses.asdict(machine), "tables": plain}
    return json.dumps(content, indent=2)


def require_folder(option: str, path: str | None) -> None:
    """Check that a file can be written before anything is measured.

    Args:
        option: name of the option.
        path: its value; None if it was not given.

    Raises:
        ConfigurationError: if the folder of the file does not exist.
    """
    if path and not Path(path).absolute().parent.is_dir():
        raise ConfigurationError(f"{option} {path}: there is no such folder.")


def write_figure(rows: Sequence[InverseRow], machine: Machine, path: Path) -> None:
    """Draw the seconds of every engine as bars on a logarithmic scale.

    Args:
        rows: the table of the inverse.
        machine: the measured machine, for the title.
        path: path of the PNG.
    """
    from matplotlib.figure import Figure

    seconds = [row.timing.seconds for row in rows]
    labels, texts, colors = [], [], []
    for row in rows:
        case = row.case
        size = f"N = {case.num_gradients}, B = {case.block_size or 'D'}, D = {case.weights:,}"
        labels.append(f"{row.engine}\n{case.name}: {size}")
        colors.append("#9aa3ad" if row.engine == "recursion" else "#1f77b4")
        speed = "" if row.ratio is None else f"{row.ratio:.3g}× the recursion's speed, "
        floor = f"{100 * (row.floor_share or 0):.0f} % of the GEMM floor"
        texts.append(f" {row.timing.seconds:.3g} s  ({speed}{floor})")
    figure = Figure(figsize=(11, 1.2 + 0.6 * len(rows)), layout="constrained")
    axes = figure.subplots()
    bars = axes.barh(range(len(rows)), seconds, color=colors, height=0.7)
    axes.bar_label(bars, texts, fontsize=9)
    axes.set_yticks(range(len(rows)), labels, fontsize=9)
    axes.invert_yaxis()
    axes.set_xscale("log")
    # Leave room for the texts to the right of the bars.
    low, high = min(seconds) / 3, max(seconds)
    axes.set_xlim(low, high * (high / low) ** 0.8)
    axes.set_xlabel("seconds (median), logarithmic")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(
        f"Inverse Fisher and its diagonal: {machine.device}, {machine.threads} threads",
        fontsize=11,
    )
    figure.savefig(path, dpi=150)
