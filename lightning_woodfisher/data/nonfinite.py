"""Gradients that are NaN or infinite: how many may be left out, and which ones were."""

from __future__ import annotations

__all__ = ["NonFiniteError", "SkippedGradients", "leave_out"]

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_woodfisher.base.errors import PruningError
from lightning_woodfisher.distributed.communicator import Communicator


class NonFiniteError(PruningError):
    """A loss or a gradient of one mini-batch is NaN or infinite."""


class SkippedGradients:
    """What is left out of one collection; the same on every rank.

    Args:
        limit: most gradients that may be left out.
        communicator: the ranks.

    Attributes:
        indices: numbers of those left out so far, in order.
        failure: says that there are too many, on the rank that has the first one too many.
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

    def note(self, index: int, error: NonFiniteError | None) -> None:
        """Remember how a gradient of this rank came out.

        Args:
            index: its number.
            error: what is wrong with it; None takes back what was noted before.
        """
        self._own.pop(index, None)
        if error is not None:
            self._own[index] = error

    def agree(self, first: int, count: int) -> Tensor | None:
        """Find out which gradients of a round are left out. Call on all ranks.

        Args:
            first: number of the first gradient of the round.
            count: gradients of the round, on all ranks.

        Returns:
            bool tensor ``[count]``, True where a gradient is kept; None when all are.
        """
        if not self.allowed:
            return None
        flags = torch.zeros(count, dtype=torch.int64)
        for index in self._own:
            if first <= index < first + count:
                flags[index - first] = 1
        flags = self._comm.sum_integers(flags.to(self._comm.device))
        skipped = flags.nonzero().squeeze(1).tolist()
        self.indices.extend(first + place for place in skipped)
        if len(self.indices) > self._limit and self.failure is None:
            beyond = self._own.get(self.indices[self._limit])
            if beyond is not None:
                self.failure = PruningError(
                    f"{beyond}; that is one more than fisher.max_nonfinite={self._limit} "
                    "allows to be left out"
                )
        return flags == 0 if skipped else None


def leave_out(values: Sequence[float], skipped: Sequence[int]) -> list[float]:
    """Drop the numbers of gradients that were left out.

    Args:
        values: one for each gradient.
        skipped: numbers of those to drop.

    Returns:
        The others, in order.
    """
    gone = frozenset(skipped)
    return [value for index, value in enumerate(values) if index not in gone]
