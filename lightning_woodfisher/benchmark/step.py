"""Measure a whole pruning step against the recursion of the literature."""

from __future__ import annotations

__all__ = ["StepRow", "measure_step"]

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_woodfisher.benchmark.collection import collect_by_loop
from lightning_woodfisher.benchmark.networks import cross_entropy
from lightning_woodfisher.benchmark.recursion import (
    Plan,
    choose_plan,
    invert_by_recursion,
    merge_units,
    read_diagonal,
)
from lightning_woodfisher.benchmark.timing import Timing, measure_alternately
from lightning_woodfisher.criteria.obs import Update, saliency
from lightning_woodfisher.distributed.communicator import Communicator
from lightning_woodfisher.distributed.smallest import select_smallest
from lightning_woodfisher.fisher.config import FisherConfig
from lightning_woodfisher.one_shot import prune
from lightning_woodfisher.pruning.config import StepConfig
from lightning_woodfisher.weights.layers import prunable_parameters
from lightning_woodfisher.weights.partition import Unit, make_partition

_SPARSITY = 0.5
_ROWS_TRIED = 8
_BASELINE = "loop + recursion"
_PUBLISHED = "loop + published recursion"


@dataclass(frozen=True)
class StepRow:
    """One method to run a pruning step.

    Attributes:
        method: ``"loop + recursion"`` (with the independent update, as published), ``"loop +
            published recursion"``, ``"ours, independent"`` or ``"ours, joint"``.
        num_gradients: N, each of one sample.
        block_size: B.
        timing: time of the step.
        ratio: seconds of ``"loop + recursion"`` divided by seconds.
        equal_mask: share of weights with the same mask as in ``"loop + recursion"``.
    """

    method: str
    num_gradients: int
    block_size: int
    timing: Timing
    ratio: float
    equal_mask: float


def measure_step(
    model: nn.Module,
    data: TensorDataset,
    block_size: int = 288,
    *,
    repeats: int = 3,
    as_published: bool = False,
) -> list[StepRow]:
    """Measure a pruning step to 50 % sparsity, including the gradients.

    The baseline computes gradients one sample at a time, inverts by the recursion, and
    selects and updates as published. Samples, λ and the global selection are the same for
    all methods. The time to choose the plan of the recursion is not counted.

    Args:
        model: the network, in evaluation mode.
        data: N inputs and labels; each sample has one gradient.
        block_size: B.
        repeats: number of repetitions.
        as_published: whether to also measure the recursion as batched products over all
            blocks.

    Returns:
        A row for each method.
    """
    fisher = FisherConfig(len(data), 1, block_size, damping=1e-5)
    parameters = list(prunable_parameters(model).values())
    sizes, device = [p.numel() for p in parameters], parameters[0].device
    units = merge_units(make_partition(sizes, block_size, 1))
    tried = torch.randn(_ROWS_TRIED, sum(sizes), device=device) * 1e-3
    plans = {_BASELINE: choose_plan(tried, units, fisher.damping)}
    if as_published:
        plans[_PUBLISHED] = Plan("products", max(unit.count for unit in units))
    masks: dict[str, Tensor] = {}

    def run(method: str, prune_model: Callable[[nn.Module], object]) -> None:
        pruned = copy.deepcopy(model)
        prune_model(pruned)
        weights = prunable_parameters(pruned).values()
        masks[method] = torch.cat([w.detach().reshape(-1) == 0 for w in weights])

    methods: dict[str, Callable[[nn.Module], object]] = {
        name: functools.partial(
            _prune_as_published, data=data, fisher=fisher, units=units, plan=plan
        )
        for name, plan in plans.items()
    }
    updates: tuple[Update, ...] = ("independent", "joint")
    for update in updates:
        methods[f"ours, {update}"] = functools.partial(
            prune,
            data=data,
            loss_fn=cross_entropy,
            target_sparsity=_SPARSITY,
            fisher=fisher,
            step=StepConfig(update=update, measure_loss=False),
        )
    timings = measure_alternately(
        {name: functools.partial(run, name, each) for name, each in methods.items()},
        repeats,
        device,
    )
    return [
        StepRow(
            method=method,
            num_gradients=len(data),
            block_size=block_size,
            timing=timing,
            ratio=timings[_BASELINE].seconds / timing.seconds,
            equal_mask=float((masks[method] == masks[_BASELINE]).double().mean()),
        )
        for method, timing in timings.items()
    ]


@torch.no_grad()
def _prune_as_published(
    model: nn.Module,
    data: TensorDataset,
    fisher: FisherConfig,
    units: list[Unit],
    plan: Plan,
) -> None:
    """Prune with single-sample gradients, the recursion and the independent update."""
    parameters = prunable_parameters(model)
    device = next(iter(parameters.values())).device
    sizes = [p.numel() for p in parameters.values()]
    rows = torch.empty(fisher.num_gradients, sum(sizes), device=device)
    with torch.enable_grad():
        collect_by_loop(model, data, rows)
    inverses = invert_by_recursion(rows, units, fisher.damping, plan)
    diagonal = read_diagonal(inverses)
    weights = torch.cat([p.reshape(-1) for p in parameters.values()])
    count = round(_SPARSITY * len(weights))
    scores = saliency(weights, diagonal).double()
    removed = select_smallest(scores, None, [count], Communicator(device))
    # δ = −F⁻¹ (w / diag(F⁻¹)) over the removed weights of each block.
    scaled = torch.where(removed, weights / diagonal, 0.0)
    for unit, inverse in zip(units, inverses, strict=True):
        blocks = scaled[unit.start : unit.stop].view(unit.count, unit.size, 1)
        weights[unit.start : unit.stop] -= torch.bmm(inverse, blocks).view(-1)
    new = torch.split(weights.masked_fill_(removed, 0.0), sizes)
    for parameter, values in zip(parameters.values(), new, strict=True):
        parameter.copy_(values.view_as(parameter))
