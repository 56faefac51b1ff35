"""Mask and weights of one linear map from the second moments of inputs and outputs.

The map takes d inputs to o outputs in each of g groups (g = 1 without groups)::

    minimize over W and its mask   E‖y − W x‖² + λ ‖W − W_d‖²

with targets y, the outputs of the dense network, inputs x of the pruned network and dense
weights W_d. With H = cov(x), R = cov(y, x) and A = H + λI this is a quadratic form around
T = (R + λW_d) A⁻¹: the sum over rows of (w − t) A (w − t)ᵀ.

The Hessian of a layer's reconstruction error is that of L-OBS (Dong et al., NeurIPS 2017),
OBC (Frantar & Alistarh, NeurIPS 2022) and SparseGPT (Frantar & Alistarh, ICML 2023); mask by
ADMM and weights by conjugate gradients follow ALPS (Meng et al., NeurIPS 2024).

Legend: g groups, o outputs and d inputs of a group.
"""

from __future__ import annotations

__all__ = ["Curvature", "LayerProblem", "Moments"]

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lightning_woodfisher.layerwise.rows import RowShare

# Steps of conjugate gradients for the kept weights.
_STEPS = 20
# Share of the first squared residual of a row at which it has converged.
_CONVERGED = 1e-26
# ADMM: first penalty, iterations between two looks at the mask, and by how much the penalty
# grows there, by the share of the mask that has changed (Meng et al. 2024, appendix).
_FIRST_PENALTY = 0.1
_INTERVAL = 3
_GROWTH = ((0.005, 1.3), (0.00025, 1.2), (0.0, 1.1))

# Marks the weights that are removed, bool ``[g, o, d]``, for scores ``[g, o, d]``.
Choose = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Moments:
    """Second moments of inputs x and targets y, centered for a layer with a bias.

    Attributes:
        inputs: E[xxᵀ], float64 ``[g, d, d]``.
        products: E[yxᵀ], float64 ``[g, o, d]``.
        targets: E[y²], float64 ``[g, o]``.
        input_means: E[x], float64 ``[g, d]``.
        target_means: E[y], float64 ``[g, o]``.
    """

    inputs: Tensor
    products: Tensor
    targets: Tensor
    input_means: Tensor
    target_means: Tensor

    def errors(self, weights: Tensor, rows: RowShare) -> Tensor:
        """Return the reconstruction error of the outputs of a rank.

        Args:
            weights: own rows of W, float64 ``[g, o_r, d]``.
            rows: the rows of the rank.

        Returns:
            E[(y − W x)²], float64 ``[g, o_r]``, not negative.
        """

        def compute(weights: Tensor, products: Tensor, targets: Tensor) -> Tensor:
            quadratic = ((weights @ self.inputs) * weights).sum(-1)
            errors = quadratic - 2 * (weights * products).sum(-1) + targets
            return errors.clamp(min=0.0)

        return rows.each(
            compute, weights, rows.own(self.products), rows.own(self.targets)
        )

    def bias(self, weights: Tensor) -> Tensor:
        """Return the bias with the smallest error, float64 ``[g, o]``."""
        product: Tensor = (weights @ self.input_means.unsqueeze(-1)).squeeze(-1)
        return self.target_means - product


class Curvature:
    """The damped covariance of inputs, scaled to a unit diagonal, and its eigenvectors.

    Layers with the same inputs share it.

    Args:
        inputs: H, float64 ``[g, d, d]``.
        relative_damping: λ as a share of the mean diagonal of H.

    Attributes:
        damping: λ.
        scale: c = √diag(A), float64 ``[g, d]``.
        values: eigenvalues of A/(ccᵀ), float64 ``[g, d]``, positive.
        vectors: its eigenvectors, float64 ``[g, d, d]``.
    """

    def __init__(self, inputs: Tensor, relative_damping: float) -> None:
        mean = inputs.diagonal(dim1=1, dim2=2).mean()
        # Inputs that are always zero say nothing: keep the dense weights.
        self.damping = relative_damping * torch.where(mean > 0, mean, 1.0)
        damped = inputs.clone()
        damped.diagonal(dim1=1, dim2=2).add_(self.damping)
        self.scale = damped.diagonal(dim1=1, dim2=2).sqrt()
        damped /= self.scale.unsqueeze(-1) * self.scale.unsqueeze(-2)
        self.scaled = damped
        values, self.vectors = torch.linalg.eigh(damped)
        # Rounding may make the smallest ones negative; λ/A_ii is a lower bound.
        floor = self.damping / damped.shape[-1]
        least = (floor / self.scale.square().amax(-1, keepdim=True)).clamp(max=1.0)
        self.values = torch.maximum(values, least)

    @cached_property
    def inverse_diagonal(self) -> Tensor:
        """Diagonal of the inverse of the scaled matrix, float64 ``[g, d]``."""
        diagonal: Tensor = (self.vectors.square() / self.values.unsqueeze(-2)).sum(-1)
        return diagonal


