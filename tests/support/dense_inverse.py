"""An inverse Fisher as dense matrices, for comparisons with oracles."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_woodfisher.fisher.base import InverseFisher


def to_dense(inverse: InverseFisher) -> Tensor:
    """F⁻¹ of one rank as one matrix, float64 ``[D, D]``."""
    identity = torch.eye(inverse.size, dtype=torch.float64)
    return torch.stack([inverse.matvec(column) for column in identity], dim=1)


def sub_blocks(inverse: InverseFisher, size: int) -> Tensor:
    """[F⁻¹]_SS of each group S of consecutive weights, float64 ``[groups, q, q]``."""
    found = [torch.empty(0, size, size, dtype=torch.float64)] * len(inverse.units)
    inverse.visit_sub_blocks([size] * len(inverse.units), found.__setitem__)
    return torch.cat(found).cpu()
