"""Which channels of which layers are coupled: a partition of all channels of a model.

Every layer has outputs and inputs, and both have channels. Channels that the network ties
together are united. Each set of united channels is one structure.
"""

from __future__ import annotations

__all__ = ["Axis", "Coupling", "Side", "find_groups"]

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvTransposeNd

from lightning_woodfisher.structured.graph.groups import Group, Member, Role
from lightning_woodfisher.weights.layers import axis_of_outputs

Side = Literal["out", "in"]


class Axis(NamedTuple):
    """An axis of a tensor of a layer; see :class:`.Member`."""

    layer: str
    tensor: str
    axis: int
    role: Role


class _Port(NamedTuple):
    """The outputs or the inputs of a layer.

    A layer that treats each channel separately, such as a norm, has outputs only. Slice i
    of the axes (tensor, axis, role) belongs to channel i; there may be fewer slices.
    """

    side: Side
    channels: int
    axes: tuple[tuple[str, int, Role], ...]


def _ports_of(layer: nn.Module) -> tuple[_Port, ...] | str:
    """List the ports of a layer, or return why its channels cannot be pruned."""
    kind = type(layer).__name__
    tensors = {key for key, value in layer._parameters.items() if value is not None}
    if isinstance(layer, nn.PReLU):
        return (_Port("out", layer.num_parameters, (("weight", 0, "consumer"),)),)
    if isinstance(layer, _NormBase):
        if not {"weight", "bias"} <= tensors:
            return (
                f"it passes a {kind} without weight and bias, whose output is not zero "
                "for a zero channel"
            )
        axes: list[tuple[str, int, Role]] = [("weight", 0, "norm"), ("bias", 0, "norm")]
        if layer.running_mean is not None:
            statistics = ("running_mean", "running_var")
            axes += [(name, 0, "statistics") for name in statistics]
        return (_Port("out", layer.num_features, tuple(axes)),)
    if "weight" not in tensors:
        return f"the weight of a {kind} is computed from other tensors"
    if others := tensors - {"weight", "bias"}:
        return f"it passes a {kind} with the parameter {min(others)!r} of its own"
    groups = int(getattr(layer, "groups", 1))
    if isinstance(layer, _ConvTransposeNd) and groups > 1:
        return "it passes a transposed convolution with groups"
    rows = axis_of_outputs(layer)
    shape, columns = layer.get_parameter("weight").shape, 1 - rows
    outputs, inputs = shape[rows], shape[columns] * groups
    is_depthwise = groups == inputs > 1
    if groups == outputs > 1 and not is_depthwise:
        return "it passes a convolution whose groups have several inputs and one output"
    writes: tuple[tuple[str, int, Role], ...] = (("weight", rows, "producer"),)
    reads: tuple[tuple[str, int, Role], ...] = (("weight", columns, "consumer"),)
    if "bias" in tensors:
        writes += (("bias", 0, "bias"),)
    # The filters of a depthwise convolution are removed with its inputs.
    if is_depthwise:
        reads = ()
    return _Port("out", outputs, writes), _Port("in", inputs, reads)


