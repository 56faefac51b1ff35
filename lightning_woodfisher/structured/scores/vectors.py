"""The vectors θ_s: the weights of one structure, and zero everywhere else.

Only the tensors that produce a channel count (filter, bias, norm), not the input slices of
the layers that read it: setting either to zero changes the network in the same way.
Shapes: S structures of all groups, in order of the groups; L layers.
"""

from __future__ import annotations

__all__ = ["ParameterSlices", "StructureVectors", "sum_products"]

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from lightning_woodfisher.base.errors import ConfigurationError
from lightning_woodfisher.structured.config import StructureKind
from lightning_woodfisher.structured.graph.groups import Group, Role

_ROLES: dict[StructureKind, tuple[Role, ...]] = {
    "conv": ("producer", "bias"),
    "bn": ("norm",),
    "conv+bn": ("producer", "bias", "norm"),
}


class ParameterSlices(NamedTuple):
    """The slices of one parameter that belong to the structures of one group.

    Attributes:
        module: name of the layer.
        tensor: name of the parameter in the layer.
        axis: the axis of the slices.
        role: what they are to the structures.
        owners: int64 ``[size of the axis]``, the structure of each slice among all S, or S
            for none; on the device of the parameter.
        parameter: index of the parameter in :attr:`StructureVectors.parameters`.
        group: index of the group.
    """

    module: str
    tensor: str
    axis: int
    role: Role
    owners: Tensor
    parameter: int
    group: int


class StructureVectors:
    """The vectors θ_s of all structures.

    Args:
        model: the network.
        groups: its groups.
        kind: which entries make up a structure; the filters of a group without norms for
            ``"bn"``.

    Attributes:
        model: as given.
        slices: where the entries are.
        parameters: the parameters with such entries, each once.
        depthwise: the depthwise convolutions of groups that have any, by their indices.
        size: S.

    Raises:
        ConfigurationError: if there are no groups, two groups have the same name, or a
            group does not fit the model.
    """

    def __init__(
        self, model: nn.Module, groups: Sequence[Group], kind: StructureKind
    ) -> None:
        if not groups or len({group.name for group in groups}) != len(groups):
            raise ConfigurationError(
                "structures cannot be scored without groups, or with two groups of the "
                "same name; pass the groups that trace_groups returns."
            )
        self.model = model
        self.size = sum(group.size for group in groups)
        self.slices: list[ParameterSlices] = []
        places: dict[Tensor, int] = {}
        self.depthwise: dict[int, set[str]] = {}
        first = 0
        for index, group in enumerate(groups):
            convolutions = {
                member.module
                for member in group.of_role("producer")
                if _is_depthwise(model.get_submodule(member.module))
            }
            if convolutions:
                self.depthwise[index] = convolutions
            for member in group.of_role(*_ROLES[kind]) or group.of_role(
                *_ROLES["conv"]
            ):
                parameter = member.find_in(model)
                owners = member.structure_of.to(parameter.device)
                owners = torch.where(owners >= 0, owners + first, self.size)
                place = places.setdefault(parameter, len(places))
                self.slices.append(
                    ParameterSlices(
                        member.module,
                        member.tensor,
                        member.axis,
                        member.role,
                        owners,
                        place,
                        index,
                    )
                )
            first += group.size
        self.parameters = list(places)


def _is_depthwise(module: nn.Module) -> bool:
    return isinstance(module, _ConvNd) and 1 < module.groups == module.in_channels


def sum_products(
    slices: Sequence[ParameterSlices],
    left: Sequence[Tensor | None],
    right: Sequence[Tensor | None],
    size: int,
) -> Tensor:
    """Multiply two vectors and sum the products over each structure in each layer.

    Args:
        slices: where the entries of the structures are.
        left: one tensor for each parameter; None for zeros.
        right: the same.
        size: S.

    Returns:
        float64 ``[L, S]``, layers in order of the slices, on the device of the vectors.
    """
    layers = list(dict.fromkeys(one.module for one in slices))
    device = next((t.device for t in left if t is not None), torch.device("cpu"))
    # The last column is for slices without a structure.
    result = torch.zeros(len(layers), size + 1, dtype=torch.float64, device=device)
    for one in slices:
        first, second = left[one.parameter], right[one.parameter]
        if first is not None and second is not None:
            # The graph of a gradient must not be kept alive.
            values = first.detach().double() * second.detach().double()
            rest = [dim for dim in range(values.dim()) if dim != one.axis]
            sums = values.sum(rest) if rest else values
            result[layers.index(one.module)].index_add_(0, one.owners, sums)
    return result[:, :-1]
