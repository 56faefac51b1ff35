"""WoodFisher: Optimal Brain Surgeon with the blockwise inverse of the empirical Fisher."""

from __future__ import annotations

__all__ = ["WoodFisher"]

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from lightning_woodfisher.criteria.compensating import CompensatingCriterion
from lightning_woodfisher.criteria.obs import Update, saliency, weight_update
from lightning_woodfisher.distributed.communicator import Communicator
from lightning_woodfisher.fisher.config import FisherConfig, choose_engine
from lightning_woodfisher.fisher.inverse import (
    InverseFisher,
    block_cost,
    full_column_chunk,
    make_inverse_fisher,
)
from lightning_woodfisher.weights.partition import (
    Partition,
    align_block_size,
    make_partition,
)
from lightning_woodfisher.weights.patterns import (
    SMALL_GROUP,
    GroupRun,
    Pattern,
    group_costs,
)


class WoodFisher(CompensatingCriterion):
    """Saliency w²/(2[F⁻¹]_qq) and the OBS update (Singh & Alistarh, NeurIPS 2020)."""

    can_restrict: ClassVar[bool] = True

    def __init__(self, fisher: FisherConfig, update: Update) -> None:
        super().__init__(fisher, update)
        self.damping = fisher.damping
        self._inverse: InverseFisher | None = None

    def layout(
        self,
        segments: Sequence[int],
        world_size: int,
        group_sizes: Sequence[int] | None = None,
    ) -> Partition:
        """Cut the active weights into blocks of the Fisher.

        Args:
            segments: active weights of each tensor.
            world_size: number of ranks.
            group_sizes: weights of each tensor that go together.

        Returns:
            Blocks of ``block_size``; for the full Fisher, runs of its columns. With groups
            blocks are whole groups, or equal parts of one if groups are large.
        """
        fisher = self.fisher
        size = fisher.block_size or full_column_chunk(segments)
        sizes: int | list[int] = size
        if group_sizes:
            sizes = [
                align_block_size(size, group, self._may_cut(group))
                for group in group_sizes
            ]
        return make_partition(
            segments,
            sizes,
            world_size,
            block_cost(fisher),
            group_sizes,
        )

    def _may_cut(self, group_size: int) -> bool:
        # Across blocks of a block-diagonal F the cost of a group is a sum.
        return self.fisher.block_size is not None and group_size > SMALL_GROUP

    def begin(self, partition: Partition, communicator: Communicator) -> None:
        """Make the empty Fisher of this rank's blocks.

        Args:
            partition: what :meth:`layout` gave.
            communicator: the ranks.
        """
        self._inverse = make_inverse_fisher(partition, self.fisher, communicator)

    @property
    def inverse_fisher(self) -> InverseFisher:
        """This rank's blocks.

        Raises:
            RuntimeError: before :meth:`begin`.
        """
        if self._inverse is None:
            raise RuntimeError("call begin() first")
        return self._inverse

    def observe(self, rows: Tensor) -> None:
        """Add gradients to the Fisher.

        Args:
            rows: tensor ``[n, D_r]``.
        """
        self.inverse_fisher.observe(rows)

    def leave_out(self, number: int) -> None:
        """Make N the number of rows that have come.

        Args:
            number: of gradients that were not finite.
        """
        self.inverse_fisher.leave_out(number)

    def score(self, weights: Tensor) -> Tensor:
        """Invert the Fisher and give the saliencies.

        Args:
            weights: float64 ``[D_r]``.

        Returns:
            ρ, float64 ``[D_r]``.
        """
        self.inverse_fisher.factorize()
        return saliency(weights, self.inverse_fisher.diagonal())

    def score_groups(
        self, weights: Tensor, runs: Sequence[GroupRun], pattern: Pattern
    ) -> tuple[Tensor, Tensor]:
        """Invert the Fisher and give the joint saliencies of groups.

        Args:
            weights: float64 ``[D_r]``.
            runs: the groups of this rank.
            pattern: what goes together.

        Returns:
            ½ w_Sᵀ([F⁻¹]_SS)⁻¹w_S, float64 ``[G_r]``, and S, bool ``[D_r]``.
        """
        inverse = self.inverse_fisher
        inverse.factorize()
        leaving = torch.zeros_like(weights, dtype=torch.bool)
        costs = [weights.new_zeros(run.count) for run in runs]
        sizes = [0] * len(inverse.units)
        by_unit = {run.unit: i for i, run in enumerate(runs)}
        cut = []
        for i, run in enumerate(runs):
            if run.size <= inverse.units[run.unit].size:
                sizes[run.unit] = run.size
            else:
                cut.append(i)

        def compare(unit: int, blocks: Tensor) -> None:
            index = by_unit[unit]
            run = runs[index]
            values = weights[run.local].view(run.count, run.size)
            found, chosen = group_costs(blocks[: run.count], values, pattern)
            costs[index] = found
            leaving[run.local] = chosen.flatten()

        inverse.visit_sub_blocks(sizes, compare)
        if cut:
            # S is whole blocks, so that ([F⁻¹]_SS)⁻¹ is F_SS.
            shares = 0.5 * weights * inverse.fisher_matvec(weights)
            for i in cut:
                run = runs[i]
                own = shares[run.local].view(run.count, run.size)
                costs[i] = own.sum(dim=1).clamp(min=0.0)
                leaving[run.local] = True
        return torch.cat([weights.new_zeros(0), *costs]), leaving

    def _change(self, weights: Tensor, removed: Tensor, update: Update) -> Tensor:
        return weight_update(weights, removed, self.inverse_fisher, update)

    def restrict(self, kept: Tensor) -> None:
        """Drop weights from the Fisher; the next :meth:`score` inverts what is left.

        Args:
            kept: bool ``[D_r]``.
        """
        self.inverse_fisher.restrict(kept)

    def predicted_increase(self, change: Tensor) -> Tensor:
        """Give each weight's share of ½δᵀFδ.

        Args:
            change: δ, float64 ``[D_r]``.

        Returns:
            ½ δ∘Fδ, float64 ``[D_r]``.
        """
        return 0.5 * change * self.inverse_fisher.fisher_matvec(change)

    def raised_damping(self) -> dict[int, float]:
        """List blocks whose λ had to be raised.

        Returns:
            λ by first active weight (global number).
        """
        return self.inverse_fisher.raised_damping()

    @property
    def engine(self) -> str:
        """``"primal"``, ``"dual"`` or ``"full"``."""
        return choose_engine(self.fisher)

    @property
    def state_bytes(self) -> int:
        """Bytes of this rank's Fisher state."""
        return self.inverse_fisher.state_bytes
