"""Inverse Fisher from Cholesky factors of the B×B blocks of F, for B <= N."""

from __future__ import annotations

__all__ = ["PrimalInverseFisher"]

import math

import torch
from torch import Tensor
from typing_extensions import override

from lightning_woodfisher.base.full_float32 import at_least_float32
from lightning_woodfisher.fisher.base import (
    BlockwiseInverseFisher,
    group_products,
)
from lightning_woodfisher.fisher.linalg import (
    ARITHMETICS,
    LARGEST_SPREAD,
    Arithmetic,
    add_half_product,
    cholesky,
    invert_lower,
    mirror,
    multiply,
    smallest_share,
    spread_of,
)

# Measured for gradients with normal, log-normal, shared and widely scaled entries: if no pivot
# is smaller than this share of its diagonal entry, a float32 factor changes F⁻¹ by less than
# 7e-4. Otherwise the unit is factorized in float64.
_SMALLEST_IN_FLOAT32 = 2.0**-8
# If at most this share of every block is kept, its rows and columns are gathered.
_LARGEST_SHARE_GATHERED = 0.75
# Cholesky may succeed by chance on a block that is singular in float64. A pivot must not be
# smaller than this share of the diagonal entry that it is computed from.
_SMALLEST_PIVOT = 1e-12


