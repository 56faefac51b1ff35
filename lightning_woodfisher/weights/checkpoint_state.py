"""Version and keys of the state that a pruning callback stores in a checkpoint.

The state is a dictionary: ``version``, ``masks`` (bool tensors by parameter name, True where
kept), ``done`` (unit, position and sparsity of each finished step), ``steps_left`` (number
of planned steps that were not done yet), ``reports`` (of the steps, as plain dictionaries) and
``logged`` (latest values that the module has logged, by name). That of a structured
callback has two more: ``network``, the name of the pruned submodule, and ``removal_plan``,
how to cut its masked channels out.
``callbacks/base.py`` writes and loads it; the export and the command ``report`` read it.
"""

from __future__ import annotations

__all__ = ["STATE_KEYS", "STATE_VERSION", "require_readable"]

import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_woodfisher.base.errors import ConfigurationError

#: Version of the state that this package writes. It reads this and all earlier ones.
STATE_VERSION = 1
#: Keys that identify the state, whatever the class of the callback is called.
STATE_KEYS = frozenset({"version", "masks", "done"})


def require_readable(state: Any, checkpoint: str) -> None:
    """Check that the state of a pruning callback is complete and not of a later version.

    Args:
        state: state of a pruning callback.
        checkpoint: name of the checkpoint that contains it, for the error.

    Raises:
        ConfigurationError: otherwise.
    """
    fault = _find_fault(state)
    if not fault and state["version"] > STATE_VERSION:
        raise ConfigurationError(
            f"the pruning state of {checkpoint} has version {state['version']}; this "
            f"package reads up to {STATE_VERSION}. Update lightning-woodfisher."
        )
    fault = fault or _find_fault_in_content(state)
    if fault:
        raise ConfigurationError(
            f"the pruning state of {checkpoint} is damaged: {fault}. Use another checkpoint, "
            "or only its weights."
        )


def _find_fault(state: Any) -> str:
    if not isinstance(state, Mapping) or not state.keys() >= STATE_KEYS:
        return f"it is not a dictionary with {', '.join(sorted(STATE_KEYS))}"
    version = state["version"]
    if type(version) is not int or version < 1:
        return f"its version is {reprlib.repr(version)}"
    return ""


def _find_fault_in_content(state: Mapping[str, Any]) -> str:
    masks, done = state["masks"], state["done"]
    if not isinstance(masks, Mapping) or not all(
        isinstance(name, str) and isinstance(mask, Tensor) and mask.dtype == torch.bool
        for name, mask in masks.items()
    ):
        return "its masks are not bool tensors"
    if not isinstance(done, Sequence) or not all(
        isinstance(step, Sequence)
        and [*map(type, step)] == [str, int, float]
        and abs(step[1]) < 2**63
        for step in done
    ):
        return "its finished steps are not lists of unit, position and sparsity"
    steps_left, reports = state.get("steps_left", 0), state.get("reports", ())
    if type(steps_left) is not int or steps_left < 0:
        return f"its number of remaining steps is {reprlib.repr(steps_left)}"
    if not isinstance(reports, Sequence) or not all(
        isinstance(report, Mapping) for report in reports
    ):
        return "its reports are not dictionaries"
    logged = state.get("logged", {})
    if not isinstance(logged, Mapping) or not all(
        isinstance(name, str) and type(value) is float for name, value in logged.items()
    ):
        return "its logged values are not numbers by name"
    if not isinstance(state.get("removal_plan", {}), Mapping):
        return "its plan of removed channels is not a dictionary"
    if not isinstance(state.get("network", ""), str):
        return "its name of the network is not a string"
    return ""
