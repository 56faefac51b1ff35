"""Prune a perceptron on scikit-learn's digits in one call, without Lightning.

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


def load_data() -> tuple[TensorDataset, TensorDataset]:
    """Load 1,437 training images and 360 held-out images."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).flatten(1) / 16
    labels = torch.tensor(digits.target)
    return TensorDataset(images[:1437], labels[:1437]), TensorDataset(
        images[1437:], labels[1437:]
    )


def make_model() -> nn.Sequential:
    """Build the perceptron 64-100-50-10."""
    return nn.Sequential(
        *(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 50), nn.ReLU()),
        nn.Linear(50, 10),
    )


def loss_fn(model: nn.Module, batch: Any) -> Tensor:
    """Compute the mean cross-entropy of a batch."""
    images, labels = batch
    return F.cross_entropy(model(images), labels)


def train(
    model: nn.Module,
    data: TensorDataset,
    epochs: int,
    masks: dict[str, Tensor] | None = None,
) -> None:
    """Train with Adam; weights whose mask is False stay zero."""
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(epochs):
        for batch in DataLoader(data, 64, shuffle=True):
            optimizer.zero_grad()
            loss_fn(model, batch).backward()
            optimizer.step()
            with torch.no_grad():
                for name, mask in (masks or {}).items():
                    model.get_parameter(name).mul_(mask)


@torch.no_grad()
def accuracy(model: nn.Module, data: TensorDataset) -> float:
    """Compute the share of images that are classified correctly."""
    images, labels = data.tensors
    return float((model(images).argmax(1) == labels).float().mean())


def main() -> None:
    """Train, prune and fine-tune."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--gradients", type=int, default=512)
    options = parser.parse_args()
    torch.manual_seed(0)
    data, held_out = load_data()
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

    # Without the callback, the training loop must keep the zeros itself.
    layers = [layer.name for layer in report.layers]
    masks = {name: model.get_parameter(name) != 0 for name in layers}
    train(model, data, options.epochs // 3, masks)
    print(f"fine-tuned  {accuracy(model, held_out):.1%}\n")
    print(report.to_table())


if __name__ == "__main__":
    main()
