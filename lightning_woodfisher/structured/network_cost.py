"""What a network costs: parameters, multiply-accumulates and seconds."""

from __future__ import annotations

__all__ = ["IndexTensors", "NetworkSize", "measure_latency"]

import contextlib
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.utils._pytree import tree_map_only

from lightning_woodfisher.data.isolation import derive_seed, isolated
from lightning_woodfisher.data.losses import LossSource
from lightning_woodfisher.distributed.communicator import Communicator
from lightning_woodfisher.structured.graph.groups import Group
from lightning_woodfisher.structured.graph.inputs import (
    compute_one_loss,
    run_model,
    tensors_in,
)

#: Indices of structures, int64, by group name.
IndexTensors = Mapping[str, Tensor]


class NetworkSize:
    """Parameters and multiply-accumulates (MACs) of a network without some structures.

    The smaller network is not built. A tensor shrinks along every axis that is a member of
    a group. MACs are those of Conv and Linear layers: their weights times the positions at
    which they are used, observed in one forward pass. Not counted are norms, activations,
    products of two activations (attention), and layers whose weight is computed from other
    tensors (``torch.nn.utils.parametrize``).

    Args:
        source: where losses of the dense network come from. Its session is entered here.
        groups: the groups of its model.
        comm: the ranks, which all use the shapes that rank 0 observes.
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
                    axes[member.axis, group.name] = member.structure_of.cpu()
        self._implants = {
            names[id(model.get_submodule(layer).weight)]: group
            for group, layers in (implants or {}).items()
            for layer in layers
        }
        positions = _count_positions(source, names, derive_seed(seed, "size"))
        numbers = comm.gather_numbers(list(positions.values()))[0]
        self._positions = dict(zip(positions, numbers, strict=True))
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
        return round(
            sum(
                positions * self._numel(name, removed, implanted)
                for name, positions in self._positions.items()
            )
        )

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


def _count_positions(
    source: LossSource, names: Mapping[int, str], seed: int
) -> dict[str, float]:
    """Count the positions of a sample at which each weight is used, by its name."""
    positions: dict[str, float] = {}

    def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
        name = names[id(module.weight)]
        data = inputs[0] if inputs else output
        used = data if isinstance(module, _ConvTransposeNd) else output
        channels = used.shape[-1 if isinstance(module, nn.Linear) else 1]
        number = used.numel() / channels / len(used)
        positions[name] = positions.get(name, 0.0) + number

    with contextlib.ExitStack() as hooks:
        for module in source.model.modules():
            if (
                isinstance(module, _ConvNd | nn.Linear)
                and "weight" in module._parameters
            ):
                hooks.enter_context(module.register_forward_hook(hook))
        compute_one_loss(source, seed)
    return positions


@torch.no_grad()
def measure_latency(
    dense: nn.Module, shrunk: nn.Module, inputs: Any, runs: int, batch_size: int = 1
) -> tuple[float, float]:
    """Time two networks in turns, so that other load slows both.

    Args:
        dense: the network.
        shrunk: the smaller network, on the same device.
        inputs: of one sample, repeated along the first axis.
        runs: number of timed passes of each network.
        batch_size: samples in a pass.

    Returns:
        Median seconds of a forward pass of the dense and of the smaller network, after
        three passes to warm up.
    """

    def repeat(value: Tensor) -> Tensor:
        return value.repeat(batch_size, *(1,) * (value.dim() - 1))

    inputs = tree_map_only(Tensor, repeat, inputs)
    device = next(tensors_in(inputs)).device
    seconds: tuple[list[float], list[float]] = ([], [])
    with isolated(dense, "eval"), isolated(shrunk, "eval"):
        for _ in range(runs + 3):
            seconds[0].append(_time_forward(dense, inputs, device))
            seconds[1].append(_time_forward(shrunk, inputs, device))
    return statistics.median(seconds[0][3:]), statistics.median(seconds[1][3:])


def _time_forward(model: nn.Module, inputs: Any, device: torch.device) -> float:
    def synchronize() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    synchronize()
    start = time.perf_counter()
    run_model(model, inputs)
    synchronize()
    return time.perf_counter() - start
