"""Blocks by Cholesky of the N×N matrix NλI + GGᵀ: for N < B."""

from __future__ import annotations

__all__ = [
    "SMALLEST_COMPLEMENT",
    "DualInverseFisher",
    "RowsInverseFisher",
    "complement_of",
]

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_woodfisher.distributed import Communicator
from lightning_woodfisher.engines.base import InverseFisher, raise_until_definite
from lightning_woodfisher.partition import Partition
from lightning_woodfisher.products import (
    Precision,
    cholesky,
    float32_is_enough,
    half_product,
    solve_lower,
    spread,
)

# λ·[F⁻¹]_jj = 1 − Σ Z² is a difference of numbers near one. Below this float32 has too few
# digits left for it, and the unit is solved again in float64 …
_SMALLEST_FLOAT32_COMPLEMENT = 2.0**-6
# … and below this float64 has: measured, the relative error of diag(F⁻¹) is up to 3e-15
# divided by the complement. Damping is raised then.
SMALLEST_COMPLEMENT = 1e-9


class RowsInverseFisher(InverseFisher):
    """What the two dual forms share: the rows, kept as they came, unit by unit."""

    def __init__(
        self,
        partition: Partition,
        num_gradients: int,
        damping: float,
        communicator: Communicator,
        precision: Precision = "auto",
    ) -> None:
        super().__init__(partition, num_gradients, damping, communicator, precision)
        self._rows: list[Tensor] = []

    @property
    def state_bytes(self) -> int:
        """Bytes of the state that this rank keeps for its blocks."""
        return sum(rows.numel() * rows.element_size() for rows in self._rows)

    def _add(self, rows: Tensor) -> None:
        if not self._rows:
            self._rows = [
                rows.new_empty(self.num_gradients, unit.stop - unit.start)
                for unit in self.units
            ]
        for unit, kept in zip(self.units, self._rows, strict=True):
            kept[self._observed : self._observed + len(rows)] = rows[
                :, self._local(unit)
            ]

    def _is_out_of_range(self, columns: int) -> bool:
        """Tell whether GGᵀ lacks full rank, where Gv = Kx loses digits; it is cheap, too."""
        return self.precision == "auto" and columns < self.num_gradients

    def _damped_factor(self, gram: Tensor, damping: Tensor) -> tuple[Tensor, Tensor]:
        """Cholesky factor of NλI + GGᵀ from ``[K, N, N]`` and λ ``[K]``."""
        damped = gram.to(torch.float64, copy=True)
        ridge = (self.num_gradients * damping).unsqueeze(-1)
        damped.diagonal(dim1=-2, dim2=-1).add_(ridge)
        return cholesky(damped)


class DualInverseFisher(RowsInverseFisher):
    """State is the rows, N·D_r numbers."""

    def _blocks_of_rows(self, index: int, dtype: torch.dtype | None = None) -> Tensor:
        """Copy a unit's rows as ``[K, N, B]``, in float32 where that is enough."""
        unit, rows = self.units[index], self._rows[index]
        blocks = rows.view(-1, unit.count, unit.size).transpose(0, 1)
        return blocks.to(
            dtype or self._dtype(index),
            copy=True,
            memory_format=torch.contiguous_format,
        )

    def _dtype(self, index: int) -> torch.dtype:
        unit, rows = self.units[index], self._rows[index]
        if rows.dtype == torch.float64 or self._is_out_of_range(unit.size):
            return torch.float64
        blocks = rows.float().view(-1, unit.count, unit.size)
        largest = torch.linalg.vector_norm(blocks, dim=-1).max().square()
        value = spread(float(largest), 1, self.num_gradients, self._initial_damping)
        enough = float32_is_enough(value, self.precision)
        return torch.float32 if enough else torch.float64

    def _factorize(self) -> None:
        self._each_unit(self._factorize_unit)

    def _factorize_unit(self, index: int) -> None:
        gram = half_product(self._blocks_of_rows(index))

        def attempt(damping: Tensor) -> tuple[Tensor, Tensor]:
            factor, bad = self._damped_factor(gram, damping)
            complement = complement_of(
                factor, lambda dtype: self._blocks_of_rows(index, dtype), self.precision
            )
            unresolved = ~(complement > SMALLEST_COMPLEMENT).all(dim=-1)
            return complement, bad | unresolved

        damping = self._dampings[index]
        complement = raise_until_definite(attempt, damping)
        self._blocks(self._diagonal, self.units[index]).copy_(
            complement / damping.unsqueeze(-1)
        )

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
            rows, blocks = self._blocks_of_rows(index), self._blocks(vector, unit)
            gram = half_product(rows)
            solved = self._solve(index, gram, rows, blocks)
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
            rows, blocks = self._blocks_of_rows(index), self._blocks(vector, unit)
            projected = rows @ blocks.to(rows.dtype).unsqueeze(-1)
            product = (rows.mT @ projected).squeeze(-1) / self.num_gradients
            damped = self._dampings[index].unsqueeze(-1) * blocks
            self._blocks(result, unit).copy_(product + damped)

        self._each_unit(multiply)
        return result

    def constrained_solve(self, weights: Tensor, removed: Tensor) -> Tensor:
        """See :meth:`InverseFisher.constrained_solve`.

        Args:
            weights: float64 tensor ``[D_r]``.
            removed: bool tensor ``[D_r]``.

        Returns:
            δ.
        """
        change = torch.where(removed, -weights, 0.0)

        def solve(index: int) -> None:
            unit = self.units[index]
            rows, blocks = self._blocks_of_rows(index), self._blocks(change, unit)
            kept = ~self._blocks(removed, unit)
            gram = half_product(rows * kept.unsqueeze(-2))
            solved = self._solve(index, gram, rows, -blocks)
            pull = (rows.mT @ solved.to(rows.dtype)).squeeze(-1)
            blocks.add_(pull * kept)

        self._each_unit(solve)
        return change

    def _solve(self, index: int, gram: Tensor, rows: Tensor, vectors: Tensor) -> Tensor:
        """Solve (NλI + GGᵀ) x = Gv, float64 ``[K, N, 1]``."""

        def attempt(damping: Tensor) -> tuple[Tensor, Tensor]:
            return self._damped_factor(gram, damping)

        factor = raise_until_definite(attempt, self._dampings[index])
        target = rows @ vectors.to(rows.dtype).unsqueeze(-1)
        return torch.cholesky_solve(target.double(), factor)


def complement_of(
    factor: Tensor,
    rows: Callable[[torch.dtype | None], Tensor],
    precision: Precision,
) -> Tensor:
    """Compute 1 − Σ_i Z_ij² with LZ = G, in float64 where float32 has no digits left.

    Args:
        factor: L, float64 ``[K, N, N]``.
        rows: makes a fresh copy of G, ``[K, N, B]``, in a given or in its own dtype.
        precision: ``"float32"`` never goes over to float64.

    Returns:
        λ·diag(F⁻¹), float64 ``[K, B]``; negative or NaN where even float64 fails.
    """

    def compute(dtype: torch.dtype | None) -> tuple[Tensor, bool]:
        half = solve_lower(factor, rows(dtype))
        complement = 1.0 - half.square_().sum(dim=-2).double()
        single = half.dtype == torch.float32
        return complement, single and precision != "float32"

    complement, may_repeat = compute(None)
    if may_repeat and not bool((complement > _SMALLEST_FLOAT32_COMPLEMENT).all()):
        complement, _ = compute(torch.float64)
    return complement
