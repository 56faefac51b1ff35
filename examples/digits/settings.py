"""Measure the effect of N, m, λ and the block size on one-shot pruning.

    python examples/digits/settings.py

Trains a perceptron (64-100-50-10, 11,900 weights) on scikit-learn's digits, prunes it in one
step without fine-tuning, and prints the accuracy on the 360 held-out images in percent, mean
over several trained networks. The documentation shows the tables.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from torch.utils.data import TensorDataset

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from examples.comparison import accuracy, loss_fn
from examples.digits.model import Digits
from lightning_woodfisher import FisherConfig, StepConfig, prune
from lightning_woodfisher.base.text_table import format_table

GRADIENTS = ((1000, 1), (256, 4))
DAMPINGS = (1e-2, 1e-3, 1e-4, 1e-5)
BLOCK_SIZES = (64, 256, None)
# Compared with 256 gradients of 4 samples, in blocks of 256.
METHODS: dict[str, dict[str, Any]] = {
    "magnitude": {"criterion": "magnitude"},
    "independent": {"step": {"update": "independent"}},
    "joint": {},
    "joint, 8 stages": {"step": {"recompute_steps": 8}},
}


def train_dense(data: TensorDataset, seed: int, epochs: int) -> nn.Sequential:
    """Train a dense network."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Flatten(),
        nn.Linear(64, 100),
        nn.ReLU(),
        nn.Linear(100, 50),
        nn.ReLU(),
        nn.Linear(50, 10),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(epochs):
        for index in torch.randperm(len(data)).split(64):
            optimizer.zero_grad()
            loss_fn(model, data[index]).backward()
            optimizer.step()
    return model


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.8])
    parser.add_argument("--networks", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=30)
    arguments = parser.parse_args()
    data = Digits()
    data.setup("fit")
    seeds = range(arguments.networks)
    states = [
        train_dense(data.train, seed, arguments.epochs).state_dict() for seed in seeds
    ]

    def measure(
        fisher: FisherConfig,
        sparsity: float,
        criterion: str = "woodfisher",
        step: Mapping[str, Any] = MappingProxyType({}),
    ) -> float:
        # Without line search, to compare only the quadratic model.
        plain = StepConfig(measure_loss=False, line_search=False, **step)
        found = []
        for seed, state in enumerate(states):
            model = train_dense(data.train, seed, epochs=0)
            model.load_state_dict(state)
            if sparsity:
                prune(
                    model,
                    data.train,
                    loss_fn,
                    target_sparsity=sparsity,
                    criterion=criterion,
                    fisher=fisher,
                    step=dataclasses.replace(plain, seed=seed),
                )
            found.append(accuracy(model, data.held_out))
        return statistics.mean(found)

    def cells(fisher: FisherConfig, **options: Any) -> str:
        values = [measure(fisher, s, **options) for s in arguments.sparsities]
        return " / ".join(f"{value:.1f}" for value in values)

    default = FisherConfig(256, 4, 256)
    print(f"dense: {measure(default, 0.0):.1f} %")
    rows = [(name, cells(default, **options)) for name, options in METHODS.items()]
    share = " / ".join(f"{sparsity:.0%}" for sparsity in arguments.sparsities)
    print(format_table((f"N × m = 256 × 4, λ = 1e-4, B = 256: {share}", ""), rows))
    table = []
    for (number, size), damping in itertools.product(GRADIENTS, DAMPINGS):
        columns = [
            cells(FisherConfig(number, size, block_size, damping))
            for block_size in BLOCK_SIZES
        ]
        table.append((f"{number:,} × {size}", f"{damping:.0e}", *columns))
    names = [f"B = {size}" if size else "full" for size in BLOCK_SIZES]
    print()
    print(format_table((f"joint, N × m: {share}", "λ", *names), table))


if __name__ == "__main__":
    main()
