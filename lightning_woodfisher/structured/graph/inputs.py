"""Call a model with example inputs, and find the tensors in what it takes and gives."""

from __future__ import annotations

__all__ = ["map_tensors", "run_model", "tensors_in"]

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn


def run_model(model: nn.Module, inputs: Any) -> Any:
    """Call a model.

    Args:
        model: the network.
        inputs: a tuple or list of arguments, a dict of keyword arguments, or one
            argument.

    Returns:
        What the model returns.
    """
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, (tuple, list)):
        return model(*inputs)
    return model(inputs)


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Replace the tensors in nested tuples, lists and dicts.

    Args:
        function: gives the new tensor.
        value: a tensor or a container.

    Returns:
        The same structure with new tensors; other leaves stay.
    """
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Mapping):
        return {key: map_tensors(function, item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        items = [map_tensors(function, item) for item in value]
        return items if isinstance(value, list) else tuple(items)
    return value


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Find the tensors in nested tuples, lists and dicts.

    Args:
        value: a tensor, a container, or an output class of a library.

    Yields:
        The tensors, in order.
    """
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)
    elif hasattr(value, "__dataclass_fields__"):
        for item in vars(value).values():
            yield from tensors_in(item)
