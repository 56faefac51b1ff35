"""The bare network as a plain ``state_dict``."""

from __future__ import annotations

__all__ = ["save_dense", "strip_prefix"]

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from lightning_woodfisher.base.errors import ConfigurationError, nearest
from lightning_woodfisher.export.sparse import replacing
from lightning_woodfisher.export.summary import ExportSummary, summarise


def strip_prefix(state_dict: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Take the part of a ``state_dict`` that belongs to one submodule.

    Args:
        state_dict: of the whole, such as a LightningModule.
        prefix: name of the submodule, such as ``"net"`` or ``"net."``; empty for all.

    Returns:
        Its tensors, named as in the submodule's own ``state_dict``.

    Raises:
        ConfigurationError: when no name begins with the prefix.
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
            f"Stages: {', '.join(known) or 'none'}."
        )
    return part


def save_dense(
    state_dict: Mapping[str, Tensor], path: str | os.PathLike[str]
) -> ExportSummary:
    """Write tensors for ``torch.load(path, weights_only=True)``.

    Args:
        state_dict: tensors by name.
        path: of the file; folders are made as needed.

    Returns:
        What was written.
    """
    path = Path(path)
    state = {name: tensor.detach().cpu() for name, tensor in state_dict.items()}
    with replacing(path) as unfinished:
        torch.save(state, unfinished)
    return summarise(state, path)
