"""Gradual pruning of ResNet-20 on CIFAR-10: WoodFisher and magnitude at the same budget.

    python -m examples.cifar10.gradual --data FOLDER --weights runs/cifar10/dense.pt

Both prune along the same cubic ramp, in six steps over the first half of the epochs, with
the same learning rates and the same order of the images; WoodFisher also looks at 400
mini-batches of 8 images in each step: of a network that fits most images few gradients say
anything, and fewer images or a damping below 1e-4 gave masks worse than magnitude's.
Prints the accuracy on the test images. ``--held-out`` takes the 5,000 held-out images
instead, to choose settings by.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import warnings
from typing import Any

from examples.cifar10.fitting import fit_and_test, trained_module
from examples.cifar10.model import CIFAR10
from lightning_woodfisher import (
    FisherConfig,
    PolynomialSchedule,
    StepConfig,
    WoodFisherPruningCallback,
)
from lightning_woodfisher.pruning.report import format_table

METHODS: dict[str, dict[str, Any]] = {
    "magnitude": {
        "criterion": "magnitude",
        "step": StepConfig(measure_loss=False),
    },
    "WoodFisher": {
        "fisher": FisherConfig(
            num_gradients=400,
            gradient_batch_size=8,
            model_mode="eval",
            block_size=2000,
            damping=1e-4,
        ),
        "step": StepConfig(update="independent", line_search=False, measure_loss=False),
    },
}
STEPS = 6


def fit(
    method: str, sparsity: float, seed: int, data: CIFAR10, options: argparse.Namespace
) -> float:
    """Prune and train one network.

    Args:
        method: name in ``METHODS``.
        sparsity: at the end.
        seed: of everything random.
        data: the images.
        options: of the command line.

    Returns:
        Accuracy in per cent.
    """
    module = trained_module(options.weights, options.learning_rate, seed)
    batches = len(data.train) // data.batch_size
    every = options.epochs * batches // (2 * STEPS)
    schedule = PolynomialSchedule(
        start_step=0, end_step=(STEPS - 1) * every, every_n_steps=every
    )
    settings = METHODS[method]
    callback = WoodFisherPruningCallback(
        sparsity,
        schedule,
        **{**settings, "step": dataclasses.replace(settings["step"], seed=seed)},
    )
    return fit_and_test(
        module,
        data,
        options.epochs,
        [callback],
        options.accelerator,
        options.held_out,
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", default="data", help="folder of the images")
    parser.add_argument("--weights", default="runs/cifar10/dense.pt")
    parser.add_argument("--held-out", action="store_true")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--images-per-epoch", type=int, help="fewer, for a quick look")
    parser.add_argument("--learning-rate", type=float, default=0.03)
    parser.add_argument("--only", default="", metavar="TEXT")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument(
        "--sparsities", type=float, nargs="+", default=[0.9, 0.95, 0.98]
    )
    parser.add_argument("--accelerator", default="auto")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    data = CIFAR10(options.data, images_per_epoch=options.images_per_epoch)
    data.setup("fit")
    rows = []
    for sparsity in options.sparsities:
        for method in (name for name in METHODS if options.only in name):
            found = []
            for seed in options.seeds:
                found.append(fit(method, sparsity, seed, data, options))
                print(f"{method} {sparsity:g} {seed}: {found[-1]:.2f}", flush=True)
            each = "  ".join(f"{value:.2f}" for value in found)
            rows.append(
                (method, f"{sparsity:g}", f"{statistics.mean(found):.2f}", each)
            )
    head = ("ResNet-20, gradual", "sparsity", "mean", "accuracy by seed, %")
    print(format_table(head, rows))


if __name__ == "__main__":
    main()
