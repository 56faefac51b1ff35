"""Gates: a factor α_s = 1 on everything that a structure sends to the next layers.

The output of a layer is linear in its weights, channel by channel. So multiplying the
outputs of all layers of structure s by α_s multiplies its weights θ_s by α_s, and
derivatives with respect to the gates are those along the vectors θ_s:

    ∂L/∂α_s = θ_s·g      ∂²L/∂α_s∂α_s' = θ_sᵀHθ_s'

One backward pass to the gates gives them for all structures. No gradient of a weight is
computed, and with one gate for each sample the pass gives θ_s·∂ℓ_n/∂θ of every sample n.
Shapes: n samples of a batch, S structures, C channels of a layer.
"""

from __future__ import annotations

__all__ = ["FrozenConvolutions", "Gates"]

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode

from lightning_woodfisher.base.errors import ConfigurationError, PruningError
from lightning_woodfisher.data.losses import differentiate, refuse_checkpoints
from lightning_woodfisher.structured.graph.attention import separate_heads
from lightning_woodfisher.structured.scores.vectors import StructureVectors
from lightning_woodfisher.weights.layers import is_linear

_CHANNELS_SECOND = (_ConvNd, _NormBase, nn.GroupNorm)
# Their arguments after the bias are stride, padding, dilation and groups.
_CONVOLUTIONS = {torch.conv1d: 1, torch.conv2d: 2, torch.conv3d: 3}


class Gates:
    """One gate for each structure, or one for each structure and sample.

    Args:
        vectors: the entries of the structures, whose layers get gates.
        per_sample: whether every sample has gates of its own.

    Attributes:
        size: S.
        lengths: of the first axes of the gated outputs in the last :meth:`run`.

    Raises:
        ConfigurationError: for a layer whose output is not known to be linear in its
            weights, channel by channel.
    """

    def __init__(self, vectors: StructureVectors, *, per_sample: bool = False) -> None:
        self._model = vectors.model
        self._per_sample = per_sample
        self.size = vectors.size
        self._owners = _find_owners(vectors)
        self.lengths: set[int] = set()
        self._factors: Tensor | None = None

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """Put the gates into the model, and freeze its weights.

        Enter it inside a session, which restores the flags of the weights.

        Yields:
            Nothing.
        """
        for parameter in self._model.parameters():
            parameter.requires_grad_(False)
        with contextlib.ExitStack() as hooks:
            for name, owners in self._owners.items():
                layer = self._model.get_submodule(name)
                gate = self._make_hook(owners)
                if isinstance(layer, nn.MultiheadAttention):
                    # A head is linear in its values, and no layer returns them.
                    hooks.enter_context(separate_heads(layer))
                    hook: Any = layer.out_proj.register_forward_pre_hook(
                        lambda module, inputs, gate=gate: gate(module, None, *inputs)
                    )
                else:
                    # Before other hooks, which may replace the output.
                    hook = layer.register_forward_hook(gate, prepend=True)
                hooks.enter_context(hook)
            yield

    def run(self, loss: Callable[[], Tensor]) -> Tensor:
        """Compute a loss with new gates.

        Args:
            loss: runs the model.

        Returns:
            The loss, with a graph that begins at the gates.
        """
        self._factors = None
        self.lengths.clear()
        return loss()

    def derivatives(
        self, value: Tensor, direction: Tensor | None = None, **options: bool
    ) -> Tensor:
        """Differentiate with respect to the gates of the last :meth:`run`.

        Args:
            value: computed in that run, or its derivatives with ``create_graph=True``.
            direction: factors of the elements of the value; None for a scalar.
            options: ``create_graph`` and ``retain_graph`` of ``torch.autograd.grad``.

        Returns:
            float64 ``[n, S]``, or ``[1, S]`` with the same gates for all samples.
        """
        refuse_checkpoints(value)
        if self._factors is None or not value.requires_grad:
            # Derivatives that are constant, or a network that calls none of the layers.
            return torch.zeros(1, self.size, dtype=torch.float64, device=value.device)
        (found,) = differentiate(value, [self._factors], direction, **options)
        if found is None:
            found = torch.zeros_like(self._factors)
        return found[:, :-1]

    def _make_hook(self, owners: Tensor) -> Callable[..., Tensor | None]:
        def hook(module: Any, inputs: Any, output: Tensor) -> Tensor | None:
            # Gates of 1 change nothing while labels are drawn.
            if not torch.is_grad_enabled():
                return None
            self.lengths.add(len(output))
            samples = len(output) if self._per_sample else 1
            if self._factors is None:
                # The last one stays 1, for channels without a structure.
                shape = samples, self.size + 1
                self._factors = torch.ones(
                    shape, dtype=torch.float64, device=output.device, requires_grad=True
                )
            if len(self._factors) != samples:
                raise PruningError(
                    "this method needs layers whose outputs have the samples on the first "
                    f"axis, but found the lengths {sorted(self.lengths)}; use "
                    "method='sosp_h', or give a map-style dataset, whose samples are run "
                    "one by one"
                )
            channel = output.dim() - 1
            if isinstance(module, _ConvNd):
                # It may be called with one sample without a batch.
                channel -= len(module.kernel_size)
            elif isinstance(module, _CHANNELS_SECOND):
                channel = 1
            sizes = [1] * output.dim()
            sizes[0], sizes[channel] = samples, len(owners)
            dtype = torch.promote_types(output.dtype, torch.float32)
            factors = self._factors.index_select(1, owners).to(dtype).view(sizes)
            return (output.to(dtype) * factors).to(output.dtype)

        return hook


def _find_owners(vectors: StructureVectors) -> dict[str, Tensor]:
    """Find the structure of every output channel of the layers.

    Returns:
        int64 ``[C]`` by name of the layer; S for channels without a structure.
    """
    tensors: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for one in vectors.slices:
        known = tensors[one.module].get(one.tensor, one.owners)
        tensors[one.module][one.tensor] = torch.minimum(known, one.owners)
    owners_of = {}
    for name, by_tensor in tensors.items():
        module = vectors.model.get_submodule(name)
        owners_of[name] = next(iter(by_tensor.values()))
        if isinstance(module, nn.MultiheadAttention):
            # Queries and keys come before the values.
            owners_of[name] = owners_of[name][-module.out_proj.in_features :]
        else:
            _require_linear(name, module, by_tensor)
    return owners_of


def _require_linear(name: str, module: nn.Module, by_tensor: dict[str, Tensor]) -> None:
    own = {key for key, value in module._parameters.items() if value is not None}
    maps = list(by_tensor.values())
    channels = getattr(module, "out_channels", len(maps[0]))
    is_known = isinstance(module, (*_CHANNELS_SECOND, nn.LayerNorm))
    is_known |= is_linear(module)
    is_known &= not (
        isinstance(module, nn.LayerNorm) and len(module.normalized_shape) > 1
    )
    if (
        not is_known
        or own != by_tensor.keys()
        or channels != len(maps[0])
        or not all(torch.equal(maps[0], other) for other in maps)
    ):
        raise ConfigurationError(
            f"the channels of {name!r} ({type(module).__name__} with {', '.join(own)}) "
            "cannot be scored, only output channels of Conv, Linear and norm layers with "
            "all of their parameters; exclude the layer, or use method='hap'."
        )


class FrozenConvolutions(TorchFunctionMode):
    """Inside, convolutions with frozen weights are differentiated without work for these.

    The second derivative of torch's convolutions computes a gradient of the weights also
    where nobody wants it, a quarter of the time of SOSP-H. With fixed weights a convolution
    is a linear map A: its derivative is Aᵀ, and the derivative of that is A.
    """

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