class LayerProblem:
    """The weights of one linear map, in scaled coordinates W·c.

    Args:
        curvature: of its inputs.
        products: R = E[yxᵀ], float64 ``[g, o, d]``.
        dense: W_d, float64 ``[g, o, d]``.
        output_weights: weight of the squared error of each output, float64 ``[g, o]``.
        rows: the rows that this rank solves.
        dtype: dtype of the search for the mask.
    """

    def __init__(
        self,
        curvature: Curvature,
        products: Tensor,
        dense: Tensor,
        output_weights: Tensor,
        rows: RowShare,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._curvature = curvature
        self._rows = rows
        self._dtype = dtype
        scale, vectors = curvature.scale.unsqueeze(-2), curvature.vectors
        values = curvature.values.unsqueeze(-2)
        self._products = rows.own(products) + curvature.damping * rows.own(dense)
        self._products /= scale
        self._target = rows.each(
            lambda products: ((products @ vectors) / values) @ vectors.mT,
            self._products,
        )
        gains = output_weights.clamp(min=0.0).sqrt()
        mean = gains.mean()
        gains = torch.where(mean > 0, gains / mean, 1.0)
        # A weight of zero would make all weights of an output equally cheap.
        self._gains = rows.own(gains.clamp(min=1e-6).unsqueeze(-1))

    def find_mask(self, choose: Choose, iterations: int) -> tuple[Tensor, int]:
        """Find the weights to remove by ADMM. Call on all ranks that share the rows.

        The weights W and a copy D with the wanted zeros are made equal by a multiplier V
        and a growing penalty ρ. The search ends when the mask no longer changes.

        Args:
            choose: marks the weights that are removed from scores of all rows.
            iterations: the largest number of iterations; 0 for the saliencies w²/[A⁻¹]_ii.

        Returns:
            bool ``[g, o, d]``, True where removed, and the number of iterations.
        """
        curvature, dtype, rows = self._curvature, self._dtype, self._rows
        start = self._target * self._gains
        if not iterations:
            inverse = curvature.inverse_diagonal.unsqueeze(-2)
            return choose(rows.gather((start.square() / inverse).to(dtype))), 0
        vectors, values = curvature.vectors.to(dtype), curvature.values.to(dtype)
        values = values.unsqueeze(-2)
        start = start.to(dtype)
        rotated = rows.each(lambda start: (start @ vectors) * values, start)
        copy, multiplier = start, torch.zeros_like(start)
        penalty, last = _FIRST_PENALTY, None

        def minimize(rotated: Tensor, copy: Tensor, multiplier: Tensor) -> Tensor:
            pull = (penalty * copy - multiplier) @ vectors
            product: Tensor = ((rotated + pull) / (values + penalty)) @ vectors.mT
            return product

        for iteration in range(1, iterations + 1):
            weights = rows.each(minimize, rotated, copy, multiplier)
            shifted = weights + multiplier / penalty
            removed = choose(rows.gather(shifted.square()))
            copy = shifted.masked_fill(rows.own(removed), 0.0)
            multiplier = multiplier + penalty * (weights - copy)
            if iteration % _INTERVAL == 0:
                if last is not None:
                    changed = float((removed != last).sum()) / removed.numel()
                    if not changed:
                        break
                    penalty *= next(f for share, f in _GROWTH if changed > share)
                last = removed
        return removed, iteration

    def solve(
        self,
        removed: Tensor,
        steps: int = _STEPS,
        dtype: torch.dtype = torch.float64,
    ) -> Tensor:
        """Minimize over the kept weights of the rows of this rank.

        Args:
            removed: own rows, bool ``[g, o_r, d]``.
            steps: number of steps of conjugate gradients.
            dtype: dtype of the steps.

        Returns:
            Own rows of W, float64 ``[g, o_r, d]``, zero where removed.
        """
        matrix = self._curvature.scaled.to(dtype)

        def run(products: Tensor, target: Tensor, removed: Tensor) -> Tensor:
            return _solve_rows(matrix, products, target, removed, steps)

        solution = self._rows.each(
            run, self._products.to(dtype), self._target.to(dtype), removed
        )
        return solution.double() / self._curvature.scale.unsqueeze(-2)


def _solve_rows(
    matrix: Tensor, products: Tensor, start: Tensor, removed: Tensor, steps: int
) -> Tensor:
    """Solve W·A = R over the kept weights by conjugate gradients, all rows at once.

    Args:
        matrix: A, ``[g, d, d]`` with a unit diagonal.
        products: R, ``[g, u, d]``.
        start: W to start from, ``[g, u, d]``.
        removed: bool ``[g, u, d]``.
        steps: number of steps.

    Returns:
        W, ``[g, u, d]``, zero where removed.
    """
    weights = start.masked_fill(removed, 0.0)
    residual = (products - weights @ matrix).masked_fill_(removed, 0.0)
    direction = residual.clone()
    squared = residual.square().sum(-1, keepdim=True)
    # A row that has converged stops: what is left of its residual is rounding.
    least = _CONVERGED * squared
    for _ in range(steps):
        product = (direction @ matrix).masked_fill_(removed, 0.0)
        curvature = (direction * product).sum(-1, keepdim=True)
        moving = squared > least
        length = torch.where(moving, squared / curvature, 0.0)
        weights = weights.addcmul_(length, direction)
        residual = residual.addcmul_(length, product, value=-1)
        before, squared = squared, residual.square().sum(-1, keepdim=True)
        growth = torch.where(moving, squared / before, 0.0)
        direction = direction.mul_(growth).add_(residual)
    return weights
