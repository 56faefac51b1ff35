"""Measure training steps with masks against training steps without masks."""

from __future__ import annotations

__all__ = ["MaskRow", "measure_masks"]

import functools
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_woodfisher.benchmark.networks import cross_entropy
from lightning_woodfisher.benchmark.timing import CPU, measure_alternately
from lightning_woodfisher.weights.layers import prunable_parameters
from lightning_woodfisher.weights.masks import Masks

_SPARSITY = 0.9
_WARM_UP_STEPS = 3


@dataclass(frozen=True)
class MaskRow:
    """Times of the training steps of one network.

    Attributes:
        network: name of the network.
        masked: number of tensors with a mask.
        steps: number of measured steps of each kind; they alternate.
        plain_seconds: median of the steps without masks.
        masked_seconds: median of the steps with masks.
        ratio: ``masked_seconds / plain_seconds``.
        mask_seconds: median of the two mask passes of a step, measured alone.
    """

    network: str
    masked: int
    steps: int
    plain_seconds: float
    masked_seconds: float
    ratio: float
    mask_seconds: float


def measure_masks(
    networks: Mapping[str, tuple[nn.Module, Tensor]],
    steps: int = 40,
    *,
    device: torch.device = CPU,
) -> list[MaskRow]:
    """Measure the cost of masks in a training step with AdamW, at 90 % sparsity.

    A step with masks does what the callback adds to a step: it masks gradients before the
    optimizer and weights after it.

    Args:
        networks: models in training mode, and a batch of inputs, by name.
        steps: number of steps of each kind; they alternate.
        device: device to measure on.

    Returns:
        A row for each network.
    """
    return [
        _measure_network(name, model.to(device), inputs.to(device), steps)
        for name, (model, inputs) in networks.items()
    ]


def _measure_network(
    name: str, model: nn.Module, inputs: Tensor, steps: int
) -> MaskRow:
    parameters = prunable_parameters(model)
    masks = Masks(parameters)
    masks.prune({n: torch.rand_like(p) < _SPARSITY for n, p in parameters.items()})
    optimizer = torch.optim.AdamW(model.parameters())
    labels = torch.arange(len(inputs), device=inputs.device) % 10

    def train(with_masks: bool) -> None:
        optimizer.zero_grad()
        torch.autograd.backward(cross_entropy(model, (inputs, labels)))
        if with_masks:
            masks.apply_to_gradients()
        optimizer.step()
        if with_masks:
            masks.apply()

    def apply_masks() -> None:
        masks.apply_to_gradients()
        masks.apply()

    timings = measure_alternately(
        {
            "plain": functools.partial(train, with_masks=False),
            "masked": functools.partial(train, with_masks=True),
            "masks": apply_masks,
        },
        steps,
        inputs.device,
        warm_up=_WARM_UP_STEPS,
        track_memory=False,
    )
    plain, masked = timings["plain"].seconds, timings["masked"].seconds
    return MaskRow(
        network=name,
        masked=len(parameters),
        steps=steps,
        plain_seconds=plain,
        masked_seconds=masked,
        ratio=masked / plain,
        mask_seconds=timings["masks"].seconds,
    )
