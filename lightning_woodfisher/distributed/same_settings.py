"""Check that all ranks have the same settings, before they wait for each other."""

from __future__ import annotations

__all__ = ["require_same_settings", "shapes_by_name"]

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from lightning_woodfisher.base.errors import ConfigurationError
from lightning_woodfisher.distributed.communicator import Communicator


def require_same_settings(
    settings: Mapping[str, Any],
    communicator: Communicator,
    remedy: str = "give all ranks the same",
) -> None:
    """Check that all ranks have the same settings. Call on all ranks.

    Args:
        settings: values by name; dataclasses are compared field by field, other values by
            their ``repr`` without addresses in memory.
        communicator: the ranks. If one differs, it raises :class:`ConfigurationError`, and
            the others an error with its text.
        remedy: what to do, for the error.
    """
    if communicator.world_size == 1:
        return
    own = {name: _describe(value) for name, value in _flatten(settings)}
    first = json.loads(communicator.broadcast_text(json.dumps(own)))
    error: ConfigurationError | None = None
    for name in [*first, *own]:
        here, there = own.get(name, "missing"), first.get(name, "missing")
        if here != there:
            error = ConfigurationError(
                f"{name} is {here} on rank {communicator.rank}, but {there} on rank 0; "
                f"{remedy}."
            )
            break
    communicator.raise_together(error)


def shapes_by_name(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all parameters, for :func:`require_same_settings`.

    Args:
        model: the network.

    Returns:
        The shapes by what they are called in an error.
    """
    return {f"shape of {n!r}": tuple(p.shape) for n, p in model.named_parameters()}


def _describe(value: object) -> str:
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def _flatten(settings: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Iterate over settings by name, and over the fields of dataclasses by dotted name."""
    for name, value in settings.items():
        if dataclasses.is_dataclass(value):
            fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
            for field, inner in _flatten(fields):
                yield f"{name}.{field}", inner
        else:
            yield name, value
