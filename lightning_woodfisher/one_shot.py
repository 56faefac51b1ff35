"""One pruning step of a plain PyTorch model, without a Trainer."""

from __future__ import annotations

__all__ = ["prune"]

import dataclasses
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from lightning_woodfisher.base.clock import Progress
from lightning_woodfisher.base.errors import ConfigurationError
from lightning_woodfisher.base.keywords import explain_keywords
from lightning_woodfisher.data.batches import known_length
from lightning_woodfisher.data.losses import FunctionLoss
from lightning_woodfisher.distributed.communicator import Communicator
from lightning_woodfisher.distributed.dtensor import reshard
from lightning_woodfisher.distributed.same_settings import (
    require_same_settings,
    shapes_by_name,
)
from lightning_woodfisher.fisher.config import FisherConfig
from lightning_woodfisher.layerwise.config import LayerwiseConfig
from lightning_woodfisher.pruning.config import (
    PruningConfig,
    SelectionConfig,
    StepConfig,
    check_sparsity,
    require_target_fits,
)
from lightning_woodfisher.pruning.pruner import Pruner
from lightning_woodfisher.pruning.report import PruningReport
from lightning_woodfisher.pruning.sample_counts import fit_to_data
from lightning_woodfisher.pruning.selector import prune_zeros
from lightning_woodfisher.resources.budget import (
    fit_into_memory,
    require_supported_device,
)
from lightning_woodfisher.weights.layers import (
    find_inputs_first,
    prunable_parameters,
)
from lightning_woodfisher.weights.masks import Masks
from lightning_woodfisher.weights.patterns import require_pattern_fits


@explain_keywords()
def prune(
    model: nn.Module,
    data: Dataset[Any] | Iterable[Any],
    loss_fn: Callable[[Any, Any], Tensor],
    *,
    target_sparsity: float | None = None,
    criterion: str = "woodfisher",
    fisher: FisherConfig = FisherConfig(),
    selection: SelectionConfig = SelectionConfig(),
    step: StepConfig = StepConfig(),
    layerwise: LayerwiseConfig = LayerwiseConfig(),
    flops_target: float | None = None,
    progress: Progress | None = None,
) -> PruningReport:
    """Prune a plain PyTorch model in place, without a Trainer.

    Weights that are exactly zero count as pruned and stay zero. With an initialized
    ``torch.distributed``, call it on every rank with the same model and data: work and
    memory are shared. Parameters may be sharded by ``fully_shard`` (FSDP2).

    Args:
        model: the network, changed in place; names and storages stay the same.
        data: a map-style Dataset of samples, a tensor or a tuple of tensors ``(inputs,
            labels)``, a list of samples whose labels are numbers, or an iterable of batches
            in the same order on every rank. From a DataLoader over a map-style Dataset, the
            dataset, the samples that its sampler may draw and its ``collate_fn`` are used,
            but neither its order nor its ``batch_size``; the batch size is
            ``fisher.gradient_batch_size``.
        loss_fn: ``loss_fn(model, batch)`` returns the mean loss of the batch.
        target_sparsity: share of the selected weights that is zero afterwards, in [0, 1).
        criterion: saliency of a weight; see :class:`~.WoodFisherPruningCallback`.
        fisher: how the Fisher is estimated.
        selection: which weights may be pruned.
        step: weight update, stages and measurements.
        layerwise: settings of ``criterion="layerwise"``.
        flops_target: in place of ``target_sparsity``: prune until the masked network needs
            this share of the FLOPs of the dense one, within 0.5 %.
        progress: called with a title and a total; returns a context manager that yields a
            function, which is called with the number of finished items.

    Returns:
        The report of the step.

    Raises:
        ConfigurationError: for settings that cannot work, before anything is computed.
    """
    if (target_sparsity is None) == (flops_target is None):
        raise ConfigurationError("give either target_sparsity or flops_target.")
    config = PruningConfig(criterion, fisher, selection, step, flops_target, layerwise)
    comm = Communicator(next(model.parameters(), torch.empty(0)).device)
    settings = {
        "target_sparsity": target_sparsity,
        **vars(config),
        "length of the data": known_length(data),
        **shapes_by_name(model),
    }
    require_same_settings(settings, comm)
    if target_sparsity is not None:
        check_sparsity(target_sparsity)
        require_target_fits(config.selection, target_sparsity)
    reshard(model)
    parameters = prunable_parameters(
        model,
        config.selection.include,
        config.selection.exclude,
        config.selection.only,
    )
    require_supported_device(model, parameters)
    require_pattern_fits(model, parameters, config.selection.pattern)
    masks = Masks(parameters, find_inputs_first(model, list(parameters)))
    prune_zeros(masks, config.selection)
    source = FunctionLoss(model, data, loss_fn)
    config, note = fit_to_data(config, source)
    if note and comm.rank == 0:
        warnings.warn(note, stacklevel=3)
    config, _ = fit_into_memory(masks, config, comm)
    pruner = Pruner(masks, config, comm, progress)
    if target_sparsity is not None:
        return pruner.step(source, target_sparsity)
    report = pruner.step(source, 0.0)
    return dataclasses.replace(report, target_sparsity=report.sparsity)
