"""Rows of a layer that ranks own, without processes: ownership is computed from numbers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_woodfisher.layerwise.rows import RowShare
from lightning_woodfisher.layerwise.solver import Curvature, LayerProblem
from lightning_woodfisher.layerwise.step import share_out

CPU = torch.device("cpu")


def shares(groups: int, outputs: int, ranks: int) -> list[RowShare]:
    comms: list[Any] = [SimpleNamespace(rank=r, world_size=ranks) for r in range(ranks)]
    return [RowShare(groups, outputs, CPU, comm) for comm in comms]


@pytest.mark.parametrize("outputs", [1, 16, 23, 100, 4096])
@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_every_row_has_one_owner(outputs: int, ranks: int) -> None:
    every = shares(1, outputs, ranks)
    numbers = torch.arange(outputs).view(1, outputs, 1)
    owned = torch.cat([share.own(numbers) for share in every], 1)
    assert torch.equal(owned, numbers)
    assert [share.own(numbers).shape[1] for share in every] == [s.count for s in every]
    if outputs == 4096:
        assert max(share.count for share in every) < 1.2 * outputs / ranks


def test_rows_of_several_groups_belong_to_all_ranks() -> None:
    assert [share.count for share in shares(4, 100, 3)] == [100] * 3


def problem(rows: RowShare) -> LayerProblem:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(1, *shape, generator=generator, dtype=torch.float64)

    x, dense = random(150, 64), random(300, 64)
    inputs = x.mT @ x
    return LayerProblem(
        Curvature(inputs, 0.1), dense @ inputs, dense, random(300).abs(), rows
    )


@pytest.mark.parametrize("ranks", [2, 3, 7])
def test_units_have_the_same_bits_on_any_number_of_ranks(ranks: int) -> None:
    generator = torch.Generator().manual_seed(1)
    removed = torch.rand(1, 300, 64, generator=generator) < 0.5
    whole = problem(RowShare(1, 300, CPU)).solve(removed)
    parts = [problem(s).solve(s.own(removed)) for s in shares(1, 300, ranks)]
    assert torch.equal(torch.cat(parts, 1), whole)


@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_curves_are_shared_out_evenly(ranks: int) -> None:
    sides = [(1, 64, 16), (1, 16, 64), (1, 16, 16)] * 6
    owners = share_out(sides, ranks)
    costs = [(o + d) * d**2 for _, o, d in sides]
    work = [
        sum(c for c, owner in zip(costs, owners, strict=True) if owner == rank)
        for rank in range(ranks)
    ]
    assert sum(work) == sum(costs)
    assert max(work) <= sum(costs) / ranks + max(costs)
