"""A fit and the accuracy after it, for the scripts that compare methods."""

from __future__ import annotations

__all__ = ["fit_and_test"]

from collections.abc import Sequence

import lightning.pytorch as pl

from examples.cifar10.model import CIFAR10, CIFAR10Classifier


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
