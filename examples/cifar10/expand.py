"""Expand and prune ResNet-20 on CIFAR-10: widen bottlenecks, train, and prune again.

    python -m examples.cifar10.expand --data FOLDER

Trains, prunes and fine-tunes a network; finds the layers that lost few channels; trains a
network with wider versions of them, and prunes it to the size of the first. Tests both.
"""

from __future__ import annotations

import argparse

import lightning.pytorch as pl

from examples.cifar10.fitting import fit_and_test, load_data
from examples.cifar10.model import CIFAR10, CIFAR10Classifier
from lightning_woodfisher import (
    OneShotSchedule,
    SOSPPruningCallback,
    StructureConfig,
    StructureReport,
)
from lightning_woodfisher.base.text_table import format_table
from lightning_woodfisher.structured.expand import find_bottlenecks, target_for_size


def train_and_prune(
    data: CIFAR10,
    options: argparse.Namespace,
    target: float | None = None,
    size: int | None = None,
    multipliers: dict[str, float] | None = None,
) -> tuple[StructureReport, float, float]:
    """Train from scratch, prune, and fine-tune.

    Args:
        data: the images.
        options: options of the command line.
        target: share of the parameters to remove.
        size: number of parameters to keep, in place of a target.
        multipliers: factors of the widths of layers.

    Returns:
        The report of pruning, and the accuracies before and after it in percent.
    """
    pl.seed_everything(options.seed, verbose=False)
    module = CIFAR10Classifier(
        options.learning_rate, width=options.width, multipliers=multipliers
    )
    dense = fit_and_test(module, data, options.epochs)
    if target is None:
        target = target_for_size(size or 0, sum(p.numel() for p in module.parameters()))
    callback = SOSPPruningCallback(
        target,
        options.variant,
        StructureConfig(num_samples=options.samples, measure="parameters"),
        schedule=OneShotSchedule(epoch=0),
        network="net",
    )
    module.learning_rate = options.learning_rate / 4
    pruned = fit_and_test(module, data, options.fine_tuning_epochs, [callback])
    return callback.reports[-1], dense, pruned


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", default="data", help="folder of the images")
    parser.add_argument("--epochs", type=int, default=18)
    parser.add_argument("--fine-tuning-epochs", type=int, default=6)
    parser.add_argument("--target", type=float, default=0.6, help="share removed")
    parser.add_argument("--variant", choices=["I", "H"], default="H", help="of SOSP")
    parser.add_argument("--samples", type=int, default=1000, help="for the scores")
    parser.add_argument(
        "--images", type=int, help="number of training images, for a quick test"
    )
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=0.2, help="maximum")
    parser.add_argument("--factor", type=float, default=2.0, help="of the width")
    parser.add_argument("--quantile", type=float, default=0.25)
    parser.add_argument("--share", type=float, default=0.5)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    data = load_data(options.data, options.images)
    first = train_and_prune(data, options, target=options.target)
    print(first[0].to_table())
    found = find_bottlenecks(
        first[0],
        factor=options.factor,
        quantile=options.quantile,
        share=options.share,
    )
    runs = {"ResNet-20": first}
    multipliers = {name.removeprefix("net."): value for name, value in found.items()}
    print(f"Bottlenecks: {', '.join(multipliers) or 'none, so no layer is widened'}.")
    if multipliers:
        size = first[0].parameters
        second = train_and_prune(data, options, size=size, multipliers=multipliers)
        print(second[0].to_table())
        runs["expanded"] = second
    rows = [
        (
            name,
            f"{report.parameters_dense:,}",
            f"{dense:.2f}",
            f"{report.parameters:,}",
            f"{report.macs / 1e6:.1f}",
            f"{pruned:.2f}",
        )
        for name, (report, dense, pruned) in runs.items()
    ]
    head = ("", "parameters", "dense, %", "left", "million MACs", "pruned, %")
    print(format_table(head, rows))


if __name__ == "__main__":
    main()
