"""Convolutions with frozen weights, differentiated twice without work for the weights.

The second derivative of torch's convolutions computes a gradient of the weights also where
nobody wants it, a quarter of the time of SOSP-H. With fixed weights a convolution is a
linear map A: its derivative is Aᵀ, and the derivative of that is A.
"""

from __future__ import annotations

__all__ = ["FrozenConvolutions"]

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

# Their arguments after the bias are stride, padding, dilation and groups.
_CONVOLUTIONS = {torch.conv1d: 1, torch.conv2d: 2, torch.conv3d: 3}


class FrozenConvolutions(TorchFunctionMode):
    """Inside, convolutions whose weights need no gradient are differentiated as above."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        dims = _CONVOLUTIONS.get(func)
        # Layers pass all arguments by position. Padding may be a name.
        if dims is None or kwargs or len(args) != 7 or isinstance(args[4], str):
            return func(*args, **(kwargs or {}))
        inputs, weight, bias, *sizes, groups = args
        is_fixed = not weight.requires_grad and not (
            bias is not None and bias.requires_grad
        )
        is_plain = inputs.dim() == dims + 2 and not torch.is_autocast_enabled(
            inputs.device.type
        )
        if not is_fixed or not is_plain or not inputs.requires_grad:
            return func(*args)
        stride, padding, dilation = (
            [size] * dims if isinstance(size, int) else list(size) for size in sizes
        )
        settings = stride, padding, dilation, False, [0] * dims, groups
        return _Convolution.apply(inputs, weight, bias, inputs.shape, settings, False)


class _Convolution(torch.autograd.Function):
    """A with the bias, or Aᵀ."""

    @staticmethod
    def forward(
        ctx: Any,
        tensor: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        shape: torch.Size,
        settings: Any,
        is_transposed: bool,
    ) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.rest = shape, settings, not is_transposed
        found: Tensor
        if is_transposed:
            # Of the inputs only the shape matters.
            inputs = tensor.new_empty(1).expand(shape)
            found = torch.ops.aten.convolution_backward(
                tensor, inputs, weight, None, *settings, [True, False, False]
            )[0]
        else:
            found = torch.ops.aten.convolution(tensor, weight, bias, *settings)
        return found

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (weight,) = ctx.saved_tensors
        found = _Convolution.apply(gradient, weight, None, *ctx.rest)
        return found, *(None,) * 5
