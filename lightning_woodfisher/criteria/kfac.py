"""K-FAC, a baseline: each layer's Fisher as a Kronecker product of two small matrices."""

from __future__ import annotations

__all__ = ["KFAC"]

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_woodfisher.base.errors import ConfigurationError, PruningError
from lightning_woodfisher.criteria.base import Needs
from lightning_woodfisher.criteria.compensating import CompensatingCriterion
from lightning_woodfisher.criteria.kronecker_factors import KroneckerFactors
from lightning_woodfisher.criteria.obs import Update, saliency
from lightning_woodfisher.distributed.communicator import Communicator
from lightning_woodfisher.fisher.config import FisherConfig
from lightning_woodfisher.weights.partition import Partition, Unit, make_partition
from lightning_woodfisher.weights.patterns import GroupRun, Pattern

# The joint update is solved to this share of the right-hand side, or in so many steps.
_RESIDUAL = 1e-9
_MOST_STEPS = 500


class KFAC(CompensatingCriterion):
    """OBS with F ≈ Ĝ ⊗ Â layer by layer (Martens & Grosse 2015; Grosse & Martens 2016).

    ``Â = A + π√λ I``, ``Ĝ = G + √λ/π I``, π² = mean of diag(A) over mean of diag(G).
    Saliency w²/(2 [Â⁻¹]_ii [Ĝ⁻¹]_oo). Every update stays within a layer: ``"joint"`` is
    the minimiser over the weights that are kept (conjugate gradients), ``"independent"``
    the sum −Ĝ⁻¹VÂ⁻¹ of single updates. A Kronecker product over a part of a matrix is none:
    inverses are those of the dense layer, in which weights that were pruned before are
    free to move; only ``"joint"`` holds these at zero. A layer belongs to one rank.
    """

    needs: ClassVar[Needs] = "factors"

    def __init__(self, fisher: FisherConfig, update: Update) -> None:
        super().__init__(fisher, update)
        self.damping = fisher.damping
        self._units: tuple[Unit, ...] = ()
        self._offset = 0
        self._layers: list[_Layer] = []

    def layout(
        self,
        segments: Sequence[int],
        world_size: int,
        group_sizes: Sequence[int] | None = None,
    ) -> Partition:
        """Make each tensor one block.

        Args:
            segments: active weights of each tensor.
            world_size: number of ranks.
            group_sizes: not supported.

        Returns:
            The partition.

        Raises:
            ConfigurationError: for a pattern.
        """
        if group_sizes is not None:
            raise ConfigurationError(
                "criterion='kfac' scores single weights, not the groups of "
                "selection.pattern; use 'woodfisher', 'diagonal_fisher' or 'magnitude'."
            )
        # Of a square matrix of so many weights this is the cost of an inverse.
        return make_partition(
            segments, max(1, *segments), world_size, lambda size: size**1.5
        )

    def begin(self, partition: Partition, communicator: Communicator) -> None:
        """Find out which layers this rank owns.

        Args:
            partition: what :meth:`layout` gave.
            communicator: the ranks.
        """
        self._units = partition.owned(communicator.rank)
        self._offset = partition.shard(communicator.rank).start

    def observe_factors(self, factors: Sequence[KroneckerFactors]) -> None:
        """Take in A and G of each layer of this rank.

        Args:
            factors: in order of the layers.
        """
        self._layers = [
            _Layer(pair, slice(u.start - self._offset, u.stop - self._offset))
            for u, pair in zip(self._units, factors, strict=True)
        ]

    def score(self, weights: Tensor) -> Tensor:
        """Invert the factors and give the saliencies.

        Args:
            weights: float64 ``[D_r]``.

        Returns:
            ρ, float64 ``[D_r]``.
        """
        scores = torch.zeros_like(weights)
        for layer in self._layers:
            layer.factorize(self.fisher.damping)
            where = layer.where
            scores[where] = saliency(weights[where], layer.inverse_diagonal())
        return scores

    def score_groups(
        self, weights: Tensor, runs: Sequence[GroupRun], pattern: Pattern
    ) -> tuple[Tensor, Tensor]:
        """Never reached: :meth:`layout` refuses patterns.

        Args:
            weights: not used.
            runs: not used.
            pattern: not used.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError

    def _change(self, weights: Tensor, removed: Tensor, update: Update) -> Tensor:
        change = torch.where(removed, -weights, 0.0)
        for layer in self._layers:
            w, gone = weights[layer.where], removed[layer.where]
            if update == "joint" and bool(gone.any()):
                change[layer.where] += layer.minimiser(change[layer.where], ~gone)
            elif update == "independent":
                scaled = torch.where(gone, w / layer.inverse_diagonal(), 0.0)
                moved = layer.inverse_product(scaled)
                change[layer.where] -= torch.where(gone, 0.0, moved)
        return change

    def predicted_increase(self, change: Tensor) -> Tensor:
        """Give each weight's share of ½δᵀFδ.

        Args:
            change: δ, float64 ``[D_r]``.

        Returns:
            ½ δ∘Fδ, float64 ``[D_r]``.
        """
        shares = torch.zeros_like(change)
        for layer in self._layers:
            own = change[layer.where]
            shares[layer.where] = 0.5 * own * layer.product(own)
        return shares

    def raised_damping(self) -> dict[int, float]:
        """List layers whose λ had to be raised.

        Returns:
            λ by first active weight (global number).
        """
        return {
            unit.start: layer.damping
            for unit, layer in zip(self._units, self._layers, strict=True)
            if layer.damping > self.fisher.damping
        }

    @property
    def engine(self) -> str:
        """Always the same."""
        return "factors"

    @property
    def state_bytes(self) -> int:
        """Bytes of the factors and of their inverses."""
        return sum(layer.state_bytes for layer in self._layers)


@dataclass
class _Layer:
    """Damped factors of one layer and their inverses; vectors are of its active weights."""

    factors: KroneckerFactors
    where: slice
    damping: float = 0.0

    def factorize(self, damping: float) -> None:
        """Damp and invert; λ is raised until both factors are positive definite."""
        a, g = self.factors.inputs, self.factors.outputs
        if not (bool(a.isfinite().all()) and bool(g.isfinite().all())):
            raise PruningError("a Kronecker factor is not finite")
        means = [float(matrix.diagonal().mean()) for matrix in (a, g)]
        # A layer without input or gradient has no scale to share the damping by.
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
        """diag(F⁻¹)."""
        inputs, outputs = (inverse.diagonal() for inverse in self._inverses)
        return torch.outer(outputs, inputs).view(-1)[self.factors.positions]

    def product(self, vector: Tensor) -> Tensor:
        """F times a vector."""
        return self._sandwich(self.factors.outputs, vector, self.factors.inputs)

    def inverse_product(self, vector: Tensor) -> Tensor:
        """F⁻¹ times a vector."""
        inputs, outputs = self._inverses
        return self._sandwich(outputs, vector, inputs)

    def minimiser(self, change: Tensor, kept: Tensor) -> Tensor:
        """Find the best change of the kept weights beside a given one of the others.

        Solves F_RR x = −F_RS δ_S; each step of conjugate gradients makes ½δᵀFδ smaller,
        so that it may stop at any. (F⁻¹)_RR is the preconditioner.

        Args:
            change: δ_S, zero on the kept weights.
            kept: R.

        Returns:
            x, zero on the others.
        """
        residual = torch.where(kept, -self.product(change), 0.0)
        goal = _RESIDUAL * float(residual.norm())
        solution = torch.zeros_like(change)
        direction, last = solution, math.inf
        for _ in range(_MOST_STEPS):
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
        """Bytes of two matrices and their inverses."""
        return 2 * (self.factors.inputs.nbytes + self.factors.outputs.nbytes)


def _inverse(matrix: Tensor, damping: float) -> Tensor | None:
    """Invert a damped matrix; None when it is not positive definite."""
    damped = matrix.clone()
    damped.diagonal().add_(damping)
    factor, info = torch.linalg.cholesky_ex(damped)
    return None if int(info) else torch.cholesky_inverse(factor)
