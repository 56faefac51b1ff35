"""What a network of the zoo is trained for: samples, inputs and loss."""

from __future__ import annotations

import contextlib
import unittest.mock
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_woodfisher.base.types import ModelMode
from lightning_woodfisher.data.isolation import isolated
from lightning_woodfisher.structured.config import ScoreLabels
from lightning_woodfisher.structured.graph.inputs import run_model

CLASSES = 5
TOKENS = 40


class Samples(Dataset[Any]):
    """Random samples, which are the same in every process."""

    def __init__(self, make: Callable[[torch.Generator], Any], count: int) -> None:
        generator = torch.Generator().manual_seed(1)
        self.samples = [make(generator) for _ in range(count)]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        return self.samples[index]


@dataclass(frozen=True)
class Task:
    """Classify images or videos.

    Args:
        shape: of the input of a sample.
    """

    shape: tuple[int, ...] = (3, 64, 64)
    #: Labels are drawn for a network that returns the logits of classes only.
    labels: ClassVar[ScoreLabels] = "sampled"
    #: Detectors compute losses in training mode only.
    mode: ClassVar[ModelMode] = "eval"

    def sample(self, generator: torch.Generator) -> Any:
        label = torch.randint(CLASSES, (), generator=generator)
        return torch.randn(self.shape, generator=generator), label

    def outputs(self, network: nn.Module, batch: Any) -> Any:
        """Return what a smaller network must compute, too."""
        return run_model(network, self.inputs(batch))

    def loader(self, count: int, batch_size: int) -> DataLoader[Any]:
        samples = Samples(self.sample, count)
        return DataLoader(samples, batch_size, collate_fn=self.collate)

    def collate(self, samples: list[Any]) -> Any:
        return torch.utils.data.default_collate(samples)

    def inputs(self, batch: Any) -> Any:
        """Return what the network is called with in evaluation mode."""
        return (batch[0],)

    def loss(self, network: nn.Module, batch: Any) -> Tensor:
        """Compute the loss, with that of auxiliary classifiers in training mode."""
        outputs = network(batch[0])
        found = outputs.values() if isinstance(outputs, dict) else outputs
        found = [found] if isinstance(found, Tensor) else found
        losses = [F.cross_entropy(o, batch[1]) for o in found if o is not None]
        return torch.stack(losses).sum()


class Segmentation(Task):
    """Classify pixels."""

    labels = "true"

    def sample(self, generator: torch.Generator) -> Any:
        labels = torch.randint(CLASSES, self.shape[1:], generator=generator)
        return torch.randn(self.shape, generator=generator), labels


class Flow(Task):
    """Predict the motion between two images."""

    labels = "true"

    def sample(self, generator: torch.Generator) -> Any:
        images = torch.rand(2, *self.shape, generator=generator) * 2 - 1
        return *images, torch.randn(2, *self.shape[1:], generator=generator)

    def inputs(self, batch: Any) -> Any:
        return {"image1": batch[0], "image2": batch[1], "num_flow_updates": 2}

    def outputs(self, network: nn.Module, batch: Any) -> Any:
        from torchvision.models.optical_flow import raft

        def coordinates(*arguments: Any) -> Tensor:
            return make_coordinates(*arguments).to(batch[0])

        # They are float32, whatever the weights are.
        make_coordinates = raft.make_coords_grid
        with unittest.mock.patch.object(raft, "make_coords_grid", coordinates):
            return super().outputs(network, batch)

    def loss(self, network: nn.Module, batch: Any) -> Tensor:
        flows = network(**self.inputs(batch))
        return torch.stack([F.l1_loss(flow, batch[2]) for flow in flows]).sum()


class Detection(Task):
    """Find boxes, with a mask and key points."""

    labels = "true"
    mode = "train"

    def sample(self, generator: torch.Generator) -> Any:
        image = torch.rand(self.shape, generator=generator)
        corner = torch.rand(2, generator=generator) * 8
        size = torch.rand(2, generator=generator) * 16 + 24
        mask = torch.zeros(1, *self.shape[1:], dtype=torch.uint8)
        mask[:, 12:36, 12:36] = 1
        points = torch.cat([corner + size / 2, torch.ones(1)]).expand(1, 17, 3)
        return image, {
            "boxes": torch.cat([corner, corner + size])[None],
            "labels": torch.ones(1, dtype=torch.int64),
            "masks": mask,
            "keypoints": points.clone(),
        }

    def collate(self, samples: list[Any]) -> Any:
        return [list(items) for items in zip(*samples, strict=True)]

    def inputs(self, batch: Any) -> Any:
        return (batch[0],)

    def outputs(self, network: nn.Module, batch: Any) -> Any:
        """Return what the heads compute; rounding selects among boxes of equal scores."""
        found: list[Any] = []
        with isolated(network, "partial_eval"), contextlib.ExitStack() as hooks:
            for name, module in network.named_modules():
                if f".{name}".endswith((".head", "_predictor")):
                    hook = module.register_forward_hook(
                        lambda *call: found.append(call[2])
                    )
                    hooks.enter_context(hook)
            found.append(self.loss(network, batch))
        return found

    def loss(self, network: nn.Module, batch: Any) -> Tensor:
        images, targets = batch
        # torchvision accepts key points of float32 only, also in float64.
        targets = [{**one, "keypoints": one["keypoints"].float()} for one in targets]
        losses: dict[str, Tensor] = network(images, targets)
        return torch.stack([*losses.values()]).sum()


@dataclass(frozen=True)
class Words(Task):
    """Predict words, or a class for all of them.

    Args:
        shape: length of a text.
        classes: number of classes of a text; None for the words themselves.
        keys: names of the inputs of the network that are token numbers.
    """

    shape: tuple[int, ...] = (8,)
    classes: int | None = None
    keys: tuple[str, ...] = ("input_ids",)
    labels = "true"

    def sample(self, generator: torch.Generator) -> Any:
        words = torch.randint(3, TOKENS, self.shape, generator=generator)
        labels = words
        if self.classes is not None:
            labels = torch.randint(self.classes, (), generator=generator)
        return {**dict.fromkeys(self.keys, words), "labels": labels}

    def inputs(self, batch: Any) -> Any:
        return dict(batch)

    def loss(self, network: nn.Module, batch: Any) -> Tensor:
        loss: Tensor = network(**batch).loss
        return loss


class Pictures(Words):
    """Classify images with a network of transformers."""

    def sample(self, generator: torch.Generator) -> Any:
        label = torch.randint(CLASSES, (), generator=generator)
        return {
            "pixel_values": torch.randn(self.shape, generator=generator),
            "labels": label,
        }


def settle(network: nn.Module, task: Task) -> None:
    """Bring a new network into a state as if it had been trained.

    Residual branches and heads that start at zero have no gradient yet, and with the
    initial running statistics the activations of deep networks overflow.
    """
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if not bool(parameter.any()) and not name.endswith("bias"):
                parameter.normal_(0.0, 0.1)
    norms = [
        (module, module.momentum)
        for module in network.modules()
        if getattr(module, "running_mean", None) is not None
    ]
    if not norms:
        return
    for norm, _ in norms:
        norm.momentum = 1.0
    network.train()
    with torch.no_grad():
        for batch in task.loader(8, 8):
            task.loss(network, batch)
    for norm, momentum in norms:
        norm.momentum = momentum
