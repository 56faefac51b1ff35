"""Prune ResNet-20 on CIFAR-10 in one shot, without fine-tuning.

    python -m examples.cifar10.one_shot --data FOLDER --weights runs/cifar10/dense.pt

``examples.cifar10.train`` writes the weights. Gradients are computed on training images
without augmentation, with BatchNorm in evaluation mode, and its statistics are not
recalibrated. Prints the accuracy on the test images. ``--only`` selects methods, ``--set``
changes settings.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import nn

from examples.cifar10.model import CIFAR10, resnet20
from examples.comparison import compare, parse_arguments

COMMON: dict[str, Any] = {
    "num_gradients": 1000,
    "gradient_batch_size": 1,
    "damping": 1e-5,
    "model_mode": "eval",
    "batchnorm_recalibration_batches": 0,
    # Published results for this network prune only the convolutions.
    "exclude": [r"^\d+\.weight$"],
}
PAPER = {"block_size": 36_864, "update": "independent", "line_search": False}
FULL = {"block_size": None, "update": "joint"}
WOODTAYLOR = {"damping": 3e-4, "first_order_samples": 4_096, "criterion": "woodtaylor"}
# 1,000 images as well; larger mini-batches give the same result in less time.
LAYERWISE = {"criterion": "layerwise", "num_gradients": 20, "gradient_batch_size": 50}
METHODS: dict[str, dict[str, Any]] = {
    "magnitude": {"criterion": "magnitude"},
    "diagonal Fisher": {"criterion": "diagonal_fisher", "line_search": False},
    "K-FAC": {"criterion": "kfac", "line_search": False},
    "independent, one block per layer (the paper)": PAPER,
    "joint, full Fisher": {**FULL, "line_search": False},
    "joint, full Fisher, line search": FULL,
    "joint, full Fisher, 8 stages": {**FULL, "recompute_steps": 8},
    "WoodTaylor, full Fisher, 8 stages": {**FULL, **WOODTAYLOR, "recompute_steps": 8},
    "layerwise": LAYERWISE,
    "layerwise, 4,000 images": {**LAYERWISE, "num_gradients": 80},
}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--width", type=int, default=16, help="of the first stage")
    parser.add_argument("--pattern", default="unstructured", help="such as 2:4")
    arguments = parse_arguments(parser, [0.5, 0.6, 0.7, 0.8, 0.9])
    state = torch.load(arguments.weights, weights_only=True)
    data = CIFAR10(str(arguments.data))
    data.setup("test")

    def make_dense() -> nn.Module:
        model = resnet20(arguments.width).to(memory_format=torch.channels_last)
        model.load_state_dict(state)
        return model

    common = {**COMMON, "pattern": arguments.pattern}
    compare(
        "ResNet-20 on CIFAR-10, one shot",
        {name: {**common, **settings} for name, settings in METHODS.items()},
        make_dense,
        data.train,
        data.test,
        arguments,
    )


if __name__ == "__main__":
    main()
