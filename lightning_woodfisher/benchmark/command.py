"""Parse and run ``lightning-woodfisher benchmark``."""

from __future__ import annotations

__all__ = ["choose_max_weights", "make_parser", "run_benchmark"]

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_woodfisher.base.errors import ConfigurationError
from lightning_woodfisher.base.optional_imports import import_optional
from lightning_woodfisher.benchmark import inverse, output
from lightning_woodfisher.benchmark.cases import (
    PRESETS,
    Case,
    custom_case,
    preset_cases,
    slice_case,
)
from lightning_woodfisher.benchmark.collection import measure_collection
from lightning_woodfisher.benchmark.masks import measure_masks
from lightning_woodfisher.benchmark.networks import (
    ResNet20,
    Transformer,
    make_mlpnet,
    make_resnet20,
    random_data,
    random_images,
)
from lightning_woodfisher.benchmark.passes import measure_passes
from lightning_woodfisher.benchmark.scaling import measure_scaling
from lightning_woodfisher.benchmark.step import measure_step
from lightning_woodfisher.benchmark.structures import (
    load_torchvision_network,
    measure_structures,
)
from lightning_woodfisher.benchmark.timing import require_device
from lightning_woodfisher.fisher.config import FisherConfig

_SLICE_ON_CPU = 300_000
# Share of a GPU's free memory that rows, inverses and their copies may take.
_USABLE_MEMORY = 0.6


def run_benchmark(options: argparse.Namespace) -> int:
    """Run the benchmark.

    Args:
        options: parsed by :func:`make_parser`.

    Returns:
        Exit status.
    """
    others = ("case", "collection", "step", "masks", "scaling", "structures")
    if not any(getattr(options, name) for name in others):
        options.preset = options.preset or "headline"
    device = require_device(options.device)
    _check(options)
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    rows, rate = _measure_inverse(options, device)
    tables: dict[str, Sequence[Any]] = {"inverse": rows} if rows else {}
    tables |= _measure_others(options, device)
    machine = output.describe_machine(device, rate, load, rows)
    sys.stdout.write(output.format_results(machine, tables))
    if options.json:
        Path(options.json).write_text(output.to_json(machine, tables))
    if options.png:
        output.write_figure(rows, machine, Path(options.png))
    return 0


