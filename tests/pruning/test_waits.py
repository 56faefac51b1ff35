"""How often the host waits for the device in a pruning step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from devices import DEVICE
from sync_counter import Waits, counted_waits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from lightning_woodfisher import FisherConfig, prune

FLAGS = torch.tensor([True, False, True], device=DEVICE)


@pytest.mark.parametrize(
    ("number", "work"),
    [
        (1, lambda x: float(x.sum())),
        (1, lambda x: bool(x.any())),
        (1, lambda x: x.tolist()),
        (1, lambda x: x.cpu()),
        (1, lambda x: x.nonzero()),
        (1, lambda x: x[FLAGS]),
        (1, lambda x: torch.equal(x, x)),
        (1, lambda x: torch.tensor([1.0], device=x.device)),
        (0, lambda x: x[torch.arange(2, device=x.device)]),
        (0, lambda x: torch.where(FLAGS, x, 0.0).sum()),
        (0, lambda x: x.masked_fill_(FLAGS, 1.0)),
        (0, lambda x: torch.zeros_like(x).scatter_add_(0, FLAGS.long(), x)),
        (0, lambda x: torch.linalg.cholesky_ex(torch.diag(x))),
    ],
)
def test_counter_sees_what_waits(number: int, work: Callable[[Tensor], Any]) -> None:
    values = torch.ones(3, device=DEVICE)
    with counted_waits() as waits:
        work(values)
    assert waits.total() == number, str(waits)


def waits_of_a_step(widths: list[int], criterion: str, fisher: FisherConfig) -> Waits:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for inputs, outputs in zip(widths, widths[1:], strict=False):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    samples = fisher.num_gradients * fisher.gradient_batch_size
    data = TensorDataset(torch.randn(samples, widths[0]), torch.randint(10, (samples,)))
    model = nn.Sequential(*layers[:-1]).to(DEVICE)
    with counted_waits() as waits:
        prune(
            model,
            data,
            lambda m, batch: F.cross_entropy(m(batch[0]), batch[1]),
            target_sparsity=0.5,
            fisher=fisher,
            criterion=criterion,
        )
    return waits


@pytest.mark.parametrize(
    ("criterion", "num_gradients", "block_size", "most"),
    [
        ("woodfisher", 32, 256, 28),
        ("woodfisher", 32, 16, 28),
        ("woodfisher", 8, None, 50),
        ("kfac", 32, 256, 40),
        ("magnitude", 32, 256, 26),
        ("diagonal_fisher", 32, 256, 26),
    ],
    ids=["dual", "primal", "full", "kfac", "magnitude", "diagonal"],
)
def test_waits_depend_on_neither_tensors_nor_blocks(
    criterion: str, num_gradients: int, block_size: int | None, most: int
) -> None:
    """Outside of the passes through the network."""
    fisher = FisherConfig(num_gradients, 8, block_size=block_size)
    few, many = (
        waits_of_a_step(widths, criterion, fisher)
        for widths in ([64, 64, 48, 40, 10], [32] * 20 + [10])
    )
    passes = ("gradients/", "data/")
    own = [waits.total() - waits.inside(*passes) for waits in (few, many)]
    assert own[0] <= most, str(few)
    # Conjugate gradients take more steps in some layers than in others.
    assert own[1] <= own[0] + 6 * (criterion == "kfac"), str(many)


@pytest.mark.parametrize("widths", [[64, 64, 48, 40, 10], [32] * 20 + [10]])
def test_a_whole_step_waits_at_most_fifty_times(widths: list[int]) -> None:
    waits = waits_of_a_step(widths, "woodfisher", FisherConfig(32, 8))
    assert waits.total() <= 50, str(waits)
