"""Second moments of the inputs and targets of a linear map, over all ranks.

The sums are exact (:mod:`~.distributed.exact_sum`), so that they have the same bits for any
number of ranks.
"""

from __future__ import annotations

__all__ = ["InputSums", "MomentSums", "Sample", "require_finite"]

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_woodfisher.base.errors import PruningError
from lightning_woodfisher.base.full_float32 import at_least_float32
from lightning_woodfisher.data.batches import Batches
from lightning_woodfisher.distributed.communicator import Communicator
from lightning_woodfisher.distributed.exact_sum import ExactSum
from lightning_woodfisher.layerwise.maps import LinearMap
from lightning_woodfisher.layerwise.solver import Moments

# The bounds of the sums are computed from squares, which round.
_SLACK = 2.0


@dataclass(frozen=True)
class Sample:
    """Inputs and targets of a map for one mini-batch.

    Attributes:
        inputs: of the pruned network.
        targets: of the shape of the map's outputs.
    """

    inputs: Tensor
    targets: Tensor


@dataclass(frozen=True)
class InputSums:
    """Sums over all positions of all ranks.

    Attributes:
        count: number of positions.
        products: Σ xxᵀ, float64 ``[g, d, d]``.
        total: Σ x, float64 ``[g, d]``.
    """

    count: int
    products: Tensor
    total: Tensor


class MomentSums:
    """Add up the moments of one map. Call all methods on all ranks.

    Args:
        linear: the map.
        samples: those of this rank.
        batches: number of mini-batches of all ranks.
        comm: the ranks.
    """

    def __init__(
        self,
        linear: LinearMap,
        samples: Sequence[Sample],
        batches: int,
        comm: Communicator,
    ) -> None:
        self._map = linear
        self._samples = samples
        self._batches = batches
        self._comm = comm

    def add_up(
        self, centered: bool, known: InputSums | None = None
    ) -> tuple[Moments, InputSums]:
        """Add up products of inputs and targets, and make means of all sums.

        Args:
            centered: subtract the products of means, as for a map with a bias.
            known: the sums of the inputs, if another map has the same inputs.

        Returns:
            The moments, and the sums of the inputs.

        Raises:
            PruningError: if all positions are padding.
        """
        # The largest sums of squares in a mini-batch, and its positions.
        x_most, y_most, positions, count = 0.0, 0.0, 0, 0
        for sample in self._samples:
            # A pixel is in each place of a patch at most once.
            x_most = max(x_most, self._largest_square(sample.inputs))
            y_most = max(y_most, self._largest_square(sample.targets))
            outputs = self._map.channels_last(sample.targets)
            here = outputs.numel() // max(1, outputs.shape[-1])
            positions, count = max(positions, here), count + here
        most = torch.tensor([x_most, y_most, float(positions)], dtype=torch.float64)
        x_most, y_most, length = self._comm.maximum(most.to(self._comm.device)).tolist()
        groups, o, d = self._map.sides
        # By the inequality of Cauchy and Schwarz.
        yx = self._sum(math.sqrt(y_most * x_most), (groups, o, d))
        yy = self._sum(y_most, (groups, o))
        y_total = self._sum(math.sqrt(y_most * length), (groups, o))
        xx = self._sum(x_most, (groups, d, d))
        x_total = self._sum(math.sqrt(x_most * length), (groups, d))
        for sample in self._samples:
            pieces = self._map.pieces(
                at_least_float32(sample.inputs), at_least_float32(sample.targets)
            )
            for x, y in pieces:
                yx.add(y.mT @ x)
                yy.add(y.square().sum(1))
                y_total.add(y.sum(1))
                if known is None:
                    xx.add(x.mT @ x)
                    x_total.add(x.sum(1))
        if known is None:
            number = torch.tensor([count], device=self._comm.device)
            number = self._comm.sum_integers(number)
            known = InputSums(int(number), xx.result(), x_total.result())
        n = known.count
        if not n:
            raise PruningError(
                f"{self._map.name} has no inputs that count: the attention_mask marks all "
                "tokens as padding, or the mini-batches are empty"
            )
        inputs, products, squares = known.products / n, yx.result() / n, yy.result() / n
        x_mean, y_mean = known.total / n, y_total.result() / n
        if centered:
            inputs = inputs - x_mean.unsqueeze(-1) * x_mean.unsqueeze(-2)
            products = products - y_mean.unsqueeze(-1) * x_mean.unsqueeze(-2)
            squares = (squares - y_mean.square()).clamp(min=0.0)
        return Moments(inputs, products, squares, x_mean, y_mean), known

    def _largest_square(self, values: Tensor) -> float:
        """Return the largest sum of squares of a channel."""
        channels = self._map.channels_last(at_least_float32(values))
        return float(channels.square().flatten(0, -2).sum(0).max())

    def _sum(self, bound: float, shape: Sequence[int]) -> ExactSum:
        bounds = torch.tensor(
            [_SLACK * self._batches * bound],
            dtype=torch.float64,
            device=self._comm.device,
        )
        return ExactSum(self._comm, bounds, shape)


def require_finite(
    linear: LinearMap, batches: Batches, index: int, inputs: Tensor, outputs: Tensor
) -> None:
    """Refuse inputs and outputs that are not finite.

    Args:
        linear: the map.
        batches: the mini-batches.
        index: index of the mini-batch.
        inputs: inputs of the map.
        outputs: its outputs or targets.

    Raises:
        PruningError: if one is not finite.
    """
    # Sums are several times faster to compute; those of finite numbers rarely overflow.
    if bool((inputs.sum() + outputs.sum()).isfinite()):
        return
    if not bool(inputs.isfinite().all() & outputs.isfinite().all()):
        raise PruningError(
            f"inputs or outputs of {linear.name} are not finite in mini-batch {index} "
            f"({batches.describe(index)})"
        )
