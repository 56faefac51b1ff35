"""The state of a pruning callback in a checkpoint: what is read, and what is damaged."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

import pytest
import torch

from lightning_woodfisher.base.errors import ConfigurationError
from lightning_woodfisher.weights.checkpoint_state import (
    STATE_VERSION,
    require_readable,
)

COMPLETE: dict[str, Any] = {
    "version": 1,
    "masks": {"layer.weight": torch.tensor([True, False])},
    "done": [("epoch", 1, 0.5), ["step", 2, 0.75]],
    "steps_left": 3,
    "reports": [{"sparsity": 0.5}],
    "logged": {"loss": 0.1},
    "removal_plan": {"layer": [0]},
    "network": "body",
}


@pytest.mark.parametrize(
    "state",
    [
        COMPLETE,
        MappingProxyType(COMPLETE),
        {"version": 1, "masks": {}, "done": []},
        {**COMPLETE, "steps_left": 0, "done": [("epoch", -(2**63) + 1, 0.0)]},
        {**COMPLETE, "a later key": 1},
    ],
    ids=["complete", "read-only", "smallest", "at the limits", "more keys"],
)
def test_a_sound_state_is_read(state: Any) -> None:
    require_readable(state, "last.ckpt")


@pytest.mark.parametrize(
    ("changed", "fault"),
    [
        ({"version": 0}, "its version is 0"),
        ({"version": True}, "its version is True"),
        ({"version": 1.0}, "its version is 1.0"),
        ({"masks": [torch.tensor([True])]}, "its masks are not bool tensors"),
        ({"masks": {0: torch.tensor([True])}}, "its masks are not bool tensors"),
        ({"masks": {"a": [True]}}, "its masks are not bool tensors"),
        ({"masks": {"a": torch.ones(2)}}, "its masks are not bool tensors"),
        ({"done": {("epoch", 1, 0.5)}}, "its finished steps are not lists"),
        ({"done": [{"epoch", 1, 0.5}]}, "its finished steps are not lists"),
        ({"done": [("epoch", 1)]}, "its finished steps are not lists"),
        ({"done": [("epoch", 1.0, 0.5)]}, "its finished steps are not lists"),
        ({"done": [("epoch", 2**63, 0.5)]}, "its finished steps are not lists"),
        ({"done": [("epoch", -(2**63), 0.5)]}, "its finished steps are not lists"),
        ({"steps_left": -1}, "its number of remaining steps is -1"),
        ({"steps_left": 2.0}, "its number of remaining steps is 2.0"),
        ({"reports": {0: {}}}, "its reports are not dictionaries"),
        ({"reports": [[]]}, "its reports are not dictionaries"),
        ({"logged": [1.0]}, "its logged values are not numbers by name"),
        ({"logged": {0: 1.0}}, "its logged values are not numbers by name"),
        ({"logged": {"loss": 1}}, "its logged values are not numbers by name"),
        ({"removal_plan": [0]}, "its plan of removed channels is not a dictionary"),
        ({"network": 0}, "its name of the network is not a string"),
    ],
    ids=lambda value: None if isinstance(value, str) else next(iter(value)),
)
def test_a_damaged_state_is_named(changed: dict[str, Any], fault: str) -> None:
    message = rf"the pruning state of last\.ckpt is damaged: {fault}"
    with pytest.raises(ConfigurationError, match=message):
        require_readable({**COMPLETE, **changed}, "last.ckpt")


@pytest.mark.parametrize("missing", ["version", "masks", "done"])
def test_a_state_without_its_keys_is_damaged(missing: str) -> None:
    state = {key: value for key, value in COMPLETE.items() if key != missing}
    with pytest.raises(
        ConfigurationError, match="dictionary with done, masks, version"
    ):
        require_readable(state, "last.ckpt")
    with pytest.raises(
        ConfigurationError, match="dictionary with done, masks, version"
    ):
        require_readable(list(COMPLETE), "last.ckpt")


def test_a_later_version_may_be_anything_and_needs_an_update() -> None:
    state = {**COMPLETE, "version": STATE_VERSION + 1, "masks": "of another kind"}
    with pytest.raises(
        ConfigurationError, match=f"reads up to {STATE_VERSION}. Update"
    ):
        require_readable(state, "last.ckpt")
