"""Blocks by Cholesky of the N×N matrix NλI + GGᵀ: for N < B."""

from __future__ import annotations

__all__ = [
    "SMALLEST_COMPLEMENT",
    "DualInverseFisher",
    "RowsInverseFisher",
    "complement_of",
    "group_complements",
]


import torch
from torch import Tensor

from lightning_woodfisher.fisher.base import (
    InverseFisher,
    group_products,
    raise_until_definite,
)
from lightning_woodfisher.fisher.products import (
    cholesky,
    half_product,
    is_well_scaled,
    solve_lower,
)
from lightning_woodfisher.fisher.rows import RowStore

# λ·[F⁻¹]_jj = 1 − Σ Z² is a difference of numbers near one. Below this float32 has too few
# digits left for it, and the unit is computed again in float64 …
_SMALLEST_FLOAT32_COMPLEMENT = 2.0**-4
# … and below this float64 has: measured, the relative error of diag(F⁻¹) is up to 3e-15
# divided by the complement. Damping is raised then.
SMALLEST_COMPLEMENT = 1e-9


class RowsInverseFisher(InverseFisher):
    """What the two dual forms share: the rows, kept as they came, unit by unit."""

    def _begin(self, offload_rows: bool) -> None:
        # ḡ, float64 [D_r]; the sum of the rows until all have come.
        self._mean = self._full(self.size, 0.0) if self._centered else None
        self._rows = RowStore(
            [self._local(unit) for unit in self.units],
            self.num_gradients,
            self._device,
            offload_rows,
        )

    @property
    def state_bytes(self) -> int:
        """Bytes of the rows on the device."""
        return self._rows.device_bytes

    def _add(self, rows: Tensor) -> None:
        self._rows.append(rows)
        if self._mean is not None:
            # One after the other: the order of the sum depends on nothing else.
            for row in rows:
                self._mean += row

    def _complete(self) -> None:
        if self._mean is not None:
            self._mean /= self.num_gradients

    def _restrict(self, kept: Tensor) -> None:
        self._rows.clear(~kept)
        if self._mean is not None:
            self._mean.masked_fill_(~kept, 0.0)

    def _unit_rows(self, index: int, dtype: torch.dtype) -> Tensor:
        """Copy a unit's rows, ``[N, K·B]``, centred where that is asked for."""
        rows = self._rows[index].to(dtype, copy=True)
        if self._mean is not None:
            rows -= self._mean[self._local(self.units[index])].to(dtype)
        return rows

    def _product_dtype(self, columns: int) -> torch.dtype:
        """Choose the dtype in which products of rows are tried."""
        wanted = self.precision == "float64" or self._are_few(columns)
        double = wanted or self._rows.dtype == torch.float64
        return torch.float64 if double else torch.float32

    def _are_few(self, columns: int) -> bool:
        """Tell whether F⁻¹v may be a small difference of large vectors."""
        return self.precision == "auto" and columns < 2 * self.num_gradients

    def _is_too_coarse(
        self, dtype: torch.dtype, complement: Tensor, digits: float = 1.0
    ) -> bool:
        """Tell whether float32 products were not enough for 1 − ΣZ²."""
        single = dtype == torch.float32 and self.precision == "auto"
        return single and not bool(complement > _SMALLEST_FLOAT32_COMPLEMENT / digits)

    def _must_repeat(self, factor: Tensor, dtype: torch.dtype) -> bool:
        """Tell whether float32 products were not enough for a factor."""
        single = dtype == torch.float32 and self.precision == "auto"
        return single and not is_well_scaled(factor)

    def _damped_factor(self, gram: Tensor, damping: Tensor) -> tuple[Tensor, Tensor]:
        """Cholesky factor of NλI + GGᵀ from ``[K, N, N]`` and λ ``[K]``."""
        damped = gram.to(torch.float64, copy=True)
        ridge = (self.num_gradients * damping).unsqueeze(-1)
        damped.diagonal(dim1=-2, dim2=-1).add_(ridge)
        return cholesky(damped)


