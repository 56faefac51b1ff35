"""Capture the inputs of a network, and call the network with them."""

from __future__ import annotations

__all__ = [
    "capture_inputs",
    "recorded_calls",
    "run_model",
    "tensors_in",
]

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils._pytree import tree_map_only

from lightning_woodfisher.base.errors import ConfigurationError
from lightning_woodfisher.data.isolation import derive_seed, eager, seeded
from lightning_woodfisher.data.losses import LossSource, choose_evaluation
from lightning_woodfisher.weights.layers import is_linear


@eager()
def capture_inputs(
    source: LossSource, network: str | None = None, seed: int = 0
) -> tuple[str, Any]:
    """Find the network in a model, and inputs to trace it with.

    Args:
        source: computes the loss of one sample.
        network: name of the submodule; None for the first module that is called and
            contains all Conv and Linear layers that run.
        seed: of the sample.

    Returns:
        Name of the submodule (``""`` for the model itself) and its inputs: a tuple, or a
        dict of keyword arguments.

    Raises:
        ConfigurationError: if there is no such module, or it is called in a way that
            cannot be traced.
    """
    model = source.model
    seed = derive_seed(seed, "inputs")
    choose_evaluation(source, seed)
    with recorded_calls(model) as calls, source.session("eval"), seeded(seed):
        source.loss(source.batches(1, 1, seed).fetch(0), 0)
    layers = [
        name
        for name, module, _, _ in calls
        if isinstance(module, _ConvNd) or is_linear(module)
    ]
    for name, _, args, kwargs in calls:
        has_all = all(layer.startswith(f"{name}.") or not name for layer in layers)
        if name == network or (network is None and has_all):
            if args and kwargs:
                raise ConfigurationError(
                    f"{name or type(model).__name__} is called with positional and "
                    "keyword arguments together, which cannot be traced; use one kind."
                )
            return name, tree_map_only(Tensor, Tensor.detach, kwargs or args)
    known = ", ".join(sorted({name for name, *_ in calls if name})[:8])
    raise ConfigurationError(
        f"network={network!r} is not called when the loss is computed; use one of {known}."
        if network is not None
        else f"no module of {type(model).__name__} that is called holds all Conv and Linear "
        "layers, so the network cannot be traced; compute the loss through one module, or "
        f"name one of {known} with network=."
    )


@contextlib.contextmanager
def recorded_calls(
    model: nn.Module,
) -> Iterator[list[tuple[str, nn.Module, tuple[Any, ...], dict[str, Any]]]]:
    """Record the calls of the modules of a model.

    Args:
        model: the network.

    Yields:
        A list that grows with the calls: name and module, positional and keyword arguments.

    Raises:
        ConfigurationError: if a module is scripted, which takes no hooks.
    """
    calls: list[tuple[str, nn.Module, tuple[Any, ...], dict[str, Any]]] = []
    with contextlib.ExitStack() as hooks:
        for name, module in model.named_modules():
            if isinstance(module, torch.jit.ScriptModule):
                raise ConfigurationError(
                    f"channels cannot be traced in a network with scripted modules, such "
                    f"as {name!r}; build it without torch.jit.script."
                )
            hook = module.register_forward_pre_hook(
                lambda *call, name=name: calls.append((name, *call)), with_kwargs=True
            )
            hooks.enter_context(hook)
        yield calls


def run_model(model: nn.Module, inputs: Any) -> Any:
    """Call a model.

    Args:
        model: the network.
        inputs: a tuple or list of arguments, a dict of keyword arguments, or one
            argument.

    Returns:
        The output of the model.
    """
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, (tuple, list)):
        return model(*inputs)
    return model(inputs)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Iterate over the tensors in nested tuples, lists, dicts and dataclasses.

    Args:
        value: a tensor, a container, or an output class of a library.

    Yields:
        The tensors, in order.
    """
    items: Iterable[Any] = ()
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        items = value.values()
    elif isinstance(value, (tuple, list)):
        items = value
    elif hasattr(value, "__dataclass_fields__"):
        items = vars(value).values()
    for item in items:
        yield from tensors_in(item)
