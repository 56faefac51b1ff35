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
# The host waits for the device once in so many steps, to see which layers are solved.
_STEPS_BETWEEN_CHECKS = 10
# Enough to go from the smallest allowed λ to one that exceeds any factor.
_MAX_RAISES = 120


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
        _factorize(self._layers, self.fisher.damping)
        for layer in self._layers:
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
        if update == "joint":
            return change + _minimize(self._layers, change, ~removed)
        for layer in self._layers:
            w, gone = weights[layer.columns], removed[layer.columns]
            if update == "independent":
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

    def factorize(self) -> Tensor:
        """Invert the factors, damped by ``damping``.

        Returns:
            0 if both are positive definite, 1 if not, 2 if one is not finite; int64.
        """
        a, g = self.factors.inputs, self.factors.outputs
        means = torch.stack([a.diagonal().mean(), g.diagonal().mean()])
        # Without inputs or gradients there is no scale by which to split the damping.
        ratio = torch.where((means > 0).all(), (means[0] / means[1]).sqrt(), 1.0)
        root = math.sqrt(self.damping)
        self._added = ratio * root, root / ratio
        pairs = [_inverse(m, d) for m, d in zip((a, g), self._added, strict=True)]
        self._inverses = pairs[0][0], pairs[1][0]
        finite = a.isfinite().all() & g.isfinite().all()
        failed = (pairs[0][1] != 0) | (pairs[1][1] != 0)
        return torch.where(finite, failed.long(), 2)

    def damp(self) -> None:
        """Damp the factors themselves, after they were inverted."""
        self.factors.inputs.diagonal().add_(self._added[0])
        self.factors.outputs.diagonal().add_(self._added[1])

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

    def _sandwich(self, left: Tensor, vector: Tensor, right: Tensor) -> Tensor:
        matrix = left.new_zeros(len(left), len(right))
        matrix.view(-1)[self.factors.positions] = vector
        return (left @ matrix @ right).view(-1)[self.factors.positions]

    @property
    def state_bytes(self) -> int:
        """Bytes of both factors and their inverses."""
        return 2 * (self.factors.inputs.nbytes + self.factors.outputs.nbytes)


def _factorize(layers: Sequence[_Layer], damping: float) -> None:
    """Invert the factors of all layers; multiply λ of a layer by ten where necessary.

    Raises:
        PruningError: if a factor is not finite.
    """
    for layer in layers:
        layer.damping = damping
    pending = list(layers)
    for _ in range(_MAX_RAISES):
        if not pending:
            break
        verdicts = torch.stack([layer.factorize() for layer in pending]).tolist()
        if 2 in verdicts:
            raise PruningError("a Kronecker factor is not finite")
        pending = [layer for layer, bad in zip(pending, verdicts, strict=True) if bad]
        for layer in pending:
            layer.damping *= 10.0
    for layer in layers:
        layer.damp()


def _minimize(layers: Sequence[_Layer], change: Tensor, kept: Tensor) -> Tensor:
    """Find the best change of the kept weights, given that of the other weights.

    Solves F_RR x = −F_RS δ_S by conjugate gradients with the preconditioner (F⁻¹)_RR, in all
    layers at the same time. Each step reduces ½δᵀFδ, so that it may stop after any step.

    Args:
        layers: the layers of this rank.
        change: δ_S, zero on the kept weights, float64 ``[D_r]``.
        kept: R, bool ``[D_r]``.

    Returns:
        x, zero on the other weights.
    """
    solvers = [_Solver(x, change[x.columns], kept[x.columns]) for x in layers]
    pending = list(solvers)
    for _ in range(0, _MAX_STEPS, _STEPS_BETWEEN_CHECKS):
        if not pending:
            break
        going = torch.stack([solver.is_going() for solver in pending]).tolist()
        pending = [solver for solver, goes in zip(pending, going, strict=True) if goes]
        for solver in pending:
            for _ in range(_STEPS_BETWEEN_CHECKS):
                solver.step()
    solution = torch.zeros_like(change)
    for layer, solver in zip(layers, solvers, strict=True):
        solution[layer.columns] = solver.solution
    return solution


class _Solver:
    """Conjugate gradients in one layer, without waiting for the device."""

    def __init__(self, layer: _Layer, change: Tensor, kept: Tensor) -> None:
        self._layer, self._kept = layer, kept
        self._residual = torch.where(kept, -layer.product(change), 0.0)
        self._goal = _RESIDUAL * self._residual.norm()
        self.solution = torch.zeros_like(change)
        self._direction = self.solution
        self._last = torch.full_like(self._goal, math.inf)

    def is_going(self) -> Tensor:
        """Return whether the residual is still too large, bool scalar."""
        going: Tensor = self._residual.norm() > self._goal
        return going

    def step(self) -> None:
        """Take a step; does nothing once the residual is small enough."""
        layer, kept, going = self._layer, self._kept, self.is_going()
        better = torch.where(kept, layer.inverse_product(self._residual), 0.0)
        energy = self._residual @ better
        direction = better + (energy / self._last) * self._direction
        ahead = torch.where(kept, layer.product(direction), 0.0)
        length = energy / (direction @ ahead)
        # Not multiplied by going: 0/0 is NaN once the residual is zero.
        solution = self.solution + length * direction
        residual = self._residual - length * ahead
        self.solution = torch.where(going, solution, self.solution)
        self._residual = torch.where(going, residual, self._residual)
        self._direction = torch.where(going, direction, self._direction)
        self._last = torch.where(going, energy, self._last)


def _inverse(matrix: Tensor, damping: Tensor) -> tuple[Tensor, Tensor]:
    """Invert a damped matrix; the second result is not 0 if it is not positive definite."""
    damped = matrix.clone()
    damped.diagonal().add_(damping)
    factor, info = torch.linalg.cholesky_ex(damped)
    # Unlike torch.cholesky_inverse, this does not check for errors on the host.
    identity = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    inverse: Tensor = torch.cholesky_solve(identity, factor)
    return inverse, info
