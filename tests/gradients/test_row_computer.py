"""How gradients are collected: waits for the device, and the choice of the method."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from devices import DEVICE
from sync_counter import counted_waits
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_woodfisher.data.losses import FunctionLoss, compute_losses
from lightning_woodfisher.distributed.communicator import Communicator
from lightning_woodfisher.gradients.collect import collect_gradients
from lightning_woodfisher.gradients.task import GradientTask


def cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def count_waits(count: int, layers: int, collection: Any, pruned: bool) -> int:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(6, 6) for _ in range(layers))).to(DEVICE)
    data = TensorDataset(torch.randn(256, 6), torch.randint(6, (256,)))
    parameters = {n: p for n, p in model.named_parameters() if p.dim() > 1}
    active = {
        name: torch.arange(3 * pruned, p.numel(), device=DEVICE)
        for name, p in parameters.items()
    }
    comm = Communicator(DEVICE)
    source = FunctionLoss(model, data, cross_entropy)
    notes: list[str] = []
    with source.session("eval"):
        batches = source.batches(count, 2, 4)
        task = GradientTask(source, parameters, active, count, 4, comm)
        width = sum(map(len, active.values()))
        with counted_waits() as waits:
            rows = collect_gradients(
                task, batches, [width], collection=collection, note=notes.append
            )
            number = sum(len(chunk) for chunk in rows)
            compute_losses(source, batches, range(count), comm, 4)
    assert number == count
    assert notes == ["loop: requested" if collection == "loop" else "per-sample"]
    return waits.total()


@pytest.mark.parametrize("collection", ["auto", "loop"])
@pytest.mark.parametrize("pruned", [False, True])
def test_waits_do_not_grow(collection: Any, pruned: bool) -> None:
    """Once for the positions of the weights, and once for the losses measured."""
    few = count_waits(16, 2, collection, pruned)
    assert few <= 2
    assert count_waits(128, 2, collection, pruned) == few
    assert count_waits(16, 12, collection, pruned) == few


def collect(samples: int, collection: Any) -> tuple[Tensor, str]:
    torch.manual_seed(0)
    convolution = nn.Conv2d(1, 80, 3, padding=1)
    model = nn.Sequential(convolution, nn.AvgPool2d(8), nn.Flatten(), nn.Linear(80, 4))
    data = TensorDataset(torch.randn(256, 1, 8, 8), torch.randint(4, (256,)))
    parameters = {n: p for n, p in model.named_parameters() if p.dim() > 1}
    active = {name: torch.arange(p.numel()) for name, p in parameters.items()}
    source = FunctionLoss(model, data, cross_entropy)
    notes: list[str] = []
    with source.session("eval"):
        task = GradientTask(source, parameters, active, 8, 4, Communicator())
        width = sum(map(len, active.values()))
        rows = collect_gradients(
            task,
            source.batches(8, samples, 4),
            [width],
            collection=collection,
            note=notes.append,
        )
        return torch.cat([*rows]), notes[0]


@pytest.mark.parametrize(
    ("samples", "fast"), [(25, "per-sample"), (26, "loop: faster")]
)
def test_long_passes_run_one_by_one(samples: int, fast: str) -> None:
    """The layers have 80·64 and 4 outputs: 2,562 for each sample, on average."""
    rows, note = collect(samples, "auto")
    assert note.startswith(fast)
    expected, _ = collect(samples, "loop")
    if fast == "per-sample":
        torch.testing.assert_close(rows, expected, rtol=1e-4, atol=1e-7)
    else:
        assert torch.equal(rows, expected)