class PrimalInverseFisher(BlockwiseInverseFisher):
    """One B×B matrix for each block; gradients are added as they arrive and not kept.

    The sums of a unit start in float32 and change to float64 before float32 would lose
    digits that F⁻¹ needs. The factor is float32 unless that turns out not to be enough.
    """

    def _allocate(self) -> None:
        # If gradients are centered, G holds the rows minus c, the mean of the first ones.
        # The final correction N(ḡ − c)(ḡ − c)ᵀ is then small and cancels no digits.
        self._shift: Tensor | None = None
        self._shifted_sum = (
            self._full(self.size, 0.0) if self._fisher.centered else None
        )
        self._products: list[Arithmetic] = [self._arithmetics[0]] * len(self.units)
        single = self._arithmetics[0] == "float32"
        dtype = torch.float32 if single else torch.float64
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
        self._choose_products(rows)
        self._each_unit(lambda index: self._accumulate(index, rows))

    def _choose_products(self, rows: Tensor) -> None:
        """Choose the arithmetic of products with the next rows of all units, with one wait."""
        fisher = self._fisher
        # Sums that may not be precise enough any more; earlier ones were when they were added.
        open_units = [i for i, kind in enumerate(self._products) if kind != "float64"]
        if rows.dtype == torch.float64:
            spreads = dict.fromkeys(open_units, 0.0)
        elif len(self._arithmetics) == 1 or not open_units:
            return
        else:
            found: dict[int, Tensor] = {}

            def measure(index: int) -> None:
                added = torch.linalg.vector_norm(
                    self._columns(rows, index), dim=-1
                ).square()
                found[index] = spread_of(
                    (_diagonal(self._gram[index]) + added).max().double(),
                    self.units[index].size,
                    max(1, fisher.num_gradients - fisher.max_nonfinite),
                    fisher.damping,
                )

            self._each_unit(measure, open_units)
            read = torch.stack([found[index] for index in open_units]).tolist()
            spreads = dict(zip(open_units, read, strict=True))
        for index, spread in spreads.items():
            self._products[index] = next(
                kind
                for kind in self._arithmetics
                if not spread > LARGEST_SPREAD.get(kind, math.inf)
            )
            if self._products[index] != "float32":
                self._gram[index] = self._gram[index].double()

    def _accumulate(self, index: int, rows: Tensor) -> None:
        gram = self._gram[index]
        columns = self._columns(rows, index).to(gram.dtype)
        add_half_product(gram, columns, self._products[index] == "split")

    @override
    def _final_arithmetic(self, index: int) -> Arithmetic:
        products, factor = self._products[index], self._arithmetic(index)
        # Whichever has more digits; the factors of split products are float64.
        return max(products, factor, key=ARITHMETICS.index)

    def _columns(self, rows: Tensor, index: int) -> Tensor:
        """View a unit's part of the rows, minus c, as ``[K, B, n]``."""
        unit = self.units[index]
        rows = rows[:, self._local(unit)]
        rows = at_least_float32(rows)
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

        self._start_again()

    def _factorize_unit(self, index: int) -> Tensor:
        factor, verdicts = self._factor(index)
        self._keep_factor(index, factor)
        diagonal = invert_lower(factor).square_().sum(dim=-2)
        self._blocks(self._diagonal, self.units[index]).copy_(diagonal)
        return verdicts

    def _sub_blocks(self, index: int, size: int) -> tuple[Tensor, Tensor]:
        factor, verdicts = self._factor(index)
        products = group_products(invert_lower(factor), size)
        return products.flatten(0, 1).double(), verdicts

    def _solve(self, index: int, blocks: Tensor) -> Tensor:
        factor = self._factors.get(index)
        if factor is None:
            factor, _ = self._factor(index)
        target = blocks.to(factor.dtype).unsqueeze(-1)
        return torch.cholesky_solve(target, factor).squeeze(-1).double()

    def _multiply(self, index: int, blocks: Tensor) -> Tensor:
        return self._times(index, blocks.unsqueeze(-1)).squeeze(-1)

    def _times(self, index: int, blocks: Tensor) -> Tensor:
        """Return GᵀGv/N for v of ``[K, B, V]``, float64."""
        gram = self._gram[index]
        return multiply(gram, blocks.to(gram.dtype)).double()

    @override
    def constrained_solve(self, weights: Tensor, removed: Tensor) -> Tensor:
        counts = [self._blocks(~removed, unit).sum(dim=1).amax() for unit in self.units]
        # One wait for all units.
        self._most_kept = torch.stack(counts).tolist() if counts else []
        return super().constrained_solve(weights, removed)

    def _solve_kept(
        self, index: int, blocks: Tensor, kept: Tensor
    ) -> tuple[Tensor, Tensor]:
        # −F δ_S on the rows of R; λI does not couple R with S.
        target = -self._times(index, blocks) * kept.unsqueeze(-1)
        most = self._most_kept[index]
        if most > _LARGEST_SHARE_GATHERED * kept.shape[1]:
            factor, verdicts = self._factor(index, kept)
            solved = torch.cholesky_solve(target.to(factor.dtype), factor)
            return solved.double(), verdicts
        # Blocks that keep fewer weights have places of others, too.
        order = kept.byte().argsort(dim=1, descending=True, stable=True)
        places = order[:, : max(1, most)]
        factor, verdicts = self._factor(index, kept.gather(1, places), places)
        places = places.unsqueeze(-1).expand(-1, -1, target.shape[-1])
        right = target.gather(1, places).to(factor.dtype)
        solved = torch.cholesky_solve(right, factor).double()
        return target.zero_().scatter_(1, places, solved), verdicts

    def _factor(
        self, index: int, kept: Tensor | None = None, places: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Factorize F, or F_RR, of one unit.

        Args:
            index: index of the unit.
            kept: which rows and columns are in R, bool ``[K, m]``; None for F.
            places: the rows and columns to factorize, ``[K, m]``; None for all, m = B.

        Returns:
            L, ``[K, m, m]``, and the verdicts.
        """
        # With precision="float32" only products are float32, because λ would be raised.
        final = self._fisher.precision == "float32"
        single = not final and self._arithmetic(index) == "float32"
        dtype = torch.float32 if single else torch.float64
        matrix = self._gram[index]
        if places is not None:
            matrix = _gather(matrix, places)
        matrix = matrix.to(dtype, copy=places is None)
        _diagonal(matrix).add_(self._dampings[index].unsqueeze(-1))
        if kept is not None:
            # Rows and columns of removed weights become those of the identity.
            removed = ~kept
            matrix.masked_fill_(removed.unsqueeze(-1), 0.0)
            matrix.masked_fill_(removed.unsqueeze(-2), 0.0)
            _diagonal(matrix).add_(removed)
        factor, bad = cholesky(matrix)
        share = smallest_share(factor)
        return factor, self._judge(
            index,
            bad | ~(share > _SMALLEST_PIVOT),
            ~(share > (_SMALLEST_IN_FLOAT32 if single else 0.0)),
        )


def _gather(matrices: Tensor, places: Tensor) -> Tensor:
    """Gather rows and columns ``[K, m]`` of matrices ``[K, B, B]``."""
    count, size, _ = matrices.shape
    first = size * torch.arange(count, device=places.device).unsqueeze(1)
    rows = matrices.flatten(0, 1).index_select(0, (places + first).flatten())
    columns = places.unsqueeze(1).expand(-1, places.shape[1], -1)
    return rows.view(count, -1, size).gather(2, columns)


def _diagonal(matrices: Tensor) -> Tensor:
    """View the diagonals of ``[K, n, n]`` as ``[K, n]``."""
    return matrices.diagonal(dim1=-2, dim2=-1)
