"""Inverse Fisher from Cholesky factors of the N×N matrices NλI + GGᵀ, for N < B."""

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
from typing_extensions import override

from lightning_woodfisher.fisher.base import (
    BlockwiseInverseFisher,
    InverseFisher,
    group_products,
)
from lightning_woodfisher.fisher.linalg import (
    Arithmetic,
    cholesky,
    half_product,
    multiply,
    smallest_share,
    solve_lower,
)
from lightning_woodfisher.fisher.rows import GradientRows

# λ·[F⁻¹]_jj = 1 − Σ Z² is a difference of numbers near one, and pivots of L are differences
# as well. Measured for gradients with normal, log-normal, shared and widely scaled entries:
# if both are above the limit of an arithmetic, it changes F⁻¹ by less than 5e-4. Products that
# are split have 8 bits more. Otherwise the unit is computed again.
_SMALLEST: dict[Arithmetic, float] = {"float32": 2.0**-7, "split": 2.0**-15}
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
        """Return the rows of a unit, ``[N, K·B]``, and center them if configured."""
        rows = self._rows[index].to(dtype)
        if self._mean is not None:
            rows = rows - self._mean[self._local(self.units[index])].to(dtype)
        return rows

    def _dtype_of(self, arithmetic: Arithmetic) -> torch.dtype:
        """Return the dtype of rows and results; those of split products are float64."""
        return torch.float32 if arithmetic == "float32" else torch.float64

    def _is_coarse(
        self, arithmetic: Arithmetic, pivots: Tensor, digits: float = 1.0
    ) -> Tensor:
        """Return where an arithmetic has too few digits; also for pivots that are NaN."""
        return ~(pivots > _SMALLEST.get(arithmetic, 0.0) / digits)

    def _damped_factor(self, gram: Tensor, damping: Tensor) -> tuple[Tensor, Tensor]:
        """Factorize NλI + GGᵀ, from GGᵀ ``[K, N, N]``, overwritten, and λ ``[K]``."""
        # With precision="float32" only products are float32, because λ would be raised.
        final = self._fisher.precision == "float32"
        damped = gram.double() if final else gram
        ridge = (self.num_gradients * damping).unsqueeze(-1)
        damped.diagonal(dim1=-2, dim2=-1).add_(ridge)
        return cholesky(damped)


