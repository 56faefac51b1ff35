"""A small residual network, and callbacks that prune its channels during fit."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch.nn.functional as F
from fits import CLASSES, Classifier, loader
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lightning_woodfisher import (
    OneShotSchedule,
    StructureConfig,
    StructuredPruningCallback,
)


class ResidualNet(nn.Module):
    """Two groups: the tied stem and second layer (6), and the inner layer (8)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 6, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(6)
        self.conv1 = nn.Conv2d(6, 8, 3, stride=2, padding=1)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 6, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(6)
        self.pool = nn.AvgPool2d(2)
        self.fc = nn.Linear(6, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        stem = F.relu(self.bn(self.stem(images)))
        hidden = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(stem)))))
        return self.fc(F.relu(hidden + self.pool(stem)).mean((2, 3)))


CHANNELS = 14


class Module(Classifier):
    """Calls its network in ``training_step``; it has no ``forward``."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"build": ResidualNet, **options})


class Data(pl.LightningDataModule):
    """The images, for the command line."""

    def train_dataloader(self) -> Any:
        return loader()


class WithForward(Module):
    """Calls itself."""

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def loss(self, batch: Any) -> Tensor:
        return cross_entropy(self(batch[0]), batch[1])


def config(**options: Any) -> StructureConfig:
    settings = {"num_samples": 24, "batch_size": 8, "probes": 10}
    return StructureConfig(**{**settings, "measure": "structures", **options})


def structured(
    kind: type[StructuredPruningCallback] = StructuredPruningCallback, **options: Any
) -> Any:
    """Make a callback that removes half of the channels at once; options override."""
    settings = {
        "target": 0.5,
        "config": config(),
        "schedule": OneShotSchedule(0),
    }
    return kind(**{**settings, **options})
