"""Neural implants in convolutions: where they are possible, as masks, and as layers.

An implant is a 1×1 filter in place of a k×k filter (Yu et al., "Hessian-aware pruning and
optimal neural implant", WACV 2022). With an odd kernel and padding that keeps its center
in place, a k×k filter whose only nonzero tap is the center is a 1×1 filter. So implants
train as a mask, and become an :class:`ImplantedConv` in the exported network.
"""

from __future__ import annotations

__all__ = [
    "ImplantedConv",
    "center_tap",
    "has_center",
    "implant_masks",
    "implantable_layers",
    "parameter_names",
    "sort_keys",
]

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from lightning_woodfisher.structured.graph.groups import (
    Group,
    Member,
    StructureIndices,
    resolve_structures,
)


class ImplantedConv(nn.Module):
    """A convolution with k×k filters, followed by 1×1 filters.

    Its parameters have no memory until they are replaced.

    Args:
        conv: a convolution that can have implants.
        rows: number of 1×1 filters, the last ones.

    Attributes:
        kept: convolution with the k×k filters.
        implant: convolution with the 1×1 filters, of the same stride.
    """

    def __init__(self, conv: _ConvNd, rows: int) -> None:
        super().__init__()
        self.in_channels, self.out_channels = conv.in_channels, conv.out_channels
        self.stride, self.kernel_size = conv.stride, conv.kernel_size
        kind: Any = type(conv)
        # On the meta device no random numbers are drawn.
        options: Any = {"bias": conv.bias is not None, "device": "meta"}
        self.kept = kind(
            conv.in_channels,
            conv.out_channels - rows,
            conv.kernel_size,
            conv.stride,
            conv.padding,
            conv.dilation,
            padding_mode=conv.padding_mode,
            **options,
        )
        self.implant = kind(conv.in_channels, rows, 1, conv.stride, **options)
        self.train(conv.training)

    def forward(self, inputs: Tensor) -> Tensor:
        """Apply both convolutions.

        Args:
            inputs: ``[n, in_channels, ...]``.

        Returns:
            ``[n, out_channels, ...]``, the outputs of the k×k filters first.
        """
        return torch.cat([self.kept(inputs), self.implant(inputs)], dim=1)


def center_tap(conv: nn.Module) -> dict[int, int]:
    """Find the center tap of the filters of a convolution.

    Args:
        conv: a convolution.

    Returns:
        Position by axis of the weight.
    """
    sizes: Any = conv.kernel_size
    return {axis: size // 2 for axis, size in enumerate(sizes, start=2)}


def parameter_names(model: nn.Module) -> dict[int, list[str]]:
    """List the names of each parameter in the distinct modules of a model.

    Args:
        model: the network.

    Returns:
        Names by id of the parameter; more than one if layers share it.
    """
    names: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(path, False, False):
            names.setdefault(id(parameter), []).append(name)
    return names


def implantable_layers(
    model: nn.Module, groups: Iterable[Group]
) -> dict[str, tuple[str, ...]]:
    """Find the layers that can have implants.

    Excluded are 1×1 filters, which would save nothing, grouped convolutions, and
    convolutions whose kernel or padding has no center.

    Args:
        model: the network.
        groups: its groups.

    Returns:
        Names of convolutions by group name. Groups without any are left out.
    """
    names = parameter_names(model)
    found = {}
    for group in groups:
        if any(
            _copies_of_group(member, group.size) is None for member in group.members
        ):
            continue
        layers = tuple(
            member.module
            for member in group.of_role("producer")
            if member.module
            and member.structure_of.tolist() == list(range(group.size))
            and member.axis == 0
            and has_center(model.get_submodule(member.module), names)
        )
        if layers:
            found[group.name] = layers
    return found


def has_center(conv: nn.Module, names: Mapping[int, Sequence[str]]) -> bool:
    """Check if the filters of a layer have a center tap, and are its own.

    Args:
        conv: the layer.
        names: names of the model's parameters, as :func:`parameter_names` returns them.

    Returns:
        Whether it can have implants.
    """
    if type(conv) not in {nn.Conv1d, nn.Conv2d, nn.Conv3d} or conv.groups != 1:
        return False
    if any(len(names[id(parameter)]) > 1 for parameter in conv.parameters(False)):
        return False
    sizes: Any = conv.kernel_size
    steps: Any = conv.dilation
    centered = tuple(d * (k - 1) // 2 for d, k in zip(steps, sizes, strict=True))
    is_odd = all(size % 2 for size in sizes)
    return is_odd and math.prod(sizes) > 1 and conv.padding in {centered, "same"}


def implant_masks(
    model: nn.Module, groups: Iterable[Group], implanted: StructureIndices
) -> dict[str, Tensor]:
    """Find the entries to set to zero to make structures implants.

    Args:
        model: the network.
        groups: its groups.
        implanted: the structures.

    Returns:
        bool tensors of the parameters' shapes by name, True for all taps of their filters
        but the center.
    """
    groups = tuple(groups)
    layers = implantable_layers(model, groups)
    masks: dict[str, Tensor] = {}
    for group, structures in resolve_structures(groups, implanted):
        for layer in layers[group.name]:
            conv: Any = model.get_submodule(layer)
            mask = torch.zeros_like(conv.weight, dtype=torch.bool)
            mask[structures.to(mask.device)] = True
            center: Any = (..., *center_tap(conv).values())
            mask[center] = False
            masks[f"{layer}.weight"] = mask
    return masks


def sort_keys(member: Member, size: int, last: Tensor) -> Tensor:
    """Compute the new positions of slices if some structures move behind the others.

    Args:
        member: of a group for which :func:`implantable_layers` has found layers.
        size: number of structures of the group.
        last: the structures that move, int64.

    Returns:
        int64 ``[size of the axis]``. Slices of other groups keep their positions.
    """
    keys = torch.arange(len(member.structure_of))
    is_last = torch.isin(member.structure_of, last)
    for start, stop in _copies_of_group(member, size) or ():
        order = torch.sort(is_last[start:stop].int(), stable=True).indices
        keys[start + order] = torch.arange(start, stop)
    return keys


def _copies_of_group(member: Member, size: int) -> list[tuple[int, int]] | None:
    """Find (start, stop) of each copy of a group on an axis; None if one is incomplete."""
    # A complete copy has the slices of all structures in order, the same number of each.
    owner = member.structure_of
    is_start = torch.ones(len(owner), dtype=torch.bool)
    is_start[1:] = (owner[1:] < owner[:-1]) | ((owner[1:] < 0) != (owner[:-1] < 0))
    starts = is_start.nonzero().flatten().tolist()
    copies = [
        (start, stop)
        for start, stop in zip(starts, [*starts[1:], len(owner)], strict=True)
        if owner[start] >= 0
    ]
    for start, stop in copies:
        repeats = (stop - start) // size
        if owner[start:stop].tolist() != [
            s for s in range(size) for _ in range(repeats)
        ]:
            return None
    return copies
