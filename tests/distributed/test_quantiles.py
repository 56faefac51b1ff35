"""Quantiles of layers, against sorted lists."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lightning_woodfisher.distributed.communicator import Communicator
from lightning_woodfisher.distributed.quantiles import quantiles_by_group
from lightning_woodfisher.pruning.report import SALIENCY_SHARES


def by_sorting(values: Tensor, groups: Tensor, number: int) -> list[tuple[float, ...]]:
    found = []
    for group in range(number):
        own = sorted(v for v in values[groups == group].tolist() if v < math.inf)
        ranks = [max(1, math.ceil(s * len(own))) for s in SALIENCY_SHARES]
        found.append(tuple(own[r - 1] for r in ranks) if own else ())
    return found


def spread(count: int, seed: int) -> Tensor:
    """Return values over thirty orders of magnitude, with ties, zeros and infinities."""
    generator = torch.Generator().manual_seed(seed)
    values = 10.0 ** (torch.rand(count, generator=generator).double() * 30 - 25)
    values[::7] = values[0]
    values[::11] = 0.0
    values[::13] = math.inf
    values[3] = 5e-324
    return values


@pytest.mark.parametrize("count", [5, 400, 3000])
def test_equal_to_sorting(comm: Communicator, count: int) -> None:
    values = spread(count, count)
    # Layers of very different size; the last one is empty, the one before has infinities.
    groups = (torch.arange(count) % 17).clamp(max=3)
    groups[values == math.inf] = 4
    found = quantiles_by_group(values, groups, 6, SALIENCY_SHARES, comm)
    assert found == by_sorting(values, groups, 6)
    assert found[4:] == [(), ()]


def test_extremes_and_nothing_at_all(comm: Communicator) -> None:
    values, groups = torch.tensor([3.0, 1.0, 2.0]).double(), torch.zeros(3).long()
    assert quantiles_by_group(values, groups, 1, (0.0, 0.5, 1.0), comm) == [(1, 2, 3)]
    empty = quantiles_by_group(values[:0], groups[:0], 2, SALIENCY_SHARES, comm)
    assert empty == [(), ()]
