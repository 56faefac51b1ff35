"""Inverse Fisher from Cholesky factors of the N×N matrices NλI + GGᵀ, for N < B."""

from __future__ import annotations

__all__ = [
    "SMALLEST_COMPLEMENT",
    "DualInverseFisher",
    "RowsInverseFisher",
    "complement_of",
    "group_complements",
]

from collections.abc import Callable

import torch
from torch import Tensor
from typing_extensions import override

from lightning_woodfisher.fisher.base import (
    BlockwiseInverseFisher,
    InverseFisher,
    group_products,
    raise_until_definite,
)
from lightning_woodfisher.fisher.linalg import (
    cholesky,
    half_product,
    is_well_scaled,
    solve_lower,
)
from lightning_woodfisher.fisher.rows import GradientRows

# λ·[F⁻¹]_jj = 1 − Σ Z² is a difference of numbers near one. Below this limit float32 has
# too few digits left, and the unit is computed again in float64.
_SMALLEST_FLOAT32_COMPLEMENT = 2.0**-4
# Below this limit float64 has too few digits as well, and damping is raised. Measured: the
# relative error of diag(F⁻¹) is up to 3e-15 divided by the complement.
SMALLEST_COMPLEMENT = 1e-9


class RowsInverseFisher(InverseFisher):
    """An inverse Fisher in the dual form, which keeps all gradient rows."""

    def _allocate(self) -> None:
        # ḡ, float64 [D_r]; the sum of the rows until all have arrived.
        self._mean = self._full(self.size, 0.0) if self._fisher.centered else None
        self._rows = GradientRows(
            [self._local(unit) for unit in self.units],
            self.num_gradients,
            self._device,
            self._fisher.offload_rows,
        )

    @property
    @override
    def state_bytes(self) -> int:
        return self._rows.device_bytes

    def _add(self, rows: Tensor) -> None:
        self._rows.append(rows)
        if self._mean is not None:
            # One by one, so that the order of the sum depends on nothing else.
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
        """Copy the rows of a unit, ``[N, K·B]``, and center them if configured."""
        rows = self._rows[index].to(dtype, copy=True)
        if self._mean is not None:
            rows -= self._mean[self._local(self.units[index])].to(dtype)
        return rows

    def _product_dtype(self, columns: int) -> torch.dtype:
        """Choose the dtype in which products of rows are tried first."""
        wanted = self._fisher.precision == "float64" or self._needs_float64(columns)
        double = wanted or self._rows.dtype == torch.float64
        return torch.float64 if double else torch.float32

    def _needs_float64(self, columns: int) -> bool:
        """Return whether F⁻¹v may be a small difference of large vectors."""
        return self._fisher.precision == "auto" and columns < 2 * self.num_gradients

    def _may_repeat(self, dtype: torch.dtype) -> bool:
        """Return whether a float32 result may be computed again in float64."""
        return dtype == torch.float32 and self._fisher.precision == "auto"

    def _is_too_coarse(
        self, dtype: torch.dtype, complement: Tensor, digits: float = 1.0
    ) -> bool:
        """Return whether float32 products have too few digits for 1 − ΣZ²."""
        return self._may_repeat(dtype) and not bool(
            complement > _SMALLEST_FLOAT32_COMPLEMENT / digits
        )

    def _must_repeat(self, factor: Tensor, dtype: torch.dtype) -> bool:
        """Return whether float32 products have too few digits for a factor."""
        return self._may_repeat(dtype) and not is_well_scaled(factor)

    def _damped_factor(self, gram: Tensor, damping: Tensor) -> tuple[Tensor, Tensor]:
        """Factorize NλI + GGᵀ, from GGᵀ ``[K, N, N]`` and λ ``[K]``."""
        damped = gram.to(torch.float64, copy=True)
        ridge = (self.num_gradients * damping).unsqueeze(-1)
        damped.diagonal(dim1=-2, dim2=-1).add_(ridge)
        return cholesky(damped)


