"""Recognize a network that still has the weights of its initialization."""

from __future__ import annotations

__all__ = ["looks_untrained"]

import math

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_woodfisher.distributed.dtensor import to_local

# The largest of many weights that are uniform up to a bound is close to the bound.
_CLOSE = 0.9
_FEWEST_WEIGHTS = 100


def looks_untrained(model: nn.Module) -> bool:
    """Return whether a network has not been trained, as far as that can be seen.

    Either no BatchNorm layer has seen a batch; or, without BatchNorm, all weights of linear
    and convolution layers are uniform up to 1/√inputs, as PyTorch initializes them.

    Args:
        model: the network.

    Returns:
        False for other initializations and where it is not certain.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    counts = [norm.num_batches_tracked for norm in norms]
    if norms:
        means = [norm.running_mean for norm in norms]
        return all(count is not None and not count.any() for count in counts) and all(
            mean is not None and not mean.any() for mean in means
        )
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    weights = [
        to_local(layer.weight.detach())
        for layer in model.modules()
        if isinstance(layer, kinds) and layer.weight.numel() >= _FEWEST_WEIGHTS
    ]
    return bool(weights) and all(map(_is_uniform, weights))


def _is_uniform(weight: torch.Tensor) -> bool:
    if not weight.numel():
        return True
    bound = 1.0 / math.sqrt(max(1, math.prod(weight.shape[1:])))
    largest = float(weight.abs().max())
    return _CLOSE * bound <= largest <= bound * (1.0 + 1e-6)
