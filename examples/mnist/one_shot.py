"""Prune the WoodFisher paper's MLPNet on MNIST in one shot, without fine-tuning.

    python -m examples.mnist.one_shot --data FOLDER

FOLDER holds ``mnist.npz`` (``x_train`` and ``x_test`` as uint8 ``[n, 28, 28]``, ``y_train``,
``y_test``) and ``mlpnet_mnist_9397.npz`` (``fc1.weight`` [40, 784], ``fc2.weight`` [20, 40],
``fc3.weight`` [10, 20]: the network of the paper, 93.97 % on the test images).

Prints the accuracy on the test images for magnitude, WoodFisher as published
(independent updates in blocks of 784), the joint update with the full Fisher, the joint
update in several stages, and WoodTaylor in several stages with a line search. N = 1000
gradients of one sample; λ = 1e-5, for WoodTaylor 1e-3 (3e-4 with 48 stages). ``--only``
selects methods, ``--set`` changes settings:

    python -m examples.mnist.one_shot --data FOLDER --only "16 stages" --set damping=3e-4
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from examples.comparison import compare, parse_arguments

COMMON = {"num_gradients": 1000, "gradient_batch_size": 1, "damping": 1e-5}
FULL: dict[str, Any] = {"update": "joint", "block_size": None}
FULL_ALONE = {**FULL, "line_search": False}
WOODTAYLOR = {**FULL, "criterion": "woodtaylor", "first_order_samples": 17_408}
METHODS: dict[str, dict[str, Any]] = {
    "magnitude": {"criterion": "magnitude", "block_size": 784},
    "independent, blocks of 784": {
        "line_search": False,
        "update": "independent",
        "block_size": 784,
    },
    "joint, full Fisher": FULL_ALONE,
    "joint, full Fisher, 8 stages": {**FULL_ALONE, "recompute_steps": 8},
    "joint, full Fisher, 16 stages": {**FULL_ALONE, "recompute_steps": 16},
    "joint, full Fisher, line search": FULL,
    "layerwise": {
        "criterion": "layerwise",
        "num_gradients": 4096,
        "relative_damping": 1e-2,
    },
    # Shorter stages need less damping.
    "WoodTaylor, line search, 16 stages": {
        **WOODTAYLOR,
        "recompute_steps": 16,
        "damping": 1e-3,
    },
    "WoodTaylor, line search, 48 stages": {
        **WOODTAYLOR,
        "recompute_steps": 48,
        "damping": 3e-4,
    },
}


def load(folder: Path) -> tuple[TensorDataset, TensorDataset, dict[str, Tensor]]:
    """Load training images, test images and weights."""
    images = np.load(folder / "mnist.npz")
    weights = np.load(folder / "mlpnet_mnist_9397.npz")

    def make_dataset(part: str) -> TensorDataset:
        pixels = torch.tensor(images[f"x_{part}"], dtype=torch.float32).flatten(1)
        labels = torch.tensor(images[f"y_{part}"]).long()
        return TensorDataset((pixels / 255 - 0.1307) / 0.3081, labels)

    state = {
        f"{2 * i}.weight": torch.tensor(weights[f"fc{i + 1}.weight"]) for i in range(3)
    }
    return make_dataset("train"), make_dataset("test"), state


def mlpnet(state: dict[str, Tensor]) -> nn.Sequential:
    """Build the perceptron 784-40-20-10, without biases."""
    model = nn.Sequential(
        nn.Linear(784, 40, bias=False),
        nn.ReLU(),
        nn.Linear(40, 20, bias=False),
        nn.ReLU(),
        nn.Linear(20, 10, bias=False),
    )
    model.load_state_dict(state)
    return model


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    arguments = parse_arguments(parser, [0.9, 0.95, 0.98])
    train, test, state = load(arguments.data)
    compare(
        "MLPNet on MNIST, one shot",
        {name: {**COMMON, **settings} for name, settings in METHODS.items()},
        lambda: mlpnet(state),
        train,
        test,
        arguments,
    )


if __name__ == "__main__":
    main()
