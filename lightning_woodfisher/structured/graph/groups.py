"""CompensatingCriterion channels: which slices of which tensors go together.

A *structure* is one output channel of a layer with everything that has to go with it: in a
residual network the same channel of every layer that is added to it, the channel's entries
of biases and norms, and the matching input slices of the layers that read it. Structures
that share those layers make a :class:`Group`. Groups are plain data, so that anything can
make them: a traced graph (:func:`trace_groups`) or a test by hand.
"""

from __future__ import annotations

__all__ = ["Group", "Member", "Role"]

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

#: ``producer``: the filter, an output slice of a Conv or Linear weight; ``bias``: of that
#: layer; ``norm``: weight and bias of a norm that follows it; ``statistics``: running mean
#: and variance of that norm; ``consumer``: the input slice of a layer that reads it.
Role = Literal["producer", "bias", "norm", "statistics", "consumer"]


@dataclass(frozen=True, eq=False)
class Member:
    """One axis of one tensor whose slices belong to the structures of a group.

    Args:
        module: name of the module in ``model.named_modules()``.
        tensor: name of the parameter or buffer in that module, such as ``"weight"``.
        axis: the axis that shrinks.
        role: what the slices are to the structure.
        structure_of: int64 ``[size of the axis]``, the number of the structure within the
            group that each slice belongs to, or -1 for slices of none. After a flatten
            several slices belong to one structure; after a concatenation other slices
            belong to other groups.
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
            structures: their numbers within the group.

        Returns:
            int64 positions on the axis, ascending.
        """
        wanted = torch.as_tensor(structures, dtype=torch.int64)
        return torch.isin(self.structure_of, wanted).nonzero().flatten()


@dataclass(frozen=True, eq=False)
class Group:
    """Structures that lie side by side in the same tensors.

    Args:
        name: of the first producing layer; unique in the model.
        size: number of structures.
        members: every axis that shrinks when a structure goes; the first is a producer.
    """

    name: str
    size: int
    members: tuple[Member, ...]

    def of_role(self, *roles: Role) -> tuple[Member, ...]:
        """Choose members.

        Args:
            roles: those that are wanted.

        Returns:
            The members with one of these roles, in order.
        """
        return tuple(member for member in self.members if member.role in roles)
