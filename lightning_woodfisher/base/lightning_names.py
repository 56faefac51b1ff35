"""Support both packages of Lightning: ``lightning.pytorch`` and ``pytorch_lightning``.

They are two packages with the same source. Every class exists twice, and an instance of one
is not an instance of the other. The pruning callbacks derive from ``lightning.pytorch`` and
support a Trainer of either package. ``pytorch_lightning`` is never imported here: a package
that is not imported has no instances.
"""

from __future__ import annotations

__all__ = ["callbacks_of", "either_name", "from_package_of", "has_callback"]

import sys
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import lightning.pytorch as pl

_NAMES = ("lightning.pytorch", "pytorch_lightning")

T = TypeVar("T")


def either_name(*kinds: type[T]) -> tuple[type[T], ...]:
    """Return classes of both packages, for ``isinstance``.

    Args:
        kinds: classes of ``lightning.pytorch``.

    Returns:
        These classes, and those of the same names in ``pytorch_lightning`` if it has been
        imported.
    """
    others = (_namesake(kind, _NAMES[1]) for kind in kinds)
    return (*kinds, *(other for other in others if other is not None))


def from_package_of(owner: object, kind: type[T]) -> type[T]:
    """Return the class of the package that a Trainer or a module comes from.

    Args:
        owner: an instance of a class of Lightning, or of a class derived from it.
        kind: class of ``lightning.pytorch``.

    Returns:
        ``kind``, or the class of its name in ``pytorch_lightning`` if ``owner`` belongs
        to that package.
    """
    for base in type(owner).__mro__:
        for name in _NAMES:
            if base.__module__.startswith(f"{name}."):
                return _namesake(kind, name) or kind
    return kind


def callbacks_of(trainer: pl.Trainer) -> list[pl.Callback]:
    """Return the list in which the Trainer keeps its callbacks.

    Args:
        trainer: Trainer of either package.

    Returns:
        The list itself, not a copy.
    """
    # Set by a connector, without an annotation.
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return callbacks


def has_callback(trainer: pl.Trainer, *kinds: type[pl.Callback]) -> bool:
    """Check whether the Trainer has a callback of certain classes, from either package.

    Args:
        trainer: Trainer of either package.
        kinds: classes of ``lightning.pytorch``.

    Returns:
        Whether one of its callbacks is an instance of one of these classes.
    """
    wanted = either_name(*kinds)
    return any(isinstance(callback, wanted) for callback in callbacks_of(trainer))


def _namesake(kind: type[T], name: str) -> type[T] | None:
    """Find a class in the package ``name``; None if that is not imported."""
    path = kind.__module__.replace(_NAMES[0], name, 1)
    found: type[T] | None = getattr(sys.modules.get(path), kind.__name__, None)
    return found
