"""Version and keys of the state that a pruning callback stores in a checkpoint.

The state is a dictionary: ``version``, ``masks`` (bool tensors by parameter name, True where
kept), ``done`` (unit and position of each finished step) and ``reports`` (of the steps, as
plain dictionaries). ``callbacks/base.py`` writes and loads it; the export and the command
``report`` read it.
"""

from __future__ import annotations

__all__ = ["STATE_KEYS", "STATE_VERSION", "require_readable"]

from collections.abc import Mapping
from typing import Any

from lightning_woodfisher.base.errors import ConfigurationError

#: Version of the state that this package writes. It reads this and all earlier ones.
STATE_VERSION = 1
#: Keys that identify the state, whatever the class of the callback is called.
STATE_KEYS = frozenset({"version", "masks", "done"})


def require_readable(state: Mapping[str, Any], checkpoint: str) -> None:
    """Check that a state was not written by a later version of the package.

    Args:
        state: state of a pruning callback.
        checkpoint: which contains it, for the error.

    Raises:
        ConfigurationError: if its version is later than :data:`STATE_VERSION`.
    """
    if state["version"] > STATE_VERSION:
        raise ConfigurationError(
            f"the pruning state of {checkpoint} has version {state['version']}; this "
            f"package reads up to {STATE_VERSION}. Update lightning-woodfisher."
        )
