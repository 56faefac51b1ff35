"""Run a network and intercept the linear maps with selected weights.

A mode for functions of torch sees every call, whoever makes it. Functions that torch writes
in Python, such as the one for attention, are run in copies that do not hide the calls inside
them. The mode is active in one thread.
"""

from __future__ import annotations

__all__ = ["Interception"]

import functools
import types
import weakref
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from lightning_woodfisher.layerwise.maps import LinearCall, WeightTable
from lightning_woodfisher.layerwise.padding import Side
from lightning_woodfisher.layerwise.residuals import Key, Trail

_CHECKS = (
    "has_torch_function",
    "has_torch_function_unary",
    "has_torch_function_variadic",
)


class Interception(TorchFunctionMode):
    """Call a function in place of each linear map, and name the tensors of a run.

    A tensor is named by the number of maps before it and the number of tensors since then.
    The dense and the pruned network give the same names to the same tensors.

    Args:
        table: the selected weights.
        visit: called with each map, in order; returns its result.
        means: running means of BatchNorm layers to use in place of those of the model, by
            address.
        sources: tensors of the mini-batch with their sides. A result has the side of the
            first argument that has one: keys and values of attention come after queries.
    """

    def __init__(
        self,
        table: WeightTable,
        visit: Callable[[LinearCall], Tensor],
        means: Mapping[int, Tensor] | None = None,
        sources: Iterable[tuple[Tensor, Side]] = (),
    ) -> None:
        super().__init__()
        self._sides: MutableMapping[Tensor, Side] = WeakIdKeyDictionary()
        self._sides.update(sources)
        self._means = means
        self._table = table
        self._visit = visit
        self._calls = 0
        self._tensors = 0
        self._keys: MutableMapping[Tensor, Key] = WeakIdKeyDictionary()
        self._named: dict[Key, weakref.ref[Tensor]] = {}
        #: Of the last call, if its outputs are followed.
        self.trail: Trail | None = None

    def side(self, *values: Any) -> Side | None:
        """Return the side of the first tensor that has one."""
        for value in values:
            if isinstance(value, Tensor):
                found = self._sides.get(value)
            else:
                found = self.side(*value) if isinstance(value, list | tuple) else None
            if found is not None:
                return found
        return None

    def named(self, key: Key) -> Tensor | None:
        """Return the tensor of a name if it is still in use."""
        found = self._named.get(key)
        return None if found is None else found()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run a function of torch."""
        kwargs = kwargs or {}
        plain = _undispatched(func)
        if plain is not None:
            with self:
                return plain(*args, **kwargs)
        side = self.side(*args, *kwargs.values()) if self._sides else None
        call = self._table.match(func, args, kwargs)
        if call is not None:
            self.trail = None
            result = self._visit(call)
            self._calls, self._tensors = self._calls + 1, 0
            self._name(result, side)
            return result
        trail = self.trail
        if trail is None:
            result = func(*self._replace_mean(func, args), **kwargs)
        else:
            trail.before(func, args, self._key_before_call)
            place = trail.find(args)
            result = func(*self._replace_mean(func, args), **kwargs)
            trail.after(func, args, kwargs, result, place)
        for each in result if isinstance(result, tuple | list) else (result,):
            self._name(each, side)
        return result

    def _replace_mean(
        self, func: Callable[..., Any], args: tuple[Any, ...]
    ) -> tuple[Any, ...]:
        if not self._means or func is not torch.batch_norm or args[3] is None:
            return args
        mean = self._means.get(args[3].data_ptr(), args[3])
        return (*args[:3], mean, *args[4:])

    def _name(self, value: Any, side: Side | None) -> None:
        if not isinstance(value, Tensor):
            return
        if side is not None:
            self._sides[value] = side
        if value.is_floating_point():
            key = (self._calls, self._tensors)
            self._tensors += 1
            self._keys[value] = key
            self._named[key] = weakref.ref(value)

    def _key_before_call(self, value: Tensor) -> Key | None:
        key = self._keys.get(value)
        return key if key is not None and key[0] < self._calls else None


@functools.cache
def _undispatched(func: Callable[..., Any]) -> Callable[..., Any] | None:
    """Copy a function of ``torch.nn.functional`` so that it calls its parts at once.

    Returns:
        The copy; None for any other function.
    """
    if not isinstance(func, types.FunctionType) or func.__globals__ is not vars(F):
        return None
    scope = {**func.__globals__, **dict.fromkeys(_CHECKS, lambda *_: False)}
    copy = types.FunctionType(
        func.__code__, scope, func.__name__, func.__defaults__, func.__closure__
    )
    copy.__kwdefaults__ = func.__kwdefaults__
    return copy
