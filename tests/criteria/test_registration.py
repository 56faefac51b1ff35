"""A criterion of the user's own: pruning by it, and what cannot be registered."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_woodfisher import ConfigurationError, FisherConfig, prune
from lightning_woodfisher.criteria import (
    CRITERIA,
    Criterion,
    DiagonalCriterion,
    register_criterion,
)
from lightning_woodfisher.distributed.communicator import Communicator
from lightning_woodfisher.weights.partition import Partition


class FirstOrder(DiagonalCriterion):
    """|w · mean gradient|."""

    needs: ClassVar = "gradients"

    def begin(self, partition: Partition, communicator: Communicator) -> None:
        own = partition.shard_sizes()[communicator.rank]
        self.total = torch.zeros(own, dtype=torch.float64)

    def observe(self, rows: Tensor) -> None:
        for row in rows:
            self.total += row.double()

    def score(self, weights: Tensor) -> Tensor:
        return (weights * self.total).abs()


pytestmark = pytest.mark.usefixtures("own_criteria")


def test_it_prunes() -> None:
    register_criterion("tested_first_order", FirstOrder)
    register_criterion("tested_first_order", FirstOrder)
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(32, 6, generator=generator)
    targets = torch.randn(32, 4, generator=generator)
    torch.manual_seed(0)
    model = nn.Linear(6, 4)
    weights = model.weight.detach().clone()
    # The mean gradient of all samples, by hand: 2/(n·4) (Wx + b − y) xᵀ.
    residual = inputs @ weights.T + model.bias.detach() - targets
    gradient = residual.T @ inputs * 2 / (32 * 4)
    prune(
        model,
        TensorDataset(inputs, targets),
        lambda model, batch: nn.functional.mse_loss(model(batch[0]), batch[1]),
        target_sparsity=0.5,
        criterion="tested_first_order",
        fisher=FisherConfig(num_gradients=32, gradient_batch_size=1),
    )
    order = (weights * gradient).abs().flatten().argsort()
    expected = weights.flatten().index_fill(0, order[:12], 0.0).view_as(weights)
    assert torch.equal(model.weight.detach(), expected)


def test_what_cannot_be_registered() -> None:
    class Unfinished(Criterion):
        """Without its methods."""

    with pytest.raises(ConfigurationError, match="is not a subclass of"):
        register_criterion("list", list)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="lacks begin, compensate, layout"):
        register_criterion("unfinished", Unfinished)
    with pytest.raises(ConfigurationError, match="'magnitude' is .*Magnitude already"):
        register_criterion("magnitude", FirstOrder)
    assert CRITERIA.keys().isdisjoint({"list", "unfinished"})
