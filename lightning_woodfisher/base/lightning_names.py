"""Lightning under its two names: ``lightning.pytorch`` and ``pytorch_lightning``.

They are two packages with the same source, so that every class exists twice and an
instance of the one is no instance of the other. The pruning callbacks are made of
``lightning.pytorch`` and serve a Trainer of either. ``pytorch_lightning`` is never imported
here: what has not been imported has no instances.
"""

from __future__ import annotations

__all__ = ["either_name", "like"]

import sys
from typing import TypeVar

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


def _namesake(kind: type[T], name: str) -> type[T] | None:
    """Find a class under another name of the package; None where it is not imported."""
    path = kind.__module__.replace(_NAMES[0], name, 1)
    found: type[T] | None = getattr(sys.modules.get(path), kind.__name__, None)
    return found
