"""Small modules, data and callbacks for tests that run whole fits."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import torchmetrics
from devices import ACCELERATOR
from lightning.pytorch.loggers.logger import Logger
from step_options import in_step
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer
from torch.utils.data import DataLoader, TensorDataset

from lightning_woodfisher import (
    FisherConfig,
    OneShotSchedule,
    WoodFisherPruningCallback,
)

CLASSES = 4
# Weights that the callback selects in convolutional().
WEIGHTS = 3 * 9 + 108 * 12 + 12 * CLASSES


def images(count: int = 48) -> TensorDataset:
    """Return 8×8 images whose class can be learned."""
    generator = torch.Generator().manual_seed(11)
    pixels = torch.randn(count, 1, 8, 8, generator=generator)
    labels = pixels.flatten(1)[:, :CLASSES].argmax(dim=1)
    return TensorDataset(pixels, labels)


def loader(count: int = 48, shuffle: bool = True, **options: Any) -> DataLoader[Any]:
    """Return a loader of six batches of eight images."""
    return DataLoader(images(count), batch_size=8, shuffle=shuffle, **options)


def convolutional() -> nn.Sequential:
    """Return a network with every kind of layer that has state or random numbers."""
    return nn.Sequential(
        nn.Conv2d(1, 3, 3),
        nn.BatchNorm2d(3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(108, 12),
        nn.ReLU(),
        nn.Linear(12, CLASSES),
    )


def adamw(parameters: Any) -> Optimizer:
    """Return the default optimizer of the tests."""
    return torch.optim.AdamW(parameters, lr=1e-2, weight_decay=1e-2)


class Classifier(pl.LightningModule):
    """A module with a plain ``training_step``.

    Args:
        optimizer: function that returns the optimizer of the parameters.
        build: function that returns the network.
    """

    def __init__(
        self,
        optimizer: Callable[[Any], Optimizer] = adamw,
        build: Callable[[], nn.Module] = convolutional,
    ) -> None:
        super().__init__()
        self.make_optimizer = optimizer
        self.net = build()

    def loss(self, batch: Any) -> Tensor:
        return cross_entropy(self.net(batch[0]).float(), batch[1])

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch), sync_dist=True)

    def configure_optimizers(self) -> Any:
        return self.make_optimizer(self.parameters())


class Counting(Classifier):
    """A module that counts its training steps."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.steps = 0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.steps += 1
        return super().training_step(batch, batch_idx)


class Talkative(Classifier):
    """A module whose ``training_step`` has every side effect that must be undone."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.accuracy = torchmetrics.Accuracy("multiclass", num_classes=CLASSES)
        self.mean = torchmetrics.MeanMetric()

    def noisy_loss(self, batch: Any) -> Tensor:
        # The loss depends on each of the random generators.
        noise = torch.randn(()) + float(np.random.rand()) + random.random()
        return self.loss(batch) * (1.0 + 0.01 * noise)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.noisy_loss(batch)
        self.observe(batch, loss)
        return {"loss": loss, "extra": 1}

    def observe(self, batch: Any, loss: Tensor) -> None:
        with torch.no_grad():
            self.accuracy(self.net(batch[0]), batch[1])
            self.mean.update(loss.detach())
        self.log("accuracy", self.accuracy, on_step=True, on_epoch=True)
        self.log_dict({"loss": loss, "twice": 2 * loss}, on_step=True, on_epoch=True)
        for logger in self.loggers:
            logger.log_metrics({"inside": loss.item()}, step=self.global_step)
        if isinstance(self.logger, MemoryLogger):
            self.logger.experiment.append(("experiment", loss.item()))


class Manual(Talkative):
    """Manual optimization with two optimizers, toggling, clipping and a schedule."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        first, second = self.optimizers()
        self.toggle_optimizer(first)
        loss = self.noisy_loss(batch)
        first.zero_grad()
        self.manual_backward(loss)
        self.clip_gradients(first, gradient_clip_val=0.5)
        first.step()
        self.untoggle_optimizer(first)
        with second.toggle_model():
            other = self.noisy_loss(batch)
            second.zero_grad()
            self.manual_backward(other)
            second.step()
        self.observe(batch, loss)
        for scheduler in self.lr_schedulers():
            scheduler.step()

    def configure_optimizers(self) -> Any:
        parameters = list(self.net.parameters())
        optimizers = [
            self.make_optimizer(parameters[:4]),
            torch.optim.SGD(parameters[4:], lr=1e-2, momentum=0.9),
        ]
        schedulers = [
            torch.optim.lr_scheduler.StepLR(o, step_size=2, gamma=0.9)
            for o in optimizers
        ]
        return optimizers, schedulers


