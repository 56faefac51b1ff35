"""What a network is called with, seen while a loss is computed."""

from __future__ import annotations

__all__ = ["capture_inputs", "within"]

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from lightning_woodfisher.base.errors import ConfigurationError
from lightning_woodfisher.data.isolation import derive_seed, seeded
from lightning_woodfisher.data.losses import LossSource
from lightning_woodfisher.structured.graph.groups import Group
from lightning_woodfisher.structured.graph.inputs import map_tensors


def capture_inputs(
    source: LossSource, network: str | None = None, seed: int = 0
) -> tuple[str, Any]:
    """Find the network in a model, and inputs to trace it with.

    Args:
        source: where losses come from; one is computed for one sample.
        network: name of the submodule; None for the first module that is called and
            holds all Conv and Linear layers that run.
        seed: of the sample.

    Returns:
        Name of the submodule, ``""`` for the model itself, and its inputs: a tuple, or a
        dict of keyword arguments.

    Raises:
        ConfigurationError: when there is no such module, with what to pass.
    """
    model = source.model
    names = {module: name for name, module in model.named_modules()}
    calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
    layers: list[str] = []

    def called(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        calls.append((names[module], args, kwargs))
        if isinstance(module, (_ConvNd, nn.Linear)):
            layers.append(names[module])

    handles = [m.register_forward_pre_hook(called, with_kwargs=True) for m in names]
    try:
        with source.session("eval"), torch.enable_grad():
            seed_ = derive_seed(seed, "inputs")
            batches = source.batches(1, 1, seed_)
            with seeded(seed_):
                source.loss(batches.fetch(0), 0)
    finally:
        for handle in handles:
            handle.remove()
    for name, args, kwargs in calls:
        inside = all(layer.startswith(f"{name}.") or not name for layer in layers)
        if name == network or (network is None and inside):
            if args and kwargs:
                raise ConfigurationError(
                    f"{name or type(model).__name__} is called with positional and "
                    "keyword arguments together, which cannot be traced; use one kind."
                )
            inputs = map_tensors(Tensor.detach, kwargs or args)
            return name, inputs
    known = ", ".join(sorted({name for name, _, _ in calls if name})[:8])
    raise ConfigurationError(
        f"network={network!r} is not called when the loss is computed; called are {known}."
        if network is not None
        else f"no module of {type(model).__name__} that is called holds all Conv and Linear "
        "layers, so the network cannot be traced; compute the loss through one module, or "
        f"name one with network=. Called are {known}."
    )


def within(groups: Iterable[Group], prefix: str) -> tuple[Group, ...]:
    """Name the groups of a submodule as its parent does.

    Args:
        groups: of the submodule.
        prefix: name of the submodule; ``""`` changes nothing.

    Returns:
        The same groups with longer names.
    """
    if not prefix:
        return tuple(groups)
    return tuple(
        Group(
            f"{prefix}.{group.name}",
            group.size,
            tuple(
                dataclasses.replace(m, module=f"{prefix}.{m.module}".rstrip("."))
                for m in group.members
            ),
        )
        for group in groups
    )
