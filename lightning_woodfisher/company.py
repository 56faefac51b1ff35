"""The other callbacks of the Trainer."""

from __future__ import annotations

__all__ = ["callbacks_of", "has_callback"]

import lightning.pytorch as pl

from lightning_woodfisher.base.lightning_names import either_name


def callbacks_of(trainer: pl.Trainer) -> list[pl.Callback]:
    """Give the list in which the Trainer keeps its callbacks.

    Args:
        trainer: of either name of Lightning.

    Returns:
        The list itself; who changes it changes the Trainer.
    """
    # Set by a connector, without an annotation.
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return callbacks


def has_callback(trainer: pl.Trainer, *kinds: type[pl.Callback]) -> bool:
    """Look for callbacks of some kinds, under either name of Lightning.

    Args:
        trainer: whose callbacks are looked through.
        kinds: classes of ``lightning.pytorch``.

    Returns:
        Whether there is one of these classes or of one derived from them.
    """
    wanted = either_name(*kinds)
    return any(isinstance(callback, wanted) for callback in callbacks_of(trainer))
