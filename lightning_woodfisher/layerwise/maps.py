"""Linear maps of a network: calls of functions with a selected weight.

Functions are matched, not modules, so that attention with packed weights and layers that
call ``torch.nn.functional`` themselves are found as well. Weights become matrices
``[g, o, d]`` that multiply inputs ``[g, n, d]``: those of a convolution are its patches, those
of a transposed convolution the patches of its inputs with zeros between them.

Legend: g groups, o outputs and d inputs of a group, n positions (tokens, pixels).
"""

from __future__ import annotations

__all__ = ["LinearCall", "LinearMap", "MapKey", "WeightTable"]

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Patches of a convolution are computed for this many bytes of samples at once.
_PATCH_BYTES = 2**26

_LINEAR = {F.linear, torch.nn.functional.linear}
# y = x·M: functions with the matrix as the second factor; ``addmm`` has the bias first.
_PRODUCTS = {torch.mm, torch.matmul, Tensor.mm, Tensor.matmul, Tensor.__matmul__}
_BIASED_PRODUCTS = {torch.addmm, Tensor.addmm}
_CONV = {
    torch.conv1d: 1,
    torch.conv2d: 2,
    torch.conv3d: 3,
    torch.conv_transpose1d: 1,
    torch.conv_transpose2d: 2,
    torch.conv_transpose3d: 3,
}
_TRANSPOSED = {
    torch.conv_transpose1d,
    torch.conv_transpose2d,
    torch.conv_transpose3d,
}
_CONV_ARGUMENTS = ("stride", "padding", "dilation", "groups")
_TRANSPOSED_ARGUMENTS = ("stride", "padding", "output_padding", "groups", "dilation")


MapKey = tuple[str, int, tuple[int, ...]]