class DualInverseFisher(RowsInverseFisher, BlockwiseInverseFisher):
    """Independent blocks in the dual form; the state is N·D_r numbers."""

    def _allocate(self) -> None:
        super()._allocate()
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

    def _factorize_unit(self, index: int) -> None:
        def compute(factor: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
            complement = complement_of(factor, rows)
            return complement, complement

        complement = self._resolve(index, compute)
        self._blocks(self._diagonal, self.units[index]).copy_(
            complement / self._dampings[index].unsqueeze(-1)
        )

    def _resolve(
        self, index: int, compute: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    ) -> Tensor:
        """Compute complements of a unit with enough digits.

        Uses float64 where float32 has too few digits, and raises damping where float64 has
        too few.

        Args:
            index: index of the unit.
            compute: maps L and G to complements and their pivots, ``[K, ...]``.

        Returns:
            The complements.
        """

        def attempt(damping: Tensor) -> tuple[Tensor, Tensor]:
            factor, rows = self._factor(index, damping)
            result, pivots = compute(factor, rows)
            if self._is_too_coarse(rows.dtype, pivots.min()):
                self._in_double.add(index)
                result, pivots = compute(*self._factor(index, damping))
            return result, ~(pivots > SMALLEST_COMPLEMENT).all(dim=-1)

        return raise_until_definite(attempt, self._dampings[index])

    def _factor(
        self, index: int, damping: Tensor, kept: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Factorize NλI + GGᵀ of a unit; raise damping where needed.

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
        if self.units[index].size < size:
            return self._full(0, 0.0).view(0, size, size)
        before = self._dampings[index].clone()
        complements = self._resolve(
            index, lambda factor, rows: group_complements(factor, rows, size)
        )
        if not torch.equal(before, self._dampings[index]):
            self._factorize_unit(index)
        damping = self._dampings[index].view(-1, 1, 1, 1)
        return (complements / damping).flatten(0, 1)

    def _solve(self, index: int, blocks: Tensor) -> Tensor:
        factor, rows = self._factor(index, self._dampings[index])
        product = _project(factor, rows, blocks.unsqueeze(-1)).squeeze(-1)
        return (blocks - product) / self._dampings[index].unsqueeze(-1)

    def _multiply(self, index: int, blocks: Tensor) -> Tensor:
        rows = self._blocks_of_rows(index, self._dtype(index))
        projected = rows @ blocks.to(rows.dtype).unsqueeze(-1)
        return (rows.mT @ projected).squeeze(-1) / self.num_gradients

    def _solve_kept(self, index: int, blocks: Tensor, kept: Tensor) -> Tensor:
        factor, rows = self._factor(index, self._dampings[index], kept)
        return _project(factor, rows, -blocks)


def complement_of(factor: Tensor, rows: Tensor) -> Tensor:
    """Compute 1 − Σ_i Z_ij² with LZ = G.

    Args:
        factor: L, float64 ``[K, N, N]``.
        rows: G, ``[K, N, B]``; overwritten.

    Returns:
        λ·diag(F⁻¹), float64 ``[K, B]``; negative or NaN if there were too few digits.
    """
    return 1.0 - solve_lower(factor, rows).square_().sum(dim=-2).double()


def group_complements(factor: Tensor, rows: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Compute I − Z_SᵀZ_S with LZ = G for groups S of columns.

    Args:
        factor: L, float64 ``[K, N, N]``.
        rows: G, ``[K, N, B]``; overwritten.
        size: columns of a group, q.

    Returns:
        λ·[F⁻¹]_SS, float64 ``[K, B // q, q, q]``, and the smallest Cholesky pivot of each,
        ``[K, B // q]``: the complement of a weight given the rest of its group. It is
        negative if there were too few digits.
    """
    complements = -group_products(solve_lower(factor, rows), size).double()
    complements.diagonal(dim1=-2, dim2=-1).add_(1.0)
    triangles, info = torch.linalg.cholesky_ex(complements)
    pivots = triangles.diagonal(dim1=-2, dim2=-1).square().amin(dim=-1)
    return complements, torch.where(info == 0, pivots, -1.0).nan_to_num(nan=-1.0)


def _project(factor: Tensor, rows: Tensor, vectors: Tensor) -> Tensor:
    """Compute Gᵀ(LLᵀ)⁻¹Gv for v of ``[K, B, V]``, in the dtype of G."""
    target = rows @ vectors.to(rows.dtype)
    solved = torch.cholesky_solve(target.double(), factor)
    return rows.mT @ solved.to(rows.dtype)
