"""Define ResNet-50 and MobileNetV1 on ImageNet, as in the WoodFisher paper.

This file contains no code for pruning. ``ImageNet(fake=True)`` draws random images, to run a
whole step without the data.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchmetrics.classification import MulticlassAccuracy
from torchvision import transforms
from torchvision.datasets import FakeData, ImageFolder
from torchvision.models.resnet import Bottleneck, ResNet

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
# Channels and strides of the thirteen separable convolutions (Howard et al. 2017, table 1).
MOBILENET = (
    *((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2)),
    *((512, 1), (512, 1), (512, 1), (512, 1), (512, 1), (1024, 2), (1024, 1)),
)


def mobilenetv1(width: float = 1.0, classes: int = 1000) -> nn.Sequential:
    """Build MobileNetV1, with 4.2 million parameters at width 1.

    Args:
        width: factor of all channels.
        classes: number of outputs.

    Returns:
        A network from images ``[n, 3, h, w]`` to logits ``[n, classes]``.
    """
    inputs = int(32 * width)
    layers: list[nn.Module] = [nn.Conv2d(3, inputs, 3, 2, 1, bias=False)]
    layers += [nn.BatchNorm2d(inputs), nn.ReLU()]
    for channels, stride in MOBILENET:
        outputs = int(channels * width)
        depthwise = nn.Conv2d(inputs, inputs, 3, stride, 1, groups=inputs, bias=False)
        pointwise = nn.Conv2d(inputs, outputs, 1, bias=False)
        layers += [depthwise, nn.BatchNorm2d(inputs), nn.ReLU()]
        layers += [pointwise, nn.BatchNorm2d(outputs), nn.ReLU()]
        inputs = outputs
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes)]
    return nn.Sequential(*layers)


def resnet50(width: float = 1.0, classes: int = 1000, depth: int = 3) -> ResNet:
    """Build torchvision's ResNet-50, for which trained weights are available.

    Args:
        width: factor of the channels inside the bottlenecks.
        classes: number of outputs.
        depth: 3 for ResNet-50; otherwise the number of blocks in every stage.

    Returns:
        A network from images ``[n, 3, h, w]`` to logits ``[n, classes]``.
    """
    blocks = [3, 4, 6, 3] if depth == 3 else [depth] * 4
    per_group = int(64 * width)
    return ResNet(Bottleneck, blocks, classes, width_per_group=per_group)


class ImageNetClassifier(pl.LightningModule):
    """One of the two networks, fine-tuned with SGD.

    Args:
        architecture: name of the network.
        weights: file with a trained ``state_dict``; None starts from random weights.
        learning_rate: initial learning rate of SGD, with cosine decay.
        weight_decay: weight decay of all parameters.
        width: factor of the channels.
        classes: number of outputs.
        depth: see :func:`resnet50`.
    """

    def __init__(
        self,
        architecture: Literal["resnet50", "mobilenetv1"] = "resnet50",
        weights: str | None = None,
        learning_rate: float = 0.005,
        weight_decay: float = 1e-4,
        width: float = 1.0,
        classes: int = 1000,
        depth: int = 3,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.net: nn.Module = (
            resnet50(width, classes, depth)
            if architecture == "resnet50"
            else mobilenetv1(width, classes)
        )
        if weights is not None:
            self.net.load_state_dict(torch.load(weights, weights_only=True))
        self.accuracy = MulticlassAccuracy(classes, average="micro")

    def forward(self, images: Tensor) -> Tensor:
        """Classify images ``[n, 3, h, w]``; returns logits ``[n, classes]``."""
        logits: Tensor = self.net(images)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = F.cross_entropy(self(images), labels)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        self.accuracy(self(images), labels)
        self.log("val_accuracy", self.accuracy, prog_bar=True)

    def configure_optimizers(self) -> dict[str, object]:
        optimizer = torch.optim.SGD(
            self.parameters(),
            lr=self.learning_rate,
            momentum=0.9,
            weight_decay=self.weight_decay,
        )
        epochs = self.trainer.max_epochs or 1
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
        return {"optimizer": optimizer, "lr_scheduler": scheduler}


class ImageNet(pl.LightningDataModule):
    """Images in ``folder/train`` and ``folder/val``, with a folder for each class.

    Args:
        folder: folder of the images.
        batch_size: number of images in a training batch of one device.
        workers: number of processes that read images.
        image_size: height and width; 224 in the papers.
        fake: whether to draw random images and read none.
        fake_images: number of random images.
        classes: number of classes of the random images.
    """

    def __init__(
        self,
        folder: str = "imagenet",
        batch_size: int = 64,
        workers: int = 8,
        image_size: int = 224,
        fake: bool = False,
        fake_images: int = 64,
        classes: int = 1000,
    ) -> None:
        super().__init__()
        self.folder = Path(folder)
        self.batch_size = batch_size
        self.workers = workers
        self.image_size = image_size
        self.fake = fake
        self.fake_images = fake_images
        self.classes = classes

    def setup(self, stage: str) -> None:
        last = [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
        size = self.image_size
        self.train = self._read(
            "train",
            [transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip()],
            last,
        )
        self.held_out = self._read(
            "val",
            [transforms.Resize(size * 8 // 7), transforms.CenterCrop(size)],
            last,
        )

    def _read(
        self, split: str, first: list[object], last: list[object]
    ) -> Dataset[object]:
        if self.fake:
            shape = (3, self.image_size, self.image_size)
            shown = transforms.Compose(last)
            return FakeData(self.fake_images, shape, self.classes, shown)
        return ImageFolder(str(self.folder / split), transforms.Compose(first + last))

    def train_dataloader(self) -> DataLoader[object]:
        return DataLoader(
            self.train,
            self.batch_size,
            shuffle=True,
            drop_last=True,
            num_workers=self.workers,
            persistent_workers=self.workers > 0,
        )

    def val_dataloader(self) -> DataLoader[object]:
        return DataLoader(self.held_out, 250, num_workers=self.workers)
