"""Averages of the weights that Lightning's callbacks keep, pruned with the network.

An average over a pruning step mixes weights from before and after it, so that what is
pruned would come back with the average: in validation, in checkpoints and in the end. An
average that is set to zero there stays zero, because from then on zeros are averaged.
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

# By name: WeightAveraging is younger than the oldest Lightning we support.
_AVERAGING = {"WeightAveraging", "StochasticWeightAveraging"}
# Where both keep their copy of the module; None until they have one.
_ATTRIBUTE = "_average_model"


def require_maskable_averages(trainer: pl.Trainer) -> None:
    """Refuse averages that cannot be pruned with the network.

    Args:
        trainer: with its callbacks.

    Raises:
        ConfigurationError: naming the callback.
    """
    for callback in _averaging(trainer):
        name = type(callback).__name__
        if isinstance(trainer.strategy, either_name(ModelParallelStrategy)):
            raise ConfigurationError(
                f"{name} averages whole tensors, but {type(trainer.strategy).__name__} "
                "shards them, so that pruned weights would come back with the average; "
                "leave it out, or use 'ddp'."
            )
        if not hasattr(callback, _ATTRIBUTE):
            raise ConfigurationError(
                f"{name} of this version of Lightning keeps its average in a place that "
                "is not known here, so that pruned weights would come back with it; leave "
                "it out, or average in a fit of its own before pruning."
            )


def mask_averages(trainer: pl.Trainer, masks: Masks) -> bool:
    """Set the pruned weights of every average to zero, in place.

    Args:
        trainer: with its callbacks.
        masks: what is pruned.

    Returns:
        Whether there is any callback that averages.

    Raises:
        ConfigurationError: for a copy of the module that lacks some weights.
    """
    found = False
    for callback in _averaging(trainer):
        found = True
        average = getattr(callback, _ATTRIBUTE)
        if isinstance(average, AveragedModel):
            average = average.module
        if not isinstance(average, nn.Module):
            continue
        # Under all their names: the first one of a tied weight is that of the mask.
        copies = dict(average.named_parameters(remove_duplicate=False))
        missing = [name for name in masks.parameters if name not in copies]
        if missing:
            raise ConfigurationError(
                f"{type(callback).__name__} has copied the module before it was complete: "
                f"its average has no {', '.join(missing[:8])}. Make the layers in "
                "__init__, or leave it out."
            )
        masks.apply_to(copies)
    return found


def _averaging(trainer: pl.Trainer) -> Iterator[pl.Callback]:
    for callback in callbacks_of(trainer):
        for cls in type(callback).__mro__:
            if cls.__name__ in _AVERAGING and "lightning" in cls.__module__:
                yield callback
