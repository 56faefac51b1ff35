"""Make small networks with random weights, and random data, for measurements."""

from __future__ import annotations

__all__ = [
    "ResNet20",
    "Transformer",
    "cross_entropy",
    "make_mlpnet",
    "make_resnet20",
    "random_data",
    "random_images",
    "split_batches",
]

import itertools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset


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
        width: channels of the first stage; 16 in the paper.
    """

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        widths = [width, *(stage * width for stage in (1, 2, 4) for _ in range(3))]
        self.blocks = nn.Sequential(*map(_BasicBlock, widths, widths[1:]))
        self.fc = nn.Linear(widths[-1], 10)

    def forward(self, images: Tensor) -> Tensor:
        """Classify images.

        Args:
            images: ``[n, 3, height, width]``.

        Returns:
            Logits ``[n, 10]``.
        """
        hidden = self.blocks(F.relu(self.bn1(self.conv1(images))))
        logits: Tensor = self.fc(hidden.mean(dim=(2, 3)))
        return logits


def make_resnet20(device: torch.device, width: int = 16) -> ResNet20:
    """Return ResNet-20 with the same random weights every time.

    Args:
        device: device of the network.
        width: channels of the first stage; 16 in the paper.

    Returns:
        The network in evaluation mode.
    """
    torch.manual_seed(0)
    return ResNet20(width).to(device).eval()


class Transformer(nn.Module):
    """A pre-norm transformer encoder that classifies sequences of vectors.

    Args:
        width: width of the model.
        layers: number of layers.
    """

    def __init__(self, width: int = 256, layers: int = 4) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, 10)

    def forward(self, vectors: Tensor) -> Tensor:
        """Classify sequences.

        Args:
            vectors: ``[n, length, width]``.

        Returns:
            Logits ``[n, 10]``.
        """
        logits: Tensor = self.head(self.encoder(vectors).mean(dim=1))
        return logits


def make_mlpnet() -> nn.Module:
    """Return MLPNet for 784 inputs (Singh & Alistarh 2020, section 5).

    Returns:
        The network, with random weights.
    """
    widths = (784, 40, 20, 10)
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def random_data(samples: int, *shape: int) -> TensorDataset:
    """Draw normally distributed inputs and random labels.

    Args:
        samples: number of samples.
        shape: shape of an input.

    Returns:
        Inputs, float32 ``[samples, *shape]``, and labels, int64 ``[samples]``.
    """
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(samples, *shape, generator=generator)
    return TensorDataset(inputs, torch.randint(10, (samples,), generator=generator))


def random_images(samples: int, size: int = 32) -> TensorDataset:
    """Draw normally distributed images and random labels.

    Args:
        samples: number of images.
        size: height and width.

    Returns:
        Images, float32 ``[samples, 3, size, size]``, and labels, int64 ``[samples]``.
    """
    return random_data(samples, 3, size, size)


def split_batches(
    data: TensorDataset, size: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Split data into batches.

    Args:
        data: images and labels.
        size: samples in a batch.
        device: device to move the batches to.

    Yields:
        Images and labels; the last batch may be smaller.
    """
    images, labels = (torch.split(tensor, size) for tensor in data.tensors)
    for batch in zip(images, labels, strict=True):
        yield batch[0].to(device), batch[1].to(device)


def cross_entropy(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Compute the mean cross-entropy of a batch.

    Args:
        model: callable from inputs to logits.
        batch: inputs and labels.

    Returns:
        Scalar.
    """
    inputs, labels = batch
    return F.cross_entropy(model(inputs), labels)
