"""What the state of a pruning callback in a checkpoint looks like, for all who read it."""

from __future__ import annotations

__all__ = ["STATE_KEYS", "STATE_VERSION", "require_readable"]

from collections.abc import Mapping
from typing import Any

from lightning_woodfisher.base.errors import ConfigurationError

#: Of the state that this package writes; it reads this and all before.
STATE_VERSION = 1
#: By these a state is known, whatever the class of the callback is called.
STATE_KEYS = frozenset({"version", "masks", "done"})


def require_readable(state: Mapping[str, Any], checkpoint: str) -> None:
    """Refuse a state of a later version of the package.

    Args:
        state: of a pruning callback.
        checkpoint: what it is part of, for the error.

    Raises:
        ConfigurationError: when its version is later than :data:`STATE_VERSION`.
    """
    if state["version"] > STATE_VERSION:
        raise ConfigurationError(
            f"the pruning state of {checkpoint} has version {state['version']}; this "
            f"package reads up to {STATE_VERSION}. Update lightning-woodfisher."
        )
