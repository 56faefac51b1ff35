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
from lightning_woodfisher.fisher.linalg import (
    Arithmetic,
    choose_arithmetics,
    half_product,
    mirror,
    smallest_share,
)


class FullInverseFisher(RowsInverseFisher):
    """The dual form, with K = NλI + Σ_r G_rG_rᵀ summed over the ranks r.

    The N×N sum is exact (:class:`.ExactSum`), so every world size gets the same bits. All
    other work is local to a rank.
    """

    def _allocate(self) -> None:
        super()._allocate()
        self._lambda = self._full(1, self._fisher.damping)
        self._dampings = [self._lambda]

    @property
    def _arithmetic(self) -> Arithmetic:
        return self._arithmetics[0]

    @override
    def _final_arithmetic(self, index: int) -> Arithmetic:
        return self._arithmetic

    @property
    def _dtype(self) -> torch.dtype:
        return self._dtype_of(self._arithmetic)

    def _restrict(self, kept: Tensor) -> None:
        super()._restrict(kept)
        if self._row_dtype != torch.float64:
            precision = self._fisher.precision
            self._arithmetics = choose_arithmetics(precision, self._device)

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
        def visit(index: int, arithmetic: Arithmetic) -> Tensor:
            size = sizes[index]
            if not size or self.units[index].size < size:
                return self._full(1, 1.0)
            rows = self._unit_rows(index, self._dtype_of(arithmetic)).unsqueeze(0)
            blocks, pivots = group_complements(
                self._factor.unsqueeze(0), rows, size, arithmetic == "split"
            )
            consume(index, blocks[0] / self._lambda)
            return pivots

        before = self._factor
        self._resolve(lambda: self._smallest_pivot(visit))
        if self._factor is not before:
            self._solve_diagonal()

    def _resolve(self, compute: Callable[[], Tensor]) -> None:
        """Repeat a computation with more digits, and then with larger λ, until they suffice.

        Args:
            compute: returns the smallest pivot of all ranks, ``[1]``.
        """
        first = True
        # Rounding errors of units are independent and their sum is exact, so the sum has
        # more digits than a unit.
        digits = math.sqrt(max(1, len(self._partition.units)))

        def attempt(damping: Tensor) -> tuple[Tensor, Tensor]:
            nonlocal first
            if not first:
                self._factor = self._factorize_gram(None)
            first = False
            smallest = compute()
            while self._must_refine(smallest, digits):
                self._factor = self._factorize_gram(None)
                smallest = compute()
            return smallest, smallest <= SMALLEST_COMPLEMENT

        raise_until_definite(attempt, self._lambda)

    def _must_refine(self, smallest: Tensor, digits: float = 1.0) -> bool:
        """Change to the next arithmetic if a pivot is too small for this one."""
        coarse = self._is_coarse(self._arithmetic, smallest, digits).any()
        if len(self._arithmetics) == 1 or not bool(coarse):
            return False
        self._arithmetics = self._arithmetics[1:]
        return True

    def _solve_diagonal(self) -> Tensor:
        """Fill in diag(F⁻¹) and return the smallest λ·[F⁻¹]_jj of all ranks, ``[1]``."""

        def solve(index: int, arithmetic: Arithmetic) -> Tensor:
            rows = self._unit_rows(index, self._dtype_of(arithmetic)).unsqueeze(0)
            split = arithmetic == "split"
            values = complement_of(self._factor.unsqueeze(0), rows, split)[0]
            self._diagonal[self._local(self.units[index])] = values / self._lambda
            return values

        return self._smallest_pivot(solve)

    def _smallest_pivot(self, compute: Callable[[int, Arithmetic], Tensor]) -> Tensor:
        """Compute every unit and return the smallest pivot of all ranks.

        Args:
            compute: returns the pivots of a unit from products in the given arithmetic;
                called again for units for which it has too few digits.

        Returns:
            float64 ``[1]``.
        """
        smallest = self._full(len(self.units) + 1, 1.0)
        pending: list[int] = list(range(len(self.units)))
        for arithmetic in self._arithmetics:

            def visit(index: int, arithmetic: Arithmetic = arithmetic) -> None:
                pivots = compute(index, arithmetic)
                smallest[index] = pivots.nan_to_num(nan=-1.0).min()

            self._each_unit(visit, pending)
            if arithmetic == self._arithmetics[-1] or not pending:
                break
            coarse = self._is_coarse(arithmetic, smallest).tolist()
            pending = [index for index in pending if coarse[index]]
        return -self._comm.maximum(-smallest.min().reshape(1))

    def _factorize_gram(self, kept: Tensor | None) -> Tensor:
        """Factorize K over the kept columns, ``[N, N]``; raise λ where needed."""
        gram = self._gram(kept)

        def attempt(damping: Tensor) -> tuple[Tensor, Tensor]:
            nonlocal gram
            while True:
                factor, singular = self._damped_factor(gram.clone(), damping)
                share = smallest_share(factor).masked_fill(singular, -1.0)
                # More digits are tried before a larger λ.
                if not self._must_refine(share):
                    return factor, singular
                gram = self._gram(kept)

        return raise_until_definite(attempt, self._lambda)[0]

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

        def measure(index: int) -> None:
            rows = self._unit_rows(index, self._row_dtype)
            norms = torch.linalg.vector_norm(rows, dim=1)
            largest[index] = norms.max().double().square()

        self._each_unit(measure)
        return self._comm.maximum(largest.max().reshape(1))

    def _gram(self, kept: Tensor | None) -> Tensor:
        """Sum G_rG_rᵀ over the ranks, float64 ``[1, N, N]``, over the kept columns."""
        columns = None if kept is None else self._places_by_unit(kept)

        def product(index: int) -> Tensor:
            rows = self._unit_rows(index, self._dtype)
            if columns is not None:
                rows = rows[:, columns[index]]
            return half_product(rows.unsqueeze(0), self._arithmetic == "split")[0]

        shape = (self.num_gradients, self.num_gradients)
        return mirror(self._sum_over_units(product, self._largest, shape).unsqueeze(0))

    def _places_by_unit(self, kept: Tensor) -> list[Tensor]:
        """Find the kept columns of each unit, with two waits."""
        parts = torch.split(kept, [unit.stop - unit.start for unit in self.units])
        counts = torch.stack([self._full(1, 0.0)[0], *(p.sum() for p in parts)])
        _, *numbers = counts.long().tolist()
        places = torch.split(kept.nonzero().squeeze(1), numbers)
        starts = [self._local(unit).start for unit in self.units]
        return [own - start for own, start in zip(places, starts, strict=True)]

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
