"""Cut structures out of a model, and repeat this on a fresh model later.

A :class:`RemovalPlan` lists the slices of tensors that are kept. It is plain data and is
saved with the weights (``files.py``). Optimizers follow with :func:`update_optimizers`.
"""

from __future__ import annotations

__all__ = [
    "Cut",
    "RemovalPlan",
    "Replacement",
    "plan_removal",
    "shrink",
    "update_optimizers",
]

import copy
import reprlib
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.optim import LBFGS, Optimizer

from lightning_woodfisher.base.errors import ConfigurationError
from lightning_woodfisher.distributed.dtensor import is_sharded
from lightning_woodfisher.structured.graph.attention import (
    PrunedAttention,
    update_heads,
)
from lightning_woodfisher.structured.graph.groups import (
    Group,
    StructureIndices,
    find_tensor,
    require_sizes,
    resolve_structures,
)
from lightning_woodfisher.structured.graph.inputs import tensors_in
from lightning_woodfisher.structured.shrink.implanted_conv import (
    ImplantedConv,
    has_center,
    implantable_layers,
    parameter_names,
    sort_keys,
)

_VERSION = 1
_MISFIT = "the plan was made for another model, or has been applied already"


@dataclass(frozen=True)
class Cut:
    """The slices of one axis that are kept.

    Args:
        size: number of slices before.
        kept: positions of the kept slices, in their new order.
    """

    size: int
    kept: tuple[int, ...]

    def is_ascending(self) -> bool:
        """Check if the kept slices stay in their order.

        Returns:
            Whether they do.
        """
        return [*self.kept] == sorted(self.kept)


@dataclass(frozen=True, eq=False)
class Replacement:
    """A parameter of the dense model and its replacement in the shrunk model.

    Args:
        old: the parameter before.
        new: the parameter of the shrunk model.
        kept: int64 positions of the kept slices, by axis.
    """

    old: nn.Parameter
    new: nn.Parameter
    kept: Mapping[int, Tensor]


