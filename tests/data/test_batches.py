"""Cached batches cannot be told from new ones."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, default_collate

from lightning_woodfisher import FisherConfig, PruningReport, prune
from lightning_woodfisher.data.batches import CachedBatches, DatasetBatches
from lightning_woodfisher.data.isolation import seeded


class Augmented(Dataset[tuple[Tensor, int]]):
    """Samples that draw from every generator, and are counted."""

    def __init__(self) -> None:
        self.read = 0

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        self.read += 1
        noise = torch.rand(5) + random.random() + float(np.random.rand())
        return noise + index, index % 3


class Bag:
    """A batch of a class that PyTorch does not know."""

    def __init__(self, samples: list[tuple[Tensor, int]]) -> None:
        self.inputs, self.labels = default_collate(samples)


def draw_all() -> list[float]:
    return [float(torch.rand(())), random.random(), float(np.random.rand())]


def batches(data: Dataset[Any]) -> DatasetBatches:
    return DatasetBatches(data, 4, 8, seed=1)


def test_random_numbers_after_a_batch_do_not_depend_on_the_cache() -> None:
    data = Augmented()
    kept, plain = CachedBatches(batches(data), 10**6), batches(data)
    for _ in range(3):
        with seeded(7):
            batch, drawn = kept.fetch(2), draw_all()
        with seeded(7):
            expected, expected_drawn = plain.fetch(2), draw_all()
        torch.testing.assert_close(batch, expected, rtol=0, atol=0)
        assert drawn == expected_drawn
        batch[0].zero_()
    assert data.read == 8 + 3 * 8


@pytest.mark.parametrize(
    ("collate", "room", "reads"),
    [(None, 10**6, 1), (None, 1_000, 3), (Bag, 10**6, 3)],
    ids=["tensors", "no room", "not only tensors"],
)
def test_batches_that_cannot_be_cached_are_read_again(
    collate: Callable[..., Any] | None, room: int, reads: int
) -> None:
    data = Augmented()
    plain = DatasetBatches(data, 4, 8, seed=1, collate=collate or default_collate)
    kept = CachedBatches(plain, room)
    for _ in range(3):
        for index in range(4):
            kept.fetch(index)
    assert data.read == reads * 4 * 8


@pytest.mark.parametrize("collate", [default_collate, Bag])
def test_a_loss_that_changes_its_batch_in_place(collate: Callable[..., Any]) -> None:
    torch.manual_seed(0)
    inputs = torch.randn(64, 5)
    data = [(50 * x, int(x[:3].argmax())) for x in inputs]

    def step(in_place: bool) -> PruningReport:
        def loss(model: nn.Module, batch: Any) -> Tensor:
            inputs, labels = (
                (batch.inputs, batch.labels) if isinstance(batch, Bag) else batch
            )
            if in_place:
                inputs.div_(50)
            else:
                inputs = inputs / 50
            return F.cross_entropy(model(inputs), labels)

        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 3))
        return prune(
            model,
            DataLoader(data, batch_size=4, collate_fn=collate),
            loss,
            target_sparsity=0.5,
            fisher=FisherConfig(num_gradients=8, gradient_batch_size=4),
        )

    one, other = step(True), step(False)
    # Not all gradients at once, because the loss would be computed twice.
    assert one.loss_before == pytest.approx(other.loss_before, rel=1e-6)
    assert one.loss_after == pytest.approx(other.loss_after, rel=1e-6)
    assert one.updates == other.updates != ("none",)
