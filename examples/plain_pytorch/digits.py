"""Without Lightning: a perceptron on scikit-learn's digits, pruned in one call.

python -m examples.plain_pytorch.digits
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_woodfisher import FisherConfig, StepConfig, prune


def read_digits() -> tuple[TensorDataset, TensorDataset]:
    """Read the images: 1,437 to train on, 360 held out."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).flatten(1) / 16
    labels = torch.tensor(digits.target)
    return TensorDataset(images[:1437], labels[:1437]), TensorDataset(
        images[1437:], labels[1437:]
    )


def make_model() -> nn.Sequential:
    """Make the perceptron 64-100-50-10."""
    return nn.Sequential(
        *(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 50), nn.ReLU()),
        nn.Linear(50, 10),
    )


def loss_fn(model: nn.Module, batch: Any) -> Tensor:
    """Mean cross-entropy of a batch."""
    images, labels = batch
    return F.cross_entropy(model(images), labels)


def train(
    model: nn.Module,
    data: TensorDataset,
    epochs: int,
    kept: dict[str, Tensor] | None = None,
) -> None:
    """Train with Adam; where ``kept`` is False, weights stay zero."""
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(epochs):
        for batch in DataLoader(data, 64, shuffle=True):
            optimizer.zero_grad()
            loss_fn(model, batch).backward()
            optimizer.step()
            with torch.no_grad():
                for name, mask in (kept or {}).items():
                    model.get_parameter(name).mul_(mask)


@torch.no_grad()
def accuracy(model: nn.Module, data: TensorDataset) -> float:
    """Share of the images that are recognised."""
    images, labels = data.tensors
    return float((model(images).argmax(1) == labels).float().mean())


def main() -> None:
    """Train, prune, train on."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--gradients", type=int, default=512)
    options = parser.parse_args()
    torch.manual_seed(0)
    data, held_out = read_digits()
    model = make_model()
    train(model, data, options.epochs)
    print(f"dense       {accuracy(model, held_out):.1%}")

    report = prune(
        model,
        data,
        loss_fn,
        target_sparsity=0.8,
        fisher=FisherConfig(
            num_gradients=options.gradients, gradient_batch_size=1, block_size=None
        ),
        step=StepConfig(recompute_steps=4),
    )
    print(f"pruned      {accuracy(model, held_out):.1%}")

    # There is no callback here that keeps zeros, so the loop does.
    layers = [layer.name for layer in report.layers]
    kept = {name: model.get_parameter(name) != 0 for name in layers}
    train(model, data, options.epochs // 3, kept)
    print(f"trained on  {accuracy(model, held_out):.1%}\n")
    print(report.to_table())


if __name__ == "__main__":
    main()
