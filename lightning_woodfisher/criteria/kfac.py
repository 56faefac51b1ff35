"""K-FAC, a baseline: the Fisher of a layer as a Kronecker product of two matrices."""

from __future__ import annotations

__all__ = ["KFAC"]

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from lightning_woodfisher.base.errors import ConfigurationError, PruningError
from lightning_woodfisher.criteria.base import CompensatingCriterion, Needs
from lightning_woodfisher.criteria.obs import Update, saliency
from lightning_woodfisher.distributed.communicator import Communicator
from lightning_woodfisher.gradients.kronecker_factors import KroneckerFactors
from lightning_woodfisher.weights.partition import Partition, make_partition
from lightning_woodfisher.weights.patterns import GroupRun, Pattern

# The joint update is solved to this share of the right-hand side, or with this many steps.
_RESIDUAL = 1e-9
_MAX_STEPS = 500


class KFAC(CompensatingCriterion):
    """OBS with F ≈ Ĝ ⊗ Â layer by layer (Martens & Grosse 2015; Grosse & Martens 2016).

    ``Â = A + π√λ I``, ``Ĝ = G + √λ/π I``, π² = mean of diag(A) over mean of diag(G).
    The saliency is w²/(2 [Â⁻¹]_ii [Ĝ⁻¹]_oo). Every update stays within a layer:
    ``"joint"`` is the minimizer over the kept weights (conjugate gradients),
    ``"independent"`` the sum −Ĝ⁻¹VÂ⁻¹ of single-weight updates. A part of a Kronecker
    product is not a Kronecker product, so the inverses are those of the dense layer, in
    which weights that were pruned before are free to move. Only ``"joint"`` holds these at
    zero. One rank owns all of a layer.
    """

    needs: ClassVar[Needs] = "factors"

    @override
    def layout(
        self,
        segments: Sequence[int],
        world_size: int,
        group_sizes: Sequence[int] | None = None,
    ) -> Partition:
        if group_sizes is not None:
            raise ConfigurationError(
                "criterion='kfac' scores single weights, not the groups of "
                "selection.pattern; use 'woodfisher', 'diagonal_fisher' or 'magnitude'."
            )
        # The cost of an inverse for a square matrix of this many weights.
        return make_partition(
            segments, max(1, *segments), world_size, lambda size: size**1.5
        )

    @override
    def begin(self, partition: Partition, communicator: Communicator) -> None:
        self._units = partition.owned(communicator.rank)
        self._offset = partition.shard(communicator.rank).start
        self._layers: list[_Layer] = []

    @override
    def observe_factors(self, factors: Sequence[KroneckerFactors]) -> None:
        self._layers = [
            _Layer(pair, slice(u.start - self._offset, u.stop - self._offset))
            for u, pair in zip(self._units, factors, strict=True)
        ]

    @override
    def score(self, weights: Tensor) -> Tensor:
        scores = torch.zeros_like(weights)
        for layer in self._layers:
            layer.factorize(self.fisher.damping)
            own = weights[layer.columns]
            scores[layer.columns] = saliency(own, layer.inverse_diagonal())
        return scores

    @override
    def score_groups(
        self, weights: Tensor, runs: Sequence[GroupRun], pattern: Pattern
    ) -> tuple[Tensor, Tensor]:
        # Never called: layout() refuses patterns.
        raise NotImplementedError

    def _change(self, weights: Tensor, removed: Tensor, update: Update) -> Tensor:
        change = torch.where(removed, -weights, 0.0)
        for layer in self._layers:
            w, gone = weights[layer.columns], removed[layer.columns]
            if update == "joint" and bool(gone.any()):
                change[layer.columns] += layer.minimize(change[layer.columns], ~gone)
            elif update == "independent":
                scaled = torch.where(gone, w / layer.inverse_diagonal(), 0.0)
                moved = layer.inverse_product(scaled)
                change[layer.columns] -= torch.where(gone, 0.0, moved)
        return change

    @override
    def predicted_increase(self, change: Tensor) -> Tensor:
        shares = torch.zeros_like(change)
        for layer in self._layers:
            own = change[layer.columns]
            shares[layer.columns] = 0.5 * own * layer.product(own)
        return shares

    @override
    def raised_damping(self) -> dict[int, float]:
        return {
            unit.start: layer.damping
            for unit, layer in zip(self._units, self._layers, strict=True)
            if layer.damping > self.fisher.damping
        }

    @property
    @override
    def engine(self) -> str:
        return "factors"

    @property
    @override
    def state_bytes(self) -> int:
        return sum(layer.state_bytes for layer in self._layers)


