"""The vectors θ_s: the weights of one structure, and zero everywhere else.

Only what produces a channel counts (filter, bias, norm), never the input slices of the
layers that read it: setting either to zero changes the function in the same way.
Shapes: S structures of all groups, in order of the groups; P parameters.
"""

from __future__ import annotations

__all__ = ["Part", "StructureVectors", "add_slices"]

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_woodfisher.base.errors import ConfigurationError
from lightning_woodfisher.structured.config import StructureKind
from lightning_woodfisher.structured.graph.groups import Group, Role

_ROLES: dict[StructureKind, tuple[Role, ...]] = {
    "conv": ("producer", "bias"),
    "bn": ("norm",),
    "conv+bn": ("producer", "bias", "norm"),
}


@dataclass(frozen=True, eq=False)
class Part:
    """The slices of one parameter that belong to the structures of one group.

    Args:
        group: place of the group.
        module: name of the module.
        tensor: name of the parameter in it.
        role: what the slices are.
        parameter: the parameter.
        axis: along which the slices lie.
        structure_of: int64 ``[size of the axis]`` on the CPU: number among all S
            structures, or -1.
    """

    group: int
    module: str
    tensor: str
    role: Role
    parameter: nn.Parameter
    axis: int
    structure_of: Tensor


class StructureVectors:
    """The vectors θ_s of all structures.

    Args:
        model: the network.
        groups: its groups.
        kind: which entries make up a structure.

    Attributes:
        groups: as given.
        parts: where the entries lie.
        parameters: the parameters of the parts, each once.
        size: S.

    Raises:
        ConfigurationError: for a group without any such entry, or one that does not fit
            the model.
    """

    def __init__(
        self, model: nn.Module, groups: Sequence[Group], kind: StructureKind
    ) -> None:
        if not groups:
            raise ConfigurationError("there is no group of structures to score.")
        self.groups = tuple(groups)
        self.parts: list[Part] = []
        self._sizes = [group.size for group in groups]
        self.size = sum(self._sizes)
        first = 0
        for place, group in enumerate(groups):
            parts = _parts(model, place, group, kind, first)
            if not any(part.role in {"producer", "norm"} for part in parts):
                raise ConfigurationError(
                    f"structure={kind!r}: group {group.name!r} has no such layer; use "
                    "structure='conv' or 'conv+bn', or leave the group out."
                )
            self.parts += parts
            first += group.size
        unique = {id(part.parameter): part.parameter for part in self.parts}
        self.parameters = list(unique.values())

    def layers_of(self, group: int) -> set[str]:
        """Name the layers in which the structures of a group have entries.

        Args:
            group: its place.

        Returns:
            Names of modules.
        """
        return {part.module for part in self.parts if part.group == group}

    def split(self, values: Tensor) -> tuple[Tensor, ...]:
        """Cut numbers of all structures into those of the groups.

        Args:
            values: ``[S]``.

        Returns:
            One tensor ``[group.size]`` for each group.
        """
        return tuple(torch.split(values, self._sizes))

    def sum(self) -> list[Tensor]:
        """Add the vectors of all structures.

        Returns:
            One tensor for each of ``parameters``: the weights, zero where an entry
            belongs to no structure.
        """
        return [
            parameter.detach() * mask
            for parameter, mask in zip(self.parameters, self.masks(), strict=True)
        ]

    def masks(self, *roles: Role) -> list[Tensor]:
        """Mark the entries that belong to structures.

        Args:
            roles: only parts with one of these; none given stands for all.

        Returns:
            One bool tensor for each of ``parameters``.
        """
        masks = {id(p): torch.zeros_like(p, dtype=torch.bool) for p in self.parameters}
        for part in self.parts:
            if not roles or part.role in roles:
                where = (part.structure_of >= 0).nonzero().flatten()
                masks[id(part.parameter)].index_fill_(
                    part.axis, where.to(part.parameter.device), True
                )
        return list(masks.values())

    def inner(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """Multiply every θ_s by a vector.

        Args:
            tensors: the vector, one tensor for each of ``parameters``; None for zeros.

        Returns:
            float64 ``[S]`` on the CPU.
        """
        found = {id(p): t for p, t in zip(self.parameters, tensors, strict=True)}
        result = torch.zeros(self.size, dtype=torch.float64)
        for part in self.parts:
            other = found[id(part.parameter)]
            if other is not None:
                # A gradient may have a graph, which must not live on.
                add_slices(
                    result,
                    part.parameter.detach().double() * other.detach().double(),
                    part.axis,
                    part.structure_of,
                )
        return result


def add_slices(result: Tensor, values: Tensor, axis: int, structure_of: Tensor) -> None:
    """Add the sum of each slice to the number of its structure.

    Args:
        result: float64 ``[S]`` on the CPU, changed in place.
        values: of any shape.
        axis: along which the slices lie.
        structure_of: int64 ``[size of the axis]``: place in ``result``, or -1.
    """
    rest = [dim for dim in range(values.dim()) if dim != axis]
    sums = values.sum(rest, dtype=torch.float64) if rest else values.double()
    belongs = structure_of >= 0
    result.index_add_(0, structure_of[belongs], sums.cpu()[belongs])


def _parts(
    model: nn.Module, place: int, group: Group, kind: StructureKind, first: int
) -> list[Part]:
    parts = []
    for member in group.of_role(*_ROLES[kind]):
        parameter = dict(model.named_parameters(remove_duplicate=False)).get(
            member.name
        )
        if parameter is None:
            raise ConfigurationError(
                f"group {group.name!r} names {member.name!r}, which is no parameter of "
                f"{type(model).__name__}."
            )
        numbers = member.structure_of.cpu()
        if parameter.shape[member.axis] != len(numbers):
            raise ConfigurationError(
                f"group {group.name!r} has {len(numbers)} slices of {member.name!r} on "
                f"axis {member.axis}, whose size is {parameter.shape[member.axis]}; the "
                "groups are of another network."
            )
        numbers = torch.where(numbers >= 0, numbers + first, numbers)
        parts.append(
            Part(
                place,
                member.module,
                member.tensor,
                member.role,
                parameter,
                member.axis,
                numbers,
            )
        )
    return parts
