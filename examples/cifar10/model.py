"""Define two networks for CIFAR-10 and the data, without any code for pruning.

``CIFAR10(folder)`` reads ``cifar10_train_jpeg.npz`` and ``cifar10_test_jpeg.npz`` if they
are in the folder (concatenated JPEG bytes in ``jpeg``, their ends in ``offsets``, and
``labels``); otherwise torchvision downloads the original images.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy
from torchvision.io import ImageReadMode, decode_jpeg

MEAN = (0.4914, 0.4822, 0.4465)
STD = (0.2470, 0.2435, 0.2616)
HELD_OUT = 5_000


class BasicBlock(nn.Module):
    """Two 3×3 convolutions and a shortcut (He et al. 2016, option B).

    Args:
        inputs: input channels.
        outputs: output channels.
        inner: channels between the convolutions.
        stride: stride of the first convolution.
    """

    def __init__(self, inputs: int, outputs: int, inner: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, inner, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if inputs != outputs or stride > 1:
            self.shortcut.append(nn.Conv2d(inputs, outputs, 1, stride, bias=False))
            self.shortcut.append(nn.BatchNorm2d(outputs))

    def forward(self, images: Tensor) -> Tensor:
        """Map ``[n, inputs, h, w]`` to ``[n, outputs, h / stride, w / stride]``."""
        hidden = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(images)))))
        return F.relu(hidden + self.shortcut(images))


def resnet20(
    width: int = 16, multipliers: Mapping[str, float] | None = None
) -> nn.Sequential:
    """Build ResNet-20, with 272 thousand parameters at the width of the paper.

    Args:
        width: channels of the first of three stages.
        multipliers: factors of the widths of layers, such as ``{"4.conv1": 2.0}``. The
            outputs of a stage share the width of ``conv2`` of its first block.

    Returns:
        A network from images ``[n, 3, 32, 32]`` to logits ``[n, 10]``.
    """
    wider = dict(multipliers or {})
    widths = [
        round(2**stage * width * wider.get(f"{3 + 3 * stage}.conv2", 1.0))
        for stage in range(3)
    ]
    inputs = widths[0]
    layers: list[nn.Module] = [nn.Conv2d(3, inputs, 3, 1, 1, bias=False)]
    layers += [nn.BatchNorm2d(inputs), nn.ReLU()]
    for stage, outputs in enumerate(widths):
        for block in range(3):
            inner = round(
                2**stage * width * wider.get(f"{3 + 3 * stage + block}.conv1", 1.0)
            )
            stride = 2 if stage and not block else 1
            layers.append(BasicBlock(inputs, outputs, inner, stride))
            inputs = outputs
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 10)]
    return nn.Sequential(*layers)


class InvertedResidual(nn.Module):
    """Expand by a 1×1 convolution, filter each channel, project (Sandler et al. 2018).

    Args:
        inputs: input channels.
        outputs: output channels.
        expansion: channels of the depthwise convolution, as a multiple of ``inputs``.
        stride: stride of the depthwise convolution.
    """

    def __init__(self, inputs: int, outputs: int, expansion: int, stride: int) -> None:
        super().__init__()
        inner = expansion * inputs
        self.layers = nn.Sequential(
            nn.Conv2d(inputs, inner, 1, bias=False),
            nn.BatchNorm2d(inner),
            nn.ReLU(),
            nn.Conv2d(inner, inner, 3, stride, 1, groups=inner, bias=False),
            nn.BatchNorm2d(inner),
            nn.ReLU(),
            nn.Conv2d(inner, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.is_residual = stride == 1 and inputs == outputs

    def forward(self, images: Tensor) -> Tensor:
        """Map ``[n, inputs, h, w]`` to ``[n, outputs, h / stride, w / stride]``."""
        hidden: Tensor = self.layers(images)
        return images + hidden if self.is_residual else hidden


def mobilenet(width: int = 16) -> nn.Sequential:
    """Build a small MobileNetV2 for 32×32 pixels, with 97 thousand parameters.

    Args:
        width: channels of the first layer.

    Returns:
        A network from images ``[n, 3, 32, 32]`` to logits ``[n, 10]``.
    """
    layers: list[nn.Module] = [nn.Conv2d(3, width, 3, 1, 1, bias=False)]
    layers += [nn.BatchNorm2d(width), nn.ReLU()]
    inputs = width
    for outputs, stride in ((24, 2), (24, 1), (40, 2), (40, 1), (64, 1), (64, 1)):
        outputs = outputs * width // 16
        layers.append(InvertedResidual(inputs, outputs, 4, stride))
        inputs = outputs
    layers += [nn.Conv2d(inputs, 8 * width, 1, bias=False)]
    layers += [nn.BatchNorm2d(8 * width), nn.ReLU()]
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8 * width, 10)]
    return nn.Sequential(*layers)


class CIFAR10Classifier(pl.LightningModule):
    """A network, trained with SGD, momentum 0.9 and one cycle of the learning rate.

    Args:
        learning_rate: maximum learning rate.
        weight_decay: weight decay of all parameters.
        width: channels of the first stage.
        weights: file with a ``state_dict`` of the network to start from.
        multipliers: factors of the widths of layers of ``"resnet20"``.
        network: ``"resnet20"`` or ``"mobilenet"``.
    """

    def __init__(
        self,
        learning_rate: float = 0.2,
        weight_decay: float = 5e-4,
        width: int = 16,
        weights: str | None = None,
        multipliers: dict[str, float] | None = None,
        network: str = "resnet20",
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.net = (
            mobilenet(width) if network == "mobilenet" else resnet20(width, multipliers)
        )
        if weights is not None:
            self.net.load_state_dict(torch.load(weights, weights_only=True))
        self.accuracy = MulticlassAccuracy(10, average="micro")

    def forward(self, images: Tensor) -> Tensor:
        """Classify images ``[n, 3, 32, 32]``; returns logits ``[n, 10]``."""
        logits: Tensor = self.net(images)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = F.cross_entropy(self(images), labels)
        self.log("train_loss", loss, prog_bar=True, sync_dist=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        self.accuracy(self(images), labels)
        self.log("val_accuracy", self.accuracy, prog_bar=True)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        self.accuracy(self(images), labels)
        self.log("test_accuracy", self.accuracy)

    def configure_optimizers(self) -> dict[str, object]:
        optimizer = torch.optim.SGD(
            self.parameters(),
            lr=self.learning_rate,
            momentum=0.9,
            nesterov=True,
            weight_decay=self.weight_decay,
        )
        scheduler = torch.optim.lr_scheduler.OneCycleLR(
            optimizer,
            self.learning_rate,
            total_steps=int(self.trainer.estimated_stepping_batches),
            pct_start=0.25,
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }


class CIFAR10(pl.LightningDataModule):
    """45,000 training images, 5,000 held-out images, 10,000 test images.

    Training images are randomly shifted by up to four pixels and mirrored, by batch.

    Args:
        folder: folder of the images, or for their download.
        batch_size: number of images in a training batch.
        images_per_epoch: number of training images; None for all.
    """

    def __init__(
        self,
        folder: str = "data",
        batch_size: int = 128,
        images_per_epoch: int | None = None,
    ) -> None:
        super().__init__()
        self.folder = Path(folder)
        self.batch_size = batch_size
        self.images_per_epoch = images_per_epoch

    def prepare_data(self) -> None:
        if not (self.folder / "cifar10_train_jpeg.npz").exists():
            for train in (True, False):
                torchvision.datasets.CIFAR10(str(self.folder), train, download=True)

    def setup(self, stage: str) -> None:
        images, labels = self._read(train=True)
        end = len(labels) - HELD_OUT
        kept = min(end, self.images_per_epoch or end)
        self.train = TensorDataset(images[:kept], labels[:kept])
        self.held_out = TensorDataset(images[end:], labels[end:])
        self.test = TensorDataset(*self._read(train=False))

    def _read(self, train: bool) -> tuple[Tensor, Tensor]:
        path = self.folder / f"cifar10_{'train' if train else 'test'}_jpeg.npz"
        if path.exists():
            file = np.load(path)
            jpeg, ends = torch.from_numpy(file["jpeg"]), file["offsets"]
            decoded = [
                decode_jpeg(jpeg[start:end], ImageReadMode.RGB)
                for start, end in zip(ends[:-1], ends[1:], strict=True)
            ]
            pixels, labels = torch.stack(decoded), torch.from_numpy(file["labels"])
        else:
            original = torchvision.datasets.CIFAR10(str(self.folder), train)
            pixels = torch.from_numpy(original.data).permute(0, 3, 1, 2)
            labels = torch.tensor(original.targets)
        mean = torch.tensor(MEAN).view(3, 1, 1)
        std = torch.tensor(STD).view(3, 1, 1)
        return (pixels.float() / 255 - mean) / std, labels.long()

    def on_after_batch_transfer(
        self, batch: list[Tensor], dataloader_idx: int
    ) -> list[Tensor]:
        if self.trainer is None or not self.trainer.training:
            return batch
        images, labels = batch
        return [shift_and_mirror(images), labels]

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.train, self.batch_size, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.held_out, 500)

    def test_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.test, 500)


def shift_and_mirror(images: Tensor) -> Tensor:
    """Crop random 32×32 windows of reflection-padded images, and mirror half of them."""
    n, device = len(images), images.device
    padded = F.pad(images, (4, 4, 4, 4), mode="reflect")
    pixels = torch.arange(32, device=device)
    rows = torch.randint(9, (n, 1), device=device) + pixels
    columns = torch.randint(9, (n, 1), device=device) + pixels
    mirrored = torch.rand(n, 1, device=device) < 0.5
    columns = torch.where(mirrored, columns.flip(1), columns)
    batch = torch.arange(n, device=device).view(n, 1, 1)
    # Indexing puts the channels last, which is also the fast format for convolutions.
    windows = padded.permute(0, 2, 3, 1)[batch, rows[:, :, None], columns[:, None, :]]
    return windows.permute(0, 3, 1, 2)
