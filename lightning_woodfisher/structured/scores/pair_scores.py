"""SOSP-I: what removing two structures together costs more than removing each.

With rows u of ``Q = UᵀU / N'`` (:mod:`.contributions`), the cost of a set π of structures is
``πᵀAπ`` with ``A_ss' = ½|Q_ss'| + δ_ss'|θ_s·g|`` (SOSP; Nonnenmacher et al. 2022). A is never
formed: a row of it takes one product with U.
Shapes: S structures, M rows of U.
"""

from __future__ import annotations

__all__ = ["PairScores"]

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lightning_woodfisher.structured.config import StructureLimits

_ROWS_AT_ONCE = 256


class PairScores:
    """The matrix A of all pairs of structures.

    Args:
        rows: U, float64 ``[M, S]``.
        samples: N', by which UᵀU is divided; M for one row each.
        first_order: θ_s·g, float64 ``[S]``; the sign does not count.

    Attributes:
        size: S.
        rows: as given.
        samples: as given.
        first_order: ``|θ_s·g|``.
    """

    def __init__(self, rows: Tensor, samples: int, first_order: Tensor) -> None:
        self.rows = rows.double()
        self.samples = samples
        self.first_order = first_order.double().abs()
        self.size = rows.shape[1]

    def curvature(self, structures: Sequence[int] | Tensor) -> Tensor:
        """Compute rows of Q, with signs.

        Args:
            structures: k numbers.

        Returns:
            float64 ``[k, S]``.
        """
        chosen = torch.as_tensor(structures, dtype=torch.int64)
        return self.rows[:, chosen].T @ self.rows / self.samples

    def row(self, structure: int) -> Tensor:
        """Compute a row of A.

        Args:
            structure: its number.

        Returns:
            float64 ``[S]``.
        """
        row = 0.5 * self.curvature([structure])[0].abs()
        row[structure] += self.first_order[structure]
        return row

    def diagonal(self) -> Tensor:
        """Compute the cost of each structure alone.

        Returns:
            A_ss, float64 ``[S]``.
        """
        return 0.5 * self.rows.square().sum(dim=0) / self.samples + self.first_order

    def row_sums(self) -> Tensor:
        """Add up what each structure costs together with all others.

        Returns:
            float64 ``[S]``.
        """
        sums = [
            0.5 * self.curvature(numbers).abs().sum(dim=1)
            for numbers in torch.split(torch.arange(self.size), _ROWS_AT_ONCE)
        ]
        return torch.cat(sums) + self.first_order

    def objective(self, structures: Sequence[int] | Tensor) -> float:
        """Compute the cost of a set.

        Args:
            structures: numbers of its members.

        Returns:
            πᵀAπ.
        """
        chosen = torch.as_tensor(structures, dtype=torch.int64)
        if not len(chosen):
            return 0.0
        pairs = self.curvature(chosen)[:, chosen].abs().sum()
        return float(0.5 * pairs + self.first_order[chosen].sum())

    def greedy(
        self, sizes: Sequence[int], limits: StructureLimits, count: int | None = None
    ) -> Tensor:
        """Remove one structure after the other, each time the one that adds the least.

        What a structure adds only grows as others go. So these costs never fall along the
        way, and the K smallest are the K that go first.

        Args:
            sizes: structures of each group, S in all.
            limits: of what may go from a group; ``round_to`` is not looked at.
            count: how many steps are needed; None for all that may go.

        Returns:
            float64 ``[S]``: what each has added when it went; infinite where it stays.
        """
        free = StructureLimits(limits.min_kept, limits.min_kept_share, limits.max_ratio)
        left = [free.removable(size)[-1] for size in sizes]
        group_of = torch.repeat_interleave(
            torch.arange(len(sizes)), torch.tensor(sizes)
        )
        added = torch.full((self.size,), math.inf, dtype=torch.float64)
        marginal = self.diagonal()
        open_ = torch.tensor(left)[group_of] > 0
        for structure in self._steps(marginal, open_, group_of, left, count):
            added[structure] = marginal[structure]
            marginal += 2 * self.row(structure)
        return added

    def _steps(
        self,
        marginal: Tensor,
        open_: Tensor,
        group_of: Tensor,
        left: list[int],
        count: int | None,
    ) -> Iterator[int]:
        for _ in range(min(sum(left), self.size if count is None else count)):
            structure = int(torch.where(open_, marginal, math.inf).argmin())
            yield structure
            group = int(group_of[structure])
            left[group] -= 1
            open_[structure] = False
            if not left[group]:
                open_ &= group_of != group
