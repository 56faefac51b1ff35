"""The vectors θ_s: the weights of one structure, and zero everywhere else.

Only the tensors that produce a channel count (filter, bias, norm), not the input slices of
the layers that read it: setting either to zero changes the network in the same way.
Shapes: S structures of all groups, in order of the groups; P parameters.
"""

from __future__ import annotations

__all__ = ["ParameterSlices", "StructureVectors", "scored_members", "sum_products"]

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from lightning_woodfisher.base.errors import ConfigurationError
from lightning_woodfisher.structured.config import StructureKind
from lightning_woodfisher.structured.graph.groups import Group, Member, Role

_ROLES: dict[StructureKind, tuple[Role, ...]] = {
    "conv": ("producer", "bias"),
    "bn": ("norm",),
    "conv+bn": ("producer", "bias", "norm"),
}


def scored_members(group: Group, kind: StructureKind) -> tuple[Member, ...]:
    """Find the entries that make up the structures of a group.

    Args:
        group: the group.
        kind: which entries are wanted.

    Returns:
        Its members of these roles; the filters of a group without norms for ``"bn"``.
    """
    return group.of_role(*_ROLES[kind]) or group.of_role(*_ROLES["conv"])


@dataclass(frozen=True, eq=False)
class ParameterSlices(Member):
    """The slices of one parameter that belong to the structures of one group.

    As :class:`.Member`, but ``structure_of`` holds indices among all S structures, on the
    device of the parameter.

    Args:
        parameter: index of the parameter in :attr:`StructureVectors.parameters`.
    """

    parameter: int

    @cached_property
    def where(self) -> Tensor:
        """Indices on the axis that belong to a structure, in order."""
        return (self.structure_of >= 0).nonzero().flatten()

    @cached_property
    def owners(self) -> Tensor:
        """Structures of the indices :attr:`where`."""
        return self.structure_of[self.where]


class StructureVectors:
    """The vectors θ_s of all structures.

    Args:
        model: the network.
        groups: its groups.
        kind: which entries make up a structure.

    Attributes:
        slices: where the entries are.
        parameters: the parameters with such entries, each once.
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
        self.slices: list[ParameterSlices] = []
        self.size = 0
        unique: dict[int, Tensor] = {}
        for group in groups:
            for member in scored_members(group, kind):
                owners = member.structure_of.cpu()
                parameter = member.find_in(model)
                unique[id(parameter)] = parameter
                shifted = torch.where(owners >= 0, owners + self.size, owners)
                shifted = shifted.to(parameter.device)
                settings = {**vars(member), "structure_of": shifted}
                index = list(unique).index(id(parameter))
                self.slices.append(ParameterSlices(**settings, parameter=index))
            self.size += group.size
        self.parameters = list(unique.values())

    def masks(self, slices: Iterable[ParameterSlices]) -> list[Tensor]:
        """Mark the entries of some slices.

        Args:
            slices: some of ``slices``.

        Returns:
            One bool tensor for each of ``parameters``, of its shape.
        """
        masks = [torch.zeros_like(p, dtype=torch.bool) for p in self.parameters]
        for one in slices:
            mask = masks[one.parameter]
            mask.index_fill_(one.axis, one.where, True)
        return masks


def sum_products(
    slices: Iterable[ParameterSlices],
    left: Sequence[Tensor | None],
    right: Sequence[Tensor | None],
    size: int,
) -> Tensor:
    """Multiply two vectors and sum the products over each structure.

    Args:
        slices: where the entries of the structures are.
        left: one tensor for each parameter; None for zeros.
        right: the same.
        size: length of the result.

    Returns:
        float64 ``[size]``, on the device of the vectors, by ``structure_of`` of the slices.
    """
    device = next((t.device for t in left if t is not None), torch.device("cpu"))
    result = torch.zeros(size, dtype=torch.float64, device=device)
    for one in slices:
        first, second = left[one.parameter], right[one.parameter]
        if first is not None and second is not None:
            # The graph of a gradient must not be kept alive.
            values = first.detach().double() * second.detach().double()
            rest = [dim for dim in range(values.dim()) if dim != one.axis]
            sums = values.sum(rest) if rest else values
            result.index_add_(0, one.owners, sums[one.where])
    return result
