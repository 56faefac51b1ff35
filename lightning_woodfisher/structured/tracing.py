"""Find the groups of coupled channels of a model that can be removed exactly."""

from __future__ import annotations

__all__ = ["TraceResult", "trace_groups"]

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils._pytree import tree_map_only

from lightning_woodfisher.base.errors import ConfigurationError, name_first, nearest
from lightning_woodfisher.base.types import IsolationMode
from lightning_woodfisher.data.isolation import eager
from lightning_woodfisher.structured.graph.attention import find_heads
from lightning_woodfisher.structured.graph.coupling import Coupling, find_groups
from lightning_woodfisher.structured.graph.groups import Group
from lightning_woodfisher.structured.graph.torch_pruning import trace_coupling
from lightning_woodfisher.structured.shrink.removal_check import check_removal
from lightning_woodfisher.weights.layers import is_linear, matches_pattern

_NOT_REACHED = "example_inputs do not reach it in evaluation mode"


@dataclass(frozen=True, eq=False)
class TraceResult:
    """The groups of a model.

    Args:
        groups: those to prune, in the order of their first layers.
        left_out: why all or some channels of the other Conv and Linear layers are not
            pruned, by name of the layer.
    """

    groups: tuple[Group, ...]
    left_out: Mapping[str, str]


@eager()
def trace_groups(
    model: nn.Module,
    example_inputs: Any,
    *,
    only: Sequence[str] = (),
    exclude: Sequence[str] = (),
    mode: IsolationMode = "eval",
    seed: int = 0,
) -> TraceResult:
    """Trace a model and find its groups of coupled channels.

    A pattern is a class path of a layer (``Conv2d``, ``torch.nn.Linear``) or else a
    regular expression that is searched in the layer's name. A group is chosen if a pattern
    matches one of its producing layers; all layers of the group are pruned together. A
    layer that matches ``only`` and ``exclude`` is excluded.

    Groups in which removing a channel differs from setting it to zero are left out, and the
    result says why: outputs of the network, LayerNorm and GroupNorm, an activation with
    f(0) ≠ 0, channels split into pieces of fixed size. The heads of an attention are a
    group of its own. Only layers that run in evaluation mode are found.

    Args:
        model: the network; unchanged afterwards.
        example_inputs: a tensor, a tuple of arguments or a dict of keyword arguments, on
            any device. A batch of one sample is enough.
        only: patterns of layers to prune; empty for all.
        exclude: patterns of layers to leave dense.
        mode: of the network in the numerical comparison; see :func:`.check_removal`.
        seed: of the numerical comparison of masked and removed channels.

    Returns:
        The groups, and why other layers have none.

    Raises:
        ConfigurationError: if torch-pruning is missing, the model cannot be traced, a
            pattern is not a regular expression or matches nothing that can be pruned,
            only and exclude disagree about coupled layers, or no group is left.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    example_inputs = tree_map_only(Tensor, lambda t: t.to(device), example_inputs)
    coupling, suspects = trace_coupling(model, example_inputs)
    heads, no_heads = find_heads(model, example_inputs)
    pruned = {
        m.module for group in heads for m in group.members if m.role != "consumer"
    }
    groups = [g for g in find_groups(coupling) if pruned.isdisjoint(g.layers)]
    groups += heads
    pruned |= {layer for group in groups for layer in group.layers}
    left_out = {
        name: no_heads.get(name) or _reason(name, coupling)
        for name in _layers(model)
        if name not in pruned
    }
    failed = check_removal(
        model,
        groups,
        example_inputs,
        mode=mode,
        other_mode=_NOT_REACHED in left_out.values(),
        seed=seed,
    )
    for group in groups:
        producers = (member.find_in(model) for member in group.of_role("producer"))
        if group.name in failed:
            for layer in group.layers:
                left_out[layer] = failed[group.name]
                if passed := suspects.get(layer):
                    left_out[layer] += (
                        f" (it passes {passed}, which is not zero at zero)"
                    )
        elif any(weight.is_complex() for weight in producers):
            left_out |= dict.fromkeys(group.layers, "its weights are complex")
    order = [name for name, _ in model.named_modules()]
    groups = [group for group in groups if left_out.keys().isdisjoint(group.layers)]
    groups.sort(key=lambda group: order.index(group.layers[0]))
    chosen = _choose(model, groups, left_out, only, exclude)
    if not chosen:
        raise ConfigurationError(
            f"{type(model).__name__} has no group of channels that can be pruned: "
            f"only={list(only)}, exclude={list(exclude)}. {_join(left_out)}"
            f"{_name_others(model)}. Use groups made by hand, or remove single weights."
        )
    return TraceResult(chosen, left_out)


def _layers(model: nn.Module) -> dict[str, nn.Module]:
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (_ConvNd, nn.MultiheadAttention)) or is_linear(module)
    }


def _reason(layer: str, coupling: Coupling) -> str:
    """Return why no channel of a layer is in a group."""
    if layer in coupling.reasons:
        return coupling.reasons[layer]
    if (layer, "out") not in coupling.channels:
        return _NOT_REACHED
    reasons = map(coupling.reason, coupling.channels[layer, "out"])
    return next(filter(None, reasons), "it has a single structure")


def _join(reasons: Mapping[str, str]) -> str:
    layers: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        layers.setdefault(reason, []).append(name)
    return "; ".join(f"{name_first(n, 3)}: {reason}" for reason, n in layers.items())


def _name_others(model: nn.Module) -> str:
    """Name layers with matrices that are never pruned."""
    known = (_ConvNd, nn.MultiheadAttention, nn.Embedding)
    others = {
        type(module).__name__: None
        for module in model.modules()
        if not (isinstance(module, known) or is_linear(module))
        and any(p is not None and p.dim() > 1 for p in module._parameters.values())
    }
    if not others:
        return ""
    return f"; {', '.join(others)} is no Conv, Linear or attention layer of torch"


def _choose(
    model: nn.Module,
    groups: Sequence[Group],
    left_out: Mapping[str, str],
    only: Sequence[str],
    exclude: Sequence[str],
) -> tuple[Group, ...]:
    """Choose groups by patterns on their layers."""
    included = {pattern: _matching_layers(pattern, model) for pattern in only}
    excluded = {pattern: _matching_layers(pattern, model) for pattern in exclude}
    prunable = {layer for group in groups for layer in group.layers}
    for pattern, layers in included.items():
        if not layers & prunable:
            reasons = {name: left_out[name] for name in layers if name in left_out}
            raise ConfigurationError(
                f"only={pattern!r} matches no layer that can be pruned: "
                f"{_join(reasons)}; name other layers."
            )
    unwanted = set().union(*excluded.values())
    wanted = set().union(*included.values()) if only else prunable
    chosen = []
    for group in groups:
        layers = {*group.layers}
        if only and layers & wanted - unwanted and layers & unwanted:
            raise ConfigurationError(
                f"only={list(only)} matches {sorted(layers & wanted - unwanted)} and "
                f"exclude={list(exclude)} matches {sorted(layers & unwanted)}, but these "
                "layers share channels and can only be pruned together."
            )
        if layers & wanted and not layers & unwanted:
            chosen.append(group)
    return tuple(chosen)


def _matching_layers(pattern: str, model: nn.Module) -> set[str]:
    layers = _layers(model)
    found = {
        name
        for name, module in layers.items()
        if matches_pattern(pattern, [(name, module)])
    }
    if not found:
        raise ConfigurationError(
            f"The pattern {pattern!r} matches no Conv, Linear or attention layer of "
            f"{type(model).__name__}.{nearest(pattern, layers)}"
        )
    return found
