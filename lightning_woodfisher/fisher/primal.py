"""Inverse Fisher from Cholesky factors of the B×B blocks of F, for B <= N."""

from __future__ import annotations

__all__ = ["PrimalInverseFisher"]

import torch
from torch import Tensor
from typing_extensions import override

from lightning_woodfisher.fisher.base import (
    BlockwiseInverseFisher,
    group_products,
    raise_until_definite,
)
from lightning_woodfisher.fisher.linalg import (
    add_half_product,
    cholesky,
    float32_is_enough,
    half_product,
    invert_lower,
    mirror,
)

# Cholesky may succeed by chance on a block that is singular in float64. A pivot must not be
# smaller than this share of the diagonal entry that it is computed from.
_SMALLEST_PIVOT = 1e-12


class PrimalInverseFisher(BlockwiseInverseFisher):
    """One B×B matrix for each block; gradients are added as they arrive and not kept.

    A unit starts in float32 and changes to float64 before float32 would lose digits that
    F⁻¹ needs.
    """

    def _allocate(self) -> None:
        # If gradients are centered, G holds the rows minus c, the mean of the first ones.
        # The final correction N(ḡ − c)(ḡ − c)ᵀ is then small and cancels no digits.
        self._shift: Tensor | None = None
        self._shifted_sum = (
            self._full(self.size, 0.0) if self._fisher.centered else None
        )
        dtype = torch.float64 if self._fisher.precision == "float64" else torch.float32
        # The lower half of GᵀG while gradients arrive, all of GᵀG/N afterwards.
        self._gram = [
            torch.zeros(u.count, u.size, u.size, dtype=dtype, device=self._device)
            for u in self.units
        ]

    @property
    @override
    def state_bytes(self) -> int:
        return sum(gram.nbytes for gram in self._gram)

    def _add(self, rows: Tensor) -> None:
        if self._shifted_sum is not None:
            if self._shift is None:
                total = torch.zeros_like(self._shifted_sum)
                for row in rows:
                    total += row
                mean = total / len(rows)
                self._shift = mean if rows.dtype == torch.float64 else mean.float()
            for row in rows:
                self._shifted_sum += row.double() - self._shift
        self._each_unit(lambda index: self._accumulate(index, rows))

    def _accumulate(self, index: int, rows: Tensor) -> None:
        rows = rows[:, self._local(self.units[index])]
        rows = rows if rows.dtype == torch.float64 else rows.float()
        if rows.dtype == self._gram[index].dtype == torch.float32:
            product = half_product(self._columns(rows, index))
            before, added = _diagonal(self._gram[index]), _diagonal(product)
            fisher = self._fisher
            if fisher.precision == "float32" or float32_is_enough(
                float((before + added).max()),
                self.units[index].size,
                max(1, fisher.num_gradients - fisher.max_nonfinite),
                fisher.damping,
            ):
                self._gram[index] += product
                return
        # Earlier sums were precise enough when they were added.
        self._gram[index] = self._gram[index].double()
        add_half_product(self._gram[index], self._columns(rows.double(), index))

    def _columns(self, rows: Tensor, index: int) -> Tensor:
        """View a unit's part of the rows, minus c, as ``[K, B, n]``."""
        unit = self.units[index]
        if self._shift is not None:
            rows = rows - self._shift[self._local(unit)]
        return rows.view(len(rows), unit.count, unit.size).permute(1, 2, 0)

    def _complete(self) -> None:
        self._each_unit(self._complete_unit)

    def _complete_unit(self, index: int) -> None:
        self._gram[index] = mirror(self._gram[index]).div_(self.num_gradients)
        if self._shifted_sum is not None:
            rest = self._blocks(self._shifted_sum, self.units[index])
            rest = (rest / self.num_gradients).to(self._gram[index].dtype)
            self._gram[index] -= rest.unsqueeze(-1) * rest.unsqueeze(-2)

    def _restrict(self, kept: Tensor) -> None:
        for index, unit in enumerate(self.units):
            blocks = self._blocks(kept, unit)
            # A multiplication by zero would not remove NaN or infinity.
            self._gram[index].masked_fill_(~blocks.unsqueeze(-1), 0.0)
            self._gram[index].masked_fill_(~blocks.unsqueeze(-2), 0.0)

    def _factorize_unit(self, index: int) -> None:
        diagonal = invert_lower(self._factor(index)).square_().sum(dim=-2)
        self._blocks(self._diagonal, self.units[index]).copy_(diagonal)

    def _sub_blocks(self, index: int, size: int) -> Tensor:
        return group_products(invert_lower(self._factor(index)), size).flatten(0, 1)

    def _solve(self, index: int, blocks: Tensor) -> Tensor:
        factor = self._factor(index)
        return torch.cholesky_solve(blocks.unsqueeze(-1), factor).squeeze(-1)

    def _multiply(self, index: int, blocks: Tensor) -> Tensor:
        return (self._gram[index].double() @ blocks.unsqueeze(-1)).squeeze(-1)

    def _solve_kept(self, index: int, blocks: Tensor, kept: Tensor) -> Tensor:
        # −F δ_S on the rows of R; λI does not couple R with S.
        target = -(self._gram[index].double() @ blocks) * kept.unsqueeze(-1)
        return torch.cholesky_solve(target, self._factor(index, kept.double()))

    def _factor(self, index: int, kept: Tensor | None = None) -> Tensor:
        """Return the Cholesky factor of F, or F_RR, of one unit; raise λ where needed."""

        def attempt(damping: Tensor) -> tuple[Tensor, Tensor]:
            matrix = self._gram[index].to(torch.float64, copy=True)
            _diagonal(matrix).add_(damping.unsqueeze(-1))
            if kept is not None:
                # Rows and columns of removed weights become those of the identity.
                matrix *= kept.unsqueeze(-1)
                matrix *= kept.unsqueeze(-2)
                _diagonal(matrix).add_(1.0 - kept)
            factor, bad = cholesky(matrix)
            pivots = _diagonal(factor).square()
            smallest = _SMALLEST_PIVOT * _diagonal(matrix)
            return factor, bad | ~(pivots > smallest).all(dim=-1)

        return raise_until_definite(attempt, self._dampings[index])


def _diagonal(matrices: Tensor) -> Tensor:
    """View the diagonals of ``[K, n, n]`` as ``[K, n]``."""
    return matrices.diagonal(dim1=-2, dim2=-1)
