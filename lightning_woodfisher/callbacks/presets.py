"""Settings by name, as arguments of the callback; ``presets.yaml`` lists them.

Those of papers reproduce the method as published (``update="independent"``,
``line_search=False``); ``update="joint"`` and ``line_search=True`` are worth trying as well.
``"post_training"`` is ours.
"""

from __future__ import annotations

__all__ = ["PRESETS", "preset", "source", "to_yaml"]

import copy
import textwrap
from pathlib import Path
from typing import Any

import yaml

from lightning_woodfisher.base.errors import require_choice
from lightning_woodfisher.fisher.config import FisherConfig
from lightning_woodfisher.layerwise.config import LayerwiseConfig
from lightning_woodfisher.pruning.config import SelectionConfig, StepConfig
from lightning_woodfisher.pruning.schedule import OneShotSchedule, PolynomialSchedule

_SCHEDULES = {kind.__name__: kind for kind in (OneShotSchedule, PolynomialSchedule)}
_CONFIGS: dict[str, type] = {
    "fisher": FisherConfig,
    "selection": SelectionConfig,
    "step": StepConfig,
    "layerwise": LayerwiseConfig,
}

#: Source and arguments of each preset, as written in YAML.
PRESETS: dict[str, dict[str, Any]] = yaml.safe_load(
    Path(__file__).with_name("presets.yaml").read_text("utf-8")
)


def source(name: str) -> str:
    """Return the source of a preset.

    Args:
        name: name of the preset.

    Returns:
        Paper, files and differences.
    """
    return str(_find(name)["source"])


def preset(name: str) -> dict[str, Any]:
    """Return settings as arguments of the callback.

    Args:
        name: ``"post_training"`` for a trained network and ten minutes, or the published
            ``"resnet50_90"``, ``"mobilenetv1_75"``, ``"bert_90"`` or
            ``"resnet20_oneshot"``; see :func:`source`.

    Returns:
        Arguments of :class:`~.WoodFisherPruningCallback`, which you may change.
    """
    arguments: dict[str, Any] = copy.deepcopy(_find(name)["init_args"])
    schedule = arguments["schedule"]
    arguments["schedule"] = _SCHEDULES[schedule["class_path"]](**schedule["init_args"])
    for group, config in _CONFIGS.items():
        arguments[group] = config(**arguments.get(group, {}))
    return arguments


def to_yaml(name: str) -> str:
    """Write a preset for ``lightning-woodfisher fit --config run.yaml --config preset.yaml``.

    Args:
        name: name of the preset.

    Returns:
        YAML that appends the callback to the callbacks of the run.
    """
    found = _find(name)
    callback = {
        "class_path": "WoodFisherPruningCallback",
        "init_args": found["init_args"],
    }
    body: str = yaml.safe_dump({"trainer": {"callbacks+": [callback]}}, sort_keys=False)
    return textwrap.indent(textwrap.fill(found["source"], 88), "# ") + "\n" + body


def _find(name: str) -> dict[str, Any]:
    require_choice("preset", name, PRESETS)
    return PRESETS[name]
