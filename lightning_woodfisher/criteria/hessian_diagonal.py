"""Diagonal of the Hessian by Hutchinson's estimator, a baseline without the Fisher."""

from __future__ import annotations

__all__ = ["HessianDiagonal"]

from typing import ClassVar

from torch import Tensor

from lightning_woodfisher.criteria.base import Needs
from lightning_woodfisher.criteria.diagonal_fisher import DiagonalFisher


class HessianDiagonal(DiagonalFisher):
    """Saliency ½w²(max(H_jj, 0) + λ), no change of the kept weights.

    Each of ``num_gradients`` probes z of random signs uses its own mini-batch; the mean of
    z∘Hz estimates diag(H) of the active weights (Hutchinson 1990; Bekas, Kokiopoulou & Saad
    2007). The estimate is noisy where H couples weights: the squared error of entry j is
    about Σ_k H_jk² divided by the number of probes. Negative curvature is set to zero,
    because a saddle is no reason to prefer a weight. An ``autograd.Function`` marked
    ``once_differentiable`` is treated as constant: PyTorch ignores its derivative.
    """

    needs: ClassVar[Needs] = "hessian rows"

    def _diagonal_of(self, row: Tensor) -> Tensor:
        return row

    def _curvature(self) -> Tensor:
        mean = self._total / max(1, self._rows)
        return mean.clamp(min=0.0) + self.fisher.damping
