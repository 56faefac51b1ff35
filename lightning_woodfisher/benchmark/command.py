"""The command line of ``lightning-woodfisher benchmark``."""

from __future__ import annotations

__all__ = ["make_parser", "run_benchmark"]

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lightning_woodfisher.base.errors import ConfigurationError
from lightning_woodfisher.base.optional_imports import import_optional
from lightning_woodfisher.benchmark import (
    inverse,
    output,
    scaling,
    structures,
    timing,
    training,
)
from lightning_woodfisher.benchmark.presets import (
    PRESETS,
    custom_case,
    preset_cases,
    slice_case,
)

_SLICE_ON_CPU = 300_000
_MASK_STEPS = 40
# Part of a GPU's free memory that rows, inverses and their copies may take.
_USABLE_MEMORY = 0.6


def run_benchmark(options: argparse.Namespace) -> int:
    """Run the benchmark.

    Args:
        options: parsed by :func:`make_parser`.

    Returns:
        Exit status.
    """
    device = torch.device(options.device)
    _check(options, device)
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    tables: dict[str, Sequence[Any]] = {}
    rate = None
    if _wants_inverse(options):
        tables["inverse"], rate = _measure_inverse(options, device)
    tables.update(_measure_others(options, device))
    machine = output.describe_machine(
        device, rate, load, timing.memory_measure(device), tables
    )
    _show(machine, tables)
    if options.json:
        Path(options.json).write_text(output.to_json(machine, tables))
    if options.png:
        output.write_figure(tables["inverse"], machine, Path(options.png))
    return 0


def _wants_inverse(options: argparse.Namespace) -> bool:
    """On request, or when nothing else is asked for."""
    others = (
        options.collection,
        options.step,
        options.masks,
        options.scaling,
        options.structures,
    )
    return bool(options.preset or options.case) or not any(others)