@dataclass
class _Layer:
    """Damped factors of one layer and their inverses; vectors hold its active weights."""

    factors: KroneckerFactors
    columns: slice
    damping: float = 0.0

    def factorize(self, damping: float) -> None:
        """Damp and invert the factors; raise λ until both are positive definite."""
        a, g = self.factors.inputs, self.factors.outputs
        if not (bool(a.isfinite().all()) and bool(g.isfinite().all())):
            raise PruningError("a Kronecker factor is not finite")
        means = [float(matrix.diagonal().mean()) for matrix in (a, g)]
        # Without inputs or gradients there is no scale by which to split the damping.
        ratio = math.sqrt(means[0] / means[1]) if min(means) > 0 else 1.0
        while True:
            root = math.sqrt(damping)
            pairs = (_inverse(a, ratio * root), _inverse(g, root / ratio))
            if pairs[0] is not None and pairs[1] is not None:
                break
            damping *= 10.0
        a.diagonal().add_(ratio * root)
        g.diagonal().add_(root / ratio)
        self._inverses = pairs[0], pairs[1]
        self.damping = damping

    def inverse_diagonal(self) -> Tensor:
        """Return diag(F⁻¹)."""
        inputs, outputs = (inverse.diagonal() for inverse in self._inverses)
        return torch.outer(outputs, inputs).view(-1)[self.factors.positions]

    def product(self, vector: Tensor) -> Tensor:
        """Multiply a vector by F."""
        return self._sandwich(self.factors.outputs, vector, self.factors.inputs)

    def inverse_product(self, vector: Tensor) -> Tensor:
        """Multiply a vector by F⁻¹."""
        inputs, outputs = self._inverses
        return self._sandwich(outputs, vector, inputs)

    def minimize(self, change: Tensor, kept: Tensor) -> Tensor:
        """Find the best change of the kept weights, given that of the other weights.

        Solves F_RR x = −F_RS δ_S by conjugate gradients with the preconditioner (F⁻¹)_RR.
        Each step reduces ½δᵀFδ, so that it may stop after any step.

        Args:
            change: δ_S, zero on the kept weights.
            kept: R.

        Returns:
            x, zero on the other weights.
        """
        residual = torch.where(kept, -self.product(change), 0.0)
        goal = _RESIDUAL * float(residual.norm())
        solution = torch.zeros_like(change)
        direction, last = solution, math.inf
        for _ in range(_MAX_STEPS):
            if float(residual.norm()) <= goal:
                break
            better = torch.where(kept, self.inverse_product(residual), 0.0)
            energy = float(residual @ better)
            direction = better + (energy / last) * direction
            ahead = torch.where(kept, self.product(direction), 0.0)
            length = energy / float(direction @ ahead)
            solution = solution + length * direction
            residual = residual - length * ahead
            last = energy
        return solution

    def _sandwich(self, left: Tensor, vector: Tensor, right: Tensor) -> Tensor:
        matrix = left.new_zeros(len(left), len(right))
        matrix.view(-1)[self.factors.positions] = vector
        return (left @ matrix @ right).view(-1)[self.factors.positions]

    @property
    def state_bytes(self) -> int:
        """Bytes of both factors and their inverses."""
        return 2 * (self.factors.inputs.nbytes + self.factors.outputs.nbytes)


def _inverse(matrix: Tensor, damping: float) -> Tensor | None:
    """Invert a damped matrix; return None if it is not positive definite."""
    damped = matrix.clone()
    damped.diagonal().add_(damping)
    factor, info = torch.linalg.cholesky_ex(damped)
    return None if int(info) else torch.cholesky_inverse(factor)
