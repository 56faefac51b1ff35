"""Loss, fit and accuracy, for the scripts that compare methods."""

from __future__ import annotations

__all__ = ["accuracy", "fit_and_test", "loss_fn", "trained_module"]

from collections.abc import Sequence

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from examples.cifar10.model import CIFAR10, CIFAR10Classifier


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Mean cross-entropy of a batch."""
    return F.cross_entropy(model(batch[0]), batch[1])


@torch.no_grad()
def accuracy(model: nn.Module, data: TensorDataset) -> float:
    """Share of right answers in per cent."""
    model.eval()
    images, labels = data.tensors
    right = [
        (model(part).argmax(1) == truth).sum()
        for part, truth in zip(images.split(500), labels.split(500), strict=True)
    ]
    return 100 * float(sum(right)) / len(labels)


def trained_module(weights: str, learning_rate: float, seed: int) -> CIFAR10Classifier:
    """Load a trained network to go on with, and seed all generators.

    Args:
        weights: file of the weights.
        learning_rate: the highest.
        seed: of the generators.

    Returns:
        The network, in the memory format that is fastest.
    """
    pl.seed_everything(seed, verbose=False)
    module = CIFAR10Classifier(learning_rate, weights=weights)
    module.to(memory_format=torch.channels_last)
    return module


def fit_and_test(
    module: CIFAR10Classifier,
    data: CIFAR10,
    epochs: int,
    callbacks: Sequence[pl.Callback] = (),
    accelerator: str = "auto",
    held_out: bool = False,
) -> float:
    """Train on one device, without a logger, checkpoints or a bar.

    Args:
        module: the network.
        data: the images.
        epochs: number of epochs.
        callbacks: such as one that prunes.
        accelerator: as the Trainer takes it.
        held_out: test on the held-out images, to choose settings by.

    Returns:
        Accuracy on the test images in per cent.
    """
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator=accelerator,
        devices=1,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        num_sanity_val_steps=0,
        check_val_every_n_epoch=epochs + 1,
    )
    trainer.fit(module, data)
    if held_out:
        found = trainer.validate(module, data, verbose=False)
        return 100 * float(found[0]["val_accuracy"])
    found = trainer.test(module, data, verbose=False)
    return 100 * float(found[0]["test_accuracy"])
