"""SOSP-I: how much each structure adds to the derivative of each sample's loss.

For the output a of a layer, bias included, Σ a·∂ℓ/∂a over the positions of channel c is the
inner product of filter and bias of c with ∂ℓ/∂θ, because a is linear in them. So one
backward pass of a whole batch gives θ_s·∂ℓ_n/∂θ for every sample n and structure s, and no
gradient of a weight is ever formed. The same holds for weight and bias of a norm.
Shapes: n samples of a batch, S structures, C channels of a layer, D classes.
"""

from __future__ import annotations

__all__ = ["Contributions"]

import contextlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from lightning_woodfisher.base.errors import ConfigurationError, PruningError
from lightning_woodfisher.structured.scores.vectors import Part, StructureVectors

_CHANNELS_SECOND = (_ConvNd, _NormBase, nn.GroupNorm)
_CHANNELS_LAST = (nn.Linear, nn.LayerNorm)


class Contributions:
    """Watches the layers that produce structures.

    Args:
        model: the network.
        vectors: of the structures.
        predictor: its module that gives logits; the model itself if None.

    Raises:
        ConfigurationError: for a layer whose output is not known to be linear in its
            weights, channel by channel.
    """

    def __init__(
        self,
        model: nn.Module,
        vectors: StructureVectors,
        predictor: nn.Module | None = None,
    ) -> None:
        self._model = model
        self._predictor = model if predictor is None else predictor
        self._size = vectors.size
        self._parts: dict[str, list[Part]] = defaultdict(list)
        for part in vectors.parts:
            self._parts[part.module].append(part)
        for name, parts in self._parts.items():
            _require_known(name, model.get_submodule(name), parts)
        self._outputs: list[tuple[str, Tensor]] = []
        self._logits: list[Tensor] = []

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Keep the outputs of the layers; no hook is left behind.

        Yields:
            Nothing.
        """
        handles = [
            self._model.get_submodule(name).register_forward_hook(self._watch(name))
            for name in self._parts
        ]
        handles.append(self._predictor.register_forward_hook(self._keep_logits))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self.take_outputs()

    def take_outputs(self) -> list[tuple[str, Tensor]]:
        """Take what the layers have put out since the last time.

        Returns:
            Names of layers with their outputs, which have a graph.
        """
        outputs, self._outputs, self._logits = self._outputs, [], []
        return outputs

    def logits(self) -> Tensor:
        """Give what the predictor has put out since the last time.

        Returns:
            ``[n, D]``, with a graph.

        Raises:
            PruningError: when there was not exactly one output of this shape.
        """
        found = [tuple(logits.shape) for logits in self._logits]
        if len(found) != 1 or len(found[0]) != 2:
            raise PruningError(
                "labels='logits' needs a loss that calls the model once and gets logits "
                f"[n, D], but the outputs had the shapes {found}; use labels='sampled'"
            )
        return self._logits[0]

    def backward(
        self,
        outputs: Sequence[tuple[str, Tensor]],
        value: Tensor,
        direction: Tensor | None = None,
        retain: bool = False,
    ) -> Tensor:
        """Multiply every θ_s by the derivatives of the samples, in one backward pass.

        Args:
            outputs: from :meth:`take_outputs`.
            value: what is differentiated: a sum over the samples, or ``[n, D]``.
            direction: ``[n, D]``; the combination of a sample's values.
            retain: whether another backward pass follows.

        Returns:
            float64 ``[n, S]`` on the CPU.

        Raises:
            PruningError: when the outputs are not those of the same n samples.
        """
        lengths = {len(output) for _, output in outputs}
        if len(lengths) != 1:
            raise PruningError(
                "SOSP-I needs layers whose outputs begin with the axis of the samples, "
                f"but found the lengths {sorted(lengths)}; use method='sosp_h'"
            )
        gradients: tuple[Tensor | None, ...] = torch.autograd.grad(
            value,
            [output for _, output in outputs],
            direction,
            retain_graph=retain,
            allow_unused=True,
        )
        result = torch.zeros(lengths.pop(), self._size, dtype=torch.float64)
        for (name, output), gradient in zip(outputs, gradients, strict=True):
            if gradient is not None:
                self._add(result, name, output.detach(), gradient)
        return result

    def _add(self, result: Tensor, name: str, output: Tensor, slope: Tensor) -> None:
        module = self._model.get_submodule(name)
        dtype = torch.promote_types(output.dtype, torch.float32)
        output, slope = output.to(dtype), slope.to(dtype)
        last = isinstance(module, _CHANNELS_LAST)
        channel = output.dim() - 1 if last else 1
        rest = [dim for dim in range(1, output.dim()) if dim != channel]
        whole, constant = output * slope, slope
        if rest:
            whole = whole.sum(rest, dtype=torch.float64)
            constant = constant.sum(rest, dtype=torch.float64)
        bias = getattr(module, "bias", None)
        by_bias = torch.zeros((), dtype=torch.float64)
        if bias is not None:
            by_bias = constant.double().cpu() * bias.detach().double().cpu()
        by_weight = whole.double().cpu() - by_bias
        for part in self._parts[name]:
            values = by_bias if part.tensor == "bias" else by_weight
            belongs = part.structure_of >= 0
            result.index_add_(1, part.structure_of[belongs], values[:, belongs])

    def _watch(self, name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> Tensor | None:
            # Without a graph when labels are drawn.
            if not output.requires_grad:
                return None
            self._outputs.append((name, output))
            # What follows may work in place.
            return output.clone()

        return hook

    def _keep_logits(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.requires_grad:
            self._logits.append(output)


def _require_known(name: str, module: nn.Module, parts: Sequence[Part]) -> None:
    known = (*_CHANNELS_SECOND, *_CHANNELS_LAST)
    odd = [p.tensor for p in parts if p.tensor not in {"weight", "bias"}]
    channels = getattr(module, "out_channels", None)
    wrong = channels is not None and any(len(p.structure_of) != channels for p in parts)
    wrong |= isinstance(module, nn.LayerNorm) and len(module.normalized_shape) > 1
    if isinstance(module, known) and not odd and not wrong:
        return
    raise ConfigurationError(
        f"method='sosp_i' cannot follow {name!r} ({type(module).__name__}"
        f"{', ' + odd[0] if odd else ''}): it knows Conv, Linear and norm layers whose "
        "structures are output channels; use method='sosp_h', or leave it out."
    )
