"""Leave out gradients that are NaN or infinite, up to a limit."""

from __future__ import annotations

__all__ = ["NonFiniteError", "SkippedGradients"]

import torch
from torch import Tensor

from lightning_woodfisher.base.errors import PruningError
from lightning_woodfisher.base.host_copy import upload
from lightning_woodfisher.distributed.communicator import Communicator


class NonFiniteError(PruningError):
    """A loss or a gradient of one mini-batch is NaN or infinite."""


class SkippedGradients:
    """The gradients that are left out of one collection; the same on every rank.

    Args:
        limit: largest number of gradients that may be left out.
        communicator: the ranks.

    Attributes:
        indices: indices of the gradients left out so far, in order.
        failure: error for too many, on the rank that has the first one beyond the limit.
    """

    def __init__(self, limit: int, communicator: Communicator) -> None:
        self.indices: list[int] = []
        self.failure: PruningError | None = None
        self._limit = limit
        self._comm = communicator
        self._own: dict[int, NonFiniteError] = {}

    @property
    def allowed(self) -> bool:
        """Whether any may be left out."""
        return self._limit > 0

    def record(self, index: int, error: NonFiniteError | None) -> None:
        """Record whether a gradient of this rank is finite.

        Args:
            index: index of the gradient.
            error: what is wrong with it; None removes an earlier error.
        """
        self._own.pop(index, None)
        if error is not None:
            self._own[index] = error

    def find_kept(self, first: int, count: int) -> Tensor | None:
        """Find the gradients of a round that are kept. Call on all ranks.

        Args:
            first: index of the first gradient of the round.
            count: gradients of the round, on all ranks.

        Returns:
            int64 tensor, the places of the gradients that are kept; None if all are.
        """
        if not self.allowed:
            return None
        flags = torch.zeros(count, dtype=torch.int64)
        for index in self._own:
            if first <= index < first + count:
                flags[index - first] = 1
        if self._comm.world_size > 1:
            flags = self._comm.sum_integers(flags.to(self._comm.device)).cpu()
        skipped = flags.nonzero().squeeze(1).tolist()
        self.indices.extend(first + place for place in skipped)
        if len(self.indices) > self._limit and self.failure is None:
            beyond = self._own.get(self.indices[self._limit])
            if beyond is not None:
                self.failure = PruningError(
                    f"{beyond}; that is one more than fisher.max_nonfinite={self._limit} "
                    "allows to be left out"
                )
        kept = (flags == 0).nonzero().squeeze(1)
        return upload(kept, self._comm.device) if skipped else None
