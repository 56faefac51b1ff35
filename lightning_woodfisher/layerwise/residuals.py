"""Follow the outputs of a linear map to the residual sum that they are added to.

A layer at the end of a branch writes into ``skip + branch``. Its best output is not that of
the dense network: it also makes up for the difference that the skip has by now. This module
follows the outputs to an addition through functions that only move elements (views, dropout
in evaluation mode) or scale them (BatchNorm, layer scale, numbers), and knows which element
of the sum each output becomes.
"""

from __future__ import annotations

__all__ = ["Skip", "Trail"]

import operator
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

# Functions that move elements, by name: methods and functions of torch have the same.
_MOVES = {
    "__getitem__",
    "contiguous",
    "flatten",
    "moveaxis",
    "movedim",
    "narrow",
    "permute",
    "reshape",
    "roll",
    "select",
    "squeeze",
    "swapaxes",
    "swapdims",
    "t",
    "transpose",
    "unflatten",
    "unsqueeze",
    "view",
}
# Functions that leave every element where it is and as it is, except for its dtype.
_COPIES = {
    "alias",
    "bfloat16",
    "clone",
    "cpu",
    "cuda",
    "detach",
    "double",
    "float",
    "half",
}
_COPIES |= {"to", "type_as"}
_DROPOUTS = {"dropout", "dropout_", "feature_dropout", "feature_dropout_"}
_SUMS = {"add", "add_", "__add__", "__radd__", "__iadd__"}
_SCALES = {"mul", "mul_", "__mul__", "__rmul__", "__imul__"}
_DIVISIONS = {"div", "div_", "__truediv__", "__itruediv__"}
# Outputs whose gain is this much smaller than the largest get no correction.
_SMALLEST_GAIN = 1e-3

#: Names a tensor that every run of the network computes: see :class:`~.interception`.
Key = tuple[int, ...]


@dataclass(frozen=True)
class Skip:
    """The other summand of an addition.

    Attributes:
        key: names the summand; the pruned network has one of the same name.
        dense: its value in the dense network.
        places: int64, of the shape of the sum: the output that each element comes from.
        gains: factor on the outputs, of the shape of the sum.
    """

    key: Key
    dense: Tensor
    places: Tensor
    gains: Tensor

    def difference(self, pruned: Tensor, shape: torch.Size) -> Tensor:
        """Return what a layer must add to its outputs to make up for the skip.

        Args:
            pruned: the summand in the pruned network.
            shape: shape of the outputs of the layer.

        Returns:
            Tensor of this shape; zero for outputs that do not reach the sum.
        """
        gains = self.gains.abs()
        usable = gains > _SMALLEST_GAIN * gains.max()
        wanted = (self.dense - pruned).to(self.gains.dtype)
        wanted = torch.where(usable, wanted / self.gains, 0.0)
        result = wanted.new_zeros(shape).flatten()
        result[self.places.flatten()] = wanted.flatten()
        return result.view(shape)


@dataclass(frozen=True)
class _Place:
    """Where the outputs are: in a tensor of the shape of ``places``."""

    places: Tensor
    gains: Tensor


@dataclass
class Trail:
    """The outputs of one call, followed through the functions that come after it.

    Args:
        output: the result of the call.

    Attributes:
        skips: the other summands of the additions that were found.
        batchnorm: running mean of the BatchNorm layer that reads the outputs as they are.
    """

    output: Tensor
    skips: list[Skip] = field(default_factory=list)
    batchnorm: Tensor | None = None

    def __post_init__(self) -> None:
        output = self.output
        places = torch.arange(output.numel(), device=output.device).view(output.shape)
        dtype = torch.float64 if output.dtype == torch.float64 else torch.float32
        gains = torch.ones((), dtype=dtype, device=output.device).expand(output.shape)
        self._found: MutableMapping[Tensor, _Place] = WeakIdKeyDictionary()
        self._found[output] = _Place(places, gains)

    def before(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        key_of: Callable[[Tensor], Key | None],
    ) -> None:
        """Remember the other summand of an addition, which it may overwrite.

        Args:
            func: function of torch that is about to be called.
            args: its arguments.
            key_of: returns the name of a tensor that was computed before the call of the
                layer; None for any other tensor.
        """
        if func.__name__ not in _SUMS or len(args) != 2:
            return
        for mine, other in (args, args[::-1]):
            place = self._at(mine)
            if place is None or not isinstance(other, Tensor):
                continue
            key = key_of(other)
            if key is not None and other.shape == place.places.shape:
                dense = other.detach().clone()
                self.skips.append(Skip(key, dense, place.places, place.gains))
                return

    def after(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        result: Any,
        place: _Place | None,
    ) -> None:
        """Follow the outputs into the result of a function.

        Args:
            func: function of torch that was called.
            args: its arguments.
            kwargs: its other arguments.
            result: its result.
            place: :meth:`find` of its arguments, from before the call.
        """
        if place is None or not isinstance(result, Tensor):
            return
        found = self._move(func, args, kwargs, place)
        if found is not None and found.places.shape == result.shape:
            self._found[result] = found
        else:
            self._found.pop(result, None)

    def find(self, args: tuple[Any, ...]) -> _Place | None:
        """Return where the outputs are among the arguments of a function."""
        return next((p for p in map(self._at, args) if p is not None), None)

    def _at(self, value: Any) -> _Place | None:
        if not isinstance(value, Tensor):
            return None
        return self._found.get(value)

    def _move(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        place: _Place,
    ) -> _Place | None:
        name, places, gains = func.__name__, place.places, place.gains
        first = self._at(args[0]) is place
        if name in _MOVES and first:
            # The same function moves the numbers of the outputs, and their gains.
            moved = [func(x, *args[1:], **kwargs) for x in (places, gains)]
            return _Place(*moved)
        if (name in _COPIES and first) or name in _SUMS:
            return place
        if name in _DROPOUTS and first:
            is_training = args[2] if len(args) > 2 else kwargs.get("train", False)
            return None if is_training else place
        if name in _SCALES or (name in _DIVISIONS and first):
            other = args[1] if first else args[0]
            if not _is_constant(other):
                return None
            change = operator.truediv if name in _DIVISIONS else operator.mul
            return _Place(places, change(gains, other))
        if name == "batch_norm" and first:
            return self._normalize(args, place)
        return None

    def _normalize(self, args: tuple[Any, ...], place: _Place) -> _Place | None:
        source, weight, _, mean, variance, training, _, epsilon, *_ = args
        if training or mean is None or variance is None:
            return None
        if source is self.output:
            self.batchnorm = mean
        factor = (variance + epsilon).rsqrt()
        if weight is not None:
            factor = factor * weight
        shape = (-1, *[1] * (place.gains.dim() - 2))
        return _Place(place.places, place.gains * factor.view(shape))


def _is_constant(value: Any) -> bool:
    return isinstance(value, int | float | nn.Parameter)
