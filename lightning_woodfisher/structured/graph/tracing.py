"""Find the groups of a model that can be pruned exactly."""

from __future__ import annotations

__all__ = ["Traced", "trace_groups"]

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd

from lightning_woodfisher.base.errors import ConfigurationError, nearest
from lightning_woodfisher.structured.graph.coupling import structures
from lightning_woodfisher.structured.graph.groups import Group
from lightning_woodfisher.structured.graph.torch_pruning import trace_coupling
from lightning_woodfisher.structured.shrink.removal_check import check_removal
from lightning_woodfisher.weights.layers import class_paths


@dataclass(frozen=True, eq=False)
class Traced:
    """What a trace has found.

    Args:
        groups: those to prune, in the order of their first layers.
        left_out: why the channels of the other Conv and Linear layers stay, or some of
            them, by name of the layer.
    """

    groups: tuple[Group, ...]
    left_out: Mapping[str, str]


def trace_groups(
    model: nn.Module,
    example_inputs: Any,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    check: bool = True,
    seed: int = 0,
) -> Traced:
    """Trace a model and find its groups of coupled channels.

    A pattern is a class path of a layer (``Conv2d``, ``torch.nn.Linear``) or else a
    regular expression that is searched in the layer's name. A group is chosen when a
    pattern matches one of its producing layers: the layers that are tied to it go along.
    A layer that both match is excluded.

    A group stays out, with the reason, where removing a channel would not be the same as
    setting it to zero: outputs of the network, LayerNorm and GroupNorm, attention, an
    activation with f(0) ≠ 0, channels split into fixed parts. Only what runs in
    evaluation mode is seen.

    Args:
        model: the network; left as it was.
        example_inputs: what it is called with: a tensor, a tuple or a dict of keyword
            arguments, on the model's device; a batch of one will do.
        include: patterns of what to prune; empty for all.
        exclude: patterns of what to leave dense.
        check: whether to compare masks with removal by numbers, too, which takes a few
            forward passes.
        seed: of that check.

    Returns:
        The groups, and why other layers have none.

    Raises:
        ConfigurationError: when torch-pruning is missing, the model cannot be traced, a
            pattern is not a regular expression or matches nothing that can be pruned,
            include and exclude want different things for tied layers, or no group is
            left.
    """
    coupling, producers, suspects = trace_coupling(model, example_inputs)
    groups = structures(coupling)
    left_out = _reasons(model, groups, coupling.reasons, producers)
    for name in producers:
        if name in left_out and name not in coupling.reasons:
            why = (
                coupling.reason(coupling.channel(name, "out", index))
                for index in range(coupling.ports[name, "out"].channels)
            )
            left_out[name] = next(filter(None, why), left_out[name])
    if check:
        failed = check_removal(model, groups, example_inputs, seed=seed)
        for group in groups:
            if group.name in failed:
                for layer in _layers(group):
                    hint = suspects.get(layer, "")
                    left_out[layer] = failed[group.name] + (
                        f" (it passes {hint}, which is not zero at zero)"
                        if hint
                        else ""
                    )
        groups = tuple(group for group in groups if group.name not in failed)
    chosen = _choose(model, groups, left_out, include, exclude)
    if not chosen:
        reasons = "; ".join(f"{name}: {why}" for name, why in left_out.items())
        raise ConfigurationError(
            f"{type(model).__name__} has no group of channels that can be pruned: "
            f"include={list(include)}, exclude={list(exclude)}. {reasons}"
        )
    return Traced(chosen, left_out)


def _layers(group: Group) -> list[str]:
    return [member.module for member in group.of_role("producer")]


def _reasons(
    model: nn.Module,
    groups: Sequence[Group],
    reasons: Mapping[str, str],
    producers: Mapping[str, nn.Module],
) -> dict[str, str]:
    """Give a first reason for every layer without a group."""
    grouped = {layer for group in groups for layer in _layers(group)}
    left_out = {}
    for name, module in model.named_modules():
        if not isinstance(module, (_ConvNd, nn.Linear)) or name in grouped:
            continue
        if name not in producers:
            left_out[name] = "example_inputs do not reach it in evaluation mode"
        else:
            left_out[name] = reasons.get(name, "it has a single structure")
    return left_out


def _choose(
    model: nn.Module,
    groups: Sequence[Group],
    left_out: Mapping[str, str],
    include: Sequence[str],
    exclude: Sequence[str],
) -> tuple[Group, ...]:
    included = {pattern: _matches(pattern, model) for pattern in include}
    excluded = {pattern: _matches(pattern, model) for pattern in exclude}
    grouped = {layer for group in groups for layer in _layers(group)}
    for pattern, layers in included.items():
        if not layers & grouped:
            reasons = "; ".join(f"{n}: {left_out[n]}" for n in layers if n in left_out)
            raise ConfigurationError(
                f"include={pattern!r} matches no layer that can be pruned: {reasons}."
            )
    wanted = set().union(*included.values()) if include else grouped
    unwanted = set().union(*excluded.values())
    chosen = []
    for group in groups:
        layers = {*_layers(group)}
        conflict = include and layers & wanted - unwanted and layers & unwanted
        if conflict:
            raise ConfigurationError(
                f"include={list(include)} wants {sorted(layers & wanted - unwanted)} and "
                f"exclude={list(exclude)} leaves out {sorted(layers & unwanted)}, but these "
                "layers share channels and can only be pruned together."
            )
        if layers & wanted and not layers & unwanted:
            chosen.append(group)
    return tuple(chosen)


def _matches(pattern: str, model: nn.Module) -> set[str]:
    try:
        regex = re.compile(pattern)
    except re.error as error:
        raise ConfigurationError(
            f"The pattern {pattern!r} is not a regular expression: {error}."
        ) from error
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (_ConvNd, nn.Linear))
    }
    found = {
        name
        for name, module in layers.items()
        if pattern in class_paths(module) or regex.search(name)
    }
    if not found:
        raise ConfigurationError(
            f"The pattern {pattern!r} matches no Conv or Linear layer of "
            f"{type(model).__name__}.{nearest(pattern, layers)}"
        )
    return found
