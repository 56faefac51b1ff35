"""Read weights and masks from a checkpoint, without running code pickled in it."""

from __future__ import annotations

__all__ = ["Checkpoint", "read_checkpoint", "strip_prefix"]

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_woodfisher.base.errors import ConfigurationError, name_first, nearest
from lightning_woodfisher.base.torch_files import load_plain
from lightning_woodfisher.weights.checkpoint_state import STATE_KEYS, require_readable

_MAX_NAMES = 3


@dataclass(frozen=True)
class Checkpoint:
    """Weights and masks of a pruned network.

    Attributes:
        path: path of the file.
        weights: tensors of the module's ``state_dict``.
        masks: bool tensors by parameter name, in the shapes of the weights, True where
            kept; empty if the file has none.
        content: everything in the file.
        steps_left: planned pruning steps that were not done when the file was saved.
        removal_plans: how to cut masked channels out, one for each structured callback, as
            ``RemovalPlan.to_dict`` of :mod:`lightning_woodfisher.structured` returns it.
    """

    path: Path
    weights: dict[str, Tensor]
    masks: dict[str, Tensor]
    content: Mapping[str, Any]
    steps_left: int = 0
    removal_plans: Sequence[Mapping[str, Any]] = field(default_factory=tuple)

    @property
    def state_dict(self) -> Mapping[str, Any]:
        """The whole ``state_dict``, including entries that are not tensors."""
        state: Mapping[str, Any] = self.content.get("state_dict", self.content)
        return state

    @property
    def left_out(self) -> list[str]:
        """Names of entries of the ``state_dict`` that are not tensors."""
        return [name for name in self.state_dict if name not in self.weights]

    @property
    def pruned(self) -> int:
        """Number of weights that the masks prune."""
        return sum(int((~kept).sum()) for kept in self.masks.values())

    def require_masks_hold(self) -> None:
        """Check that there are masks and that every pruned weight is zero.

        Raises:
            ConfigurationError: otherwise, with the first layers that are wrong.
        """
        if not self.masks:
            raise ConfigurationError(
                f"{self.path} has no masks: it was saved without the pruning callback, "
                "before its first step, or with save_weights_only. Add --from_zeros to "
                "export the weights without masks."
            )
        wrong = []
        for name, kept in self.masks.items():
            weight = self.weights.get(name)
            if weight is None:
                wrong.append(f"{name}: no weight of this name")
            elif weight.shape != kept.shape:
                shapes = f"{tuple(kept.shape)}, not {tuple(weight.shape)}"
                wrong.append(f"{name}: mask has shape {shapes}")
            elif count := int((weight[~kept] != 0).sum()):
                pruned = int((~kept).sum())
                wrong.append(f"{name}: {count} of {pruned} pruned weights are not zero")
        if wrong:
            listed = name_first(wrong, _MAX_NAMES, "; ")
            raise ConfigurationError(
                f"weights and masks of {self.path} disagree in {len(wrong)} of "
                f"{len(self.masks)} layers ({listed}). The weights were changed after the "
                "masks were applied, for example by averaging. Add --from_zeros to export "
                "them as they are."
            )


def read_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Read a Lightning checkpoint, or a ``state_dict``, with ``weights_only=True``.

    Args:
        path: path of the file.

    Returns:
        Weights and masks, on the CPU.

    Raises:
        ConfigurationError: if the file is something else, or holds objects other than
            tensors and plain values.
    """
    path = Path(path)
    if path.is_dir():
        raise ConfigurationError(
            f"{path} is a folder: a distributed checkpoint. Convert it to a file with "
            f"python -m lightning.pytorch.utilities.consolidate_checkpoint {path}."
        )
    if not path.is_file():
        raise ConfigurationError(f"{path} is not a file.")
    content = load_plain(path)
    content = content if isinstance(content, dict) else {}
    state = content.get("state_dict", content)
    entries = state.items() if isinstance(state, dict) else ()
    weights = {name: value for name, value in entries if isinstance(value, Tensor)}
    # Modules may save objects other than tensors; a plain state_dict has only tensors.
    if (
        not weights
        or (content is state and len(weights) < len(content))
        or not all(isinstance(name, str) for name in state)
    ):
        raise ConfigurationError(
            f"{path} is not a checkpoint: it neither is nor contains a state_dict."
        )
    states = _pruning_states(path, content)
    steps_left = max((state.get("steps_left", 0) for state in states), default=0)
    plans = [state["removal_plan"] for state in states if "removal_plan" in state]
    masks = _combine_masks(path, states)
    return Checkpoint(path, weights, masks, content, steps_left, plans)


def strip_prefix(state_dict: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Select the entries of a ``state_dict`` that belong to a submodule.

    Args:
        state_dict: tensors of the whole module, such as a LightningModule, by name.
        prefix: name of the submodule, such as ``"net"`` or ``"net."``; empty for all.

    Returns:
        The tensors of the submodule, named as in its own ``state_dict``.

    Raises:
        ConfigurationError: if no name begins with the prefix.
    """
    start = f"{prefix.rstrip('.')}." if prefix else ""
    part = {
        name.removeprefix(start): tensor
        for name, tensor in state_dict.items()
        if name.startswith(start)
    }
    if not part:
        known = list(dict.fromkeys(n.partition(".")[0] for n in state_dict if "." in n))
        raise ConfigurationError(
            f"no weight has a name that begins with {start!r}.{nearest(prefix, known)} "
            f"Submodules: {', '.join(known) or 'none'}."
        )
    return part


def _pruning_states(path: Path, content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the states of all pruning callbacks, recognized by their keys."""
    callbacks = content.get("callbacks")
    states = [
        state
        for state in (callbacks.values() if isinstance(callbacks, dict) else ())
        if isinstance(state, dict) and state.keys() >= STATE_KEYS
    ]
    for state in states:
        require_readable(state, str(path))
    return states


def _combine_masks(
    path: Path, states: Sequence[Mapping[str, Any]]
) -> dict[str, Tensor]:
    """Combine the masks of all pruning callbacks."""
    masks: dict[str, Tensor] = {}
    for state in states:
        for name, kept in state["masks"].items():
            if name in masks and masks[name].shape != kept.shape:
                raise ConfigurationError(
                    f"{path} is damaged: it has masks of {name} with shapes "
                    f"{tuple(masks[name].shape)} and {tuple(kept.shape)}."
                )
            masks[name] = masks[name] & kept if name in masks else kept
    return masks
