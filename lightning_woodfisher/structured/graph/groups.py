"""Groups of coupled channels, and the masks that remove them.

A *structure* is one output channel of a layer with everything that must be removed with
it: in a residual network the same channel of every layer whose outputs are added, its
entries of biases and norms, and the matching input slices of the layers that read it.
Structures of the same layers form a :class:`Group`. Groups are plain data: they come from
a traced model (:func:`.trace_groups`) or are written by hand.

A structure is masked when the filters, biases and norm entries of all its layers are
zero. Every layer that reads it then receives zeros, and the network computes the same as
with the structure cut out. The input slices of the reading layers keep their values.
"""

from __future__ import annotations

__all__ = [
    "Group",
    "Member",
    "Role",
    "StructureIndices",
    "add_prefix",
    "channel_masks",
    "find_tensor",
    "masked_parameters",
    "require_sizes",
    "resolve_structures",
    "zero_structures",
]

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_woodfisher.base.errors import ConfigurationError, nearest

#: ``producer``: the filter, an output slice of a Conv or Linear weight; ``bias``: of that
#: layer; ``norm``: weight and bias of a norm that follows it; ``statistics``: running mean
#: and variance of that norm; ``query_key``: of an attention head, its rows of queries and
#: keys, which count for nothing once those of its values are zero; ``consumer``: the input
#: slice of a layer that reads it.
Role = Literal["producer", "bias", "norm", "statistics", "query_key", "consumer"]

#: The roles that a mask sets to zero.
_MASKED_ROLES: tuple[Role, ...] = ("producer", "bias", "norm", "query_key")

#: Structure indices by group name.
StructureIndices = Mapping[str, Sequence[int] | Tensor]


@dataclass(frozen=True, eq=False)
class Member:
    """One axis of one tensor whose slices belong to the structures of a group.

    Args:
        module: name of the module in ``model.named_modules()``.
        tensor: name of the parameter or buffer in that module, such as ``"weight"``.
        axis: the axis that shrinks.
        role: what the slices are to the structure.
        structure_of: int64 ``[size of the axis]``, the index of the structure in the group
            that each slice belongs to, or -1 for none. After a flatten, several slices
            belong to one structure. After a concatenation, other slices belong to other
            groups.
    """

    module: str
    tensor: str
    axis: int
    role: Role
    structure_of: Tensor

    @property
    def name(self) -> str:
        """Name of the tensor in the model's ``state_dict``."""
        return f"{self.module}.{self.tensor}" if self.module else self.tensor

    def slices(self, structures: Sequence[int] | Tensor) -> Tensor:
        """Find the slices of some structures.

        Args:
            structures: indices in the group.

        Returns:
            int64 positions on the axis, ascending.
        """
        wanted = torch.as_tensor(structures, dtype=torch.int64)
        return torch.isin(self.structure_of, wanted).nonzero().flatten()

    def find_in(self, model: nn.Module) -> Tensor:
        """Find the tensor in a model. Raise a ConfigurationError if its size differs.

        Args:
            model: the network.

        Returns:
            The parameter or buffer itself.
        """
        tensors, key = find_tensor(model, self.name)
        sizes = {self.axis: len(self.structure_of)}
        require_sizes(self.name, tensors[key], sizes, "trace the groups again")
        found: Tensor = tensors[key]
        return found


@dataclass(frozen=True, eq=False)
class Group:
    """Structures that share the same tensors.

    Args:
        name: of the first producing layer; unique in the model.
        size: number of structures.
        members: every axis that shrinks with a structure. The first is a producer.
    """

    name: str
    size: int
    members: tuple[Member, ...]

    @property
    def width(self) -> int:
        """Channels of a structure in its first layer: those of a head, 1 for a filter."""
        producers = self.of_role("producer")
        return int((producers[0].structure_of == 0).sum()) if producers else 1

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the producing layers."""
        return tuple(member.module for member in self.of_role("producer"))

    def of_role(self, *roles: Role) -> tuple[Member, ...]:
        """Choose members.

        Args:
            roles: one or more roles.

        Returns:
            The members with one of these roles, in order.
        """
        return tuple(member for member in self.members if member.role in roles)


def add_prefix(groups: Iterable[Group], prefix: str) -> tuple[Group, ...]:
    """Rename the groups of a submodule as its parent names them.

    Args:
        groups: of the submodule.
        prefix: name of the submodule, or ``""`` for the model itself.

    Returns:
        The same groups with longer names.
    """
    if not prefix:
        return tuple(groups)
    return tuple(
        replace(
            group,
            name=f"{prefix}.{group.name}",
            members=tuple(
                replace(m, module=f"{prefix}.{m.module}".rstrip("."))
                for m in group.members
            ),
        )
        for group in groups
    )


def masked_parameters(
    model: nn.Module, groups: Iterable[Group]
) -> dict[str, nn.Parameter]:
    """Find the parameters that masks of some groups can change.

    Args:
        model: the network.
        groups: its groups.

    Returns:
        Parameters by name, in the order of ``model.named_parameters()``. A shared
        parameter appears once, under its first name.
    """
    masked = {
        id(member.find_in(model))
        for group in groups
        for member in group.of_role(*_MASKED_ROLES)
    }
    return {n: p for n, p in model.named_parameters() if id(p) in masked}


def channel_masks(
    model: nn.Module, groups: Iterable[Group], structures: StructureIndices
) -> dict[str, Tensor]:
    """Find the entries to set to zero to mask structures.

    Args:
        model: the network.
        groups: its groups.
        structures: the structures to mask.

    Returns:
        bool tensors of the parameters' shapes by parameter name, True where the entry
        becomes zero, on the parameters' devices. Parameters without such entries are
        left out.

    Raises:
        ConfigurationError: for a group or a structure that does not exist.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    masks: dict[str, Tensor] = {}
    for group, indices in resolve_structures(groups, structures):
        for member in group.of_role(*_MASKED_ROLES):
            parameter = member.find_in(model)
            name = names.get(id(parameter))
            if name is None:
                raise ConfigurationError(
                    f"{member.name} is a buffer, and only parameters can be masked."
                )
            if name not in masks:
                masks[name] = torch.zeros_like(parameter, dtype=torch.bool)
            slices = member.slices(indices).to(parameter.device)
            masks[name].index_fill_(member.axis, slices, value=True)
    return {name: mask for name, mask in masks.items() if bool(mask.any())}