class Coupling:
    """A partition of the channels of a model's layers.

    Args:
        layers: convolutions, Linear, Conv1D, BatchNorm, InstanceNorm and PReLU layers, by
            name.

    Attributes:
        channels: numbers of the channels, by name of the layer and side.
        axes: tensors with slices of these channels, as (numbers of the channels of the
            slices, axis).
        reasons: why the channels of a layer cannot be pruned, by name of the layer.
    """

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        self.channels: dict[tuple[str, Side], range] = {}
        self.axes: list[tuple[range, Axis]] = []
        self.reasons: dict[str, str] = {}
        self._parent: list[int] = []
        self._left_out: dict[int, str] = {}
        shared: dict[tuple[int, int], range] = {}
        for name, layer in layers.items():
            ports = _ports_of(layer)
            if isinstance(ports, str):
                self.reasons[name] = ports
                continue
            for port in ports:
                first = len(self._parent)
                channels = range(first, first + port.channels)
                self.channels[name, port.side] = channels
                self._parent.extend(channels)
                for tensor, axis, role in port.axes:
                    value = getattr(layer, tensor)
                    slices = channels[: value.shape[axis]]
                    self.axes.append((slices, Axis(name, tensor, axis, role)))
                    # Layers with the same tensor lose the same channels.
                    other = shared.setdefault((id(value), axis), slices)
                    self._unite_all(slices, other)
            self._unite_convolution_groups(name, int(getattr(layer, "groups", 1)))

    def channel(self, layer: str, side: Side, index: int) -> int:
        """Return the number of a channel.

        Args:
            layer: name of the layer.
            side: outputs or inputs. A layer without inputs has the outputs for both.
            index: of the channel on this side.

        Returns:
            Its number, or -1 if the layer has no such channel.
        """
        channels = self.channels.get((layer, side)) or self.channels[layer, "out"]
        return channels[index] if 0 <= index < len(channels) else -1

    def unite(self, one: int, other: int) -> None:
        """Make two channels the same structure.

        Args:
            one: number of a channel.
            other: number of another.
        """
        low, high = sorted((self.root(one), self.root(other)))
        if low != high:
            self._parent[high] = low
            if high in self._left_out:
                self._left_out.setdefault(low, self._left_out.pop(high))

    def leave_out(self, channel: int, reason: str) -> None:
        """Mark a channel, and all that are or will be united with it, as not prunable.

        Args:
            channel: its number.
            reason: why.
        """
        self._left_out.setdefault(self.root(channel), reason)

    def reason(self, channel: int) -> str | None:
        """Return why a channel cannot be pruned.

        Args:
            channel: its number.

        Returns:
            The first reason given, or None if it can be pruned.
        """
        return self._left_out.get(self.root(channel))

    def root(self, channel: int) -> int:
        """Return the channel that represents a structure.

        Args:
            channel: number of any of its channels.

        Returns:
            The lowest number of its channels.
        """
        root = channel
        while self._parent[root] != root:
            root = self._parent[root]
        while self._parent[channel] != root:
            self._parent[channel], channel = root, self._parent[channel]
        return root

    def _unite_convolution_groups(self, name: str, groups: int) -> None:
        """Tie channels so that each convolution group loses the same number of them."""
        if groups == 1:
            return
        outputs, inputs = self.channels[name, "out"], self.channels[name, "in"]
        if len(inputs) == groups:
            size = len(outputs) // groups
            self._unite_all(outputs, [c for c in inputs for _ in range(size)])
            return
        for channels in (outputs, inputs):
            first = channels[: len(channels) // groups]
            self._unite_all(channels, [*first] * groups)

    def _unite_all(self, ones: Iterable[int], others: Iterable[int]) -> None:
        for one, other in zip(ones, others, strict=True):
            self.unite(one, other)


def find_groups(coupling: Coupling) -> tuple[Group, ...]:
    """Collect the structures of a partition in groups.

    Structures are in the same group if they have slices in the same tensors.

    Args:
        coupling: the partition.

    Returns:
        Groups of at least two structures, in the order of their first layers.
    """
    slices: dict[int, dict[Axis, list[int]]] = defaultdict(dict)
    for channels, axis in coupling.axes:
        for position, channel in enumerate(channels):
            if coupling.reason(channel) is None:
                structure = slices[coupling.root(channel)]
                structure.setdefault(axis, []).append(position)
    alike: dict[tuple[Axis, ...], list[dict[Axis, list[int]]]] = defaultdict(list)
    for structure in slices.values():
        if any(axis.role == "producer" for axis in structure):
            alike[tuple(structure)].append(structure)
    sizes = {axis: len(channels) for channels, axis in coupling.axes}
    groups: dict[str, Group] = {}
    for axes, structures in alike.items():
        if len(structures) > 1:
            group = _make_group(axes, structures, sizes, groups)
            groups[group.name] = group
    return tuple(groups.values())


def _make_group(
    axes: tuple[Axis, ...],
    structures: list[dict[Axis, list[int]]],
    sizes: Mapping[Axis, int],
    taken: Iterable[str],
) -> Group:
    """Make a group of structures, given their slices on each axis."""
    producers = [axis for axis in axes if axis.role == "producer"]
    first = next((axis for axis in producers if axis.layer not in taken), producers[0])
    name, count = first.layer, 2
    while name in taken:
        name, count = f"{first.layer}#{count}", count + 1
    structures.sort(key=lambda slices: slices[first][0])
    members = []
    for axis in sorted(axes, key=lambda axis: axis != first):
        structure_of = torch.full((sizes[axis],), -1, dtype=torch.int64)
        for index, slices in enumerate(structures):
            structure_of[slices[axis]] = index
        members.append(Member(*axis, structure_of))
    return Group(name, len(structures), tuple(members))