class DualInverseFisher(RowsInverseFisher):
    """State is the rows, N·D_r numbers."""

    def _begin(self, offload_rows: bool) -> None:
        super()._begin(offload_rows)
        # Units for which float32 has turned out not to be enough.
        self._in_double: set[int] = set()

    def _blocks_of_rows(self, index: int, dtype: torch.dtype) -> Tensor:
        """Copy a unit's rows as ``[K, N, B]``."""
        unit, rows = self.units[index], self._rows[index]
        if self._mean is not None:
            rows = self._unit_rows(index, dtype)
        blocks = rows.view(-1, unit.count, unit.size).transpose(0, 1)
        return blocks.to(dtype, copy=True, memory_format=torch.contiguous_format)

    def _restrict(self, kept: Tensor) -> None:
        super()._restrict(kept)
        self._in_double.clear()

    def _dtype(self, index: int, kept: Tensor | None = None) -> torch.dtype:
        if index in self._in_double:
            return torch.float64
        columns = self.units[index].size
        if self._kept is not None:
            alive = self._blocks(self._kept, self.units[index])
            kept = alive if kept is None else kept & alive
        if kept is not None:
            columns = int(kept.sum(dim=-1).min())
        return self._product_dtype(columns)

    def _factorize(self) -> None:
        self._each_unit(self._factorize_unit)

    def _factorize_unit(self, index: int) -> None:
        def attempt(damping: Tensor) -> tuple[Tensor, Tensor]:
            factor, rows = self._factor(index, damping)
            complement = complement_of(factor, rows)
            if self._is_too_coarse(rows.dtype, complement.min()):
                self._in_double.add(index)
                complement = complement_of(*self._factor(index, damping))
            unresolved = ~(complement > SMALLEST_COMPLEMENT).all(dim=-1)
            return complement, unresolved

        damping = self._dampings[index]
        complement = raise_until_definite(attempt, damping)
        self._blocks(self._diagonal, self.units[index]).copy_(
            complement / damping.unsqueeze(-1)
        )

    def _factor(
        self, index: int, damping: Tensor, kept: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Factorise NλI + GGᵀ of a unit; raises damping where needed.

        Returns:
            L, float64 ``[K, N, N]``, over the kept columns, and all of G, ``[K, N, B]``, in
            the precision that L needed.
        """
        rows = self._blocks_of_rows(index, self._dtype(index, kept))
        product = half_product(rows if kept is None else rows * kept.unsqueeze(-2))
        factor = raise_until_definite(
            lambda value: self._damped_factor(product, value), damping
        )
        if self._must_repeat(factor, rows.dtype):
            self._in_double.add(index)
            return self._factor(index, damping, kept)
        return factor, rows

    def _sub_blocks(self, index: int, size: int) -> Tensor:
        before = self._dampings[index].clone()

        def attempt(damping: Tensor) -> tuple[Tensor, Tensor]:
            factor, rows = self._factor(index, damping)
            complements, pivots = group_complements(factor, rows, size)
            if self._is_too_coarse(rows.dtype, pivots.min()):
                self._in_double.add(index)
                factor, rows = self._factor(index, damping)
                complements, pivots = group_complements(factor, rows, size)
            return complements, ~(pivots > SMALLEST_COMPLEMENT).all(dim=-1)

        if self.units[index].size < size:
            return self._full(0, 0.0).view(0, size, size)
        complements = raise_until_definite(attempt, self._dampings[index])
        if not torch.equal(before, self._dampings[index]):
            self._factorize_unit(index)
        damping = self._dampings[index].view(-1, 1, 1, 1)
        return (complements / damping).flatten(0, 1)

    def matvec(self, vector: Tensor) -> Tensor:
        """See :meth:`InverseFisher.matvec`.

        Args:
            vector: float64 tensor ``[D_r]``.

        Returns:
            F⁻¹v.
        """
        result = torch.empty_like(vector)

        def multiply(index: int) -> None:
            unit = self.units[index]
            blocks = self._blocks(vector, unit)
            factor, rows = self._factor(index, self._dampings[index])
            solved = _solve(factor, rows, blocks.unsqueeze(-1))
            product = (rows.mT @ solved.to(rows.dtype)).squeeze(-1)
            damping = self._dampings[index].unsqueeze(-1)
            self._blocks(result, unit).copy_((blocks - product) / damping)

        self._each_unit(multiply)
        return result

    def fisher_matvec(self, vector: Tensor) -> Tensor:
        """See :meth:`InverseFisher.fisher_matvec`.

        Args:
            vector: float64 tensor ``[D_r]``.

        Returns:
            Fv.
        """
        result = torch.empty_like(vector)

        def multiply(index: int) -> None:
            unit = self.units[index]
            blocks = self._blocks(vector, unit)
            rows = self._blocks_of_rows(index, self._dtype(index))
            projected = rows @ blocks.to(rows.dtype).unsqueeze(-1)
            product = (rows.mT @ projected).squeeze(-1) / self.num_gradients
            damped = self._dampings[index].unsqueeze(-1) * blocks
            self._blocks(result, unit).copy_(product + damped)

        self._each_unit(multiply)
        return result

    def constrained_solve(self, weights: Tensor, removed: Tensor) -> Tensor:
        """See :meth:`InverseFisher.constrained_solve`.

        Args:
            weights: float64 tensor ``[D_r]`` or ``[V, D_r]``.
            removed: bool tensor ``[D_r]``.

        Returns:
            δ.
        """
        change = torch.where(removed, -weights, 0.0)
        vectors = self._stacked(change)

        def solve(index: int) -> None:
            unit = self.units[index]
            blocks = self._blocks(vectors, unit).movedim(0, -1)
            kept = ~self._blocks(removed, unit)
            factor, rows = self._factor(index, self._dampings[index], kept)
            solved = _solve(factor, rows, -blocks)
            pull = rows.mT @ solved.to(rows.dtype)
            blocks.add_(pull * kept.unsqueeze(-1))

        self._each_unit(solve)
        return change


def complement_of(factor: Tensor, rows: Tensor) -> Tensor:
    """Compute 1 − Σ_i Z_ij² with LZ = G.

    Args:
        factor: L, float64 ``[K, N, N]``.
        rows: G, ``[K, N, B]``; overwritten.

    Returns:
        λ·diag(F⁻¹), float64 ``[K, B]``; negative or NaN where digits did not suffice.
    """
    return 1.0 - solve_lower(factor, rows).square_().sum(dim=-2).double()


def group_complements(factor: Tensor, rows: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Compute I − Z_SᵀZ_S with LZ = G for groups S of columns.

    Args:
        factor: L, float64 ``[K, N, N]``.
        rows: G, ``[K, N, B]``; overwritten.
        size: columns of a group, q.

    Returns:
        λ·[F⁻¹]_SS, float64 ``[K, B // q, q, q]``, and the smallest pivot of each,
        ``[K, B // q]``: what is left of a weight's own complement when the group is
        known; negative where digits did not suffice.
    """
    complements = -group_products(solve_lower(factor, rows), size).double()
    complements.diagonal(dim1=-2, dim2=-1).add_(1.0)
    triangles, info = torch.linalg.cholesky_ex(complements)
    pivots = triangles.diagonal(dim1=-2, dim2=-1).square().amin(dim=-1)
    return complements, torch.where(info == 0, pivots, -1.0).nan_to_num(nan=-1.0)


def _solve(factor: Tensor, rows: Tensor, vectors: Tensor) -> Tensor:
    """Solve LLᵀx = Gv for v of ``[K, B, V]``, float64 ``[K, N, V]``."""
    target = rows @ vectors.to(rows.dtype)
    return torch.cholesky_solve(target.double(), factor)