class RawManual(Classifier):
    """Manual optimization with two steps of the plain torch optimizer per batch."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers(use_pl_optimizer=False)
        for _ in range(2):
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()


class MemoryLogger(Logger):
    """A logger that keeps all metrics in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.history: list[Any] = []

    @property
    def name(self) -> str:
        return "memory"

    @property
    def version(self) -> str:
        return "0"

    @property
    def experiment(self) -> list[Any]:
        return self.history

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing."""

    def log_metrics(
        self, metrics: Mapping[str, float], step: int | None = None
    ) -> None:
        self.history.append((step, dict(metrics)))


class Reseed(pl.Callback):
    """Make data order and dropout depend only on the position in training.

    Lightning does not save random states: without this callback a resumed run would
    differ even if nothing was pruned.
    """

    def on_train_epoch_start(self, trainer: pl.Trainer, module: Any) -> None:
        seed_all(1000 + trainer.current_epoch)

    def on_train_batch_start(
        self, trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int
    ) -> None:
        seed_all(100 * trainer.current_epoch + batch_idx)


def seed_all(seed: int) -> None:
    """Seed all random generators that the modules of this file use."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def pruning(**options: Any) -> WoodFisherPruningCallback:
    """Return a callback for small networks; options replace its defaults."""
    return WoodFisherPruningCallback(
        **in_step(
            **{
                "target_sparsity": 0.75,
                "schedule": OneShotSchedule(),
                "fisher": FisherConfig(
                    num_gradients=6, gradient_batch_size=2, block_size=16
                ),
                **options,
            }
        )
    )


def trainer(*callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    """Return a Trainer without output; options replace its defaults."""
    return pl.Trainer(
        **{
            "accelerator": ACCELERATOR,
            "devices": 1,
            "max_epochs": 2,
            "callbacks": list(callbacks),
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "log_every_n_steps": 1,
            "num_sanity_val_steps": 0,
            "default_root_dir": Path.cwd(),
            **options,
        }
    )


def final_state(fitted: pl.Trainer) -> dict[str, Any]:
    """Copy weights, optimizers, schedulers and all other state of a fit."""
    module = fitted.lightning_module
    scaler = getattr(fitted.precision_plugin, "scaler", None)
    return copied(
        {
            "model": module.state_dict(),
            "gradients": {n: p.grad for n, p in module.named_parameters()},
            "flags": [m.training for m in module.modules()],
            "optimizers": [o.state_dict() for o in fitted.optimizers],
            "schedulers": [
                config.scheduler.state_dict() for config in fitted.lr_scheduler_configs
            ],
            "scaler": scaler.state_dict() if scaler is not None else None,
            "step": fitted.global_step,
        }
    )


def copied(value: Any) -> Any:
    """Copy nested containers and their tensors."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, Mapping):
        return {key: copied(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [copied(item) for item in value]
    return value


def differences(left: Any, right: Any, path: str = "") -> list[str]:
    """Return the paths at which two nested values differ in any bit."""
    if isinstance(left, Mapping) and isinstance(right, Mapping):
        if left.keys() != right.keys():
            return [f"{path}: keys {left.keys() ^ right.keys()}"]
        return [d for k in left for d in differences(left[k], right[k], f"{path}/{k}")]
    if isinstance(left, list | tuple) and isinstance(right, list | tuple):
        if len(left) != len(right):
            return [f"{path}: {len(left)} and {len(right)} items"]
        pairs = enumerate(zip(left, right, strict=True))
        return [d for i, (a, b) in pairs for d in differences(a, b, f"{path}/{i}")]
    if isinstance(left, Tensor | np.ndarray) and isinstance(right, type(left)):
        a, b = torch.as_tensor(left).cpu(), torch.as_tensor(right).cpu()
        same = a.dtype == b.dtype and a.shape == b.shape
        same = same and torch.equal(a.nan_to_num(), b.nan_to_num())
        same = same and torch.equal(a.isnan(), b.isnan())
        return [] if same else [f"{path}: tensors differ"]
    same = left == right or (left != left and right != right)
    return [] if same else [f"{path}: {left!r} and {right!r}"]
