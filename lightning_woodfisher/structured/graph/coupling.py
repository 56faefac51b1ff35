"""Which channels of which layers are one and the same: a partition of all channels.

Every layer has ports, its outputs and its inputs, and a port has channels. Channels that
the network ties together are united; what is united in the end is a structure.
"""

from __future__ import annotations

__all__ = ["Coupling", "Port", "ports_of", "structures"]

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from lightning_woodfisher.structured.graph.groups import Group, Member, Role

Side = Literal["out", "in"]
#: Layer, tensor, axis and role.
Place = tuple[str, str, int, Role]


@dataclass(frozen=True)
class Port:
    """One side of a layer.

    Args:
        side: outputs or inputs; a layer that keeps channels apart has outputs only.
        channels: their number.
        axes: tensors whose axis has this side's slices, as (tensor, axis, role). Slice i
            belongs to channel i, and there may be fewer slices than channels.
    """

    side: Side
    channels: int
    axes: tuple[tuple[str, int, Role], ...]


def ports_of(layer: nn.Module) -> tuple[Port, ...] | str:
    """List the ports of a layer.

    Args:
        layer: a convolution, Linear, BatchNorm, InstanceNorm or PReLU layer.

    Returns:
        Its ports, or the reason why its channels cannot be pruned.
    """
    if isinstance(layer, nn.PReLU):
        return (Port("out", layer.num_parameters, (("weight", 0, "consumer"),)),)
    if isinstance(layer, _NormBase):
        return _norm_ports(layer)
    if layer._parameters.get("weight") is None:
        return f"the weight of a {type(layer).__name__} is computed from other tensors"
    bias: tuple[tuple[str, int, Role], ...] = ()
    if layer._parameters.get("bias") is not None:
        bias = (("bias", 0, "bias"),)
    if isinstance(layer, nn.Linear):
        sizes, rows, columns = (layer.out_features, layer.in_features), 0, 1
    elif isinstance(layer, _ConvNd):
        sizes, rows, columns = (layer.out_channels, layer.in_channels), 0, 1
        if isinstance(layer, _ConvTransposeNd):
            if layer.groups > 1:
                return "it passes a transposed convolution with groups"
            rows, columns = 1, 0
    else:
        return f"it passes a {type(layer).__name__}"
    reads: tuple[tuple[str, int, Role], ...] = (("weight", columns, "consumer"),)
    if isinstance(layer, _ConvNd) and layer.groups > 1:
        if layer.in_channels == layer.groups:
            reads = ()  # Depthwise: the filters go with the inputs.
        elif layer.out_channels == layer.groups:
            return "it passes a convolution whose groups have several inputs and one output"
    return (
        Port("out", sizes[0], (("weight", rows, "producer"), *bias)),
        Port("in", sizes[1], reads),
    )


def _norm_ports(layer: _NormBase) -> tuple[Port, ...] | str:
    if layer._parameters.get("weight") is None or layer._parameters.get("bias") is None:
        return (
            f"it passes a {type(layer).__name__} without weight and bias, which gives "
            "something else than zero for a zero channel"
        )
    axes: list[tuple[str, int, Role]] = [("weight", 0, "norm"), ("bias", 0, "norm")]
    if layer.running_mean is not None:
        axes += [("running_mean", 0, "statistics"), ("running_var", 0, "statistics")]
    return (Port("out", layer.num_features, tuple(axes)),)


