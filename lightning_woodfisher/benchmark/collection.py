"""Measure methods to compute the gradients of single samples."""

from __future__ import annotations

__all__ = [
    "CollectionRow",
    "collect_as_in_step",
    "collect_by_loop",
    "measure_collection",
    "run_batches",
]

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_woodfisher.benchmark.networks import cross_entropy, split_batches
from lightning_woodfisher.benchmark.timing import Timing, measure_alternately
from lightning_woodfisher.data.isolation import derive_seed
from lightning_woodfisher.data.losses import FunctionLoss
from lightning_woodfisher.distributed.communicator import Communicator
from lightning_woodfisher.gradients.collect import collect_gradients
from lightning_woodfisher.gradients.task import GradientTask
from lightning_woodfisher.weights.layers import prunable_parameters

_BATCH = 128
_VMAP_CHUNK = 32


@dataclass(frozen=True)
class CollectionRow:
    """One method to compute per-sample gradients.

    Attributes:
        method: ``"batched"`` (no per-sample gradients: the reference), ``"loop"``,
            ``"vmap"`` or ``"collect_gradients"``.
        samples: number of samples, each with one gradient.
        timing: time of all samples.
        ratio: seconds divided by those of ``"batched"``.
    """

    method: str
    samples: int
    timing: Timing
    ratio: float


def measure_collection(
    model: nn.Module, data: TensorDataset, *, repeats: int = 3
) -> list[CollectionRow]:
    """Measure methods to compute the gradients of single samples.

    All methods compute gradients of the prunable weights in evaluation mode and discard
    them.

    Args:
        model: the network.
        data: inputs and labels.
        repeats: number of repetitions, after one that is not counted.

    Returns:
        A row for each method.
    """
    parameters = list(prunable_parameters(model).values())
    methods: dict[str, Callable[[], object]] = {
        "batched": lambda: run_batches(model, data, _BATCH, parameters),
        "loop": lambda: collect_by_loop(model, data),
        "vmap": lambda: _collect_by_vmap(model, data),
        "collect_gradients": lambda: collect_as_in_step(model, data),
    }
    timings = measure_alternately(methods, repeats, parameters[0].device, warm_up=1)
    reference = timings["batched"].seconds
    return [
        CollectionRow(method, len(data), timing, timing.seconds / reference)
        for method, timing in timings.items()
    ]


def run_batches(
    model: nn.Module,
    data: TensorDataset,
    batch_size: int,
    parameters: Sequence[nn.Parameter],
) -> None:
    """Run forward and backward passes over all data and discard the gradients.

    Args:
        model: the network.
        data: inputs and labels.
        batch_size: samples in a batch.
        parameters: parameters to differentiate by; the loss may ignore some of them.
    """
    for batch in split_batches(data, batch_size, parameters[0].device):
        loss = cross_entropy(model, batch)
        torch.autograd.grad(loss, parameters, allow_unused=True)


def collect_by_loop(
    model: nn.Module, data: TensorDataset, rows: Tensor | None = None
) -> None:
    """Run one backward pass for each sample.

    Args:
        model: the network.
        data: inputs and labels.
        rows: ``[N, D]`` to fill with the gradients of the prunable weights; None discards
            them.
    """
    source = FunctionLoss(model, data, cross_entropy)
    batches = source.batches(len(data), 1, derive_seed(0, 0, 0))
    parameters = list(prunable_parameters(model).values())
    for index in range(len(data)):
        loss = source.loss(batches.fetch(index), index)
        gradients = torch.autograd.grad(loss, parameters)
        if rows is not None:
            torch.cat([g.reshape(-1) for g in gradients], out=rows[index])


def _collect_by_vmap(model: nn.Module, data: TensorDataset) -> None:
    weights = {name: p.detach() for name, p in prunable_parameters(model).items()}
    device = next(iter(weights.values())).device

    def loss(weights: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        def call(inputs: Tensor) -> Any:
            return torch.func.functional_call(model, weights, (inputs,))

        return cross_entropy(call, (image.unsqueeze(0), label.unsqueeze(0)))

    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))
    for images, labels in split_batches(data, _VMAP_CHUNK, device):
        per_sample(weights, images, labels)


def collect_as_in_step(
    model: nn.Module, data: TensorDataset, rows: Tensor | None = None
) -> str:
    """Collect the gradients of all samples as a pruning step does.

    Args:
        model: the network.
        data: inputs and labels.
        rows: ``[N, D]``, receives the gradients of the prunable weights; None discards them.

    Returns:
        How they were computed: ``"per-sample"``, or ``"loop: <reason>"``.
    """
    notes: list[str] = []
    done = 0
    parameters = prunable_parameters(model)
    device = next(iter(parameters.values())).device
    active = {n: torch.arange(p.numel(), device=device) for n, p in parameters.items()}
    source, samples = FunctionLoss(model, data, cross_entropy), len(data)
    seed = derive_seed(0, 0, 0)
    with source.session("eval"):
        task = GradientTask(
            source, parameters, active, samples, seed, Communicator(device)
        )
        sizes = [sum(len(positions) for positions in active.values())]
        batches = source.batches(samples, 1, seed)
        for chunk in collect_gradients(task, batches, sizes, note=notes.append):
            if rows is not None:
                rows[done : done + len(chunk)] = chunk
            done += len(chunk)
    return notes[0]
