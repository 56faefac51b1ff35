"""Many gradients from one forward and one backward pass.

A batch of P·m samples gives P rows; row p is the gradient of the loss of samples p·m ..
(p+1)·m - 1 (:mod:`~.gradients.lockstep`). The weight gradient of a linear or convolution
layer is a sum of products of its inputs and the gradients of its outputs. Autograd computes
the latter only, and the products are summed within each row instead of over the batch.

Legend: P rows, m samples of a row, I/O channels in and out, G groups, L positions of the
output, D active weights.
"""

from __future__ import annotations

__all__ = [
    "LayerCall",
    "fill_rows",
    "find_obstacle",
    "has_inputs_first",
    "is_plain",
    "make_layer_call",
    "owners_of",
    "record_calls",
    "unfold",
]

import contextlib
import math
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn.grad import conv1d_weight, conv2d_weight, conv3d_weight
from torch.nn.modules.conv import _ConvNd

from lightning_woodfisher.base.errors import PruningError
from lightning_woodfisher.data.losses import differentiate
from lightning_woodfisher.weights.layers import find_kind

_LAYERS: tuple[type[nn.Module], ...] = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_CONV_WEIGHT: dict[int, Callable[..., Tensor]] = {
    1: conv1d_weight,
    2: conv2d_weight,
    3: conv3d_weight,
}
# Convolution kernels work on blocks of this many channels.
_CHANNEL_BLOCK = 8


@dataclass
class LayerCall:
    """One call of a layer: its inputs, and the graph edge of its outputs.

    Attributes:
        layer: the layer.
        inputs: the input tensor, without graph.
        edge: the gradient edge of the output tensor.
        names: names of the wanted parameters by their key in the layer.
        size: number of elements of the output tensor.
    """

    layer: nn.Module
    inputs: Tensor
    edge: GradientEdge
    names: dict[str, str]
    size: int


def find_obstacle(
    model: nn.Module, parameters: Mapping[str, nn.Parameter]
) -> str | None:
    """Check the layers of a model for a reason not to use :func:`fill_rows`.

    Args:
        model: the network.
        parameters: the parameters to differentiate with respect to, by name.

    Returns:
        A reason, or None if every parameter belongs to a plain linear or convolution
        layer (:func:`is_plain`).
    """
    wanted = {id(parameter): name for name, parameter in parameters.items()}
    for module in model.modules():
        for key, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in wanted:
                continue
            name = wanted[id(parameter)]
            if not parameter.requires_grad:
                return f"{name} is frozen"
            if key not in {"weight", "bias"} or not is_plain(module):
                return f"{name} belongs to a {type(module).__name__}"
    return None


def fill_rows(
    calls: Sequence[LayerCall],
    losses: Sequence[Tensor],
    positions: Mapping[str, Tensor],
    whole: Container[str],
    rows: Tensor,
    scale: float = 1.0,
) -> torch.dtype:
    """Fill each row with the gradient of one loss.

    Args:
        calls: all calls of the layers. Their inputs and outputs belong to the losses in
            order, an equal share to each.
        losses: P scalars with a graph.
        positions: int64 positions of the active weights in each flattened parameter.
        whole: names of the parameters whose weights are all active, in order.
        rows: ``[P, D]``, overwritten.
        scale: factor on the losses in the backward pass, to keep float16 from
            underflowing.

    Returns:
        The coarsest dtype of the gradient of an output.
    """
    outputs: Sequence[Tensor | None] = ()
    if calls:
        outputs = differentiate(
            torch.stack([loss.reshape(()) for loss in losses]).sum() * scale,
            [call.edge for call in calls],
        )
    lengths = [len(where) for where in positions.values()]
    targets = dict(zip(positions, torch.split(rows, lengths, dim=1), strict=True))
    written: set[str] = set()
    for call, gradient in zip(calls, outputs, strict=True):
        if gradient is None:
            continue
        for key, name in call.names.items():
            values = _products(call, key, gradient, len(rows))
            if name not in whole:
                values = values[:, positions[name]]
            if name in written:
                targets[name].add_(values)
            else:
                targets[name].copy_(values)
            written.add(name)
    for name in targets.keys() - written:
        targets[name].zero_()
    if scale != 1.0:
        rows.div_(scale)
    dtypes = {g.dtype for g in outputs if g is not None} or {rows.dtype}
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)


