"""Cut structures out of a model, and do the same to a fresh one later.

A :class:`RemovalPlan` says which slices of which tensors stay. It is plain numbers, so it
can be saved next to the weights: the dense model is built as ever, the plan makes it
small, and the weights fit.
"""

from __future__ import annotations

__all__ = [
    "RemovalPlan",
    "Replacement",
    "load_shrunk",
    "plan_removal",
    "save_shrunk",
    "shrink",
]

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from lightning_woodfisher.base.errors import ConfigurationError
from lightning_woodfisher.distributed.dtensor import is_sharded
from lightning_woodfisher.structured.graph.channels import Chosen, resolve, tensor_of
from lightning_woodfisher.structured.graph.groups import Group
from lightning_woodfisher.structured.shrink.implanted_conv import (
    ImplantedConv,
    arrangement,
    centre,
    implantable,
)

_PLAN, _WEIGHTS = "plan.json", "weights.pt"
_VERSION = 1


@dataclass(frozen=True)
class Cut:
    """What stays of one axis.

    Args:
        size: slices before.
        kept: positions of those that stay, in the order that they take.
    """

    size: int
    kept: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Replacement:
    """A parameter that took the place of another one.

    Args:
        old: the parameter before.
        new: the parameter of the shrunk model.
        kept: int64 positions of the slices that stayed, by axis.
    """

    old: nn.Parameter
    new: nn.Parameter
    kept: Mapping[int, Tensor]

    def cut(self, tensor: Tensor) -> Tensor:
        """Cut a tensor of the old parameter's shape.

        Args:
            tensor: such as the momentum.

        Returns:
            A new tensor of the new parameter's shape.
        """
        return _cut(tensor, self.kept)