@torch.no_grad()
def zero_structures(model: nn.Module, groups: Iterable[Group]) -> dict[str, Tensor]:
    """Find the structures that are masked in a model.

    Args:
        model: the network.
        groups: its groups.

    Returns:
        int64 ``[masked structures]``, ascending, on the CPU, by group name. Groups
        without masked structures are left out, and so are groups that are zero as a
        whole, because a layer keeps at least one channel.
    """
    found: dict[str, Tensor] = {}
    for group in groups:
        is_masked = torch.ones(group.size, dtype=torch.bool)
        for member in group.of_role(*_MASKED_ROLES):
            slices = (member.find_in(model) != 0).movedim(member.axis, 0)
            is_nonzero = slices.reshape(len(slices), -1).any(1).cpu()
            owner = member.structure_of
            is_masked[owner[(owner >= 0) & is_nonzero]] = False
        if bool(is_masked.any()) and not bool(is_masked.all()):
            found[group.name] = is_masked.nonzero().flatten()
    return found


def resolve_structures(
    groups: Iterable[Group], structures: StructureIndices
) -> list[tuple[Group, Tensor]]:
    """Look up groups by name and check the indices of structures.

    Args:
        groups: those of the model.
        structures: indices by group name.

    Returns:
        Pairs of a group and its structures, int64, ascending, without duplicates. Groups
        without structures are left out.

    Raises:
        ConfigurationError: for a group or a structure that does not exist.
    """
    by_name = {group.name: group for group in groups}
    pairs = []
    for name, indices in structures.items():
        if name not in by_name:
            raise ConfigurationError(
                f"there is no group {name!r}.{nearest(name, by_name)}"
            )
        group = by_name[name]
        found = torch.unique(torch.as_tensor(indices, dtype=torch.int64).cpu())
        wrong = found[(found < 0) | (found >= group.size)].tolist()
        if wrong:
            raise ConfigurationError(
                f"group {name!r} has structures 0 to {group.size - 1}, not {wrong[0]}."
            )
        if len(found):
            pairs.append((group, found))
    return pairs


def find_tensor(model: nn.Module, name: str) -> tuple[dict[str, Any], str]:
    """Find the dict of a module that holds a parameter or buffer.

    Args:
        model: the network.
        name: of the tensor in ``state_dict``.

    Returns:
        The dict, and the key of the tensor in it.

    Raises:
        ConfigurationError: if the model has no such tensor.
    """
    path, _, key = name.rpartition(".")
    try:
        module = model.get_submodule(path)
    except AttributeError:
        module = nn.Module()
    for tensors in (module._parameters, module._buffers):
        if tensors.get(key) is not None:
            return tensors, key
    raise ConfigurationError(
        f"the model has no tensor {name!r}; the groups or the plan were made for another "
        "model."
    )


def require_sizes(
    name: str, tensor: Tensor, sizes: Mapping[int, int], remedy: str
) -> None:
    """Check the size of a tensor along some axes.

    Args:
        name: of the tensor, for the message.
        tensor: the parameter or buffer.
        sizes: number of slices by axis.
        remedy: what to do, for the message.

    Raises:
        ConfigurationError: if a size differs.
    """
    for axis, size in sizes.items():
        if axis >= tensor.dim() or tensor.shape[axis] != size:
            raise ConfigurationError(
                f"{name} has shape {tuple(tensor.shape)}, but {size} slices are expected "
                f"on axis {axis}; {remedy}."
            )
