"""One-shot pruning of the WoodFisher paper's MLPNet on MNIST, without retraining.

    python examples/mnist/one_shot.py --data FOLDER

FOLDER holds ``mnist.npz`` (``x_train`` and ``x_test`` as uint8 ``[n, 28, 28]``, ``y_train``,
``y_test``) and ``mlpnet_mnist_9397.npz`` (``fc1.weight`` [40, 784], ``fc2.weight`` [20, 40],
``fc3.weight`` [10, 20]: the network of the paper, 93.97 % on the test images).

Prints the accuracy on the test images for magnitude, WoodFisher as published
(independent updates in blocks of 784), the joint update with the full Fisher, the joint
update recomputed in parts, and WoodTaylor in parts whose length is taken by the measured
loss. N = 1000 gradients of one sample; λ = 1e-5, with WoodTaylor 1e-3. ``--only`` chooses
methods, ``--set`` tries other settings:

    python examples/mnist/one_shot.py --data FOLDER --only "48 parts" --set damping=3e-4
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_woodfisher import FisherConfig, prune
from lightning_woodfisher.report import format_table

METHODS: dict[str, dict[str, Any]] = {
    "magnitude": {"criterion": "magnitude", "block_size": 784},
    "independent, blocks of 784": {"update": "independent", "block_size": 784},
    "joint, full Fisher": {"update": "joint", "block_size": None},
    "joint, full Fisher, 8 parts": {
        "update": "joint",
        "block_size": None,
        "recompute_steps": 8,
    },
    "joint, full Fisher, 16 parts": {
        "update": "joint",
        "block_size": None,
        "recompute_steps": 16,
    },
}
WOODTAYLOR: dict[str, Any] = {
    "criterion": "woodtaylor",
    "update": "joint",
    "block_size": None,
    "damping": 1e-3,
    "first_order_samples": 17_408,
    "step_search": True,
}
for _parts in (16, 48):
    METHODS[f"WoodTaylor, step search, {_parts} parts"] = {
        **WOODTAYLOR,
        "recompute_steps": _parts,
    }


def load(folder: Path) -> tuple[TensorDataset, Tensor, Tensor, dict[str, Tensor]]:
    """Read the images and the weights."""
    images = np.load(folder / "mnist.npz")
    weights = np.load(folder / "mlpnet_mnist_9397.npz")

    def normalise(pixels: Any) -> Tensor:
        flat = torch.tensor(pixels, dtype=torch.float32).flatten(1) / 255
        return (flat - 0.1307) / 0.3081

    train = TensorDataset(
        normalise(images["x_train"]), torch.tensor(images["y_train"]).long()
    )
    state = {
        f"{2 * i}.weight": torch.tensor(weights[f"fc{i + 1}.weight"]) for i in range(3)
    }
    labels = torch.tensor(images["y_test"]).long()
    return train, normalise(images["x_test"]), labels, state


def mlpnet(state: dict[str, Tensor]) -> nn.Sequential:
    """Build 784-40-20-10 with ReLU and without biases."""
    model = nn.Sequential(
        nn.Linear(784, 40, bias=False),
        nn.ReLU(),
        nn.Linear(40, 20, bias=False),
        nn.ReLU(),
        nn.Linear(20, 10, bias=False),
    )
    model.load_state_dict(state)
    return model


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Mean cross-entropy of a batch."""
    return F.cross_entropy(model(batch[0]), batch[1])


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of right answers in per cent."""
    return 100 * float((model(images).argmax(1) == labels).float().mean())


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument(
        "--sparsities", type=float, nargs="+", default=[0.9, 0.95, 0.98]
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", default="", help="methods with this in their name")
    parser.add_argument(
        "--verbose", action="store_true", help="print the scales of the steps"
    )
    parser.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="other settings for these methods, such as damping=3e-4",
    )
    arguments = parser.parse_args()
    train, images, labels, state = load(arguments.data)
    dense = accuracy(mlpnet(state), images, labels)
    print(f"dense: {dense:.2f} % of {len(labels):,} test images")
    rows = []
    changes = {
        name: ast.literal_eval(value)
        for name, value in (text.split("=", 1) for text in arguments.set)
    }
    for name, settings in METHODS.items():
        if arguments.only not in name:
            continue
        settings = {**settings, **changes}
        known = {field.name for field in dataclasses.fields(FisherConfig)}
        own = {key: settings.pop(key) for key in known & settings.keys()}
        fisher = FisherConfig(
            **{"num_gradients": 1000, "gradient_batch_size": 1, "damping": 1e-5, **own}
        )
        for sparsity in arguments.sparsities:
            found = []
            # Magnitude draws nothing: every seed gives the same.
            seeds = 1 if settings.get("criterion") == "magnitude" else arguments.seeds
            for seed in range(seeds):
                model = mlpnet(state)
                report = prune(
                    model,
                    train,
                    loss_fn,
                    target_sparsity=sparsity,
                    fisher=fisher,
                    measure_loss=False,
                    seed=seed,
                    **settings,
                )
                found.append(accuracy(model, images, labels))
                if arguments.verbose:
                    print(
                        report.update_scales,
                        report.first_order_scales,
                        dict(report.seconds),
                    )
            each = "  ".join(f"{value:.2f}" for value in found)
            rows.append((name, f"{sparsity:g}", f"{statistics.mean(found):.2f}", each))
    head = ("MLPNet on MNIST, one shot", "sparsity", "mean", "accuracy by seed, %")
    print(format_table(head, rows))


if __name__ == "__main__":
    main()
