"""Convert 2:4 weights for sparse tensor cores, and measure the speedup."""

from __future__ import annotations

__all__ = [
    "SpeedComparison",
    "compare_speed",
    "find_semi_structured",
    "to_semi_structured",
]

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from lightning_woodfisher.base.errors import ConfigurationError
from lightning_woodfisher.weights.layers import matches_pattern

_WARMUP = 10


@dataclass(frozen=True)
class SpeedComparison:
    """Median times of a forward pass.

    Attributes:
        dense_ms: milliseconds with dense weights.
        sparse_ms: milliseconds with 2:4 weights.
        calls: number of measured passes of each model.
    """

    dense_ms: float
    sparse_ms: float
    calls: int

    @property
    def speedup(self) -> float:
        """Dense time divided by sparse time."""
        return self.dense_ms / self.sparse_ms


def find_semi_structured(
    model: nn.Module, exclude: Sequence[str] = ()
) -> dict[str, nn.Linear]:
    """Find the Linear layers, and check that their weights are 2:4.

    Args:
        model: the network.
        exclude: regular expressions, searched in the names of layers, or class paths;
            matching layers are ignored.

    Returns:
        Layers by name.

    Raises:
        ConfigurationError: if a weight is not 2:4, if there is no Linear layer, or if a
            pattern is not a regular expression.
    """
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and not any(matches_pattern(pattern, [(name, module)]) for pattern in exclude)
    }
    if not layers:
        raise ConfigurationError(
            f"{type(model).__name__} has no Linear layer to convert. Convolutions stay "
            "dense: PyTorch has 2:4 products for matrices only."
        )
    for name, layer in layers.items():
        _check_pattern(name, layer.weight.detach())
    return layers


def to_semi_structured(model: nn.Module, exclude: Sequence[str] = ()) -> list[str]:
    """Convert the 2:4 weights of Linear layers for sparse tensor cores, in place.

    Converted layers are for inference only. Convolutions stay dense: PyTorch has 2:4
    products for matrices only.

    Args:
        model: network in float16 or bfloat16, on a GPU of compute capability 8.0 or later.
        exclude: regular expressions, searched in the names of layers, or class paths;
            matching layers stay dense.

    Returns:
        Names of the converted layers.

    Raises:
        ConfigurationError: if a weight is not 2:4, is on another device, or has a dtype or
            shape that the kernels do not support. Nothing is converted then.
    """
    layers = find_semi_structured(model, exclude)
    converted: dict[int, nn.Parameter] = {}
    for name, layer in layers.items():
        if id(layer.weight) in converted:
            continue
        _check_device(name, layer.weight)
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", ".*prototype stage", UserWarning)
                sparse = torch.sparse.to_sparse_semi_structured(
                    layer.weight.detach().contiguous()
                )
        except RuntimeError as error:
            raise ConfigurationError(
                f"{name}: the kernels do not support a weight of shape "
                f"{tuple(layer.weight.shape)} ({error}); leave it dense with exclude."
            ) from error
        converted[id(layer.weight)] = nn.Parameter(sparse, requires_grad=False)
    for layer in layers.values():
        layer.weight = converted[id(layer.weight)]
    return list(layers)


def compare_speed(
    dense: nn.Module, sparse: nn.Module, inputs: Sequence[Any], calls: int = 100
) -> SpeedComparison:
    """Measure forward passes of a dense and a converted model.

    Args:
        dense: copy of the model from before the conversion.
        sparse: the converted model.
        inputs: positional arguments of ``forward``, on the GPU.
        calls: number of measured passes of each model, after a warm-up.

    Returns:
        Medians of times measured with CUDA events.

    Raises:
        ConfigurationError: without a GPU.
    """
    if not torch.cuda.is_available():
        raise ConfigurationError("compare_speed needs a GPU, and no GPU is available.")
    for model in (dense, sparse):
        for _ in range(_WARMUP):
            _milliseconds(model, inputs)
    # In turn, so that changes of the clock rate affect both.
    times = [
        (_milliseconds(dense, inputs), _milliseconds(sparse, inputs))
        for _ in range(calls)
    ]
    dense_ms, sparse_ms = (median(column) for column in zip(*times, strict=True))
    return SpeedComparison(dense_ms, sparse_ms, calls)


@torch.no_grad()
def _milliseconds(model: Callable[..., Any], inputs: Sequence[Any]) -> float:
    event: Any = torch.cuda.Event  # untyped
    start, end = (event(enable_timing=True) for _ in range(2))
    start.record()
    model(*inputs)
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def _check_pattern(name: str, weight: Tensor) -> None:
    if weight.shape[1] % 4:
        raise ConfigurationError(
            f"{name} has {weight.shape[1]} inputs, not a multiple of 4; leave it dense with "
            "exclude."
        )
    groups = (weight != 0).view(weight.shape[0], -1, 4).sum(dim=2)
    wrong = (groups > 2).nonzero()
    if len(wrong):
        row, group = wrong[0].tolist()
        raise ConfigurationError(
            f"{name} is not 2:4: row {row} has {int(groups[row, group])} nonzero weights in "
            f"columns {4 * group} to {4 * group + 3}, and {len(wrong)} of {groups.numel()} "
            'groups have more than 2. Prune it with selection.pattern="2:4", or leave it '
            "dense with exclude."
        )


def _check_device(name: str, weight: Tensor) -> None:
    if weight.device.type != "cuda":
        raise ConfigurationError(
            f"{name} is on {weight.device}: 2:4 products need an NVIDIA GPU of compute "
            'capability 8.0 or later; move the model there with model.to("cuda").'
        )
    capability = torch.cuda.get_device_capability(weight.device)
    if capability < (8, 0):
        raise ConfigurationError(
            f"{torch.cuda.get_device_name(weight.device)} has compute capability "
            f"{'.'.join(map(str, capability))}; 2:4 products need 8.0 (A100) or later."
        )
    if weight.dtype not in {torch.float16, torch.bfloat16}:
        raise ConfigurationError(
            f"{name} is {weight.dtype}: convert the model to float16 or bfloat16 first, "
            "with model.half()."
        )
