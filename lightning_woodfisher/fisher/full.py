"""One block over all weights of all ranks (``block_size=None``), in the dual form."""

from __future__ import annotations

__all__ = ["FullInverseFisher"]

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lightning_woodfisher.distributed.exact_sum import ExactSum
from lightning_woodfisher.fisher.base import raise_until_definite
from lightning_woodfisher.fisher.dual import (
    SMALLEST_COMPLEMENT,
    RowsInverseFisher,
    complement_of,
    group_complements,
)
from lightning_woodfisher.fisher.products import half_product, mirror


class FullInverseFisher(RowsInverseFisher):
    """K = NλI + Σ_r G_rG_rᵀ is one N×N sum over ranks; all else is local.

    The sum is exact (:class:`.ExactSum`), so every world size gets the same bits.
    """

    def _begin(self, offload_rows: bool) -> None:
        super()._begin(offload_rows)
        self._lambda = self._full(1, self._initial_damping)

    def _add(self, rows: Tensor) -> None:
        super()._add(rows)
        self._dtype = self._product_dtype(self._total_size)

    def _restrict(self, kept: Tensor) -> None:
        super()._restrict(kept)
        self._lambda.fill_(self._initial_damping)
        self._dtype = self._product_dtype(self._count(kept))

    def _count(self, marked: Tensor) -> int:
        """Count the marks of all ranks."""
        return int(self._comm.sum_integers(marked.sum().reshape(1)))

    @property
    def damping(self) -> Tensor:
        """λ of the one block, float64 ``[1]``."""
        return self._lambda

    def raised(self) -> dict[int, float]:
        """List the blocks whose damping had to be raised.

        Returns:
            λ under index 0, or nothing.
        """
        value = float(self._lambda)
        return {} if value == self._initial_damping else {0: value}

    def _factorize(self) -> None:
        self._largest = self._largest_square_norm()

        def attempt(damping: Tensor) -> tuple[Tensor, Tensor]:
            factor = self._factorize_gram(None)
            least = self._solve_diagonal(factor, damping)
            # Rounding errors of units are independent and their sum is exact: the sum has
            # more digits than a unit.
            if self._is_too_coarse(self._dtype, least, math.sqrt(self._total_units)):
                self._dtype = torch.float64
                factor = self._factorize_gram(None)
                least = self._solve_diagonal(factor, damping)
            return factor, least <= SMALLEST_COMPLEMENT

        self._factor = raise_until_definite(attempt, self._lambda)

    def _solve_diagonal(self, factor: Tensor, damping: Tensor) -> Tensor:
        """Fill in diag(F⁻¹); give the smallest λ·[F⁻¹]_jj of all ranks, ``[1]``."""
        smallest = self._full(len(self.units) + 1, 1.0)

        def solve(index: int) -> None:
            values = self._complement(factor, index, self._dtype)
            if self._is_too_coarse(self._dtype, values.min()):
                values = self._complement(factor, index, torch.float64)
            self._diagonal[self._local(self.units[index])] = values / damping
            smallest[index] = values.min()

        self._each_unit(solve)
        least = smallest.nan_to_num(nan=-1.0).min().reshape(1)
        return -self._comm.maximum(-least)

    def _complement(self, factor: Tensor, index: int, dtype: torch.dtype) -> Tensor:
        rows = self._unit_rows(index, dtype).unsqueeze(0)
        return complement_of(factor.unsqueeze(0), rows)[0]

    def _factorize_gram(self, kept: Tensor | None) -> Tensor:
        """L of NλI + Σ_r G_rG_rᵀ over the kept columns, ``[N, N]``; raises λ if needed."""

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

    def visit_sub_blocks(
        self, sizes: Sequence[int], consume: Callable[[int, Tensor], None]
    ) -> None:
        """See :meth:`InverseFisher.visit_sub_blocks`.

        Args:
            sizes: of the groups of each unit.
            consume: gets a unit and its sub-blocks.
        """
        first = float(self._lambda)

        def attempt(damping: Tensor) -> tuple[Tensor, Tensor]:
            if float(damping) != first:
                self._refactorize()
            least = self._visit(sizes, consume)
            if self._is_too_coarse(self._dtype, least, math.sqrt(self._total_units)):
                self._dtype = torch.float64
                self._refactorize()
                least = self._visit(sizes, consume)
            return self._factor, least <= SMALLEST_COMPLEMENT

        raise_until_definite(attempt, self._lambda)

    def _refactorize(self) -> None:
        self._factor = self._factorize_gram(None)
        self._solve_diagonal(self._factor, self._lambda)

    def _visit(
        self, sizes: Sequence[int], consume: Callable[[int, Tensor], None]
    ) -> Tensor:
        """Hand out what has enough digits; give the smallest pivot of all ranks, ``[1]``."""
        smallest = self._full(len(self.units) + 1, 1.0)

        def visit(index: int) -> None:
            size = sizes[index]
            if not size or self.units[index].size < size:
                return
            blocks, pivots = self._group_complements(index, size, self._dtype)
            if self._is_too_coarse(self._dtype, pivots.min()):
                blocks, pivots = self._group_complements(index, size, torch.float64)
            smallest[index] = pivots.min()
            if bool(smallest[index] > SMALLEST_COMPLEMENT):
                consume(index, blocks / self._lambda)

        self._each_unit(visit)
        return -self._comm.maximum(-smallest.min().reshape(1))

    def _group_complements(
        self, index: int, size: int, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        rows = self._unit_rows(index, dtype).unsqueeze(0)
        blocks, pivots = group_complements(self._factor.unsqueeze(0), rows, size)
        return blocks[0], pivots[0]

    def _sub_blocks(self, index: int, size: int) -> Tensor:
        return self._group_complements(index, size, torch.float64)[0] / self._lambda

    def matvec(self, vector: Tensor) -> Tensor:
        """See :meth:`InverseFisher.matvec`.

        Args:
            vector: float64 tensor ``[D_r]``.

        Returns:
            F⁻¹v.
        """
        solved = torch.cholesky_solve(self._project(vector).unsqueeze(-1), self._factor)
        return (vector - self._combine(solved.squeeze(-1))) / self._lambda

    def fisher_matvec(self, vector: Tensor) -> Tensor:
        """See :meth:`InverseFisher.fisher_matvec`.

        Args:
            vector: float64 tensor ``[D_r]``.

        Returns:
            Fv.
        """
        product = self._combine(self._project(vector))
        return product / self.num_gradients + self._lambda * vector

    def constrained_solve(self, weights: Tensor, removed: Tensor) -> Tensor:
        """See :meth:`InverseFisher.constrained_solve`.

        Args:
            weights: float64 tensor ``[D_r]`` or ``[V, D_r]``.
            removed: bool tensor ``[D_r]``.

        Returns:
            δ.
        """
        change = torch.where(removed, -weights, 0.0)
        kept = ~removed if self._kept is None else ~removed & self._kept
        if self._are_few(self._count(kept)):
            self._dtype = torch.float64
        factor = self._factorize_gram(kept)
        # One after the other: each has a scale of its own in the exact sum.
        for vector in self._stacked(change):
            target = -self._project(vector).unsqueeze(-1)
            solved = torch.cholesky_solve(target, factor).squeeze(-1)
            vector.copy_(torch.where(removed, vector, self._combine(solved)))
        return change

    def to_dense(self) -> Tensor:
        """Build F⁻¹ as one matrix; for small problems on one rank.

        Returns:
            float64 tensor ``[D, D]``.

        Raises:
            ValueError: on more than one rank.
        """
        if self._comm.world_size > 1:
            raise ValueError("the full inverse Fisher is dense on one rank only")
        return super().to_dense()

    def _largest_square_norm(self) -> Tensor:
        """Largest squared norm of a row inside any unit of any rank, float64 ``[1]``."""
        largest = self._full(len(self.units) + 1, 0.0)

        def measure(index: int) -> None:
            double = self._rows.dtype == torch.float64
            rows = self._unit_rows(index, torch.float64 if double else torch.float32)
            norms = torch.linalg.vector_norm(rows, dim=1)
            largest[index] = norms.max().double().square()

        self._each_unit(measure)
        return self._comm.maximum(largest.max().reshape(1))

    def _gram(self, kept: Tensor | None) -> Tensor:
        """Σ over ranks of G_rG_rᵀ, float64 ``[1, N, N]``, over the kept columns."""

        def product(index: int) -> Tensor:
            rows = self._unit_rows(index, self._dtype)
            if kept is not None:
                columns = kept[self._local(self.units[index])]
                rows = rows[:, columns.nonzero().squeeze(1)]
            return half_product(rows.unsqueeze(0))[0]

        shape = (self.num_gradients, self.num_gradients)
        return mirror(self._sum_over_units(product, self._largest, shape).unsqueeze(0))

    def _project(self, vector: Tensor) -> Tensor:
        """Σ over ranks of G_r v_r, float64 ``[N]``."""
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
        # A float32 product may exceed its bound by a rounding.
        total = ExactSum(self._comm, bound * 1.01 * self._total_units, shape)
        self._each_unit(lambda index: total.add(product(index)))
        return total.result()

    def _combine(self, coefficients: Tensor) -> Tensor:
        """G_rᵀc on this rank, float64 ``[D_r]``."""
        result = self._full(self.size, 0.0)

        def product(index: int) -> None:
            rows = self._unit_rows(index, self._dtype)
            values = rows.mT @ coefficients.to(rows.dtype)
            result[self._local(self.units[index])] = values.double()

        self._each_unit(product)
        return result
