"""Save a shrunk network, and load one from its folder or from the checkpoint of a run."""

from __future__ import annotations

__all__ = ["load_shrunk", "read_shrunk", "save_shrunk"]

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_woodfisher.base.errors import ConfigurationError
from lightning_woodfisher.base.torch_files import load_plain
from lightning_woodfisher.export.checkpoint import Checkpoint, read_checkpoint
from lightning_woodfisher.export.state_dict_files import write_atomically
from lightning_woodfisher.structured.shrink.removal import RemovalPlan

_PLAN, _WEIGHTS = "plan.json", "weights.pt"


def save_shrunk(
    folder: str | os.PathLike[str], state_dict: Mapping[str, Any], plan: RemovalPlan
) -> Path:
    """Save a shrunk network: its plan and its ``state_dict``.

    Args:
        folder: where to write. It is created if it does not exist.
        state_dict: of the shrunk network.
        plan: the plan that was applied to the dense network.

    Returns:
        Path of the file with the weights.
    """
    path = Path(folder, _WEIGHTS)
    text = json.dumps(plan.to_dict(), indent=1, sort_keys=True)
    with write_atomically(path) as unfinished:
        torch.save(dict(state_dict), unfinished)
        unfinished.with_name(_PLAN).write_text(f"{text}\n", encoding="utf-8")
    return path


def load_shrunk(path: str | os.PathLike[str], model: nn.Module) -> nn.Module:
    """Build the smaller network of a run that has removed channels, with its weights.

    No code in the file is run, and everything is checked before it is used: a
    ConfigurationError is raised if the file is damaged or holds no such run, or if
    ``model`` is another network.

    Args:
        path: a checkpoint that Lightning saved with a structured pruning callback, or a
            folder that its ``export_path``, :func:`save_shrunk` or ``lightning-woodfisher
            export --format shrunk`` wrote.
        model: the dense network, freshly built, or the module that holds it; its weights
            do not matter, and it is not changed.

    Returns:
        A copy of ``model`` without the removed channels, in the same mode (call ``eval()``
        before you use it).
    """
    path = Path(path)
    if path.is_dir():
        plan, weights = _read_folder(path)
    else:
        plan, weights = read_shrunk(read_checkpoint(path))
    prefix = _find_prefix(path, plan, weights, model)
    smaller = plan.without_prefix(prefix).apply_to_copy(model)
    # With the versions of its layers, which some need to load a state (MNASNet).
    state = smaller.state_dict()
    found = {
        name.removeprefix(prefix): value
        for name, value in weights.items()
        if name.startswith(prefix)
    }
    _require_loadable(path, found, smaller)
    state.update(found)
    smaller.load_state_dict(state)
    return smaller


def read_shrunk(checkpoint: Checkpoint) -> tuple[RemovalPlan, dict[str, Any]]:
    """Cut the removed channels out of the weights of a checkpoint.

    Args:
        checkpoint: of a run with a structured pruning callback.

    Returns:
        The plan and the cut ``state_dict`` of the whole module.

    Raises:
        ConfigurationError: if no channels were removed, or a removed one is not zero.
    """
    if not checkpoint.removal_plans:
        raise ConfigurationError(
            f"{checkpoint.path} has no plan of removed channels: it was saved without a "
            "structured pruning callback, before its first step, or with "
            "save_weights_only. Give a later checkpoint, or the folder of export_path."
        )
    checkpoint.require_masks_hold()
    try:
        plans = map(RemovalPlan.from_dict, checkpoint.removal_plans)
        plan = RemovalPlan.combine(tuple(plans))
        return plan, plan.cut(checkpoint.state_dict)
    except ConfigurationError as error:
        raise ConfigurationError(f"{checkpoint.path} is damaged: {error}") from error


def _read_folder(folder: Path) -> tuple[RemovalPlan, dict[str, Any]]:
    missing = [name for name in (_PLAN, _WEIGHTS) if not (folder / name).is_file()]
    if missing:
        raise ConfigurationError(
            f"{folder} contains no shrunk network: it has no file {missing[0]}. Give the "
            "folder of export_path, or a checkpoint."
        )
    try:
        plain = json.loads((folder / _PLAN).read_text(encoding="utf-8"))
        plan = RemovalPlan.from_dict(plain)
    # ValueError: not UTF-8, not JSON, or our error. RecursionError: nested too deeply.
    except (AttributeError, OSError, RecursionError, ValueError) as error:
        raise ConfigurationError(f"{folder / _PLAN} is damaged: {error}") from error
    weights = load_plain(folder / _WEIGHTS)
    if not isinstance(weights, dict) or not all(isinstance(n, str) for n in weights):
        raise ConfigurationError(
            f"{folder / _WEIGHTS} is not a state_dict; write the folder anew, with "
            "lightning-woodfisher export CHECKPOINT --format shrunk."
        )
    return plan, weights


def _find_prefix(
    path: Path, plan: RemovalPlan, weights: Mapping[str, Any], model: nn.Module
) -> str:
    """Find what the names in the file have before the names in the model."""
    dense = set()
    for name in weights:
        module, _, key = name.rpartition(".")
        owner, _, part = module.rpartition(".")
        is_part = owner in plan.implants and part in {"kept", "implant"}
        dense.add(f"{owner}.{key}" if is_part else name)
    names = {*model.state_dict()}
    some = next(iter(names), "")
    ends = {
        name.removesuffix(some) for name in dense if f".{name}".endswith(f".{some}")
    }
    for prefix in sorted(ends, key=len):
        found = {n.removeprefix(prefix) for n in dense if n.startswith(prefix)}
        if found == names:
            return prefix
    kind = type(model).__name__
    for child, module in model.named_modules():
        if {*module.state_dict()} == dense:
            raise ConfigurationError(
                f"{path} holds the network alone: pass model.{child} instead of the whole "
                f"{kind}."
            )
    extra, lacking = sorted(dense - names)[:1], sorted(names - dense)[:1]
    raise ConfigurationError(
        f"the weights in {path} do not fit {kind}: the file has "
        f"{', '.join(extra) or 'nothing'} that the model lacks, and the model has "
        f"{', '.join(lacking) or 'nothing'} that the file lacks. Build the dense network as "
        "in training, or pass the part of it that was saved."
    )


def _require_loadable(path: Path, weights: Mapping[str, Any], model: nn.Module) -> None:
    """Check the kinds and shapes of all entries before any of them is loaded."""
    for name, own in model.state_dict().items():
        if not isinstance(own, Tensor):
            continue
        value = weights.get(name)
        fault = ""
        if not isinstance(value, Tensor) or value.layout != own.layout or value.is_meta:
            fault = "is not a dense tensor"
        elif value.shape != own.shape:
            shapes = f"{tuple(value.shape)}, not {tuple(own.shape)}"
            fault = f"has shape {shapes}"
        elif not torch.can_cast(value.dtype, own.dtype):
            fault = f"has dtype {value.dtype}, not {own.dtype}"
        if fault:
            raise ConfigurationError(
                f"the weights in {path} do not fit {type(model).__name__}: {name} {fault}. "
                "Build the dense network as in training."
            )
