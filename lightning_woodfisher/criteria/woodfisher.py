"""WoodFisher: Optimal Brain Surgeon with the blockwise inverse of the empirical Fisher."""

from __future__ import annotations

__all__ = ["WoodFisher"]

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from lightning_woodfisher.criteria.base import CompensatingCriterion
from lightning_woodfisher.criteria.obs import Update, saliency, weight_update
from lightning_woodfisher.distributed.communicator import Communicator
from lightning_woodfisher.fisher.config import choose_engine
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
    """Saliency w²/(2[F⁻¹]_qq) and the OBS update (Singh & Alistarh, NeurIPS 2020).

    A group S of weights costs ½ w_Sᵀ([F⁻¹]_SS)⁻¹w_S.

    Attributes:
        inverse_fisher: this rank's blocks, from :meth:`begin` on.
    """

    can_restrict: ClassVar[bool] = True
    inverse_fisher: InverseFisher

    @override
    def layout(
        self,
        segments: Sequence[int],
        world_size: int,
        group_sizes: Sequence[int] | None = None,
    ) -> Partition:
        # Blocks of block_size, or chunks of the columns of the full Fisher. With groups, a
        # block is whole groups, or an equal part of a large group.
        size = self.fisher.block_size or full_column_chunk(segments)
        sizes: int | list[int] = size
        if group_sizes:
            # The cost of a group is a sum over the blocks of a block-diagonal F.
            may_cut = self.fisher.block_size is not None
            sizes = [
                align_block_size(size, group, may_cut and group > SMALL_GROUP)
                for group in group_sizes
            ]
        cost = block_cost(self.fisher)
        return make_partition(segments, sizes, world_size, cost, group_sizes)

    @override
    def begin(self, partition: Partition, communicator: Communicator) -> None:
        self.inverse_fisher = make_inverse_fisher(partition, self.fisher, communicator)

    @override
    def observe(self, rows: Tensor) -> None:
        self.inverse_fisher.observe(rows)

    @override
    def leave_out(self, number: int) -> None:
        self.inverse_fisher.leave_out(number)

    @override
    def score(self, weights: Tensor) -> Tensor:
        self.inverse_fisher.factorize()
        return saliency(weights, self.inverse_fisher.diagonal())

    @override
    def score_groups(
        self, weights: Tensor, runs: Sequence[GroupRun], pattern: Pattern
    ) -> tuple[Tensor, Tensor]:
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
            # S consists of whole blocks, so ([F⁻¹]_SS)⁻¹ is F_SS.
            shares = 0.5 * weights * inverse.fisher_matvec(weights)
            for i in cut:
                run = runs[i]
                own = shares[run.local].view(run.count, run.size)
                costs[i] = own.sum(dim=1).clamp(min=0.0)
                leaving[run.local] = True
        return torch.cat([weights.new_zeros(0), *costs]), leaving

    def _change(self, weights: Tensor, removed: Tensor, update: Update) -> Tensor:
        return weight_update(weights, removed, self.inverse_fisher, update)

    @override
    def restrict(self, kept: Tensor) -> None:
        self.inverse_fisher.restrict(kept)

    @override
    def predicted_increase(self, change: Tensor) -> Tensor:
        return 0.5 * change * self.inverse_fisher.fisher_matvec(change)

    @override
    def raised_damping(self) -> dict[int, float]:
        return self.inverse_fisher.raised_damping()

    @override
    def count_arithmetics(self) -> Mapping[str, int]:
        return self.inverse_fisher.count_arithmetics()

    @property
    @override
    def engine(self) -> str:
        return choose_engine(self.fisher)

    @property
    @override
    def state_bytes(self) -> int:
        return self.inverse_fisher.state_bytes
