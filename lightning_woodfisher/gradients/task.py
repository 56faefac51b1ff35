"""Description of one collection of gradients."""

from __future__ import annotations

__all__ = ["GradientTask"]

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lightning_woodfisher.base.types import common_dtype
from lightning_woodfisher.data.isolation import derive_seed, seeded
from lightning_woodfisher.data.losses import LossSource
from lightning_woodfisher.distributed.communicator import Communicator


@dataclass(frozen=True)
class GradientTask:
    """The gradients that one collection computes.

    Args:
        source: source of losses, inside its session.
        parameters: the parameters to differentiate with respect to, by name.
        positions: int64 positions of the active weights in each flattened parameter, or in
            this rank's shard of a sharded parameter.
        count: N, the number of mini-batches.
        seed: gradient i is computed under ``derive_seed(seed, i)``.
        comm: the ranks.
        losses: receives the N losses in order, after the last gradient.
        tick: called with the number of gradients that all ranks have finished.
    """

    source: LossSource
    parameters: Mapping[str, nn.Parameter]
    positions: Mapping[str, Tensor]
    count: int
    seed: int
    comm: Communicator
    losses: list[float] = field(default_factory=list)
    tick: Callable[[int], object] = lambda _: None

    @property
    def dtype(self) -> torch.dtype:
        """Dtype in which gradients are computed and exchanged."""
        return common_dtype(self.parameters.values())

    def seeded(self, index: int) -> contextlib.AbstractContextManager[None]:
        """Seed all generators for one gradient, and restore them afterwards.

        Args:
            index: number of the gradient.

        Returns:
            A context manager.
        """
        return seeded(derive_seed(self.seed, index))
