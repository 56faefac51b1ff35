"""Compute loss, accuracy and a table of one-shot methods for several example scripts."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_woodfisher import (
    FisherConfig,
    LayerwiseConfig,
    SelectionConfig,
    StepConfig,
    prune,
)
from lightning_woodfisher.base.text_table import format_table


def loss_fn(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    """Compute the mean cross-entropy of a batch."""
    return F.cross_entropy(model(batch[0]), batch[1])


@torch.no_grad()
def accuracy(model: nn.Module, data: TensorDataset) -> float:
    """Compute the accuracy in percent, in evaluation mode."""
    model.eval()
    inputs, labels = data.tensors
    batches = zip(inputs.split(500), labels.split(500), strict=True)
    correct = sum((model(batch).argmax(1) == truth).sum() for batch, truth in batches)
    return 100 * float(correct) / len(labels)


def format_accuracies(values: Sequence[float]) -> tuple[str, str]:
    """Format the mean of the accuracies and all of them as two cells of a table."""
    return f"{statistics.mean(values):.2f}", "  ".join(f"{v:.2f}" for v in values)


def parse_arguments(
    parser: argparse.ArgumentParser, sparsities: list[float]
) -> argparse.Namespace:
    """Parse the command line of a one-shot comparison.

    Args:
        parser: parser with the script's own options.
        sparsities: default of ``--sparsities``.

    Returns:
        The values, with the settings of ``--set`` as a dict ``changes``.
    """
    parser.add_argument("--data", type=Path, required=True, help="folder of the images")
    parser.add_argument("--sparsities", type=float, nargs="+", default=sparsities)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="methods whose name contains TEXT"
    )
    parser.add_argument(
        "--verbose",
        action="store_true",
        help="print the scales and seconds of each step",
    )
    add_settings(parser)
    arguments = parser.parse_args()
    arguments.changes = dict(arguments.set)
    return arguments


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Add the option ``--set``, a list of names and values."""
    parser.add_argument(
        "--set",
        nargs="+",
        default=[],
        type=_read_setting,
        metavar="NAME=VALUE",
        help="settings that override those of the methods, such as damping=3e-4",
    )


def _read_setting(text: str) -> tuple[str, Any]:
    name, value = text.split("=", 1)
    return name, ast.literal_eval(value)


def compare(
    title: str,
    methods: Mapping[str, Mapping[str, Any]],
    make_model: Callable[[], nn.Module],
    train: TensorDataset,
    test: TensorDataset,
    arguments: argparse.Namespace,
) -> None:
    """Prune a new network by each method at each sparsity, and print a table.

    Args:
        title: title of the table.
        methods: settings by name: arguments of :func:`prune` and fields of
            :class:`FisherConfig`, :class:`SelectionConfig`, :class:`StepConfig` and
            :class:`LayerwiseConfig`.
        make_model: returns the dense network.
        train: samples for gradients.
        test: samples for the accuracy.
        arguments: from :func:`parse_arguments`.
    """
    print(f"dense: {accuracy(make_model(), test):.2f} %", flush=True)
    rows = []
    for name, settings in methods.items():
        if arguments.only not in name:
            continue
        options = {**settings, **arguments.changes}
        fisher = FisherConfig(**_take(options, FisherConfig))
        selection = SelectionConfig(**_take(options, SelectionConfig))
        layerwise = LayerwiseConfig(**_take(options, LayerwiseConfig))
        step = StepConfig(measure_loss=False, **_take(options, StepConfig))
        for sparsity in arguments.sparsities:
            # Magnitude uses no random numbers, so one seed is enough.
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
                    layerwise=layerwise,
                    **options,
                )
                found.append(accuracy(model, test))
                if arguments.verbose:
                    print(
                        f"{name} {sparsity:g} {seed}: {found[-1]:.2f}, scales "
                        f"{report.update_scales} {report.first_order_scales}, "
                        f"{sum(report.seconds.values()):.1f} s",
                        flush=True,
                    )
            rows.append((name, f"{sparsity:g}", *format_accuracies(found)))
    head = (title, "sparsity", "mean", "accuracy by seed, %")
    print(format_table(head, rows))


def _take(options: dict[str, Any], kind: type[Any]) -> dict[str, Any]:
    """Remove the fields of a dataclass from the options and return them."""
    known = {field.name for field in dataclasses.fields(kind)}
    return {name: options.pop(name) for name in known & options.keys()}
