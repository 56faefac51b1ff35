"""Quantiles of values that real processes share, against those of a sorted list."""

from __future__ import annotations

import math

import pytest
import torch
from rank_pool import RankPool
from torch import Tensor

from lightning_woodfisher.distributed.communicator import Communicator
from lightning_woodfisher.distributed.quantiles import quantiles_by_group
from lightning_woodfisher.pruning.report import SALIENCY_SHARES

COUNT = 997


def values_and_groups() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    values = torch.randn(COUNT, generator=generator).double().exp()
    values[::9] = values[1]
    # Consecutive layers, as the ranks hold them; the second is tiny.
    return values, torch.arange(COUNT).ge(600).long() + torch.arange(COUNT).ge(604)


def quantiles_of_a_share(cuts: list[int]) -> list[tuple[float, ...]]:
    """Job: each rank has what lies between two cuts."""
    comm = Communicator()
    own = slice(cuts[comm.rank], cuts[comm.rank + 1])
    values, groups = values_and_groups()
    return quantiles_by_group(values[own], groups[own], 4, SALIENCY_SHARES, comm)


@pytest.mark.parametrize("cuts", [[0, 602, COUNT], [0, 0, 300, COUNT]])
def test_ranks_find_what_sorting_finds(ranks: RankPool, cuts: list[int]) -> None:
    values, groups = values_and_groups()
    expected: list[tuple[float, ...]] = []
    for group in range(4):
        own = values[groups == group].sort().values.tolist()
        places = [math.ceil(share * len(own)) for share in SALIENCY_SHARES]
        expected.append(tuple(own[place - 1] for place in places) if own else ())
    found = ranks.run(len(cuts) - 1, quantiles_of_a_share, cuts)
    assert found == [expected] * (len(cuts) - 1)
