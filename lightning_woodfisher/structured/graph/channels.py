"""From structures to the entries of the model that are zero without them, and back.

A structure counts as masked when the filters, biases and norm entries of all its layers
are zero. Then it sends zeros to everything that reads it, and the network computes what it
would compute had the structure been cut out. The slices of the readers keep their values.
"""

from __future__ import annotations

__all__ = ["Chosen", "channel_masks", "masked_parameters", "zero_structures"]

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from lightning_woodfisher.base.errors import ConfigurationError, nearest
from lightning_woodfisher.structured.graph.groups import Group, Member, Role

#: Numbers of structures by the name of their group.
Chosen = Mapping[str, Sequence[int] | Tensor]

#: What a mask sets to zero.
_MASKED: tuple[Role, ...] = ("producer", "bias", "norm")


def masked_parameters(
    model: nn.Module, groups: Iterable[Group]
) -> dict[str, nn.Parameter]:
    """Find the parameters that the masks of some groups may touch.

    Args:
        model: the network.
        groups: its groups.

    Returns:
        Parameters by name, in the order of ``model.named_parameters()``; a tensor that
        layers share appears once, under its first name.
    """
    touched = {
        id(tensor_of(model, member))
        for group in groups
        for member in group.of_role(*_MASKED)
    }
    return {n: p for n, p in model.named_parameters() if id(p) in touched}


def channel_masks(
    model: nn.Module, groups: Iterable[Group], chosen: Chosen
) -> dict[str, Tensor]:
    """Find the entries to set to zero so that structures are masked.

    Args:
        model: the network.
        groups: its groups.
        chosen: the structures to mask.

    Returns:
        bool tensors of the parameters' shapes by parameter name, True where the entry
        goes, on the parameters' devices; only parameters with such entries.

    Raises:
        ConfigurationError: for a group or a structure that does not exist.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    pruned: dict[str, Tensor] = {}
    for group, structures in resolve(groups, chosen):
        for member in group.of_role(*_MASKED):
            parameter = tensor_of(model, member)
            name = names.get(id(parameter))
            if name is None:
                raise ConfigurationError(f"{member.name} is no parameter of the model.")
            if name not in pruned:
                pruned[name] = torch.zeros_like(parameter, dtype=torch.bool)
            slices = member.slices(structures).to(parameter.device)
            pruned[name].index_fill_(member.axis, slices, value=True)
    return {name: gone for name, gone in pruned.items() if bool(gone.any())}


@torch.no_grad()
def zero_structures(model: nn.Module, groups: Iterable[Group]) -> dict[str, Tensor]:
    """Find the structures that are masked in a model.

    Args:
        model: the network.
        groups: its groups.

    Returns:
        int64 ``[masked structures]``, ascending, on the CPU, by group name; only groups
        that have some.
    """
    found: dict[str, Tensor] = {}
    for group in groups:
        alive = torch.zeros(group.size, dtype=torch.bool)
        for member in group.of_role(*_MASKED):
            weights = tensor_of(model, member).detach()
            slices = (weights != 0).movedim(member.axis, 0)
            per_slice = slices.reshape(len(slices), -1).any(1).cpu()
            owner = member.structure_of
            alive[owner[(owner >= 0) & per_slice]] = True
        if not bool(alive.all()):
            found[group.name] = (~alive).nonzero().flatten()
    return found


def resolve(groups: Iterable[Group], chosen: Chosen) -> list[tuple[Group, Tensor]]:
    """Look up groups by name and check the numbers of the structures.

    Args:
        groups: those of the model.
        chosen: structures by group name.

    Returns:
        Each group that has any with its structures, int64, ascending, without doubles.

    Raises:
        ConfigurationError: for a group or a structure that does not exist.
    """
    by_name = {group.name: group for group in groups}
    pairs = []
    for name, structures in chosen.items():
        if name not in by_name:
            raise ConfigurationError(
                f"there is no group {name!r}.{nearest(name, by_name)}"
            )
        group = by_name[name]
        numbers = torch.as_tensor(structures, dtype=torch.int64).cpu()
        numbers = torch.unique(numbers)
        if numbers.numel() == 0:
            continue
        if int(numbers[0]) < 0 or int(numbers[-1]) >= group.size:
            raise ConfigurationError(
                f"group {name!r} has structures 0 to {group.size - 1}, not "
                f"{int(numbers[0] if numbers[0] < 0 else numbers[-1])}."
            )
        pairs.append((group, numbers))
    return pairs


def tensor_of(model: nn.Module, member: Member) -> Tensor:
    """Look up the tensor of a member.

    Args:
        model: the network.
        member: one axis of one of its tensors.

    Returns:
        The parameter or buffer itself.

    Raises:
        ConfigurationError: when the model has no such tensor, or of another size.
    """
    try:
        module = model.get_submodule(member.module)
    except AttributeError as error:
        raise ConfigurationError(
            f"the model has no module {member.module!r}; the groups are of another model."
        ) from error
    tensors: dict[str, Tensor | None] = {**module._buffers, **module._parameters}
    tensor = tensors.get(member.tensor)
    if tensor is None:
        raise ConfigurationError(
            f"{member.name} is neither a parameter nor a buffer of the model."
        )
    size = len(member.structure_of)
    if member.axis >= tensor.dim() or tensor.shape[member.axis] != size:
        raise ConfigurationError(
            f"{member.name} has shape {tuple(tensor.shape)}, but the group expects "
            f"{size} slices on axis {member.axis}; trace the groups again."
        )
    return tensor
