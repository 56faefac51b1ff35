"""Second moments of the inputs and targets of a linear map, over all ranks.

The sums are exact (:mod:`~.distributed.exact_sum`), so that they have the same bits for any
number of ranks.
"""

from __future__ import annotations

__all__ = ["InputSums", "MomentSums", "Sample"]

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

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
        products: Σ x̃x̃ᵀ with x̃ = (x, 1), float64 ``[g, d + 1, d + 1]``.
        largest: bound of the sum of squares of one input in a mini-batch.
    """

    products: Tensor
    largest: float

    @property
    def count(self) -> float:
        """Number of positions."""
        return float(self.products[0, -1, -1])


class MomentSums:
    """Add up the moments of one map.

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

    def inputs(self) -> InputSums:
        """Add up products of inputs. Call on all ranks."""
        largest = 0.0
        for sample in self._samples:
            # A pixel is in each place of a patch at most once.
            x = sample.inputs
            axis = -1 - len(self._map.dilation)
            squares = _wide(x).square().movedim(axis, -1).flatten(0, -2).sum(0)
            positions = math.prod(self._map.channels_last(sample.targets).shape[:-1])
            largest = max(largest, float(squares.max()), float(positions))
        largest = float(self._comm.maximum(self._vector(largest)))
        groups, _, d = self._map.sides
        total = self._sum(largest, (groups, d + 1, d + 1))
        for sample in self._samples:
            for x, _ in self._pieces(sample):
                total.add(x.mT @ x)
        return InputSums(total.result(), largest)

    def moments(self, inputs: InputSums, centered: bool) -> Moments:
        """Add up products with targets, and make means of all sums. Call on all ranks.

        Args:
            inputs: the sums of the inputs.
            centered: subtract the products of means, as for a map with a bias.

        Returns:
            The moments.
        """
        squares = 0.0
        for sample in self._samples:
            y = self._map.channels_last(_wide(sample.targets)).flatten(0, -2)
            squares = max(squares, float(y.square().sum(0).max()))
        squares = float(self._comm.maximum(self._vector(squares)))
        groups, o, d = self._map.sides
        # By the inequality of Cauchy and Schwarz.
        products = self._sum(math.sqrt(squares * inputs.largest), (groups, o, d + 1))
        total = self._sum(squares, (groups, o))
        for sample in self._samples:
            for x, y in self._pieces(sample):
                products.add(y.mT @ x)
                total.add(y.square().sum(1))
        count = inputs.count
        xx, yx, yy = (
            inputs.products / count,
            products.result() / count,
            total.result() / count,
        )
        x_mean, y_mean = xx[:, :-1, -1], yx[..., -1]
        xx, yx = xx[:, :-1, :-1], yx[..., :-1]
        if centered:
            xx = xx - x_mean.unsqueeze(-1) * x_mean.unsqueeze(-2)
            yx = yx - y_mean.unsqueeze(-1) * x_mean.unsqueeze(-2)
            yy = (yy - y_mean.square()).clamp(min=0.0)
        return Moments(xx, yx, yy, x_mean, y_mean)

    def _pieces(self, sample: Sample) -> list[tuple[Tensor, Tensor]]:
        found = []
        for x, y in self._map.pieces(_wide(sample.inputs), _wide(sample.targets)):
            found.append((torch.cat([x, x.new_ones(*x.shape[:2], 1)], dim=2), y))
        return found

    def _sum(self, bound: float, shape: Sequence[int]) -> ExactSum:
        return ExactSum(self._comm, self._vector(_SLACK * self._batches * bound), shape)

    def _vector(self, value: float) -> Tensor:
        return torch.tensor([value], dtype=torch.float64, device=self._comm.device)


def _wide(values: Tensor) -> Tensor:
    """Convert 16-bit numbers to float32."""
    return values if values.dtype == torch.float64 else values.float()
