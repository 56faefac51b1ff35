"""Lightning under its two names: ``lightning.pytorch`` and ``pytorch_lightning``.

They are two packages with the same source, so that every class exists twice and an
instance of the one is no instance of the other. The pruning callbacks are made of
``lightning.pytorch`` and serve a Trainer of either. ``pytorch_lightning`` is never imported
here: what has not been imported has no instances.
"""

from __future__ import annotations

__all__ = ["callbacks_of", "either_name", "has_callback", "like"]

import sys
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import lightning.pytorch as pl

_NAMES = ("lightning.pytorch", "pytorch_lightning")

T = TypeVar("T")


def either_name(*kinds: type[T]) -> tuple[type[T], ...]:
    """Give classes with their namesakes, for ``isinstance``.

    Args:
        kinds: classes of ``lightning.pytorch``.

    Returns:
        They, and those of ``pytorch_lightning`` as far as it has been imported.
    """
    others = (_namesake(kind, _NAMES[1]) for kind in kinds)
    return (*kinds, *(other for other in others if other is not None))


def like(owner: object, kind: type[T]) -> type[T]:
    """Choose the one of two classes that goes with a Trainer or a module.

    Args:
        owner: an instance of a class of Lightning, or of one derived from it.
        kind: class of ``lightning.pytorch``.

    Returns:
        It, or its namesake when ``owner`` is of ``pytorch_lightning``.
    """
    for base in type(owner).__mro__:
        for name in _NAMES:
            if base.__module__.startswith(f"{name}."):
                return _namesake(kind, name) or kind
    return kind


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


def _namesake(kind: type[T], name: str) -> type[T] | None:
    """Find a class under another name of the package; None where it is not imported."""
    path = kind.__module__.replace(_NAMES[0], name, 1)
    found: type[T] | None = getattr(sys.modules.get(path), kind.__name__, None)
    return found