def _check(options: argparse.Namespace) -> None:
    """Check options that would otherwise fail after minutes of measurement."""
    output.require_folder("--json", options.json)
    output.require_folder("--png", options.png)
    if options.png:
        import_optional("matplotlib.figure", "--png")
    if options.png and not (options.preset or options.case):
        raise ConfigurationError(
            "--png draws the table of the inverse; add --preset or --case."
        )


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the subcommand.

    Returns:
        The parser.
    """
    parser = argparse.ArgumentParser(
        prog="lightning-woodfisher benchmark",
        description="Measure the cost of a pruning step on this machine.",
    )
    add = parser.add_argument
    add("--preset", choices=PRESETS, help="cases to measure (default: headline)")
    add(
        "--case",
        type=_read_case,
        action="append",
        default=[],
        metavar="N,B,D",
        help="case to measure; B = 'full' for the full Fisher; repeatable",
    )
    add(
        "--engines",
        nargs="+",
        choices=("auto", "primal", "dual"),
        default=["auto"],
        help="engines that compute the inverse (default: auto, the cheaper one)",
    )
    add("--update", action="store_true", help="also measure the joint update")
    add(
        "--as_published",
        action="store_true",
        help="also measure the recursion as in published code, which is slow",
    )
    add(
        "--max_weights",
        type=_read_count,
        help="measure only a slice of larger networks (default: 300000 on a CPU; the most "
        "that fits into memory on a GPU)",
    )
    add("--repeats", type=_read_count, default=3, help="repetitions (default: 3)")
    add("--threads", type=_read_count, help="number of torch threads on a CPU")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", default=device, help=f"torch device (default: {device})")
    add("--json", metavar="PATH", help="write every number to this file")
    add("--png", metavar="PATH", help="draw the table of the inverse to this file")
    add("--collection", action="store_true", help="measure gradient collection")
    add("--step", action="store_true", help="measure pruning steps of five networks")
    add("--masks", action="store_true", help="measure training steps with masks")
    add(
        "--scaling",
        type=_read_count,
        metavar="R",
        help="measure a step on 1 to R ranks",
    )
    add(
        "--structures",
        nargs="?",
        const="resnet50",
        metavar="NETWORK",
        help="measure channel scores of a torchvision network (default: resnet50)",
    )
    return parser


def _read_count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return value


def _read_case(text: str) -> Case:
    sizes = text.split(",")
    if len(sizes) != 3:
        raise argparse.ArgumentTypeError(f"{text!r} is not N,B,D")
    gradients, block, weights = sizes
    size = None if block == "full" else _read_count(block)
    return custom_case(_read_count(gradients), size, _read_count(weights))


def _measure_inverse(
    options: argparse.Namespace, device: torch.device
) -> tuple[list[inverse.InverseRow], float | None]:
    """Return rows, and the best GEMM rate of those measured between the cases."""
    cases = list(options.case)
    if options.preset:
        cases += [
            slice_case(case, options.max_weights or choose_max_weights(device, case))
            for case in preset_cases(options.preset)
        ]
    if not cases:
        return [], None
    rows: list[inverse.InverseRow] = []
    # Too low a rate, because of other processes, would make the engines look better.
    rates = [inverse.measure_gemm_rate(device)]
    for case in cases:
        rows += inverse.measure_case(
            case,
            repeats=options.repeats,
            device=device,
            engines=options.engines,
            with_update=options.update,
            as_published=options.as_published,
        )
        rates.append(inverse.measure_gemm_rate(device))
    return [inverse.add_floor(row, max(rates)) for row in rows], max(rates)


def choose_max_weights(device: torch.device, case: Case) -> int:
    """Choose the size of a slice of a network.

    Args:
        device: device to measure on.
        case: the problem size of the whole network.

    Returns:
        Number of weights; on a GPU what fits into its free memory.
    """
    if device.type != "cuda":
        return _SLICE_ON_CPU
    free, _ = torch.cuda.mem_get_info(device)
    # Given and stored rows; a matrix and its factor in float64.
    bytes_per_weight = 8 * case.num_gradients + 16 * (case.block_size or 0)
    return int(_USABLE_MEMORY * free / bytes_per_weight)


def _networks_of_steps(
    device: torch.device,
) -> Iterator[tuple[str, nn.Module, TensorDataset, FisherConfig]]:
    """Yield name, network, data and Fisher of the steps measured in plain passes."""
    resnet20 = make_resnet20(device)
    yield "resnet20", resnet20, random_images(4096), FisherConfig()
    for block_size in (288, None):
        fisher = FisherConfig(1000, 1, block_size=block_size)
        yield "resnet20", resnet20, random_images(1000), fisher
    for name in ("mobilenet_v3_small", "efficientnet_b0"):
        network = load_torchvision_network(name).to(device)
        yield name, network, random_images(256, 64), FisherConfig(64, 4)
    torch.manual_seed(0)
    transformer = Transformer().to(device).eval()
    yield "transformer", transformer, random_data(4096, 16, 256), FisherConfig()
    mlpnet = make_mlpnet().to(device).eval()
    yield "mlpnet", mlpnet, random_data(4096, 784), FisherConfig()


def _measure_others(
    options: argparse.Namespace, device: torch.device
) -> dict[str, Sequence[Any]]:
    tables: dict[str, Sequence[Any]] = {}
    model, repeats = make_resnet20(device), options.repeats
    if options.collection:
        tables["collection"] = measure_collection(
            model, random_images(256), repeats=repeats
        )
    if options.step:
        tables["step"] = measure_step(
            model,
            random_images(1000),
            repeats=repeats,
            as_published=options.as_published,
        )
        tables["passes"] = [
            row
            for name, network, data, fisher in _networks_of_steps(device)
            for row in measure_passes(name, network, data, fisher, repeats=repeats)
        ]
    if options.masks:
        torch.manual_seed(0)
        networks: dict[str, tuple[nn.Module, Tensor]] = {
            "resnet20": (ResNet20(), torch.randn(32, 3, 32, 32)),
            "transformer": (Transformer(), torch.randn(32, 64, 256)),
        }
        tables["masks"] = measure_masks(networks, device=device)
    if options.scaling:
        tables["scaling"] = measure_scaling(
            options.scaling, model.cpu(), random_images(128), repeats=repeats
        )
    if options.structures:
        network = load_torchvision_network(options.structures).to(device)
        tables["structures"] = measure_structures(
            network, random_images(16, 224), repeats=repeats
        )
    return tables
