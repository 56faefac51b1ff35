"""Convolutions of which some filters are 1×1 (neural implants; Yu et al. 2022).

With an odd kernel and padding that keeps the middle in place, a k×k filter of which only
the centre tap is not zero is a 1×1 filter. So an implant is trained in place under a mask,
and afterwards takes a smaller layer: :class:`ImplantedConv`.
"""

from __future__ import annotations

__all__ = ["ImplantedConv", "arrangement", "centre", "implantable"]

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from lightning_woodfisher.structured.graph.groups import Group, Member


class ImplantedConv(nn.Module):
    """Whole filters and 1×1 filters side by side, in this order.

    Args:
        conv: an implantable convolution; the last filters keep their centre taps only.
        rows: how many of them.

    Attributes:
        kept: convolution with the whole filters.
        implant: convolution with the 1×1 filters, of the same stride.
    """

    def __init__(self, conv: _ConvNd, rows: int) -> None:
        super().__init__()
        self.in_channels, self.out_channels = conv.in_channels, conv.out_channels
        self.stride, self.kernel_size = conv.stride, conv.kernel_size
        kind: Any = type(conv)
        bias = conv.bias is not None
        whole = conv.out_channels - rows
        # Without memory, and without a draw from the generator.
        self.kept = kind(
            conv.in_channels,
            whole,
            conv.kernel_size,
            conv.stride,
            conv.padding,
            conv.dilation,
            bias=bias,
            padding_mode=conv.padding_mode,
            device="meta",
        )
        self.implant = kind(
            conv.in_channels, rows, 1, conv.stride, bias=bias, device="meta"
        )
        self.train(conv.training)

    def forward(self, inputs: Tensor) -> Tensor:
        """Convolve.

        Args:
            inputs: ``[n, in_channels, ...]``.

        Returns:
            ``[n, out_channels, ...]``, the whole filters first.
        """
        return torch.cat([self.kept(inputs), self.implant(inputs)], dim=1)


def centre(conv: nn.Module) -> dict[int, int]:
    """Find the centre tap of a filter.

    Args:
        conv: a convolution.

    Returns:
        Position by axis of the weight.
    """
    sizes: Any = conv.kernel_size
    return {axis + 2: size // 2 for axis, size in enumerate(sizes)}


def implantable(
    model: nn.Module, groups: Iterable[Group]
) -> dict[str, tuple[str, ...]]:
    """Find the layers that implants can be made in.

    Filters with one tap save nothing and stay as they are; so do those of grouped
    convolutions, and those whose kernel or padding has no middle.

    Args:
        model: the network.
        groups: its groups.

    Returns:
        Names of convolutions by group name; only groups with any.
    """
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    found = {}
    for group in groups:
        if any(_segments(member, group.size) is None for member in group.members):
            continue
        layers = tuple(
            member.module
            for member in group.of_role("producer")
            if member.module
            and member.structure_of.tolist() == list(range(group.size))
            and member.axis == 0
            and _has_middle(model.get_submodule(member.module), owners)
        )
        if layers:
            found[group.name] = layers
    return found


def arrangement(member: Member, size: int, last: Tensor) -> Tensor:
    """Find where slices go when some structures move behind the others.

    Args:
        member: of a group for which :func:`implantable` has found layers.
        size: structures of the group.
        last: the structures that move, int64.

    Returns:
        int64, sorting by which puts the slices in their new order; a slice of another
        group keeps its position.
    """
    keys = torch.arange(len(member.structure_of))
    behind = torch.isin(member.structure_of, last)
    for start, stop in _segments(member, size) or ():
        order = torch.sort(behind[start:stop].int(), stable=True).indices
        keys[start + order] = torch.arange(start, stop)
    return keys


def _has_middle(conv: nn.Module, owners: Mapping[int, int]) -> bool:
    if type(conv) not in {nn.Conv1d, nn.Conv2d, nn.Conv3d} or conv.groups != 1:
        return False
    if any(owners[id(p)] > 1 for p in conv._parameters.values() if p is not None):
        return False
    sizes: Any = conv.kernel_size
    steps: Any = conv.dilation
    middle = tuple(d * (k - 1) // 2 for d, k in zip(steps, sizes, strict=True))
    odd = all(size % 2 for size in sizes)
    return odd and math.prod(sizes) > 1 and conv.padding in {middle, "same"}


def _segments(member: Member, size: int) -> list[tuple[int, int]] | None:
    """Cut an axis into copies of the group; None where it holds anything else."""
    owner = member.structure_of.tolist()
    found: list[tuple[int, int]] = []
    start = 0
    for place in range(1, len(owner) + 1):
        ends = place == len(owner) or owner[place] < owner[place - 1]
        if ends or (owner[place] >= 0) != (owner[place - 1] >= 0):
            if owner[start] >= 0:
                found.append((start, place))
            start = place
    for first, stop in found:
        repeats, rest = divmod(stop - first, size)
        whole = [s for s in range(size) for _ in range(repeats)]
        if rest or owner[first:stop] != whole:
            return None
    return found
