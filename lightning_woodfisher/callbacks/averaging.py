"""Prune the averaged weights that Lightning's callbacks keep (EMA, SWA).

An average over a pruning step mixes weights from before and after it, so pruned weights
would become nonzero again in validation, in checkpoints and at the end. Once the average of
a pruned weight is set to zero, it stays zero, because only zeros are averaged from then on.
"""

from __future__ import annotations

__all__ = ["mask_averages", "require_maskable_averages"]

from collections.abc import Iterator

import lightning.pytorch as pl
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.optim.swa_utils import AveragedModel

from lightning_woodfisher.base.errors import ConfigurationError
from lightning_woodfisher.base.lightning_names import callbacks_of, either_name
from lightning_woodfisher.weights.masks import Masks

# By name, because the oldest supported Lightning has no WeightAveraging.
_AVERAGING = {"WeightAveraging", "StochasticWeightAveraging"}
# Attribute with the averaged copy of the module; None until there is one.
_ATTRIBUTE = "_average_model"


def require_maskable_averages(trainer: pl.Trainer) -> None:
    """Check that all averages of the Trainer can be pruned with the network.

    Args:
        trainer: the Trainer.

    Raises:
        ConfigurationError: if one cannot, with the name of its callback.
    """
    for callback in _averaging(trainer):
        name = type(callback).__name__
        if isinstance(trainer.strategy, either_name(ModelParallelStrategy)):
            raise ConfigurationError(
                f"{name} averages whole tensors, but {type(trainer.strategy).__name__} "
                "shards them, so pruned weights would become nonzero in the average; "
                "remove the callback, or use 'ddp'."
            )
        if not hasattr(callback, _ATTRIBUTE):
            raise ConfigurationError(
                f"{name} of this version of Lightning keeps its average in an unknown "
                "attribute, so pruned weights would become nonzero in it; remove the "
                "callback, or average in a separate fit before pruning."
            )


def mask_averages(trainer: pl.Trainer, masks: Masks) -> bool:
    """Set the pruned weights of every average to zero, in place.

    Args:
        trainer: the Trainer.
        masks: masks of the network.

    Returns:
        Whether any callback averages weights.

    Raises:
        ConfigurationError: if an average has no copy of some selected weights.
    """
    found = False
    for callback in _averaging(trainer):
        found = True
        average = getattr(callback, _ATTRIBUTE)
        if isinstance(average, AveragedModel):
            average = average.module
        if not isinstance(average, nn.Module):
            continue
        # All names: a mask has the first name of a tied weight.
        copies = dict(average.named_parameters(remove_duplicate=False))
        missing = [name for name in masks.parameters if name not in copies]
        if missing:
            raise ConfigurationError(
                f"{type(callback).__name__} has copied the module before it was complete: "
                f"its average has no {', '.join(missing[:8])}. Create the layers in "
                "__init__, or remove the callback."
            )
        masks.apply_to(copies)
    return found


def _averaging(trainer: pl.Trainer) -> Iterator[pl.Callback]:
    for callback in callbacks_of(trainer):
        for cls in type(callback).__mro__:
            if cls.__name__ in _AVERAGING and "lightning" in cls.__module__:
                yield callback