class Coupling:
    """A partition of the channels of a model's layers.

    Args:
        layers: by name, those with channels; see :func:`ports_of`.

    Attributes:
        ports: by name of the layer and side.
        reasons: why the channels of a layer cannot be pruned, by name of the layer.
    """

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        self.ports: dict[tuple[str, Side], Port] = {}
        self.reasons: dict[str, str] = {}
        self._first: dict[tuple[str, Side], int] = {}
        self._parent: list[int] = []
        self._bad: dict[int, str] = {}
        self._layers = dict(layers)
        for name, layer in layers.items():
            ports = ports_of(layer)
            if isinstance(ports, str):
                self.reasons[name] = ports
                continue
            for port in ports:
                self.ports[name, port.side] = port
                self._first[name, port.side] = len(self._parent)
                self._parent.extend(
                    range(len(self._parent), len(self._parent) + port.channels)
                )
            self._unite_convolution_groups(name, layer)
        self._unite_shared_tensors()

    def channel(self, layer: str, side: Side, index: int) -> int:
        """Number a channel.

        Args:
            layer: name of the layer.
            side: which port; a layer without inputs has the outputs for both.
            index: of the channel in the port.

        Returns:
            Its number, or -1 when the port has no such channel.
        """
        place = (layer, side) if (layer, side) in self.ports else (layer, "out")
        port = self.ports.get(place)
        if port is None or not 0 <= index < port.channels:
            return -1
        return self._first[place] + index

    def unite(self, one: int, other: int) -> None:
        """Make two channels the same structure.

        Args:
            one: number of a channel.
            other: number of another.
        """
        a, b = self._root(one), self._root(other)
        if a != b:
            self._parent[max(a, b)] = min(a, b)
            if max(a, b) in self._bad:
                self._bad.setdefault(min(a, b), self._bad.pop(max(a, b)))

    def leave_out(self, channel: int, reason: str) -> None:
        """Mark a channel, and all that is or will be united with it, as not prunable.

        Args:
            channel: its number.
            reason: why.
        """
        self._bad.setdefault(self._root(channel), reason)

    def reason(self, channel: int) -> str | None:
        """Tell why a channel cannot be pruned.

        Args:
            channel: its number.

        Returns:
            The first reason that was given, if any was.
        """
        return self._bad.get(self._root(channel))

    def slices(self) -> Iterator[tuple[int, Place, int]]:
        """Go through all slices of prunable channels.

        Yields:
            Number of the structure, (layer, tensor, axis, role), position on the axis.
        """
        for (name, side), port in self.ports.items():
            first = self._first[name, side]
            for tensor, axis, role in port.axes:
                size = int(getattr(self._layers[name], tensor).shape[axis])
                for position in range(size):
                    root = self._root(first + position)
                    if root not in self._bad:
                        yield root, (name, tensor, axis, role), position

    def _root(self, channel: int) -> int:
        root = channel
        while self._parent[root] != root:
            root = self._parent[root]
        while self._parent[channel] != root:
            self._parent[channel], channel = root, self._parent[channel]
        return root

    def _unite_convolution_groups(self, name: str, layer: nn.Module) -> None:
        """Of each convolution group the same share has to go."""
        groups = int(getattr(layer, "groups", 1))
        if groups == 1:
            return
        outputs = self.ports[name, "out"].channels // groups
        inputs = self.ports[name, "in"].channels // groups
        out_first, in_first = self._first[name, "out"], self._first[name, "in"]
        for group in range(groups):
            if inputs == 1:
                for index in range(outputs):
                    self.unite(in_first + group, out_first + group * outputs + index)
                continue
            for first, size in ((out_first, outputs), (in_first, inputs)):
                for index in range(size):
                    self.unite(first + index, first + group * size + index)

    def _unite_shared_tensors(self) -> None:
        seen: dict[tuple[int, int], int] = {}
        for (name, side), port in self.ports.items():
            for tensor, axis, _ in port.axes:
                value = getattr(self._layers[name], tensor)
                first = self._first[name, side]
                other = seen.setdefault((id(value), axis), first)
                if other != first:
                    for index in range(value.shape[axis]):
                        self.unite(first + index, other + index)


def structures(coupling: Coupling) -> tuple[Group, ...]:
    """Sort the structures of a partition into groups.

    Structures are in the same group when they have slices in the same tensors.

    Args:
        coupling: the partition.

    Returns:
        Groups of at least two structures, in the order of their first layers.
    """
    owned: dict[int, dict[Place, list[int]]] = defaultdict(dict)
    sizes: dict[Place, int] = defaultdict(int)
    for root, place, position in coupling.slices():
        owned[root].setdefault(place, []).append(position)
    for (name, _), port in coupling.ports.items():
        for tensor, axis, role in port.axes:
            value = getattr(coupling._layers[name], tensor)
            sizes[name, tensor, axis, role] = int(value.shape[axis])
    alike: dict[tuple[Place, ...], list[int]] = defaultdict(list)
    for root, slices in owned.items():
        if any(role == "producer" for *_, role in slices):
            alike[tuple(slices)].append(root)
    groups: list[Group] = []
    taken: set[str] = set()
    for places, roots in alike.items():
        if len(roots) > 1:
            groups.append(_group(places, [owned[r] for r in roots], sizes, taken))
            taken.add(groups[-1].name)
    return tuple(groups)


def _group(
    places: tuple[Place, ...],
    members: list[dict[Place, list[int]]],
    sizes: Mapping[Place, int],
    taken: Iterable[str],
) -> Group:
    producers = [place for place in places if place[3] == "producer"]
    free = [place for place in producers if place[0] not in taken]
    first = (free or producers)[0]
    name, count = first[0], 2
    while name in taken:
        name, count = f"{first[0]}#{count}", count + 1
    members.sort(key=lambda slices: slices[first][0])
    made = []
    for place in sorted(places, key=lambda place: place != first):
        owner = torch.full((sizes[place],), -1, dtype=torch.int64)
        for number, slices in enumerate(members):
            owner[slices[place]] = number
        made.append(Member(*place, structure_of=owner))
    return Group(name, len(members), tuple(made))