@dataclass(frozen=True)
class RemovalPlan:
    """The slices of a model that are kept.

    Args:
        tensors: what is kept of each axis that shrinks, by name of the tensor in
            ``state_dict``. A tensor shared by layers is listed under each of its names.
        implants: number of filters of a convolution, the last ones, that are 1×1, by module
            name. The convolution becomes an :class:`.ImplantedConv`.
    """

    tensors: Mapping[str, Mapping[int, Cut]] = field(default_factory=dict)
    implants: Mapping[str, int] = field(default_factory=dict)

    def apply(self, model: nn.Module) -> tuple[Replacement, ...]:
        """Shrink a model in place.

        Parameters are replaced by new ones with the same ``requires_grad`` and the kept
        slices of ``.grad``. Objects that hold the old ones, such as an optimizer, need the
        replacements. Tensors shared by layers stay shared. If the plan does not fit the
        model, a ConfigurationError is raised before anything changes.

        Args:
            model: the dense model.

        Returns:
            The replaced parameters.
        """
        places = [self._find(model, name) for name in self.tensors]
        self._require_implantable(model)
        done: dict[int, Tensor] = {}
        replacements = []
        for (tensors, key), cuts in zip(places, self.tensors.values(), strict=True):
            old = tensors[key]
            if id(old) not in done:
                kept = {axis: torch.tensor(cut.kept) for axis, cut in cuts.items()}
                if isinstance(old, nn.Parameter):
                    replacements.append(_replace(old, kept))
                    done[id(old)] = replacements[-1].new
                else:
                    done[id(old)] = _cut(old, kept)
            tensors[key] = done[id(old)]
        paths = {name.rpartition(".")[0] for name in self.tensors}
        for path in paths | {path.rpartition(".")[0] for path in paths}:
            update_heads(model.get_submodule(path))
        for path in paths:
            _update_sizes(model.get_submodule(path))
        for module in model.modules():
            if isinstance(module, nn.TransformerEncoder) and any(
                isinstance(part, PrunedAttention) for part in module.modules()
            ):
                # Nested tensors are for the fused kernel, which wants all heads.
                module.use_nested_tensor = False
        for name, rows in self.implants.items():
            replacements = _implant(model, name, rows, replacements)
        return tuple(replacements)

    def apply_to_copy(self, model: nn.Module) -> nn.Module:
        """Build a smaller copy of a model.

        Activations that layers keep on themselves are copied without their graph.

        Args:
            model: the dense model; unchanged.

        Returns:
            The copy, in the same mode.
        """
        detached: dict[int, Any] = {
            id(tensor): tensor.detach().clone()
            for module in model.modules()
            for tensor in tensors_in(vars(module))
            if not tensor.is_leaf
        }
        smaller = copy.deepcopy(model, detached)
        self.apply(smaller)
        return smaller

    def cut(self, state_dict: Mapping[str, Any]) -> dict[str, Any]:
        """Cut the tensors of a dense model as :meth:`apply` cuts its parameters.

        Args:
            state_dict: of the dense model; entries that are not tensors are kept.

        Returns:
            The entries of the shrunk model.

        Raises:
            ConfigurationError: if the plan was made for another model.
        """
        for name in self.tensors:
            tensor = state_dict.get(name)
            if not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
                raise ConfigurationError(f"there is no tensor {name!r}; {_MISFIT}.")
        found: dict[str, Any] = {}
        for name, tensor in state_dict.items():
            kept = self._kept(name, tensor) if name in self.tensors else {}
            module, _, key = name.rpartition(".")
            if kept and module in self.implants:
                parts = _divide(kept, self.implants[module], tensor.shape)
                for part, positions in parts:
                    found[f"{module}.{part}.{key}"] = _cut(tensor, positions)
            else:
                found[name] = _cut(tensor, kept)
        return found

    def without_prefix(self, prefix: str) -> RemovalPlan:
        """Select what belongs to a submodule, by names within it.

        Args:
            prefix: name of the submodule, followed by a dot.

        Returns:
            Its plan.
        """

        def select(entries: Mapping[str, Any]) -> dict[str, Any]:
            names = (name for name in entries if name.startswith(prefix))
            return {name.removeprefix(prefix): entries[name] for name in names}

        return RemovalPlan(select(self.tensors), select(self.implants))

    def with_prefix(self, prefix: str) -> RemovalPlan:
        """Rename everything as the parent of the model names it.

        Args:
            prefix: name of the model in its parent, followed by a dot; or empty.

        Returns:
            The same plan with longer names.
        """
        return RemovalPlan(
            {f"{prefix}{name}": cuts for name, cuts in self.tensors.items()},
            {f"{prefix}{name}": rows for name, rows in self.implants.items()},
        )

    @classmethod
    def combine(cls, plans: Sequence[RemovalPlan]) -> RemovalPlan:
        """Combine plans that were made for the same dense model.

        Args:
            plans: at least one.

        Returns:
            A plan that keeps what all of them keep.

        Raises:
            ConfigurationError: if two of them move slices of the same axis, for implants.
        """
        tensors: dict[str, dict[int, Cut]] = defaultdict(dict)
        for plan in plans:
            for name, cuts in plan.tensors.items():
                for axis, cut in cuts.items():
                    before = tensors[name].get(axis, cut)
                    # The one that moves slices last, if any, gives the order.
                    one, other = sorted((cut, before), key=Cut.is_ascending)
                    if one != other and not other.is_ascending():
                        raise ConfigurationError(
                            f"two plans change the order of {name} on axis {axis}, for "
                            "1x1 filters; cut the channels of one callback at a time."
                        )
                    both = tuple(each for each in one.kept if each in {*other.kept})
                    tensors[name][axis] = Cut(cut.size, both)
        implants = {n: rows for plan in plans for n, rows in plan.implants.items()}
        return cls(dict(tensors), implants)

    def to_dict(self) -> dict[str, Any]:
        """Convert the plan to plain data.

        Returns:
            Nested dicts of numbers and tuples.
        """
        return {"version": _VERSION, **asdict(self)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> RemovalPlan:
        """Read the output of :meth:`to_dict`, also after a round trip through JSON.

        Args:
            data: the plain data.

        Returns:
            The plan.

        Raises:
            ConfigurationError: if the data is not a plan of this version.
        """
        # An attribute of a mapping from a file may hide its method ``get``.
        is_mapping = isinstance(data, Mapping)
        version = Mapping.get(data, "version") if is_mapping else None
        if type(version) is not int or version != _VERSION:
            raise ConfigurationError(
                f"a plan of version {reprlib.repr(version)} cannot be read, only version "
                f"{_VERSION}."
            )
        try:
            tensors = {
                str(name): {
                    # A key of a JSON object is a text.
                    int(str(axis)): Cut(_integer(cut["size"]), _integers(cut["kept"]))
                    for axis, cut in cuts.items()
                }
                for name, cuts in data["tensors"].items()
            }
            implants = {str(n): _integer(r) for n, r in data["implants"].items()}
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise ConfigurationError(f"not a removal plan: {error}.") from error
        return cls(tensors, implants)

    def _find(self, model: nn.Module, name: str) -> tuple[dict[str, Any], str]:
        """Find a tensor in a model and check that its cuts are possible."""
        tensors, key = find_tensor(model, name)
        if is_sharded(tensors[key]):
            raise ConfigurationError(
                f"{name} is sharded over the ranks; gather the model before you shrink it."
            )
        self._kept(name, tensors[key])
        return tensors, key

    def _kept(self, name: str, tensor: Tensor) -> dict[int, Tensor]:
        """Return the positions of the kept slices of a tensor, by axis."""
        cuts = self.tensors[name]
        sizes = {axis: cut.size for axis, cut in cuts.items()}
        require_sizes(name, tensor, sizes, _MISFIT)
        for axis, cut in cuts.items():
            _require_cut(name, axis, cut)
        return {axis: torch.tensor(cut.kept) for axis, cut in cuts.items()}

    def _require_implantable(self, model: nn.Module) -> None:
        names = parameter_names(model)
        for name, rows in self.implants.items():
            try:
                conv = model.get_submodule(name)
            except AttributeError:
                conv = nn.Module()
            filters = [
                len(cuts[0].kept) if 0 in cuts else 0
                for key, _ in conv.named_parameters()
                for cuts in (self.tensors.get(f"{name}.{key}", {}),)
            ]
            if (
                not has_center(conv, names)
                or len({*filters}) != 1
                or not 0 < rows < filters[0]
            ):
                raise ConfigurationError(
                    f"the plan puts {rows} 1x1 filters into {name!r}, which is not a "
                    "convolution with more filters; it was made for another model."
                )


def _integer(value: Any) -> int:
    if type(value) is not int:
        raise TypeError(f"{reprlib.repr(value)} is not a whole number")
    return value


def _integers(values: Any) -> tuple[int, ...]:
    # A tensor may be larger than the file that it comes from.
    if not isinstance(values, list | tuple):
        raise TypeError(f"{type(values).__name__} is not a list of whole numbers")
    return tuple(map(_integer, values))


def _require_cut(name: str, axis: int, cut: Cut) -> None:
    """Check that a cut keeps some of its slices, each once."""
    kept = cut.kept
    if (
        axis < 0
        or not kept
        or not 0 <= min(kept) <= max(kept) < cut.size
        or len({*kept}) < len(kept)
    ):
        raise ConfigurationError(
            f"the plan keeps {len(kept)} slices of {name} on axis {axis} that are not "
            f"all different and in 0 to {cut.size - 1}."
        )


def plan_removal(
    model: nn.Module,
    groups: Iterable[Group],
    removed: StructureIndices,
    implanted: StructureIndices | None = None,
) -> RemovalPlan:
    """Plan the removal of structures from a model, which stays unchanged.

    Implanted structures move behind the others in every tensor of their group.

    Args:
        model: the network.
        groups: its groups.
        removed: the structures to remove, by group name.
        implanted: the structures whose filters keep only their center taps.

    Returns:
        The plan.

    Raises:
        ConfigurationError: for a group or a structure that does not exist, or if nothing
            would be left of a layer.
    """
    groups = tuple(groups)
    layers = implantable_layers(model, groups) if implanted else {}
    implants: dict[str, int] = {}
    # Slices in their new order have ascending keys; those to remove have -1.
    keys: dict[tuple[str, int], Tensor] = {}
    for group, structures in resolve_structures(groups, implanted or {}):
        if group.name not in layers:
            raise ConfigurationError(
                f"the layers of group {group.name!r} cannot have implants."
            )
        implants |= dict.fromkeys(layers[group.name], len(structures))
        for member in group.members:
            member.find_in(model)
            moved = sort_keys(member, group.size, structures)
            key = member.name, member.axis
            earlier = keys.setdefault(key, moved)
            # Other groups have other slices of the axis.
            is_moved = moved != torch.arange(len(moved))
            keys[key] = torch.where(is_moved, moved, earlier)
    for group, structures in resolve_structures(groups, removed):
        for member in group.members:
            member.find_in(model)
            stays = torch.arange(len(member.structure_of))
            order = keys.setdefault((member.name, member.axis), stays)
            order[member.slices(structures)] = -1
    tensors: dict[str, dict[int, Cut]] = defaultdict(dict)
    for (name, axis), order in sorted(keys.items()):
        number = int((order >= 0).sum())
        if not number:
            raise ConfigurationError(
                f"all {len(order)} slices of {name} on axis {axis} would be removed, and "
                "a layer needs one; keep a structure of its group."
            )
        kept = order.argsort()[-number:].tolist()
        tensors[name][axis] = Cut(len(order), tuple(kept))
    _require_all_names(model, tensors)
    return RemovalPlan(dict(tensors), implants)


def shrink(
    model: nn.Module, groups: Iterable[Group], removed: StructureIndices
) -> RemovalPlan:
    """Cut structures out of a model, in place.

    To continue training with the same optimizer, use :func:`plan_removal`,
    :meth:`RemovalPlan.apply` and :func:`update_optimizers`.

    Args:
        model: the network.
        groups: its groups, which no longer fit the model afterwards.
        removed: the structures to remove, by group name.

    Returns:
        The plan, to apply to a fresh model.
    """
    plan = plan_removal(model, groups, removed)
    plan.apply(model)
    return plan


def update_optimizers(
    optimizers: Iterable[Optimizer], replacements: Iterable[Replacement]
) -> None:
    """Make optimizers continue with the parameters of the shrunk model, in place.

    State of a parameter's shape, such as momentum, is cut like the parameter. Scalars,
    such as a step count, are kept. The order of the parameters is kept, so that saved
    optimizer states remain valid; a convolution with implants has two parameters in the
    place of one. If state cannot be cut, a ConfigurationError is raised before any
    optimizer changes.

    Args:
        optimizers: their parameter groups contain the old parameters. Other parameters
            are unchanged.
        replacements: the output of :meth:`RemovalPlan.apply`.
    """
    optimizers = tuple(optimizers)
    by_old: dict[Tensor, list[Replacement]] = defaultdict(list)
    for replacement in replacements:
        by_old[replacement.old].append(replacement)
    for optimizer in optimizers:
        _require_cuttable(optimizer, by_old)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["params"] = [
                new
                for old in group["params"]
                for new in ([r.new for r in by_old[old]] if old in by_old else [old])
            ]
        for old, parts in by_old.items():
            if old in optimizer.state:
                state = optimizer.state.pop(old)
                for part in parts:
                    optimizer.state[part.new] = {
                        key: _cut_state(value, part) for key, value in state.items()
                    }


def _cut_state(value: Any, replacement: Replacement) -> Any:
    if isinstance(value, Tensor) and value.shape == replacement.old.shape:
        return _cut(value, replacement.kept)
    # Step counts are tensors as well, and no two parameters may share one.
    return value.clone() if isinstance(value, Tensor) else value


def _require_cuttable(optimizer: Optimizer, replaced: Collection[Tensor]) -> None:
    kind = type(optimizer).__name__
    remedy = "so it cannot be cut; make a new optimizer for the shrunk model."
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for old in (parameter for parameter in parameters if parameter in replaced):
        if isinstance(optimizer, LBFGS):
            raise ConfigurationError(
                f"{kind} keeps one history for all parameters, {remedy}"
            )
        for key, value in optimizer.state.get(old, {}).items():
            is_scalar = not isinstance(value, Tensor) or value.numel() == 1
            if not is_scalar and value.shape != old.shape:
                raise ConfigurationError(
                    f"the state {key!r} of {kind} has shape {tuple(value.shape)}, its "
                    f"parameter {tuple(old.shape)}, {remedy}"
                )


def _update_sizes(layer: Any) -> None:
    """Set the sizes that a layer stores to those of its tensors."""
    if isinstance(layer, _ConvTransposeNd):
        layer.in_channels, layer.out_channels = layer.weight.shape[:2]
    elif isinstance(layer, _ConvNd):
        filters, inputs = layer.weight.shape[:2]
        if layer.groups == layer.in_channels > 1:
            # Depthwise: whole convolution groups are removed with their input channel.
            layer.groups = layer.groups * filters // layer.out_channels
        layer.out_channels, layer.in_channels = filters, inputs * layer.groups
    elif isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = layer.weight.shape
    elif isinstance(layer, _NormBase):
        known = layer.running_mean if layer.weight is None else layer.weight
        layer.num_features = len(known)
    elif isinstance(layer, nn.PReLU):
        layer.num_parameters = len(layer.weight)


def _require_all_names(model: nn.Module, tensors: Mapping[str, object]) -> None:
    """Check that no layer outside the groups shares a tensor that is cut."""
    for names in parameter_names(model).values():
        outside = [name for name in names if name not in tensors]
        if outside and len(outside) < len(names):
            inside = next(name for name in names if name in tensors)
            raise ConfigurationError(
                f"{inside} and {outside[0]} are one tensor, but no group contains "
                f"{outside[0]}."
            )


def _implant(
    model: nn.Module, name: str, rows: int, replacements: list[Replacement]
) -> list[Replacement]:
    """Replace a cut convolution by an ImplantedConv everywhere in a model."""
    conv: Any = model.get_submodule(name)
    implanted = ImplantedConv(conv, rows)
    by_new = {id(replacement.new): replacement for replacement in replacements}
    for key, cut in conv.named_parameters():
        replacement = by_new.pop(id(cut))
        parts = _divide(replacement.kept, rows, replacement.old.shape)
        for part, kept in parts:
            made = _replace(replacement.old, kept)
            setattr(getattr(implanted, part), key, made.new)
            by_new[id(made.new)] = made
    for module in list(model.modules()):
        for key, child in module._modules.items():
            if child is conv:
                module._modules[key] = implanted
    return list(by_new.values())


def _divide(
    kept: Mapping[int, Tensor], rows: int, shape: Sequence[int]
) -> Iterator[tuple[str, dict[int, Tensor]]]:
    """Divide what is kept of a weight or bias between the parts of an ImplantedConv.

    Args:
        kept: positions of the kept slices, by axis.
        rows: number of 1×1 filters, the last ones.
        shape: of the whole tensor; of an odd kernel the center tap is kept.

    Yields:
        The name of the part, and the positions of its slices, by axis.
    """
    yield "kept", {**kept, 0: kept[0][:-rows]}
    center = {axis: torch.tensor([shape[axis] // 2]) for axis in range(2, len(shape))}
    yield "implant", {**kept, 0: kept[0][-rows:], **center}


def _replace(old: nn.Parameter, kept: Mapping[int, Tensor]) -> Replacement:
    """Make the parameter that replaces an old one."""
    new = nn.Parameter(_cut(old.detach(), kept), old.requires_grad)
    if old.grad is not None:
        new.grad = _cut(old.grad, kept)
    return Replacement(old, new, kept)


def _cut(tensor: Tensor, kept: Mapping[int, Tensor]) -> Tensor:
    """Keep some slices of a tensor along some axes."""
    for axis, positions in kept.items():
        tensor = tensor.index_select(axis, positions.to(tensor.device))
    return tensor
