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
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.optim import LBFGS, Optimizer

from lightning_woodfisher.base.errors import ConfigurationError
from lightning_woodfisher.base.plain_data import read_dataclass
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
from lightning_woodfisher.structured.shrink.implants import (
    ImplantedConv,
    has_center,
    implantable_layers,
    parameter_names,
)
from lightning_woodfisher.weights.layers import is_linear

_VERSION = 1
_MISFIT = "the plan was made for another model, or has been applied already"


@dataclass(frozen=True)
class Cut:
    """The slices of one axis that are kept.

    Args:
        size: number of slices before.
        kept: positions of the kept slices, ascending.
    """

    size: int
    kept: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Replacement:
    """A tensor of the dense model and its replacement in the shrunk model.

    Args:
        old: the parameter or buffer before.
        new: that of the shrunk model.
        kept: int64 positions of the kept slices, by axis.
    """

    old: Tensor
    new: Tensor
    kept: Mapping[int, Tensor]


@dataclass(frozen=True)
class RemovalPlan:
    """The slices of a model that are kept.

    Args:
        tensors: what is kept of each axis that shrinks, by name of the tensor in
            ``state_dict``. A tensor shared by layers is listed under each of its names.
        implants: filters of a convolution that become 1×1, of those before, by module name.
            The convolution becomes an :class:`.ImplantedConv`.
    """

    tensors: Mapping[str, Mapping[int, Cut]]
    implants: Mapping[str, tuple[int, ...]]

    def apply(self, model: nn.Module) -> tuple[Replacement, ...]:
        """Shrink a model in place.

        Parameters are replaced by new ones with the same ``requires_grad`` and the kept
        slices of ``.grad``. Objects that hold the old ones, such as an optimizer, need the
        replacements. Tensors shared by layers stay shared.

        Args:
            model: the dense model.

        Returns:
            The replaced parameters.

        Raises:
            ConfigurationError: if the plan does not fit, before anything changes.
        """
        found: dict[str, Tensor] = {}
        parts: dict[str, dict[str, dict[int, Tensor]]] = {}
        for name in self.tensors:
            tensors, key = find_tensor(model, name)
            found[name] = tensors[key]
            if is_sharded(found[name]):
                raise ConfigurationError(
                    f"{name} is sharded over the ranks; gather the model before you shrink "
                    "it."
                )
            parts[name] = self._parts(name, found[name])
        self._require_implantable(model)
        for name in self.implants:
            conv: Any = model.get_submodule(name)
            filters = (kept[0] for kept in parts[f"{name}.weight"].values())
            implanted = ImplantedConv(conv, *filters)
            for module in list(model.modules()):
                for key, child in module._modules.items():
                    if child is conv:
                        module._modules[key] = implanted
        done: dict[int, list[Replacement]] = {}
        for name, old in found.items():
            if id(old) not in done:
                done[id(old)] = [_replace(old, kept) for kept in parts[name].values()]
            for part, replacement in zip(parts[name], done[id(old)], strict=True):
                tensors, key = find_tensor(model, part)
                tensors[key] = replacement.new
        paths = {name.rpartition(".")[0] for new in parts.values() for name in new}
        paths |= {path.rpartition(".")[0] for path in paths}
        for path in paths:
            update_heads(model.get_submodule(path))
        for path in paths:
            _update_sizes(model.get_submodule(path))
        for module in model.modules():
            if isinstance(module, nn.TransformerEncoder) and any(
                isinstance(part, PrunedAttention) for part in module.modules()
            ):
                # Nested tensors are for the fused kernel, which wants all heads.
                module.use_nested_tensor = False
        made = (replacement for each in done.values() for replacement in each)
        return tuple(each for each in made if isinstance(each.old, nn.Parameter))

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
            parts = self._parts(name, tensor) if name in self.tensors else {name: {}}
            found |= {part: _cut(tensor, kept) for part, kept in parts.items()}
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
            {f"{prefix}{name}": found for name, found in self.implants.items()},
        )

    @classmethod
    def combine(cls, plans: Sequence[RemovalPlan]) -> RemovalPlan:
        """Combine plans that were made for the same dense model.

        Args:
            plans: at least one.

        Returns:
            A plan that keeps what all of them keep.
        """
        tensors: dict[str, dict[int, Cut]] = defaultdict(dict)
        for plan in plans:
            for name, cuts in plan.tensors.items():
                for axis, cut in cuts.items():
                    before = tensors[name].get(axis, cut)
                    both = sorted({*cut.kept} & {*before.kept})
                    tensors[name][axis] = Cut(cut.size, tuple(both))
        implants = {n: found for plan in plans for n, found in plan.implants.items()}
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
        plain = {name: data[name] for name in data if name != "version"}
        try:
            return read_dataclass(cls, plain)
        # Also if an attribute hides a method.
        except (AttributeError, TypeError, ValueError) as error:
            raise ConfigurationError(f"not a removal plan: {error}") from error

    def _parts(self, name: str, tensor: Tensor) -> dict[str, dict[int, Tensor]]:
        """Return what takes the place of a tensor, and the positions of its slices.

        Returns:
            int64 positions by axis, by name of the new tensor.
        """
        cuts = self.tensors[name]
        sizes = {axis: cut.size for axis, cut in cuts.items()}
        require_sizes(name, tensor, sizes, _MISFIT)
        for axis, cut in cuts.items():
            _require_cut(name, axis, cut)
        kept = {axis: torch.tensor(cut.kept) for axis, cut in cuts.items()}
        module, _, key = name.rpartition(".")
        if module not in self.implants or 0 not in kept:
            return {name: kept}
        implants = torch.tensor(self.implants[module], dtype=torch.int64)
        is_implant = torch.isin(kept[0], implants)
        middle = {
            a: torch.tensor([tensor.shape[a] // 2]) for a in range(2, tensor.dim())
        }
        return {
            f"{module}.kept.{key}": {**kept, 0: kept[0][~is_implant]},
            f"{module}.implant.{key}": {**kept, 0: kept[0][is_implant], **middle},
        }

    def _require_implantable(self, model: nn.Module) -> None:
        names = parameter_names(model)
        for name, implants in self.implants.items():
            try:
                conv = model.get_submodule(name)
            except AttributeError:
                conv = nn.Module()
            cuts = [
                self.tensors.get(f"{name}.{k}", {}) for k, _ in conv.named_parameters()
            ]
            filters = {cut[0].kept if 0 in cut else () for cut in cuts}
            number = len({*implants}.intersection(*filters))
            if (
                not has_center(conv, names)
                or len(filters) != 1
                or not 0 < number < len(*filters)
            ):
                raise ConfigurationError(
                    f"the plan puts {number} 1x1 filters into {name!r}, which is not a "
                    "convolution with more filters; it was made for another model."
                )


def _require_cut(name: str, axis: int, cut: Cut) -> None:
    """Check that a cut keeps some of its slices, each once."""
    kept = [*cut.kept]
    if not kept or kept != sorted({*kept}) or not 0 <= kept[0] <= kept[-1] < cut.size:
        raise ConfigurationError(
            f"the plan keeps {len(kept)} slices of {name} on axis {axis} that are not "
            f"ascending and in 0 to {cut.size - 1}."
        )


def plan_removal(
    model: nn.Module,
    groups: Iterable[Group],
    removed: StructureIndices,
    implanted: StructureIndices | None = None,
) -> RemovalPlan:
    """Plan the removal of structures from a model, which stays unchanged.

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
    implants: dict[str, tuple[int, ...]] = {}
    changed = resolve_structures(groups, removed)
    for group, structures in resolve_structures(groups, implanted or {}):
        if group.name not in layers:
            raise ConfigurationError(
                f"the layers of group {group.name!r} cannot have implants."
            )
        filters = tuple(structures.tolist())
        implants |= dict.fromkeys(layers[group.name], filters)
        # A plan lists all tensors of a convolution with implants.
        changed.append((group, structures[:0]))
    stays: dict[tuple[str, int], Tensor] = {}
    for group, structures in changed:
        for member in group.members:
            member.find_in(model)
            everything = torch.ones(len(member.structure_of), dtype=torch.bool)
            kept = stays.setdefault((member.name, member.axis), everything)
            kept[member.slices(structures)] = False
    tensors: dict[str, dict[int, Cut]] = defaultdict(dict)
    for (name, axis), kept in sorted(stays.items()):
        if not kept.any():
            raise ConfigurationError(
                f"all {len(kept)} slices of {name} on axis {axis} would be removed, and "
                "a layer needs one; keep a structure of its group."
            )
        tensors[name][axis] = Cut(len(kept), tuple(kept.nonzero().flatten().tolist()))
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
    if isinstance(layer, ImplantedConv):
        layer.in_channels = layer.kept.weight.shape[1]
    elif isinstance(layer, _ConvTransposeNd):
        layer.in_channels, layer.out_channels = layer.weight.shape[:2]
    elif isinstance(layer, _ConvNd):
        filters, inputs = layer.weight.shape[:2]
        if layer.groups == layer.in_channels > 1:
            # Depthwise: whole convolution groups are removed with their input channel.
            layer.groups = layer.groups * filters // layer.out_channels
        layer.out_channels, layer.in_channels = filters, inputs * layer.groups
    elif isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = layer.weight.shape
    elif is_linear(layer):
        layer.nf = layer.weight.shape[1]
        if hasattr(layer, "nx"):
            layer.nx = len(layer.weight)
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


def _replace(old: Tensor, kept: Mapping[int, Tensor]) -> Replacement:
    """Make the parameter or buffer that replaces an old one."""
    new = _cut(old.detach(), kept)
    if isinstance(old, nn.Parameter):
        new = nn.Parameter(new, old.requires_grad)
    if old.grad is not None:
        new.grad = _cut(old.grad, kept)
    return Replacement(old, new, kept)


def _cut(tensor: Tensor, kept: Mapping[int, Tensor]) -> Tensor:
    """Keep some slices of a tensor along some axes."""
    for axis, positions in kept.items():
        tensor = tensor.index_select(axis, positions.to(tensor.device))
    return tensor