def is_plain(module: nn.Module) -> bool:
    """Return whether the gradient of a layer's weight is known from inputs and outputs.

    Args:
        module: any layer.

    Returns:
        True for a linear or convolution layer with the forward pass of ``torch.nn``, and
        for ``Conv1D`` with that of transformers.
    """
    forward = getattr(type(module), "forward", None)
    if getattr(forward, "__qualname__", "") == "Conv1D.forward":
        return (
            getattr(forward, "__module__", "") == "transformers.pytorch_utils"
            and find_kind(module) is not None
            and "forward" not in vars(module)
        )
    for cls in _LAYERS:
        if isinstance(module, cls):
            # MultiheadAttention uses the weight of its output layer without calling it.
            called = (
                type(module) is not nn.modules.linear.NonDynamicallyQuantizableLinear
            )
            names = ("forward", "_conv_forward")
            return called and all(
                getattr(type(module), name, None) is getattr(cls, name, None)
                and name not in vars(module)
                for name in names
            )
    return False


@contextlib.contextmanager
def record_calls(
    model: nn.Module, parameters: Mapping[str, nn.Parameter]
) -> Iterator[list[LayerCall]]:
    """Record the calls of all layers that own one of the parameters.

    Args:
        model: the network.
        parameters: the wanted parameters, by name.

    Yields:
        A list that receives the calls, in order. Hooks exist inside the context only.
    """
    calls: list[LayerCall] = []
    owners = owners_of(model, parameters)
    handles = []

    def record(
        layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        call = make_layer_call(layer, owners[layer], args, kwargs, output)
        if call is not None:
            calls.append(call)

    try:
        for layer in owners:
            handles.append(
                # Before other hooks, because these may replace the output.
                layer.register_forward_hook(record, prepend=True, with_kwargs=True)
            )
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def owners_of(
    model: nn.Module, parameters: Mapping[str, nn.Parameter]
) -> dict[nn.Module, dict[str, str]]:
    """Find the layers that own one of the parameters.

    Args:
        model: the network.
        parameters: the wanted parameters, by name.

    Returns:
        For each such layer, the names of the parameters by their key in the layer.
    """
    names = {id(parameter): name for name, parameter in parameters.items()}
    owners = {}
    for module in model.modules():
        owned = module.named_parameters(recurse=False)
        used = {key: names[id(p)] for key, p in owned if id(p) in names}
        if used:
            owners[module] = used
    return owners


def make_layer_call(
    layer: nn.Module,
    names: dict[str, str],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    output: Any,
) -> LayerCall | None:
    """Describe a call of a layer.

    Args:
        layer: the layer.
        names: names of its wanted parameters by their key in the layer.
        args: arguments of the call.
        kwargs: arguments of the call.
        output: its result, before anything has changed it in place.

    Returns:
        The call; None if the output has no graph.

    Raises:
        PruningError: if the input has no dimension of samples.
    """
    if not isinstance(output, Tensor) or not output.requires_grad:
        return None
    inputs = args[0] if args else next(iter(kwargs.values()))
    dimensions = layer.weight.dim() if isinstance(layer, _ConvNd) else 2
    if inputs.dim() < dimensions:
        raise PruningError(f"a {type(layer).__name__} got a sample without a batch")
    # The edge, not the tensor, whose meaning an in-place operation would change.
    edge = get_gradient_edge(output)
    return LayerCall(layer, inputs.detach(), edge, names, output.numel())


@torch.no_grad()
def _products(call: LayerCall, key: str, gradient: Tensor, count: int) -> Tensor:
    """Compute the gradient of one parameter in one call for every row, ``[P, n]``."""
    layer = call.layer
    if isinstance(layer, _ConvNd):
        if key == "bias":
            pixels = math.prod(gradient.shape[2:])
            return gradient.reshape(count, -1, layer.out_channels, pixels).sum((1, 3))
        # Autocast may run the layer in another dtype than that of its input.
        inputs, padding = _padded(layer, call.inputs.to(gradient.dtype))
        if _by_convolution(layer, gradient, count):
            return _convolve(layer, inputs, padding, gradient, count)
        return _multiply(layer, inputs, padding, gradient, count)
    gradient = gradient.reshape(count, -1, gradient.shape[-1])
    if key == "bias":
        return gradient.sum(dim=1)
    inputs = call.inputs.to(gradient.dtype).reshape(count, -1, call.inputs.shape[-1])
    if has_inputs_first(layer):
        return torch.bmm(inputs.mT, gradient).view(count, -1)
    return torch.bmm(gradient.mT, inputs).view(count, -1)


def has_inputs_first(layer: nn.Module) -> bool:
    """Return whether the weight of a layer is ``[I, O]`` and not ``[O, I]``.

    Args:
        layer: a layer for which :func:`is_plain` returns True.

    Returns:
        True for ``Conv1D``.
    """
    kind = find_kind(layer)
    return kind is not None and kind.inputs == 0


def unfold(layer: _ConvNd, inputs: Tensor) -> Tensor:
    """Return the patches that the weight of a convolution multiplies.

    Args:
        layer: the convolution, with output positions L and kernel elements k.
        inputs: ``[S, C, ...]``.

    Returns:
        ``[S, C, L.., k..]``.
    """
    return _windows(layer, *_padded(layer, inputs))


def _windows(layer: _ConvNd, inputs: Tensor, padding: tuple[int, ...]) -> Tensor:
    if any(padding):
        inputs = F.pad(inputs, [p for size in reversed(padding) for p in (size, size)])
    steps = zip(layer.kernel_size, layer.stride, layer.dilation, strict=True)
    for axis, (taps, stride, dilation) in enumerate(steps, start=2):
        window = inputs.unfold(axis, (taps - 1) * dilation + 1, stride)
        inputs = window[..., ::dilation]
    return inputs


def _padded(layer: _ConvNd, inputs: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """Apply the padding that a convolution cannot; return the padding that is left."""
    none = (0,) * (inputs.dim() - 2)
    if layer.padding == "valid":
        return inputs, none
    if layer.padding_mode == "zeros" and not isinstance(layer.padding, str):
        return inputs, tuple(layer.padding)
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    return F.pad(inputs, layer._reversed_padding_repeated_twice, mode=mode), none


def _by_convolution(layer: _ConvNd, gradient: Tensor, count: int) -> bool:
    """Return whether a grouped convolution is faster than unfolding and a product."""
    # Measured on CPUs: it is for 32-bit kernels of more than one element and at least a
    # block of channels, unless there are more weights than positions to sum over.
    if gradient.device.type != "cpu" or gradient.dtype != torch.float32:
        return False
    if math.prod(layer.kernel_size) == 1:
        return False
    if layer.groups > 1:
        return True
    positions = gradient.numel() // (count * layer.out_channels)
    return layer.in_channels >= _CHANNEL_BLOCK and positions >= layer.out_channels


def _convolve(
    layer: _ConvNd,
    inputs: Tensor,
    padding: tuple[int, ...],
    gradient: Tensor,
    count: int,
) -> Tensor:
    """Compute weight gradients as that of one convolution with P·G groups."""

    def by_row(tensor: Tensor) -> Tensor:
        # [P·m, C, ...] -> [m, P·C, ...]
        rows = tensor.reshape(count, -1, *tensor.shape[1:]).transpose(0, 1)
        return rows.reshape(len(rows), -1, *tensor.shape[2:])

    shape = (count * layer.out_channels, *layer.weight.shape[1:])
    return _CONV_WEIGHT[len(padding)](
        by_row(inputs),
        shape,
        by_row(gradient),
        layer.stride,
        padding,
        layer.dilation,
        count * layer.groups,
    ).view(count, -1)


def _multiply(
    layer: _ConvNd,
    inputs: Tensor,
    padding: tuple[int, ...],
    gradient: Tensor,
    count: int,
) -> Tensor:
    """Compute weight gradients from products of unfolded inputs and output gradients."""
    inputs = _windows(layer, inputs, padding)
    groups, axes = layer.groups, len(padding)
    # [P·m, I, L.., k..] -> [P, m, G, I/G, L.., k..] -> [P·G, I/G·k, m·L]
    split = (count, len(inputs) // count, groups)
    unfolded = inputs.reshape(*split, inputs.shape[1] // groups, *inputs.shape[2:])
    positions = range(4, 4 + axes)
    taps_at = range(4 + axes, 4 + 2 * axes)
    unfolded = unfolded.permute(0, 2, 3, *taps_at, 1, *positions)
    unfolded = unfolded.reshape(count * groups, layer.weight[0].numel(), -1)
    outputs = gradient.reshape(*split, -1, *gradient.shape[2:])
    outputs = outputs.permute(0, 2, 3, 1, *positions)
    outputs = outputs.reshape(count * groups, layer.out_channels // groups, -1)
    return torch.bmm(outputs, unfolded.mT).view(count, -1)
