"""Blocks by Cholesky of the Fisher itself: for B <= N."""

from __future__ import annotations

__all__ = ["PrimalInverseFisher"]

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_woodfisher.fisher.base import (
    InverseFisher,
    group_products,
    raise_until_definite,
)
from lightning_woodfisher.fisher.products import (
    add_half_product,
    cholesky,
    float32_is_enough,
    half_product,
    invert_lower,
    mirror,
    spread,
)

# Cholesky may succeed by luck on a block that is singular in float64: a pivot must not be
# smaller than this beside the entry of the diagonal that it is left over from.
_SMALLEST_PIVOT = 1e-12


class PrimalInverseFisher(InverseFisher):
    """One B×B matrix for each block; gradients are added as they arrive and not kept.

    A unit starts in float32 and goes over to float64 before float32 would lose digits that
    F⁻¹ needs.
    """

    def _begin(self, offload_rows: bool) -> None:
        # Centred, G stands for rows less the mean of the first ones, c: what is left to
        # subtract in the end, N(ḡ − c)(ḡ − c)ᵀ, is small then and cancels no digits.
        self._shift: Tensor | None = None
        self._shifted_sum = self._full(self.size, 0.0) if self._centered else None
        dtype = torch.float64 if self.precision == "float64" else torch.float32
        # The lower half of GᵀG while gradients arrive, all of GᵀG/N after.
        self._gram = [
            torch.zeros(u.count, u.size, u.size, dtype=dtype, device=self._device)
            for u in self.units
        ]

    @property
    def state_bytes(self) -> int:
        """Bytes of the state that this rank keeps for its blocks."""
        return sum(gram.numel() * gram.element_size() for gram in self._gram)

    def _add(self, rows: Tensor) -> None:
        if self._shifted_sum is not None:
            if self._shift is None:
                total = torch.zeros_like(self._shifted_sum)
                for row in rows:
                    total += row
                single = rows.dtype != torch.float64
                mean = total / len(rows)
                self._shift = mean.float() if single else mean
            for row in rows:
                self._shifted_sum += row.double() - self._shift
        self._each_unit(lambda index: self._accumulate(index, rows))

    def _accumulate(self, index: int, rows: Tensor) -> None:
        unit = self.units[index]
        rows = rows[:, self._local(unit)]
        rows = rows if rows.dtype == torch.float64 else rows.float()
        if rows.dtype == self._gram[index].dtype == torch.float32:
            product = half_product(self._columns(rows, index))
            before, added = _diagonal(self._gram[index]), _diagonal(product)
            value = spread(
                float((before + added).max()),
                unit.size,
                self._fewest_gradients,
                self._initial_damping,
            )
            if float32_is_enough(value, self.precision):
                self._gram[index] += product
                return
        # What is there already was precise enough when it was added.
        self._gram[index] = self._gram[index].double()
        add_half_product(self._gram[index], self._columns(rows.double(), index))

    def _columns(self, rows: Tensor, index: int) -> Tensor:
        """View a unit's part of the rows, less c, as ``[K, B, n]``."""
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
            # A product could not remove what is not finite.
            self._gram[index].masked_fill_(~blocks.unsqueeze(-1), 0.0)
            self._gram[index].masked_fill_(~blocks.unsqueeze(-2), 0.0)

    def _factorize(self) -> None:
        self._each_unit(self._factorize_unit)

    def _factorize_unit(self, index: int) -> None:
        factor = self._factor(index, lambda damped: damped)
        diagonal = invert_lower(factor).square_().sum(dim=-2)
        self._blocks(self._diagonal, self.units[index]).copy_(diagonal)

    def _sub_blocks(self, index: int, size: int) -> Tensor:
        factor = self._factor(index, lambda damped: damped)
        return group_products(invert_lower(factor), size).flatten(0, 1)

    def matvec(self, vector: Tensor) -> Tensor:
        """See :meth:`InverseFisher.matvec`.

        Args:
            vector: float64 tensor ``[D_r]``.

        Returns:
            F⁻¹v.
        """
        result = torch.empty_like(vector)

        def solve(index: int) -> None:
            unit = self.units[index]
            factor = self._factor(index, lambda damped: damped)
            target = self._blocks(vector, unit).unsqueeze(-1)
            solved = torch.cholesky_solve(target, factor).squeeze(-1)
            self._blocks(result, unit).copy_(solved)

        self._each_unit(solve)
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
            product = (self._gram[index].double() @ blocks.unsqueeze(-1)).squeeze(-1)
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
            kept = (~self._blocks(removed, unit)).double()
            blocks = self._blocks(vectors, unit).movedim(0, -1)

            def keep_rows(damped: Tensor) -> Tensor:
                # Rows and columns of removed weights become those of the identity.
                damped *= kept.unsqueeze(-1)
                damped *= kept.unsqueeze(-2)
                _diagonal(damped).add_(1.0 - kept)
                return damped

            # −F δ_S on the kept rows; λI does not couple R with S.
            pull = -(self._gram[index].double() @ blocks)
            factor = self._factor(index, keep_rows)
            solved = torch.cholesky_solve(pull * kept.unsqueeze(-1), factor)
            blocks.add_(solved * kept.unsqueeze(-1))

        self._each_unit(solve)
        return change

    def _factor(self, index: int, transform: Callable[[Tensor], Tensor]) -> Tensor:
        """Cholesky factor of a transformed F of one unit; raises damping where needed."""

        def attempt(damping: Tensor) -> tuple[Tensor, Tensor]:
            damped = self._gram[index].to(torch.float64, copy=True)
            _diagonal(damped).add_(damping.unsqueeze(-1))
            matrix = transform(damped)
            factor, bad = cholesky(matrix)
            pivots = _diagonal(factor).square()
            smallest = _SMALLEST_PIVOT * _diagonal(matrix)
            return factor, bad | ~(pivots > smallest).all(dim=-1)

        return raise_until_definite(attempt, self._dampings[index])


def _diagonal(matrices: Tensor) -> Tensor:
    """View the diagonals of ``[K, n, n]`` as ``[K, n]``."""
    return matrices.diagonal(dim1=-2, dim2=-1)
