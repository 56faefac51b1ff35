"""One-shot methods compared on one network: the table behind the examples."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.utils.data import Dataset

from lightning_woodfisher import FisherConfig, SelectionConfig, StepConfig, prune
from lightning_woodfisher.pruning.report import format_table


def parse_arguments(
    description: str, sparsities: list[float], parser: argparse.ArgumentParser
) -> argparse.Namespace:
    """Read the command line.

    Args:
        description: of the script.
        sparsities: compared unless others are asked for.
        parser: with the script's own options.

    Returns:
        Its values, with those of ``--set`` as a dict ``changes``.
    """
    parser.description = description
    parser.add_argument("--data", type=Path, required=True, help="folder of the images")
    parser.add_argument("--sparsities", type=float, nargs="+", default=sparsities)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="methods with this in their name"
    )
    parser.add_argument(
        "--verbose", action="store_true", help="print scales and seconds of the steps"
    )
    parser.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="other settings for these methods, such as damping=3e-4",
    )
    arguments = parser.parse_args()
    arguments.changes = {
        name: ast.literal_eval(value)
        for name, value in (text.split("=", 1) for text in arguments.set)
    }
    return arguments


def compare(
    title: str,
    methods: Mapping[str, Mapping[str, Any]],
    make_model: Callable[[], nn.Module],
    train: Dataset[Any],
    loss_fn: Callable[[nn.Module, Any], Tensor],
    accuracy: Callable[[nn.Module], float],
    arguments: argparse.Namespace,
) -> None:
    """Prune a fresh network by each method at each sparsity, and print a table.

    Args:
        title: of the table.
        methods: settings by name: arguments of :func:`prune` and fields of
            :class:`FisherConfig`, :class:`SelectionConfig` and :class:`StepConfig`.
        make_model: gives the dense network.
        train: samples of gradients.
        loss_fn: mean loss of a batch.
        accuracy: of a network, in per cent.
        arguments: of the command line.
    """
    print(f"dense: {accuracy(make_model()):.2f} %", flush=True)
    rows = []
    for name, settings in methods.items():
        if arguments.only not in name:
            continue
        options = {**settings, **arguments.changes}
        fisher = FisherConfig(**_take(options, FisherConfig))
        selection = SelectionConfig(**_take(options, SelectionConfig))
        step = StepConfig(measure_loss=False, **_take(options, StepConfig))
        for sparsity in arguments.sparsities:
            # Magnitude draws nothing: every seed gives the same.
            draws = options.get("criterion") != "magnitude"
            found = []
            for seed in range(arguments.seeds if draws else 1):
                model = make_model()
                report = prune(
                    model,
                    train,
                    loss_fn,
                    target_sparsity=sparsity,
                    fisher=fisher,
                    selection=selection,
                    step=dataclasses.replace(step, seed=seed),
                    **options,
                )
                found.append(accuracy(model))
                if arguments.verbose:
                    print(
                        f"{name} {sparsity:g} {seed}: {found[-1]:.2f}, scales "
                        f"{report.update_scales} {report.first_order_scales}, "
                        f"{sum(report.seconds.values()):.1f} s",
                        flush=True,
                    )
            each = "  ".join(f"{value:.2f}" for value in found)
            rows.append((name, f"{sparsity:g}", f"{statistics.mean(found):.2f}", each))
    head = (title, "sparsity", "mean", "accuracy by seed, %")
    print(format_table(head, rows))


def _take(options: dict[str, Any], kind: type[Any]) -> dict[str, Any]:
    """Take the fields of a dataclass out of the options."""
    known = {field.name for field in dataclasses.fields(kind)}
    return {name: options.pop(name) for name in known & options.keys()}
