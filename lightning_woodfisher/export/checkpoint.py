"""Weights and masks out of a checkpoint, without running what is pickled in it."""

from __future__ import annotations

__all__ = ["Checkpoint", "read_checkpoint"]

import os
import pickle
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_woodfisher.base.errors import ConfigurationError
from lightning_woodfisher.weights.checkpoint_state import STATE_KEYS, require_readable

_MOST_NAMES = 3


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint has of a pruned network.

    Attributes:
        path: of the file.
        weights: the tensors of the module's ``state_dict``.
        masks: bool tensors by the name of their weight, True where kept; empty when there
            are none.
        content: everything that is in the file.
    """

    path: Path
    weights: dict[str, Tensor]
    masks: dict[str, Tensor]
    content: Mapping[str, Any]

    @property
    def state_dict(self) -> Mapping[str, Any]:
        """All of the module's ``state_dict``, with what some modules put beside tensors."""
        state: Mapping[str, Any] = self.content.get("state_dict", self.content)
        return state

    @property
    def left_out(self) -> list[str]:
        """Names in the ``state_dict`` that are no tensors."""
        return [name for name in self.state_dict if name not in self.weights]

    @property
    def pruned(self) -> int:
        """Number of weights that the masks have pruned."""
        return sum(int((~kept).sum()) for kept in self.masks.values())

    def require_masks_hold(self) -> None:
        """Check that there are masks, and that every pruned weight is zero.

        Raises:
            ConfigurationError: otherwise, with the first layers that are wrong.
        """
        if not self.masks:
            raise ConfigurationError(
                f"{self.path} has no masks: it was saved without the pruning callback, "
                "before its first step, or with save_weights_only. --from_zeros takes the "
                "zeros of the weights for what is pruned."
            )
        wrong: dict[str, str] = {}
        for name, kept in self.masks.items():
            weight = self.weights.get(name)
            if weight is None:
                wrong[name] = "has no weight"
            elif weight.shape != kept.shape:
                shapes = f"{tuple(kept.shape)}, not {tuple(weight.shape)}"
                wrong[name] = f"has a mask of shape {shapes}"
            elif count := int((weight[~kept] != 0).sum()):
                wrong[name] = f"{count} of {int((~kept).sum())} pruned weights not zero"
        if wrong:
            listed = [f"{name}: {what}" for name, what in wrong.items()]
            more = len(listed) - _MOST_NAMES
            listed[_MOST_NAMES:] = [f"and {more} more"] if more > 0 else []
            raise ConfigurationError(
                f"weights and masks of {self.path} disagree in {len(wrong)} of "
                f"{len(self.masks)} layers ({'; '.join(listed)}). The weights were changed "
                "after the masks were applied, for example by averaging; --from_zeros "
                "exports them as they are."
            )


def read_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Read a Lightning checkpoint, or a ``state_dict``, with ``weights_only=True``.

    Args:
        path: of the file.

    Returns:
        Weights and masks, on the CPU.

    Raises:
        ConfigurationError: for a file of another kind, or one with more than tensors and
            plain values in it.
    """
    path = Path(path)
    if path.is_dir():
        raise ConfigurationError(
            f"{path} is a folder: a distributed checkpoint. Make a file of it with "
            f"python -m lightning.pytorch.utilities.consolidate_checkpoint {path}."
        )
    if not path.is_file():
        raise ConfigurationError(f"{path} is not a file.")
    try:
        with warnings.catch_warnings():
            # What is said of a pickle that is no checkpoint; the error says it better.
            warnings.filterwarnings("ignore", "Detected pickle protocol", UserWarning)
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ConfigurationError(_explain(path, str(error))) from error
    # Bytes of something else can make the reader fail in any way.
    except Exception as error:
        raise ConfigurationError(
            f"{path} is no checkpoint, or it is cut off ({_first_line(error)})."
        ) from error
    content = content if isinstance(content, dict) else {}
    state = content.get("state_dict", content)
    weights = {
        name: value
        for name, value in (state.items() if isinstance(state, dict) else ())
        if isinstance(value, Tensor)
    }
    # Some modules put other things beside their tensors; a bare state_dict has none.
    if not weights or (content is state and len(weights) < len(content)):
        raise ConfigurationError(
            f"{path} is no checkpoint: it has neither a state_dict nor is one."
        )
    masks: dict[str, Tensor] = {}
    for found in _find_masks(path, content):
        for name, kept in found.items():
            masks[name] = masks[name] & kept if name in masks else kept
    return Checkpoint(path, weights, masks, content)


def _find_masks(
    path: Path, content: Mapping[str, Any]
) -> Iterator[Mapping[str, Tensor]]:
    """Yield the masks of every pruning callback, whatever its class is called."""
    callbacks = content.get("callbacks")
    for state in callbacks.values() if isinstance(callbacks, dict) else ():
        if not isinstance(state, dict) or not state.keys() >= STATE_KEYS:
            continue
        require_readable(state, str(path))
        yield state["masks"]


def _explain(path: Path, message: str) -> str:
    if "GLOBAL" not in message:
        return f"{path} is no checkpoint ({message.splitlines()[0]})."
    culprit = message.partition("GLOBAL ")[2].split()[0]
    return (
        f"{path} holds an object of {culprit}, and only tensors and plain values are read "
        "from it, so that no code in it is run. Keep the object out of the checkpoint "
        f"(self.save_hyperparameters(ignore=[…])), or save its ['state_dict'] with "
        "torch.save where you trust it, and export that with --from_zeros."
    )


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
