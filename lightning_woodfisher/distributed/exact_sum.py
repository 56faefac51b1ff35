"""Add floating-point numbers over ranks, with a result that does not depend on the order.

The numbers are first converted to 64-bit integers on a common scale, because integer
addition does not depend on the order. The result therefore has the same bits for any number
of ranks.
"""

from __future__ import annotations

__all__ = ["ExactSum"]

import math
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_woodfisher.base.errors import PruningError
from lightning_woodfisher.distributed.communicator import Communicator

# |sum| < 2**61 fits into int64, with room for rounding.
_FIXED_POINT_BITS = 61


class ExactSum:
    """A sum over summands and ranks in any order.

    Each summand is rounded to a multiple of ``bound * 2**-61`` (256 times finer than
    float64 resolves at ``bound``) and added as an integer.

    Args:
        communicator: the ranks.
        bound: scalar; an upper bound of the magnitude of any partial sum over *all* ranks.
            The largest bound of all ranks is used.
        shape: shape of a summand.

    Raises:
        PruningError: if the bound is not finite.
    """

    def __init__(
        self, communicator: Communicator, bound: Tensor, shape: Sequence[int]
    ) -> None:
        self._comm = communicator
        largest = float(
            communicator.maximum(bound.detach().double().reshape(1).clone())
        )
        if not math.isfinite(largest):
            raise PruningError(f"cannot add numbers bounded by {largest} over ranks")
        exponent = _FIXED_POINT_BITS - (math.frexp(largest)[1] if largest > 0 else 0)
        # In two steps, because the exponent of a float64 ends at 1023.
        half = exponent // 2
        self._up = math.ldexp(1.0, half), math.ldexp(1.0, exponent - half)
        self._total = torch.zeros(
            tuple(shape), dtype=torch.int64, device=communicator.device
        )
        self._lock = threading.Lock()

    def add(self, summand: Tensor) -> None:
        """Add one summand. Several threads may do so at once.

        Args:
            summand: float32 or float64 tensor.
        """
        scaled = (
            summand.to(torch.float64, copy=True).mul_(self._up[0]).mul_(self._up[1])
        )
        integers = scaled.round_().to(torch.int64)
        with self._lock:
            self._total += integers

    def result(self) -> Tensor:
        """Add up over the ranks. Call it once, on every rank.

        Returns:
            float64 tensor, bit-identical on every rank and for every distribution of the
            summands over ranks.
        """
        total = self._comm.sum_integers(self._total)
        return total.double() / self._up[0] / self._up[1]
