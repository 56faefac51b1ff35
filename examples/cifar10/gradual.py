"""Prune ResNet-20 on CIFAR-10 gradually: WoodFisher and magnitude at the same budget.

    python -m examples.cifar10.gradual --data FOLDER --weights runs/cifar10/dense.pt

Both prune on the same cubic ramp, in six steps over the first half of the epochs, with the
same learning rates and order of images. WoodFisher also reads 400 mini-batches of 8 images
in each step: most gradients of a network that fits its images are near zero, so that fewer
images or a damping below 1e-4 gave worse masks than magnitude. Prints the accuracy on the
test images; ``--held-out`` uses the 5,000 held-out images instead, to choose settings.
"""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from examples.cifar10.fitting import (
    fit_and_test,
    load_data,
    load_module,
    make_parser,
)
from examples.cifar10.model import CIFAR10
from examples.comparison import format_accuracies
from lightning_woodfisher import (
    FisherConfig,
    PolynomialSchedule,
    StepConfig,
    WoodFisherPruningCallback,
)
from lightning_woodfisher.base.text_table import format_table

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
        sparsity: sparsity after the last step.
        seed: seed of all random numbers.
        data: the images.
        options: options of the command line.

    Returns:
        Accuracy in percent.
    """
    module = load_module(options.weights, options.learning_rate, seed)
    batches = len(data.train) // data.batch_size
    every = options.epochs * batches // (2 * STEPS)
    schedule = PolynomialSchedule(
        start_step=0, end_step=(STEPS - 1) * every, every_n_steps=every
    )
    settings = METHODS[method]
    step = dataclasses.replace(settings["step"], seed=seed)
    callback = WoodFisherPruningCallback(
        sparsity, schedule, **{**settings, "step": step}
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
    parser = make_parser(__doc__.split("\n")[0])
    sparsities = [0.9, 0.95, 0.98]
    parser.add_argument("--sparsities", type=float, nargs="+", default=sparsities)
    options = parser.parse_args()
    data = load_data(options.data, options.images_per_epoch)
    rows = []
    for sparsity in options.sparsities:
        for method in (name for name in METHODS if options.only in name):
            found = []
            for seed in options.seeds:
                found.append(fit(method, sparsity, seed, data, options))
                print(f"{method} {sparsity:g} {seed}: {found[-1]:.2f}", flush=True)
            rows.append((method, f"{sparsity:g}", *format_accuracies(found)))
    head = ("ResNet-20, gradual", "sparsity", "mean", "accuracy by seed, %")
    print(format_table(head, rows))


if __name__ == "__main__":
    main()
