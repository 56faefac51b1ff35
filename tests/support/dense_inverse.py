"""An inverse Fisher as dense matrices, and dense solutions to compare with."""

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


def constrained_minimizer(
    fisher: Tensor, weights: Tensor, removed: Tensor, gradient: Tensor | None = None
) -> Tensor:
    """Minimise gᵀδ + ½δᵀFδ under δ_S = −w_S by its Karush-Kuhn-Tucker system."""
    size = len(weights)
    constraints = torch.eye(size, dtype=torch.float64)[removed]
    number = len(constraints)
    corner = torch.zeros(number, number, dtype=torch.float64)
    system = torch.cat(
        [
            torch.cat([fisher, constraints.mT], dim=1),
            torch.cat([constraints, corner], dim=1),
        ]
    )
    slope = torch.zeros_like(weights) if gradient is None else gradient
    return torch.linalg.solve(system, torch.cat([-slope, -weights[removed]]))[:size]
