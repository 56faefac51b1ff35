"""Fit the number of samples of a pruning step to the data that there is."""

from __future__ import annotations

__all__ = ["fit_to_data"]

from dataclasses import replace

from lightning_woodfisher.base.errors import ConfigurationError
from lightning_woodfisher.criteria import CRITERIA
from lightning_woodfisher.data.losses import LossSource
from lightning_woodfisher.fisher.config import fit_samples
from lightning_woodfisher.pruning.config import PruningConfig


def fit_to_data(config: PruningConfig, source: LossSource) -> tuple[PruningConfig, str]:
    """Lower the default N and m where the data has fewer samples.

    A criterion without gradients needs no data: its loss is measured on what there is.

    Args:
        config: settings of the step.
        source: source of losses.

    Returns:
        The settings to use, and a sentence on what was changed, or ``""``.

    Raises:
        ConfigurationError: for data that cannot be sampled, if anything needs it.
    """
    if not config.reads_data:
        return config, ""
    needs_data = CRITERIA[config.criterion].needs != "nothing" or config.counts_flops
    try:
        data = source.peek()
    except ConfigurationError as error:
        if needs_data:
            raise
        return _without_data(config, str(error))
    if data is None or data.available is None:
        return config, ""
    if not data.available and not needs_data:
        return _without_data(config, "the data has no batches")
    old, by_sample = config.fisher, data.regroupable
    new = fit_samples(old, data.available, by_sample=by_sample, keep_set=needs_data)
    if new == old:
        return config, ""
    count, size = new.num_gradients, new.gradient_batch_size
    if by_sample:
        note = (
            f"the data has {data.available:,} samples, so a step uses num_gradients={count} "
            f"and gradient_batch_size={size}, not {old.num_gradients} and "
            f"{old.gradient_batch_size}"
        )
    else:
        note = (
            f"the data has {data.available:,} batches, so a step uses num_gradients={count}, "
            f"not {old.num_gradients}"
        )
    return replace(config, fisher=new), note


def _without_data(config: PruningConfig, reason: str) -> tuple[PruningConfig, str]:
    step = replace(
        config.step,
        measure_loss=False,
        local_model_points=0,
        batchnorm_recalibration_batches=0,
    )
    note = f"the loss is not measured: {reason}" if config.step.measure_loss else ""
    return replace(config, step=step), note
