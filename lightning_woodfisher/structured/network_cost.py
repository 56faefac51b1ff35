"""What a network costs: parameters, multiply-accumulates and seconds."""

from __future__ import annotations

__all__ = ["IndexTensors", "NetworkSize", "measure_latency"]

import functools
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_woodfisher.base.clock import time_action
from lightning_woodfisher.data.isolation import derive_seed, eager, isolated, seeded
from lightning_woodfisher.data.losses import LossSource, run_loss
from lightning_woodfisher.distributed.communicator import Communicator
from lightning_woodfisher.pruning.flops import flops_by_tensor
from lightning_woodfisher.structured.graph.attention import attention_modules
from lightning_woodfisher.structured.graph.groups import Group
from lightning_woodfisher.structured.graph.inputs import run_model, tensors_in

#: Indices of structures, int64, by group name.
IndexTensors = Mapping[str, Tensor]


class NetworkSize:
    """Parameters and multiply-accumulates (MACs) of a network without some structures.

    The smaller network is not built. A tensor shrinks along every axis that is a member of
    a group, and the operations that multiply by it shrink with it. MACs are half of the
    FLOPs that torch's FLOP counter finds in a forward pass of the dense network, as for
    :func:`.count_flops`: matrix products and convolutions, also those of two activations
    (attention), but neither norms nor activations. Work that depends on the values of the
    weights, such as on the number of proposals of a detector, is that of the dense network.

    Args:
        source: where losses of the dense network come from. Its session is entered here.
        groups: the groups of its model.
        comm: the ranks, which all use the FLOPs that rank 0 counts.
        seed: of the sample that is observed.
        implants: convolutions in which implanted structures have 1×1 filters, by group.

    Attributes:
        dense_parameters: of the whole network.
        dense_macs: for one sample.
    """

    def __init__(
        self,
        source: LossSource,
        groups: Sequence[Group],
        comm: Communicator,
        seed: int = 0,
        implants: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        model = source.model
        self._shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        # A parameter with two names counts once.
        names = {id(p): name for name, p in model.named_parameters()}
        self._axes: dict[str, dict[tuple[int, str], Tensor]] = {}
        for group in groups:
            for member in group.members:
                name = names.get(id(member.find_in(model)))
                if name is not None:
                    axes = self._axes.setdefault(name, {})
                    owners = member.structure_of.cpu()
                    # Values, queries and keys may be rows of one tensor.
                    known = axes.get((member.axis, group.name), owners)
                    axes[member.axis, group.name] = torch.maximum(known, owners)
        self._implants = {
            names[id(model.get_submodule(layer).weight)]: group
            for group, layers in (implants or {}).items()
            for layer in layers
        }
        self._sizes = {group.name: group.size for group in groups}
        self._other_macs, self._macs, self._head_macs = _count_macs(
            source,
            comm,
            derive_seed(seed, "size"),
            attention_modules(model, groups),
        )
        self.dense_parameters = self.parameters({})
        self.dense_macs = self.macs({})

    def parameters(
        self, removed: IndexTensors, implanted: IndexTensors | None = None
    ) -> int:
        """Count the remaining parameters of the network.

        Args:
            removed: the removed structures.
            implanted: the structures with 1×1 filters.

        Returns:
            Their number.
        """
        return sum(self._numel(name, removed, implanted) for name in self._shapes)

    def macs(self, removed: IndexTensors, implanted: IndexTensors | None = None) -> int:
        """Count the remaining multiply-accumulates.

        Args:
            removed: the removed structures.
            implanted: the structures with 1×1 filters.

        Returns:
            Their number for one sample.
        """
        left = {
            name: macs * self._numel(name, removed, implanted) / self._numel(name, {})
            for name, macs in self._macs.items()
        }
        for group, macs in self._head_macs.items():
            gone = len(removed[group]) if group in removed else 0
            left[group] = macs * (1 - gone / self._sizes[group])
        return round(self._other_macs + sum(left.values()))

    def _numel(
        self, name: str, removed: IndexTensors, implanted: IndexTensors | None = None
    ) -> int:
        shape = list(self._shapes[name])
        for (axis, group), structure_of in self._axes.get(name, {}).items():
            if group in removed:
                shape[axis] -= int(torch.isin(structure_of, removed[group].cpu()).sum())
        saved = 0
        if implanted and name in self._implants:
            rows = len(implanted.get(self._implants[name], ()))
            saved = rows * shape[1] * (math.prod(shape[2:]) - 1)
        return math.prod(shape) - saved


def _count_macs(
    source: LossSource, comm: Communicator, seed: int, heads: Mapping[str, nn.Module]
) -> tuple[float, dict[str, float], dict[str, float]]:
    """Count the MACs of one sample: of the rest, by weight, and between heads by group."""
    model = source.model
    # A product with a bias in it counts for its matrix.
    weights = {n: p for n, p in model.named_parameters() if p.dim() > 1}
    with source.session("eval"), torch.enable_grad(), seeded(seed):
        batches = source.batches(1, 1, seed)
        batch = batches.fetch(0)
        total, flops, inside = flops_by_tensor(
            lambda: run_loss(source, batch, 0), weights, heads
        )
    # The size of a batch of a stream is known once it is read.
    samples = batches.size or next((len(t) for t in tensors_in(batch) if t.dim()), 1)
    counts = [samples, total, *flops.values(), *inside.values()]
    numbers = comm.gather_numbers(counts)[0]
    macs = iter(number / numbers[0] / 2 for number in numbers[1:])
    dense = next(macs)
    by_name = {name: next(macs) for name in flops}
    by_group = {name: next(macs) for name in inside}
    rest = dense - sum(by_name.values()) - sum(by_group.values())
    return rest, {name: number for name, number in by_name.items() if number}, by_group


@torch.no_grad()
@eager()
def measure_latency(
    dense: nn.Module, shrunk: nn.Module, inputs: Any, runs: int
) -> tuple[float, float]:
    """Time two networks in turns, so that other load slows both.

    Args:
        dense: the network.
        shrunk: the smaller network, on the same device.
        inputs: see :func:`.run_model`.
        runs: number of timed passes of each network.

    Returns:
        Median seconds of a forward pass of the dense and of the smaller network, after
        three passes to warm up.
    """
    device = next(tensors_in(inputs)).device
    passes = [functools.partial(run_model, model, inputs) for model in (dense, shrunk)]
    with isolated(dense, "eval"), isolated(shrunk, "eval"):
        seconds = [
            [time_action(run, device) for run in passes] for _ in range(runs + 3)
        ]
    of_dense, of_shrunk = map(statistics.median, zip(*seconds[3:], strict=True))
    return of_dense, of_shrunk
