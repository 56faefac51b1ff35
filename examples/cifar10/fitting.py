"""Parse arguments, train and test for the scripts that compare methods."""

from __future__ import annotations

__all__ = ["fit_and_test", "load_data", "load_module", "make_parser"]

import argparse
import warnings
from collections.abc import Sequence

import lightning.pytorch as pl
import torch

from examples.cifar10.model import CIFAR10, CIFAR10Classifier


def make_parser(description: str) -> argparse.ArgumentParser:
    """Return a parser with the options of scripts that prune a trained network.

    Args:
        description: description of the script.

    Returns:
        The parser.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--data", default="data", help="folder of the images")
    parser.add_argument("--weights", default="runs/cifar10/dense.pt")
    parser.add_argument(
        "--held-out", action="store_true", help="test on held-out images"
    )
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--images-per-epoch", type=int, help="for a quick test")
    parser.add_argument("--learning-rate", type=float, default=0.03, help="maximum")
    parser.add_argument("--only", default="", metavar="TEXT", help="select methods")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--accelerator", default="auto")
    return parser


def load_data(folder: str, images_per_epoch: int | None) -> CIFAR10:
    """Load the images, and silence Lightning's advice on worker processes.

    Args:
        folder: folder of the images.
        images_per_epoch: number of training images; None for all.

    Returns:
        The images, ready for training.
    """
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    data = CIFAR10(folder, images_per_epoch=images_per_epoch)
    data.setup("fit")
    return data


def load_module(weights: str, learning_rate: float, seed: int) -> CIFAR10Classifier:
    """Seed all generators and load a trained network.

    Args:
        weights: file of the weights.
        learning_rate: maximum learning rate.
        seed: seed of the generators.

    Returns:
        The network in the fastest memory format.
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
    """Train on one device, without logger, checkpoints and progress bar, and test.

    Args:
        module: the network.
        data: the images.
        epochs: number of epochs.
        callbacks: callbacks, such as one that prunes.
        accelerator: accelerator of the Trainer.
        held_out: whether to test on the held-out images, for choosing settings.

    Returns:
        Accuracy in percent.
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
