"""One-shot pruning of the WoodFisher paper's MLPNet on MNIST, without retraining.

    python -m examples.mnist.one_shot --data FOLDER

FOLDER holds ``mnist.npz`` (``x_train`` and ``x_test`` as uint8 ``[n, 28, 28]``, ``y_train``,
``y_test``) and ``mlpnet_mnist_9397.npz`` (``fc1.weight`` [40, 784], ``fc2.weight`` [20, 40],
``fc3.weight`` [10, 20]: the network of the paper, 93.97 % on the test images).

Prints the accuracy on the test images for magnitude, WoodFisher as published
(independent updates in blocks of 784), the joint update with the full Fisher, the joint
update recomputed in parts, and WoodTaylor in parts whose length is taken by the measured
loss. N = 1000 gradients of one sample; λ = 1e-5, with WoodTaylor 1e-3 (3e-4 in 48
parts). ``--only`` chooses methods, ``--set`` tries other settings:

    python -m examples.mnist.one_shot --data FOLDER --only "16 parts" --set damping=3e-4
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from examples.comparison import compare, parse_arguments

COMMON = {"num_gradients": 1000, "gradient_batch_size": 1, "damping": 1e-5}
METHODS: dict[str, dict[str, Any]] = {
    "magnitude": {"criterion": "magnitude", "block_size": 784},
    "independent, blocks of 784": {
        "line_search": False,
        "update": "independent",
        "block_size": 784,
    },
    "joint, full Fisher": {"line_search": False, "update": "joint", "block_size": None},
    "joint, full Fisher, 8 parts": {
        "line_search": False,
        "update": "joint",
        "block_size": None,
        "recompute_steps": 8,
    },
    "joint, full Fisher, 16 parts": {
        "line_search": False,
        "update": "joint",
        "block_size": None,
        "recompute_steps": 16,
    },
}
METHODS["joint, full Fisher, step search"] = {"update": "joint", "block_size": None}
WOODTAYLOR: dict[str, Any] = {
    "criterion": "woodtaylor",
    "update": "joint",
    "block_size": None,
    "damping": 1e-3,
    "first_order_samples": 17_408,
    "line_search": True,
}
# Smaller parts are trusted with less damping.
for _parts, _damping in ((16, 1e-3), (48, 3e-4)):
    METHODS[f"WoodTaylor, step search, {_parts} parts"] = {
        **WOODTAYLOR,
        "recompute_steps": _parts,
        "damping": _damping,
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
    arguments = parse_arguments(
        __doc__.split("\n")[0], [0.9, 0.95, 0.98], argparse.ArgumentParser()
    )
    train, images, labels, state = load(arguments.data)
    compare(
        "MLPNet on MNIST, one shot",
        {name: {**COMMON, **settings} for name, settings in METHODS.items()},
        lambda: mlpnet(state),
        train,
        loss_fn,
        lambda model: accuracy(model, images, labels),
        arguments,
    )


if __name__ == "__main__":
    main()
