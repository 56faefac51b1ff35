"""Inverse Fisher with one block over all weights of all ranks (``block_size=None``)."""

from __future__ import annotations

__all__ = ["FullInverseFisher"]

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from typing_extensions import override

from lightning_woodfisher.distributed.exact_sum import ExactSum
from lightning_woodfisher.fisher.base import raise_until_definite
from lightning_woodfisher.fisher.dual import (
    SMALLEST_COMPLEMENT,
    RowsInverseFisher,
    complement_of,
    group_complements,
)
from lightning_woodfisher.fisher.linalg import half_product, mirror


class FullInverseFisher(RowsInverseFisher):
    """The dual form, with K = NλI + Σ_r G_rG_rᵀ summed over the ranks r.

    The N×N sum is exact (:class:`.ExactSum`), so every world size gets the same bits. All
    other work is local to a rank.
    """

    def _allocate(self) -> None:
        super()._allocate()
        self._lambda = self._full(1, self._fisher.damping)
        self._dampings = [self._lambda]

    def _add(self, rows: Tensor) -> None:
        super()._add(rows)
        self._dtype = self._product_dtype(self._partition.size)

    def _restrict(self, kept: Tensor) -> None:
        super()._restrict(kept)
        self._dtype = self._product_dtype(self._count(kept))

    def _count(self, marked: Tensor) -> int:
        """Count the True entries over all ranks."""
        return int(self._comm.sum_integers(marked.sum().reshape(1)))

    @override
    def raised_damping(self) -> dict[int, float]:
        value = float(self._lambda)
        return {} if value == self._fisher.damping else {0: value}

    def _factorize(self) -> None:
        self._largest = self._largest_square_norm()
        self._factor = self._factorize_gram(None)
        self._resolve(self._solve_diagonal)

    @override
    def visit_sub_blocks(
        self, sizes: Sequence[int], consume: Callable[[int, Tensor], None]
    ) -> None:
        def visit(index: int, dtype: torch.dtype) -> Tensor:
            size = sizes[index]
            if not size or self.units[index].size < size:
                return self._full(1, 1.0)
            rows = self._unit_rows(index, dtype).unsqueeze(0)
            blocks, pivots = group_complements(self._factor.unsqueeze(0), rows, size)
            if bool(pivots.min() > SMALLEST_COMPLEMENT):
                consume(index, blocks[0] / self._lambda)
            return pivots

        before = self._factor
        self._resolve(lambda: self._smallest_pivot(visit))
        if self._factor is not before:
            self._solve_diagonal()

    def _resolve(self, compute: Callable[[], Tensor]) -> None:
        """Repeat a computation in float64, and then with larger λ, until digits suffice.

        Args:
            compute: returns the smallest pivot of all ranks, ``[1]``.
        """
        first = float(self._lambda)
        # Rounding errors of units are independent and their sum is exact, so the sum has
        # more digits than a unit.
        digits = math.sqrt(len(self._partition.units))

        def attempt(damping: Tensor) -> tuple[Tensor, Tensor]:
            if float(damping) != first:
                self._factor = self._factorize_gram(None)
            smallest = compute()
            if self._is_too_coarse(self._dtype, smallest, digits):
                self._dtype = torch.float64
                self._factor = self._factorize_gram(None)
                smallest = compute()
            return smallest, smallest <= SMALLEST_COMPLEMENT

        raise_until_definite(attempt, self._lambda)

    def _solve_diagonal(self) -> Tensor:
        """Fill in diag(F⁻¹) and return the smallest λ·[F⁻¹]_jj of all ranks, ``[1]``."""

        def solve(index: int, dtype: torch.dtype) -> Tensor:
            rows = self._unit_rows(index, dtype).unsqueeze(0)
            values = complement_of(self._factor.unsqueeze(0), rows)[0]
            self._diagonal[self._local(self.units[index])] = values / self._lambda
            return values

        return self._smallest_pivot(solve)

    def _smallest_pivot(self, compute: Callable[[int, torch.dtype], Tensor]) -> Tensor:
        """Compute every unit and return the smallest pivot of all ranks.

        Args:
            compute: returns the pivots of a unit from products in the given dtype; called
                again with float64 where float32 has too few digits.

        Returns:
            float64 ``[1]``.
        """
        smallest = self._full(len(self.units) + 1, 1.0)

        def visit(index: int) -> None:
            pivot = compute(index, self._dtype).min()
            if self._is_too_coarse(self._dtype, pivot):
                pivot = compute(index, torch.float64).min()
            smallest[index] = pivot

        self._each_unit(visit)
        own = smallest.nan_to_num(nan=-1.0).min().reshape(1)
        return -self._comm.maximum(-own)

    def _factorize_gram(self, kept: Tensor | None) -> Tensor:
        """Factorize K over the kept columns, ``[N, N]``; raise λ where needed."""

        def compute() -> Tensor:
            gram = self._gram(kept)
            return raise_until_definite(
                lambda damping: self._damped_factor(gram, damping), self._lambda
            )

        factor = compute()
        if self._must_repeat(factor, self._dtype):
            self._dtype = torch.float64
            factor = compute()
        return factor[0]

    @override
    def matvec(self, vector: Tensor) -> Tensor:
        solved = torch.cholesky_solve(self._project(vector).unsqueeze(-1), self._factor)
        return (vector - self._combine(solved.squeeze(-1))) / self._lambda

    @override
    def fisher_matvec(self, vector: Tensor) -> Tensor:
        product = self._combine(self._project(vector))
        return product / self.num_gradients + self._lambda * vector

    @override
    def constrained_solve(self, weights: Tensor, removed: Tensor) -> Tensor:
        change = torch.where(removed, -weights, 0.0)
        kept = ~removed if self._kept is None else ~removed & self._kept
        if self._needs_float64(self._count(kept)):
            self._dtype = torch.float64
        factor = self._factorize_gram(kept)
        # One by one, because each vector has its own scale in the exact sum.
        for vector in self._stacked(change):
            target = -self._project(vector).unsqueeze(-1)
            solved = torch.cholesky_solve(target, factor).squeeze(-1)
            vector.copy_(torch.where(removed, vector, self._combine(solved)))
        return change

    def _largest_square_norm(self) -> Tensor:
        """Return the largest squared norm of a row within a unit, float64 ``[1]``."""
        largest = self._full(len(self.units) + 1, 0.0)
        double = self._rows.dtype == torch.float64
        dtype = torch.float64 if double else torch.float32

        def measure(index: int) -> None:
            rows = self._unit_rows(index, dtype)
            norms = torch.linalg.vector_norm(rows, dim=1)
            largest[index] = norms.max().double().square()

        self._each_unit(measure)
        return self._comm.maximum(largest.max().reshape(1))

    def _gram(self, kept: Tensor | None) -> Tensor:
        """Sum G_rG_rᵀ over the ranks, float64 ``[1, N, N]``, over the kept columns."""

        def product(index: int) -> Tensor:
            rows = self._unit_rows(index, self._dtype)
            if kept is not None:
                columns = kept[self._local(self.units[index])]
                rows = rows[:, columns.nonzero().squeeze(1)]
            return half_product(rows.unsqueeze(0))[0]

        shape = (self.num_gradients, self.num_gradients)
        return mirror(self._sum_over_units(product, self._largest, shape).unsqueeze(0))

    def _project(self, vector: Tensor) -> Tensor:
        """Sum G_r v_r over the ranks, float64 ``[N]``."""
        # |g·v| <= |g||v|; the norm of v over a unit depends on the unit only.
        norms = [vector[self._local(unit)].norm() for unit in self.units]
        largest = torch.stack([self._full(1, 0.0)[0], *norms]).max()
        bound = self._comm.maximum(largest.reshape(1)) * self._largest.sqrt() * 1.01

        def product(index: int) -> Tensor:
            rows = self._unit_rows(index, self._dtype)
            return rows @ vector[self._local(self.units[index])].to(rows.dtype)

        return self._sum_over_units(product, bound, (self.num_gradients,))

    def _sum_over_units(
        self, product: Callable[[int], Tensor], bound: Tensor, shape: tuple[int, ...]
    ) -> Tensor:
        """Add a product of each unit of each rank, none larger than the bound."""
        # A float32 product may exceed its bound by a rounding error.
        bound = bound * 1.01 * len(self._partition.units)
        total = ExactSum(self._comm, bound, shape)
        self._each_unit(lambda index: total.add(product(index)))
        return total.result()

    def _combine(self, coefficients: Tensor) -> Tensor:
        """Return G_rᵀc on this rank, float64 ``[D_r]``."""
        result = self._full(self.size, 0.0)

        def product(index: int) -> None:
            rows = self._unit_rows(index, self._dtype)
            values = rows.mT @ coefficients.to(rows.dtype)
            result[self._local(self.units[index])] = values.double()

        self._each_unit(product)
        return result
