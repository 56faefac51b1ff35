"""The mode of a network, and the dtype of its gradients."""

from __future__ import annotations

__all__ = ["IsolationMode", "ModelMode", "common_dtype"]

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor

#: Mode of the network while gradients are collected.
ModelMode = Literal["train", "eval"]
#: The same, and training mode with BatchNorm and dropout in evaluation mode: the losses of
#: detectors need ``model.training``.
IsolationMode = Literal["train", "eval", "partial_eval"]


def common_dtype(parameters: Iterable[Tensor]) -> torch.dtype:
    """Choose the dtype of weights and gradients of several parameters.

    Args:
        parameters: parameters of any floating-point dtypes.

    Returns:
        float64 if any parameter is float64, else float32, also for 16-bit parameters.
    """
    double = any(parameter.dtype == torch.float64 for parameter in parameters)
    return torch.float64 if double else torch.float32
