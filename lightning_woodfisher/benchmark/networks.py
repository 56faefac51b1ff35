"""Small networks to measure with, at random weights."""

from __future__ import annotations

__all__ = ["RandomImages", "ResNet20", "Transformer", "cross_entropy"]

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset


class _BasicBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.stride = 1 if inputs == outputs else 2
        self.added = outputs - inputs
        self.conv1 = nn.Conv2d(inputs, outputs, 3, self.stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)

    def forward(self, images: Tensor) -> Tensor:
        hidden = F.relu(self.bn1(self.conv1(images)))
        shortcut = images[:, :, :: self.stride, :: self.stride]
        shortcut = F.pad(shortcut, (0, 0, 0, 0, 0, self.added))
        return F.relu(self.bn2(self.conv2(hidden)) + shortcut)


class ResNet20(nn.Module):
    """ResNet-20 for 32×32 images with parameter-free shortcuts (He et al. 2016, 4.2).

    Args:
        width: channels of the first stage; 16 is the network of the paper.
    """

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        blocks = []
        inputs = width
        for outputs in (width, 2 * width, 4 * width):
            for _ in range(3):
                blocks.append(_BasicBlock(inputs, outputs))
                inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(inputs, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Classify.

        Args:
            images: ``[n, 3, height, width]``.

        Returns:
            Logits ``[n, 10]``.
        """
        hidden = self.blocks(F.relu(self.bn1(self.conv1(images))))
        logits: Tensor = self.fc(hidden.mean(dim=(2, 3)))
        return logits


class Transformer(nn.Module):
    """A pre-norm transformer encoder that classifies sequences of vectors.

    Args:
        width: of the model.
        layers: their number.
    """

    def __init__(self, width: int = 256, layers: int = 4) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, 10)

    def forward(self, vectors: Tensor) -> Tensor:
        """Classify.

        Args:
            vectors: ``[n, length, width]``.

        Returns:
            Logits ``[n, 10]``.
        """
        logits: Tensor = self.head(self.encoder(vectors).mean(dim=1))
        return logits


class RandomImages(Dataset[tuple[Tensor, Tensor]]):
    """Normally distributed images with random labels.

    Args:
        samples: their number.
        size: height and width.
    """

    def __init__(self, samples: int, size: int = 32) -> None:
        generator = torch.Generator().manual_seed(1)
        self.images = torch.randn(samples, 3, size, size, generator=generator)
        self.labels = torch.randint(10, (samples,), generator=generator)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index], self.labels[index]


def cross_entropy(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Compute the mean loss of a batch.

    Args:
        model: maps inputs to logits.
        batch: inputs and labels.

    Returns:
        Scalar.
    """
    inputs, labels = batch
    return F.cross_entropy(model(inputs), labels)
