"""Draw the channels of a pruned ResNet: docs/images/channels.png and channels-size.png.

python docs/draw_channels.py

Trains ResNet-20 on scikit-learn's digits and removes channels by HAP with implants, in about
half a minute on two cores.
"""

from __future__ import annotations

import sys
from pathlib import Path

import lightning.pytorch as pl
import torch
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from examples.cifar10.model import CIFAR10Classifier
from lightning_woodfisher import (
    HAPPruningCallback,
    PolynomialSchedule,
    StructureConfig,
)
from lightning_woodfisher.reporting.figures import draw_channels, draw_network_size


def digits() -> TensorDataset:
    """Return the images with three channels, 16 by 16 pixels."""
    pixels, labels = load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1
    images = torch.nn.functional.interpolate(images, scale_factor=2.0)
    return TensorDataset(images.expand(-1, 3, -1, -1), torch.tensor(labels))


def main() -> None:
    """Train, prune, and write the figures."""
    pl.seed_everything(0, verbose=False)
    callback = HAPPruningCallback(
        target=0.5,
        implant_ratio=0.3,
        schedule=PolynomialSchedule(2, 4),
        config=StructureConfig(num_samples=256, probes=20),
    )
    trainer = pl.Trainer(
        max_epochs=6,
        accelerator="cpu",
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    model = CIFAR10Classifier(learning_rate=0.02)
    trainer.fit(model, DataLoader(digits(), 128, shuffle=True))
    reports = callback.reports
    for name, figure in (
        ("channels", draw_channels(reports[-1])),
        ("channels-size", draw_network_size(reports)),
    ):
        figure.savefig(ROOT / "docs" / "images" / f"{name}.png", dpi=100)


if __name__ == "__main__":
    main()
