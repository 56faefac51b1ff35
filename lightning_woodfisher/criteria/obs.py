"""Optimal Brain Surgeon: cost of removing weights, and change of the other weights.

All functions work on this rank's active weights, float64 tensors of shape ``[D_r]``.
"""

from __future__ import annotations

__all__ = ["Update", "saliency", "weight_update"]

from typing import Literal

import torch
from torch import Tensor

from lightning_woodfisher.fisher.inverse import InverseFisher

Update = Literal["joint", "independent", "none"]


def saliency(weights: Tensor, inverse_diagonal: Tensor) -> Tensor:
    """Predict the loss increase of removing each weight alone, with the others re-optimized.

    ρ_q = w_q² / (2 [F⁻¹]_qq)   (Hassibi & Stork 1993, eq. 5; WoodFisher, section 3).

    Args:
        weights: w, ``[D_r]``.
        inverse_diagonal: diag(F⁻¹), ``[D_r]``, positive.

    Returns:
        ρ, ``[D_r]``.
    """
    return weights.square() / (2.0 * inverse_diagonal)


def weight_update(
    weights: Tensor, removed: Tensor, inverse_fisher: InverseFisher, update: Update
) -> Tensor:
    """Compute the change of the weights when some of them are removed.

    * ``"joint"``: the minimizer of ½δᵀFδ under w_S + δ_S = 0 (OBS for a set of weights).
    * ``"independent"``: the sum of the single-weight updates,
      δ = −F⁻¹ Σ_{q∈S} e_q w_q / [F⁻¹]_qq, then S set to zero (as published for WoodFisher).
    * ``"none"``: S set to zero, the other weights unchanged.

    Args:
        weights: w, ``[D_r]``, or several vectors ``[V, D_r]`` for the joint update.
        removed: S, bool ``[D_r]``.
        inverse_fisher: this rank's blocks.
        update: one of the three.

    Returns:
        δ of the shape of w; exactly −w on the removed weights.
    """
    if update == "joint":
        return inverse_fisher.constrained_solve(weights, removed)
    if update == "independent":
        scaled = torch.where(removed, weights / inverse_fisher.diagonal(), 0.0)
        return torch.where(removed, -weights, -inverse_fisher.matvec(scaled))
    return torch.where(removed, -weights, 0.0)