@dataclass(frozen=True)
class LinearMap:
    """A weight, or rows of it, and how it acts on its inputs.

    Attributes:
        name: name of the parameter.
        first: first row of the parameter, for packed projections.
        shape: shape of the rows that are used, as in the parameter.
        inputs_first: whether the parameter has its inputs in the first dimension.
        groups: g.
        stride: of a convolution, by axis; None for a linear layer.
        padding: before and after, by axis.
        dilation: by axis.
        transposed: whether the convolution is transposed.
    """

    name: str
    first: int
    shape: tuple[int, ...]
    inputs_first: bool = False
    groups: int = 1
    stride: tuple[int, ...] | None = None
    padding: tuple[tuple[int, int], ...] = ()
    dilation: tuple[int, ...] = ()
    transposed: bool = False

    @property
    def key(self) -> MapKey:
        """Identify the rows of the parameter: its name, the first row and the shape."""
        return self.name, self.first, self.shape

    @property
    def sides(self) -> tuple[int, int, int]:
        """Return g, o and d."""
        numbers = math.prod(self.shape)
        outputs = self.shape[1] if self.inputs_first else self.shape[0] // self.groups
        return self.groups, outputs, numbers // (self.groups * outputs)

    @property
    def is_convolution(self) -> bool:
        """Whether the inputs are patches."""
        return self.stride is not None

    def rows_of(self, parameter: Tensor) -> Tensor:
        """View the rows of a parameter, or of a tensor of its shape, that are used."""
        if self.inputs_first or self.shape == tuple(parameter.shape):
            return parameter
        return parameter.narrow(0, self.first, self.shape[0])

    def to_matrix(self, weight: Tensor) -> Tensor:
        """Convert the rows of a weight to a matrix.

        Args:
            weight: tensor of ``shape``.

        Returns:
            ``[g, o, d]``.
        """
        g = self.groups
        if self.transposed:
            # [g·i, o, k..] with the kernel reversed -> [g, o, i, k..]
            weight = weight.flip(list(range(2, weight.dim())))
            weight = weight.view(g, -1, *weight.shape[1:]).transpose(1, 2)
            return weight.reshape(g, weight.shape[1], -1)
        if self.inputs_first:
            weight = weight.transpose(0, 1)
        return weight.reshape(g, weight.shape[0] // g, -1)

    def from_matrix(self, matrix: Tensor) -> Tensor:
        """Convert a matrix ``[g, o, d]`` back to ``shape``."""
        if self.transposed:
            kernel = self.shape[2:]
            inputs, outputs = self.shape[0] // self.groups, self.shape[1]
            weight = matrix.reshape(self.groups, outputs, inputs, *kernel)
            weight = weight.transpose(1, 2).reshape(self.shape)
            return weight.flip(list(range(2, weight.dim())))
        if self.inputs_first:
            return matrix.reshape(self.shape[::-1]).transpose(0, 1)
        return matrix.reshape(self.shape)

    def channels_last(self, outputs: Tensor) -> Tensor:
        """View results of a call with their outputs in the last dimension."""
        return outputs.movedim(-1 - len(self.dilation), -1)

    def spread(self, bias: Tensor) -> Tensor:
        """View a bias so that it can be added to the results of a call."""
        return bias.view(-1, *[1] * len(self.dilation)) if bias.dim() == 1 else bias

    def pieces(
        self, inputs: Tensor, outputs: Tensor
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield inputs ``[g, n, d]`` and outputs ``[g, n, o]`` of a call, in pieces.

        The pieces depend on shapes only, so that sums have the same bits on every rank.

        Args:
            inputs: the first argument of the call.
            outputs: its result, or a tensor of that shape.
        """
        if not self.is_convolution:
            yield (
                inputs.reshape(1, -1, inputs.shape[-1]),
                outputs.reshape(1, -1, outputs.shape[-1]),
            )
            return
        axes = len(self.dilation)
        inputs, outputs = (
            x.unsqueeze(0) if x.dim() == axes + 1 else x for x in (inputs, outputs)
        )
        kernel = self.shape[2:]
        channels = inputs.shape[1] // self.groups
        pixels = math.prod(outputs.shape[2:])
        image = pixels * inputs.shape[1] * math.prod(kernel) * inputs.element_size()
        at_once = max(1, _PATCH_BYTES // max(1, image))
        for own, results in zip(
            torch.split(inputs, at_once), torch.split(outputs, at_once), strict=True
        ):
            windows = _in_groups(self._windows(own, kernel), self.groups)
            results = _in_groups(results, self.groups)
            # Positions last in memory, where copies of windows are fast:
            # [s, g, c, l.., k..] -> [g, c·k, s·l] -> [g, s·l, c·k]
            taps = range(3 + axes, 3 + 2 * axes)
            windows = windows.permute(1, 2, *taps, 0, *range(3, 3 + axes))
            results = results.permute(1, 2, 0, *range(3, 3 + axes))
            yield (
                windows.reshape(self.groups, channels * math.prod(kernel), -1).mT,
                results.flatten(2).mT,
            )

    def _windows(self, inputs: Tensor, kernel: tuple[int, ...]) -> Tensor:
        """Return the patches ``[s, c, l.., k..]`` of inputs ``[s, c, ...]``."""
        stride = self.stride or ()
        if self.transposed:
            spread = [
                (n - 1) * s + 1 for n, s in zip(inputs.shape[2:], stride, strict=True)
            ]
            zeros = inputs.new_zeros(*inputs.shape[:2], *spread)
            zeros[
                (slice(None), slice(None), *(slice(None, None, s) for s in stride))
            ] = inputs
            inputs, stride = zeros, (1,) * len(stride)
        if any(before or after for before, after in self.padding):
            # Transposed convolutions crop where their padding exceeds the kernel.
            inputs = F.pad(inputs, [p for pair in reversed(self.padding) for p in pair])
        steps = zip(kernel, stride, self.dilation, strict=True)
        for axis, (taps, step, dilation) in enumerate(steps, start=2):
            inputs = inputs.unfold(axis, (taps - 1) * dilation + 1, step)
            inputs = inputs[..., ::dilation]
        return inputs


@dataclass(frozen=True)
class LinearCall:
    """One call of a function with a selected weight.

    Attributes:
        map: the linear map.
        inputs: x.
        bias: the bias argument; None without one.
        run: calls the function with another weight and bias.
    """

    map: LinearMap
    inputs: Tensor
    bias: Tensor | None
    run: Callable[[Tensor, Tensor | None], Tensor]


class WeightTable:
    """Find the selected weights among the arguments of functions.

    Args:
        parameters: the selected parameters by name.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self._parameters = parameters
        self._by_storage = {
            parameter.untyped_storage().data_ptr(): name
            for name, parameter in parameters.items()
        }

    def match(
        self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> LinearCall | None:
        """Match a call of a function.

        Args:
            func: any function of torch.
            args: its positional arguments.
            kwargs: its other arguments.

        Returns:
            The call; None if the function is no linear map or its weight is not selected.
        """
        if func in _LINEAR:
            x, weight, bias = _bind(("input", "weight", "bias"), args, kwargs)
            return self._linear(x, weight, bias, lambda w, b: func(x, w, b))
        if func in _CONV:
            return self._convolution(func, args, kwargs)
        if func in _PRODUCTS and len(args) == 2:
            x, matrix = args
            return self._linear(
                x, _transposed(matrix), None, lambda w, _: func(x, w.mT)
            )
        if func in _BIASED_PRODUCTS and len(args) == 3 and not kwargs:
            bias, x, matrix = args
            return self._linear(
                x, _transposed(matrix), bias, lambda w, b: func(b, x, w.mT)
            )
        return None

    def _linear(
        self, x: Any, weight: Any, bias: Any, run: Callable[..., Tensor]
    ) -> LinearCall | None:
        """Match y = x·wᵀ + b; ``weight`` is ``[out, in]``, possibly a view."""
        if not (isinstance(x, Tensor) and isinstance(weight, Tensor)):
            return None
        name = self._find(weight)
        if name is None or weight.dim() != 2:
            return None
        parameter = self._parameters[name]
        if parameter.dim() != 2:
            return None
        offset = int(weight.storage_offset()) - int(parameter.storage_offset())
        if weight.stride() == parameter.stride():
            first, rest = divmod(offset, parameter.stride(0))
            if rest or weight.shape[1] != parameter.shape[1]:
                return None
            found = LinearMap(name, first, tuple(weight.shape))
        elif weight.mT.shape == parameter.shape and not offset:
            found = LinearMap(name, 0, tuple(parameter.shape), inputs_first=True)
        else:
            return None
        if found.inputs_first:
            return LinearCall(found, x, bias, lambda w, b: run(w.mT, b))
        return LinearCall(found, x, bias, run)

    def _convolution(
        self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> LinearCall | None:
        transposed, axes = func in _TRANSPOSED, _CONV[func]
        more = _TRANSPOSED_ARGUMENTS if transposed else _CONV_ARGUMENTS
        x, weight, bias, *values = _bind(
            ("input", "weight", "bias", *more), args, kwargs
        )
        name = self._find(weight) if isinstance(weight, Tensor) else None
        if name is None or weight.shape != self._parameters[name].shape:
            return None
        given = {k: v for k, v in zip(more, values, strict=True) if v is not None}
        stride = _each(given.get("stride", 1), axes)
        dilation = _each(given.get("dilation", 1), axes)
        reach = [(k - 1) * d for k, d in zip(weight.shape[2:], dilation, strict=True)]
        padding = given.get("padding", 0)
        if padding == "valid":
            padding = 0
        if transposed:
            after = _each(given.get("output_padding", 0), axes)
            sizes = _each(padding, axes)
            pairs = [
                (r - p, r - p + a) for r, p, a in zip(reach, sizes, after, strict=True)
            ]
        elif padding == "same":
            pairs = [(r // 2, r - r // 2) for r in reach]
        else:
            pairs = [(p, p) for p in _each(padding, axes)]
        found = LinearMap(
            name,
            0,
            tuple(weight.shape),
            transposed,
            int(given.get("groups", 1)),
            stride,
            tuple(pairs),
            dilation,
            transposed,
        )
        return LinearCall(found, x, bias, lambda w, b: func(x, w, b, **given))

    def _find(self, weight: Tensor) -> str | None:
        return self._by_storage.get(weight.untyped_storage().data_ptr())


def _bind(
    names: tuple[str, ...], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> list[Any]:
    return [
        args[i] if i < len(args) else kwargs.get(name) for i, name in enumerate(names)
    ]


def _in_groups(tensor: Tensor, groups: int) -> Tensor:
    """View ``[s, g·c, ...]`` as ``[s, g, c, ...]``."""
    channels = tensor.shape[1] // groups
    return tensor.reshape(len(tensor), groups, channels, *tensor.shape[2:])


def _transposed(matrix: Any) -> Any:
    return matrix.mT if isinstance(matrix, Tensor) and matrix.dim() == 2 else None


def _each(value: Any, axes: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * axes if len(values) == 1 else values
