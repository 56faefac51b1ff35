"""WoodFisher: Optimal Brain Surgeon with the blockwise inverse of the empirical Fisher."""

from __future__ import annotations

__all__ = ["WoodFisher"]

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from lightning_woodfisher.criteria.base import Criterion
from lightning_woodfisher.distributed import Communicator
from lightning_woodfisher.fisher import (
    FisherConfig,
    InverseFisher,
    block_cost,
    full_column_chunk,
    make_inverse_fisher,
)
from lightning_woodfisher.obs import Update, saliency, weight_update
from lightning_woodfisher.partition import Partition, make_partition


class WoodFisher(Criterion):
    """Saliency w²/(2[F⁻¹]_qq) and the OBS update (Singh & Alistarh, NeurIPS 2020)."""

    can_restrict: ClassVar[bool] = True

    def __init__(self, fisher: FisherConfig, update: Update) -> None:
        super().__init__(fisher, update)
        self.damping = fisher.damping
        self._inverse: InverseFisher | None = None

    def layout(self, segments: Sequence[int], world_size: int) -> Partition:
        """Cut the active weights into blocks of the Fisher.

        Args:
            segments: active weights of each tensor.
            world_size: number of ranks.

        Returns:
            Blocks of ``block_size``; for the full Fisher, runs of its columns.
        """
        fisher = self.fisher
        return make_partition(
            segments,
            fisher.block_size or full_column_chunk(segments),
            world_size,
            block_cost(fisher.num_gradients, fisher.block_size, fisher.engine),
        )

    def begin(self, partition: Partition, communicator: Communicator) -> None:
        """Make the empty Fisher of this rank's blocks.

        Args:
            partition: what :meth:`layout` gave.
            communicator: the ranks.
        """
        self._inverse = make_inverse_fisher(
            partition,
            self.fisher.num_gradients,
            self.fisher.damping,
            communicator,
            block_size=self.fisher.block_size,
            engine=self.fisher.engine,
            precision=self.fisher.precision,
            offload_rows=self.fisher.offload_rows,
            centered=self.fisher.centered,
        )

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

    def score(self, weights: Tensor) -> Tensor:
        """Invert the Fisher and give the saliencies.

        Args:
            weights: float64 ``[D_r]``.

        Returns:
            ρ, float64 ``[D_r]``.
        """
        self.inverse_fisher.factorize()
        return saliency(weights, self.inverse_fisher.diagonal())

    def compensate(self, weights: Tensor, removed: Tensor) -> Tensor:
        """Compute the OBS update.

        Args:
            weights: float64 ``[D_r]``.
            removed: bool ``[D_r]``.

        Returns:
            δ, float64 ``[D_r]``.
        """
        return weight_update(weights, removed, self.inverse_fisher, self.update)

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
        return self.inverse_fisher.raised()

    @property
    def state_bytes(self) -> int:
        """Bytes of this rank's Fisher state."""
        return self.inverse_fisher.state_bytes
