"""Write the options of a pruning step flat, as tests with tables of options do."""

from __future__ import annotations

__all__ = ["in_step"]

import dataclasses
from typing import Any

from lightning_woodfisher import StepConfig

_FIELDS = {field.name for field in dataclasses.fields(StepConfig)}


# So that weights and counts of passes are those of the setting that a test is about.
_DEFAULTS: dict[str, Any] = {
    "batchnorm_recalibration_batches": 0,
    "update": "joint",
    "line_search": True,
}


def in_step(**options: Any) -> dict[str, Any]:
    """Group the options that are fields of ``StepConfig`` under ``step``."""
    step = {name: value for name, value in options.items() if name in _FIELDS}
    others = {name: value for name, value in options.items() if name not in _FIELDS}
    if "step" in others:
        assert not step
        return others
    return {**others, "step": StepConfig(**{**_DEFAULTS, **step})}