class DualInverseFisher(RowsInverseFisher, BlockwiseInverseFisher):
    """Independent blocks in the dual form; the state is N·D_r numbers."""

    def _blocks_of_rows(self, index: int, dtype: torch.dtype) -> Tensor:
        """View a unit's rows as ``[K, N, B]``."""
        unit, rows = self.units[index], self._unit_rows(index, dtype)
        return rows.view(-1, unit.count, unit.size).transpose(0, 1)

    def _restrict(self, kept: Tensor) -> None:
        super()._restrict(kept)
        self._start_again()

    def _factorize_unit(self, index: int) -> Tensor:
        factor, rows, singular, coarse = self._factor(index)
        self._keep_factor(index, factor)
        arithmetic = self._arithmetic(index)
        complement = complement_of(factor, rows, arithmetic == "split")
        self._blocks(self._diagonal, self.units[index]).copy_(
            complement / self._dampings[index].unsqueeze(-1)
        )
        return self._judge_both(index, singular, coarse, complement)

    def _judge_both(
        self, index: int, singular: Tensor, coarse: Tensor, pivots: Tensor
    ) -> Tensor:
        """Judge the factors of a unit and the pivots of complements, ``[K, ...]``."""
        smallest = pivots.nan_to_num(nan=-1.0).flatten(1).amin(dim=1)
        return self._judge(
            index,
            singular | (smallest <= SMALLEST_COMPLEMENT),
            coarse | self._is_coarse(self._arithmetic(index), smallest),
        )

    def _factor(
        self, index: int, kept: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Factorize NλI + GGᵀ of a unit.

        Returns:
            L ``[K, N, N]``, over the kept columns, all of G, ``[K, N, B]``, where L does not
            exist, and where it has too few digits, bool ``[K]``.
        """
        arithmetic = self._arithmetic(index)
        rows = self._blocks_of_rows(index, self._dtype_of(arithmetic))
        inside = rows if kept is None else rows * kept.unsqueeze(-2)
        product = half_product(inside, arithmetic == "split")
        factor, singular = self._damped_factor(product, self._dampings[index])
        coarse = self._is_coarse(arithmetic, smallest_share(factor))
        return factor, rows, singular, coarse

    def _sub_blocks(self, index: int, size: int) -> tuple[Tensor, Tensor]:
        factor, rows, singular, coarse = self._factor(index)
        split = self._arithmetic(index) == "split"
        complements, pivots = group_complements(factor, rows, size, split)
        damping = self._dampings[index].view(-1, 1, 1, 1)
        verdicts = self._judge_both(index, singular, coarse, pivots)
        return (complements / damping).flatten(0, 1), verdicts

    def _solve(self, index: int, blocks: Tensor) -> Tensor:
        if index in self._factors:
            factor = self._factors[index]
            dtype = self._dtype_of(self._arithmetic(index))
            rows = self._blocks_of_rows(index, dtype)
        else:
            factor, rows, _, _ = self._factor(index)
        product = _project(factor, rows, blocks.unsqueeze(-1)).squeeze(-1)
        return (blocks - product) / self._dampings[index].unsqueeze(-1)

    def _multiply(self, index: int, blocks: Tensor) -> Tensor:
        rows = self._blocks_of_rows(index, self._dtype_of(self._arithmetic(index)))
        projected = multiply(rows, blocks.to(rows.dtype).unsqueeze(-1))
        return multiply(rows.mT, projected).squeeze(-1).double() / self.num_gradients

    def _solve_kept(
        self, index: int, blocks: Tensor, kept: Tensor
    ) -> tuple[Tensor, Tensor]:
        factor, rows, singular, coarse = self._factor(index, kept)
        return _project(factor, rows, -blocks), self._judge(index, singular, coarse)


def complement_of(factor: Tensor, rows: Tensor, split: bool = False) -> Tensor:
    """Compute 1 − Σ_i Z_ij² with LZ = G.

    Args:
        factor: L, ``[K, N, N]``.
        rows: G, ``[K, N, B]``.
        split: multiply by :func:`.split_product`.

    Returns:
        λ·diag(F⁻¹), float64 ``[K, B]``; negative or NaN if there were too few digits.
    """
    return 1.0 - solve_lower(factor, rows, split).square_().sum(dim=-2).double()


def group_complements(
    factor: Tensor, rows: Tensor, size: int, split: bool = False
) -> tuple[Tensor, Tensor]:
    """Compute I − Z_SᵀZ_S with LZ = G for groups S of columns.

    Args:
        factor: L, ``[K, N, N]``.
        rows: G, ``[K, N, B]``.
        size: columns of a group, q.
        split: multiply by :func:`.split_product`.

    Returns:
        λ·[F⁻¹]_SS, float64 ``[K, B // q, q, q]``, and the smallest Cholesky pivot of each,
        ``[K, B // q]``: the complement of a weight given the rest of its group. It is
        negative if there were too few digits.
    """
    complements = -group_products(solve_lower(factor, rows, split), size).double()
    complements.diagonal(dim1=-2, dim2=-1).add_(1.0)
    triangles, info = torch.linalg.cholesky_ex(complements)
    pivots = triangles.diagonal(dim1=-2, dim2=-1).square().amin(dim=-1)
    return complements, torch.where(info == 0, pivots, -1.0).nan_to_num(nan=-1.0)


def _project(factor: Tensor, rows: Tensor, vectors: Tensor) -> Tensor:
    """Compute Gᵀ(LLᵀ)⁻¹Gv for v of ``[K, B, V]``, in the dtype of G."""
    target = multiply(rows, vectors.to(rows.dtype))
    solved = torch.cholesky_solve(target.to(factor.dtype), factor)
    return multiply(rows.mT, solved.to(rows.dtype)).double()