def _check(options: argparse.Namespace, device: torch.device) -> None:
    """Refuse now what would fail after minutes of measurement."""
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigurationError(
            f"--device {options.device}: torch finds no CUDA device; use --device cpu."
        )
    for option, path in (("--json", options.json), ("--png", options.png)):
        if path and not Path(path).absolute().parent.is_dir():
            raise ConfigurationError(f"{option} {path}: there is no such folder.")
    if options.png:
        import_optional("matplotlib.figure", "--png")
        if not _wants_inverse(options):
            raise ConfigurationError(
                "--png draws the table of the inverse; give --preset or --case, too."
            )


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of the subcommand.

    Returns:
        It.
    """
    parser = argparse.ArgumentParser(
        prog="lightning-woodfisher benchmark",
        description="Measure what the parts of a pruning step cost on this machine.",
    )
    add = parser.add_argument
    add("--preset", choices=PRESETS, help="cases to measure (default: headline)")
    add(
        "--case",
        type=_case_sizes,
        action="append",
        metavar="N,B,D",
        help="a case of your own; B = 'full' for the full Fisher; repeatable",
    )
    add(
        "--engines",
        nargs="+",
        choices=("auto", "primal", "dual"),
        default=["auto"],
        help="ways to compute the inverse (default: auto, the cheaper one)",
    )
    add("--update", action="store_true", help="also measure the joint update")
    add(
        "--as-published",
        action="store_true",
        help="also measure the recursion as published code runs it: slow",
    )
    add(
        "--max-weights",
        type=_positive,
        help="measure a slice of larger networks (default: 300000 on a CPU; on a GPU "
        "what fits into its memory)",
    )
    add("--repeats", type=_positive, default=3, help="repetitions (default: 3)")
    add("--threads", type=_positive, help="of torch on a CPU")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", default=device, help=f"as torch calls it (default: {device})")
    add("--json", metavar="PATH", help="write every number here")
    add("--png", metavar="PATH", help="draw the table of the inverse here")
    add("--collection", action="store_true", help="ways to collect gradients")
    add("--step", action="store_true", help="a whole pruning step of ResNet-20")
    add("--masks", action="store_true", help="training steps with masks and without")
    add("--scaling", type=_positive, metavar="R", help="1 to R processes")
    add(
        "--structures",
        nargs="?",
        const="resnet50",
        metavar="NETWORK",
        help="scores of channels of a network of torchvision (default: resnet50)",
    )
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return value


def _case_sizes(text: str) -> tuple[int, int | None, int]:
    parts = text.split(",")
    if len(parts) != 3:
        raise argparse.ArgumentTypeError(f"{text!r} is not N,B,D")
    gradients, block, weights = parts
    size = None if block == "full" else _positive(block)
    return _positive(gradients), size, _positive(weights)


def _measure_inverse(
    options: argparse.Namespace, device: torch.device
) -> tuple[list[inverse.InverseRow], float]:
    """Rows, with the floor of the best GEMM rate that was seen between the cases."""
    cases = [custom_case(*sizes) for sizes in options.case or ()]
    if options.preset or not cases:
        cases += [
            slice_case(case, options.max_weights or _most_weights(device, case))
            for case in preset_cases(options.preset or "headline")
        ]
    ticks = sum(
        options.repeats * (len(options.engines) + (case.block_size is not None))
        for case in cases
    )
    rows: list[inverse.InverseRow] = []
    rate = inverse.gemm_rate(device)
    with timing.show_progress(ticks) as tick:
        for case in cases:
            rows += inverse.measure_case(
                case,
                rate,
                repeats=options.repeats,
                device=device,
                engines=list(dict.fromkeys(options.engines)),
                with_update=options.update,
                as_published=options.as_published,
                tick=tick,
            )
            # A rate that a rival on the cores has lowered would flatter the engines.
            best = max(rate, inverse.gemm_rate(device))
            rows = [inverse.with_rate(row, rate, best) for row in rows]
            rate = best
    return rows, rate


def _most_weights(device: torch.device, case: inverse.Case) -> int:
    """Choose how much of a network is measured."""
    if device.type != "cuda":
        return _SLICE_ON_CPU
    free, _ = torch.cuda.mem_get_info(device)
    # Rows, given and kept; a matrix and its factor in float64.
    bytes_of_a_weight = 8 * case.num_gradients + 16 * (case.block_size or 0)
    return int(_USABLE_MEMORY * free / bytes_of_a_weight)


def _measure_others(
    options: argparse.Namespace, device: torch.device
) -> dict[str, Sequence[Any]]:
    tables: dict[str, Sequence[Any]] = {}
    repeats = options.repeats
    if options.collection:
        with timing.show_progress(4 * repeats) as tick:
            tables["collection"] = training.measure_collection(
                repeats=repeats, device=device, tick=tick
            )
    if options.step:
        with timing.show_progress(3 * repeats) as tick:
            tables["step"] = training.measure_step(
                as_published=options.as_published,
                repeats=repeats,
                device=device,
                tick=tick,
            )
    if options.masks:
        with timing.show_progress(2 * (_MASK_STEPS + training.WARM_UP_STEPS)) as tick:
            tables["masks"] = training.measure_masks(
                _MASK_STEPS, device=device, tick=tick
            )
    if options.scaling:
        with timing.show_progress(options.scaling) as tick:
            tables["scaling"] = scaling.measure_scaling(
                options.scaling, repeats=repeats, tick=tick
            )
    if options.structures:
        network = structures.torchvision_network(options.structures)
        with timing.show_progress(5 * (repeats + 1)) as tick:
            tables["structures"] = structures.measure_structures(
                network, repeats=repeats, device=device, tick=tick
            )
    return tables


def _show(machine: output.Machine, tables: dict[str, Sequence[Any]]) -> None:
    lines = [
        f"{machine.device}, {machine.threads} threads on {machine.cores_allowed} cores, "
        f"torch {machine.torch}, memory: {machine.memory}"
    ]
    if machine.load is not None:
        lines.append(f"load before the start: {machine.load:.2f} running processes")
    if machine.gemm_rate is not None:
        lines.append(f"float32 GEMM: {machine.gemm_rate / 1e9:.1f} GFLOP/s (the floor)")
    for name, rows in tables.items():
        lines += ["", f"[{name}]", output.format_table(rows)]
    if machine.busy:
        lines += ["", output.BUSY_NOTE]
    sys.stdout.write("\n".join(lines) + "\n")
