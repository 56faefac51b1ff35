"""In which precision the numbers of a pruning step are kept."""

from __future__ import annotations

__all__ = ["common_dtype"]

from collections.abc import Iterable

import torch
from torch import Tensor


def common_dtype(parameters: Iterable[Tensor]) -> torch.dtype:
    """Choose the dtype in which weights and gradients of several parameters fit.

    Args:
        parameters: of any floating-point dtypes; none at all are kept in float32.

    Returns:
        float64 where any parameter is, else float32, also for 16-bit parameters.
    """
    double = any(parameter.dtype == torch.float64 for parameter in parameters)
    return torch.float64 if double else torch.float32