@dataclass(frozen=True)
class RemovalPlan:
    """The slices that stay, and the sizes that layers have then.

    Args:
        tensors: what stays of each axis that shrinks, by name of the tensor in
            ``state_dict``; a tensor of several layers under each of its names.
        attributes: new values of attributes such as ``out_channels``, by module name.
        implants: how many filters of a convolution, the last ones, are 1×1, by module
            name; it becomes an :class:`.ImplantedConv`.
    """

    tensors: Mapping[str, Mapping[int, Cut]] = field(default_factory=dict)
    attributes: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    implants: Mapping[str, int] = field(default_factory=dict)

    def apply(self, model: nn.Module) -> tuple[Replacement, ...]:
        """Shrink a model in place.

        Parameters are replaced by new ones with the same ``requires_grad`` and the cut
        ``.grad``; what refers to the old ones, like an optimizer, needs the
        replacements. Tensors that layers share stay shared. A model that the plan was
        not made for is refused with a ConfigurationError before anything changes.

        Args:
            model: of the sizes that the plan was made for.

        Returns:
            What was replaced by what.
        """
        places = [
            (*self._place(model, name), cuts) for name, cuts in self.tensors.items()
        ]
        modules = {name: model.get_submodule(name) for name in self.attributes}
        self._require_implantable(model)
        done: dict[int, Tensor] = {}
        replacements = []
        for owner, key, cuts in places:
            old = owner[key]
            if id(old) not in done:
                kept = {
                    a: torch.tensor(c.kept, device=old.device) for a, c in cuts.items()
                }
                new = _cut(old.detach(), kept)
                if isinstance(old, nn.Parameter):
                    new = nn.Parameter(new, old.requires_grad)
                    if old.grad is not None:
                        new.grad = _cut(old.grad, kept)
                    replacements.append(Replacement(old, new, kept))
                done[id(old)] = new
            owner[key] = done[id(old)]
        for name, values in self.attributes.items():
            for attribute, value in values.items():
                setattr(modules[name], attribute, value)
        for name, rows in self.implants.items():
            replacements = _implant(model, name, rows, replacements)
        return tuple(replacements)

    def to_json(self) -> dict[str, Any]:
        """Give the plan as plain JSON data.

        Returns:
            Nested dicts of strings, numbers and lists.
        """
        return {
            "version": _VERSION,
            "tensors": {
                name: {
                    str(axis): {"size": cut.size, "kept": list(cut.kept)}
                    for axis, cut in cuts.items()
                }
                for name, cuts in self.tensors.items()
            },
            "attributes": {n: dict(values) for n, values in self.attributes.items()},
            "implants": dict(self.implants),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> RemovalPlan:
        """Read what :meth:`to_json` gave.

        Args:
            data: the JSON data.

        Returns:
            The plan.

        Raises:
            ConfigurationError: when the data is no such plan.
        """
        if data.get("version") != _VERSION:
            raise ConfigurationError(
                f"a plan of version {data.get('version')!r} cannot be read, only "
                f"{_VERSION}."
            )
        try:
            tensors = {
                str(name): {
                    int(axis): Cut(int(cut["size"]), tuple(map(int, cut["kept"])))
                    for axis, cut in cuts.items()
                }
                for name, cuts in data["tensors"].items()
            }
            attributes = {
                str(name): {str(key): int(value) for key, value in values.items()}
                for name, values in data["attributes"].items()
            }
            implants = {str(n): int(rows) for n, rows in data["implants"].items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ConfigurationError(f"this is no removal plan: {error!r}.") from error
        return cls(tensors, attributes, implants)

    def _require_implantable(self, model: nn.Module) -> None:
        for name, rows in self.implants.items():
            conv = model.get_submodule(name)
            weight = self.tensors.get(f"{name}.weight", {}).get(0)
            if (
                not isinstance(conv, _ConvNd)
                or not weight
                or not 0 < rows < len(weight.kept)
            ):
                raise ConfigurationError(
                    f"the plan puts {rows} 1x1 filters into {name!r}, which is no "
                    "convolution with more filters; it was made for another model."
                )

    def _place(self, model: nn.Module, name: str) -> tuple[dict[str, Any], str]:
        """Find the dict that holds a tensor and check its size; axes must exist."""
        path, _, key = name.rpartition(".")
        try:
            module = model.get_submodule(path)
        except AttributeError:
            module = nn.Module()
        for owner in (module._parameters, module._buffers):
            tensor = owner.get(key)
            if tensor is None:
                continue
            if is_sharded(tensor):
                raise ConfigurationError(
                    f"{name} is sharded over the ranks; gather the model before it is "
                    "shrunk."
                )
            for axis, cut in self.tensors[name].items():
                if axis >= tensor.dim() or tensor.shape[axis] != cut.size:
                    raise ConfigurationError(
                        f"{name} has shape {tuple(tensor.shape)}, but the plan expects "
                        f"{cut.size} slices on axis {axis}; it was made for another model, "
                        "or has been applied already."
                    )
                if not cut.kept or not 0 <= min(cut.kept) <= max(cut.kept) < cut.size:
                    raise ConfigurationError(
                        f"the plan keeps {len(cut.kept)} slices of {name} on axis {axis} "
                        f"that are not all in 0 to {cut.size - 1}."
                    )
            return owner, key
        raise ConfigurationError(
            f"the model has no tensor {name!r}; the plan was made for another model."
        )


def plan_removal(
    model: nn.Module,
    groups: Iterable[Group],
    removed: Chosen,
    implanted: Chosen | None = None,
) -> RemovalPlan:
    """Plan to cut structures out of a model; the model stays as it is.

    Implanted structures move behind the others, in every tensor of their group.

    Args:
        model: the network.
        groups: its groups.
        removed: the structures that go, by group name.
        implanted: the structures whose filters keep their centre taps only.

    Returns:
        The plan.

    Raises:
        ConfigurationError: for a group or a structure that does not exist, or when
            nothing would stay of a layer.
    """
    groups = tuple(groups)
    keep: dict[tuple[str, int], Tensor] = {}
    order: dict[tuple[str, int], Tensor] = {}
    implants: dict[str, int] = {}
    layers = implantable(model, groups) if implanted else {}
    for group, structures in resolve(groups, implanted or {}):
        if group.name not in layers:
            raise ConfigurationError(
                f"the layers of group {group.name!r} cannot have implants."
            )
        implants |= dict.fromkeys(layers[group.name], len(structures))
        for member in group.members:
            tensor_of(model, member)
            place = member.name, member.axis
            moved = arrangement(member, group.size, structures)
            # Other groups have other slices of the axis.
            stays = torch.arange(len(moved))
            earlier = order.get(place, stays)
            order[place] = torch.where(moved != stays, moved, earlier)
            keep.setdefault(place, torch.ones(len(moved), dtype=torch.bool))
    for group, structures in resolve(groups, removed):
        for member in group.members:
            tensor_of(model, member)
            kept = ~torch.isin(member.structure_of, structures)
            place = member.name, member.axis
            keep[place] = keep[place] & kept if place in keep else kept
    tensors: dict[str, dict[int, Cut]] = {}
    for (name, axis), kept in sorted(keep.items()):
        if not bool(kept.any()):
            raise ConfigurationError(
                f"nothing of {name} would be left on axis {axis}; keep a structure."
            )
        if not bool(kept.all()) or (name, axis) in order:
            positions = kept.nonzero().flatten()
            if (name, axis) in order:
                positions = positions[order[name, axis][positions].argsort()]
            tensors.setdefault(name, {})[axis] = Cut(
                len(kept), tuple(positions.tolist())
            )
    attributes = {}
    for path in sorted({name.rpartition(".")[0] for name in tensors}):
        module = model.get_submodule(path)
        values = _attributes(module, path, tensors)
        if values:
            attributes[path] = values
    _require_all_names(model, tensors)
    return RemovalPlan(tensors, attributes, implants)


def shrink(model: nn.Module, groups: Iterable[Group], removed: Chosen) -> RemovalPlan:
    """Cut structures out of a model, in place.

    To train on, use :func:`plan_removal`, :meth:`RemovalPlan.apply` and
    ``transplant``, which moves the optimizers to the new parameters.

    Args:
        model: the network.
        groups: its groups; of no use after this.
        removed: the structures that go, by group name.

    Returns:
        What was done, to be done again on a fresh model.
    """
    plan = plan_removal(model, groups, removed)
    plan.apply(model)
    return plan


def save_shrunk(folder: str | Path, model: nn.Module, plan: RemovalPlan) -> None:
    """Save a shrunk model: its plan and its ``state_dict``.

    Args:
        folder: where to; made if missing.
        model: the model, after the plan.
        plan: how it came about from the dense model.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(plan.to_json(), indent=1, sort_keys=True)
    (folder / _PLAN).write_text(text + "\n", encoding="utf-8")
    torch.save(model.state_dict(), folder / _WEIGHTS)


def load_shrunk(folder: str | Path, model: nn.Module) -> RemovalPlan:
    """Turn a freshly built dense model into a saved shrunk one, in place.

    Args:
        folder: what :func:`save_shrunk` wrote.
        model: the dense model.

    Returns:
        The plan that was applied.

    Raises:
        ConfigurationError: when the folder holds no shrunk model, or one of another
            dense model.
    """
    folder = Path(folder)
    try:
        text = (folder / _PLAN).read_text(encoding="utf-8")
        plan = RemovalPlan.from_json(json.loads(text))
        state = torch.load(folder / _WEIGHTS, map_location="cpu", weights_only=True)
    except (OSError, json.JSONDecodeError) as error:
        raise ConfigurationError(f"{folder} holds no shrunk model: {error}") from error
    plan.apply(model)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ConfigurationError(
            f"the weights do not fit the model: {error}"
        ) from error
    return plan


def _attributes(
    module: nn.Module, path: str, tensors: Mapping[str, Mapping[int, Cut]]
) -> dict[str, int]:
    """Work out the sizes that a layer stores besides its tensors."""

    def size(tensor: str, axis: int) -> int:
        cut = tensors.get(f"{path}.{tensor}" if path else tensor, {}).get(axis)
        return len(cut.kept) if cut else int(getattr(module, tensor).shape[axis])

    if isinstance(module, _ConvTransposeNd):
        after = {"in_channels": size("weight", 0), "out_channels": size("weight", 1)}
    elif isinstance(module, _ConvNd):
        rows, groups = size("weight", 0), module.groups
        if groups == module.in_channels and groups > 1:
            # Depthwise: whole convolution groups go with their input channel.
            groups = groups * rows // module.out_channels
        inputs = size("weight", 1) * groups
        after = {"out_channels": rows, "in_channels": inputs, "groups": groups}
    elif isinstance(module, nn.Linear):
        after = {"out_features": size("weight", 0), "in_features": size("weight", 1)}
    elif isinstance(module, _NormBase):
        known = "running_mean" if module.weight is None else "weight"
        after = {"num_features": size(known, 0)}
    elif isinstance(module, nn.PReLU):
        after = {"num_parameters": size("weight", 0)}
    else:
        after = {}
    return {key: value for key, value in after.items() if getattr(module, key) != value}


def _require_all_names(model: nn.Module, tensors: Mapping[str, object]) -> None:
    """Refuse to cut a tensor that a layer outside the groups holds, too."""
    names: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                name = f"{path}.{key}" if path else key
                names.setdefault(id(parameter), []).append(name)
    for alike in names.values():
        outside = [name for name in alike if name not in tensors]
        if outside and len(outside) < len(alike):
            inside = next(name for name in alike if name in tensors)
            raise ConfigurationError(
                f"{inside} and {outside[0]} are one tensor, but no group holds the latter."
            )


def _implant(
    model: nn.Module, name: str, rows: int, replacements: list[Replacement]
) -> list[Replacement]:
    """Put an ImplantedConv in the place of a convolution, in all of its places."""
    conv: Any = model.get_submodule(name)
    made = ImplantedConv(conv, rows)
    done = {id(replacement.new): replacement for replacement in replacements}
    whole = len(conv.weight) - rows
    for part, chosen in (("kept", slice(whole)), ("implant", slice(whole, None))):
        for key in ("weight", "bias"):
            if getattr(conv, key) is None:
                continue
            cut = done[id(getattr(conv, key))]
            kept = {**cut.kept, 0: cut.kept[0][chosen]}
            if key == "weight" and part == "implant":
                kept |= {a: torch.tensor([c]) for a, c in centre(conv).items()}
            new = nn.Parameter(_cut(cut.old.detach(), kept), cut.old.requires_grad)
            if cut.old.grad is not None:
                new.grad = _cut(cut.old.grad, kept)
            setattr(getattr(made, part), key, new)
            replacements = [*replacements, Replacement(cut.old, new, kept)]
    for module in list(model.modules()):
        for key, child in module._modules.items():
            if child is conv:
                module._modules[key] = made
    gone = {id(conv.weight), id(conv.bias)}
    return [r for r in replacements if id(r.new) not in gone]


def _cut(tensor: Tensor, kept: Mapping[int, Tensor]) -> Tensor:
    for axis, positions in kept.items():
        tensor = tensor.index_select(axis, positions.to(tensor.device))
    return tensor
