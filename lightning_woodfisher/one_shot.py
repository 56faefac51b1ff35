"""One pruning step of a plain PyTorch model, without a Trainer."""

from __future__ import annotations

__all__ = ["prune"]

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn
from torch.utils.data import Dataset

from lightning_woodfisher.base.clock import Progress
from lightning_woodfisher.base.errors import (
    ConfigurationError,
)
from lightning_woodfisher.criteria.obs import Update
from lightning_woodfisher.data.losses import FunctionLoss
from lightning_woodfisher.distributed.communicator import Communicator
from lightning_woodfisher.distributed.dtensor import reshard
from lightning_woodfisher.fisher.config import FisherConfig
from lightning_woodfisher.pruning.config import PruningConfig, check_sparsity
from lightning_woodfisher.pruning.pruner import Pruner
from lightning_woodfisher.pruning.quotas import (
    require_target_fits,
)
from lightning_woodfisher.pruning.report import PruningReport
from lightning_woodfisher.pruning.selection import SelectionConfig
from lightning_woodfisher.pruning.selector import (
    take_zeros,
)
from lightning_woodfisher.pruning.stages import Spacing
from lightning_woodfisher.resources.budget import fit_into_memory, require_one_device
from lightning_woodfisher.weights.layers import prunable_parameters
from lightning_woodfisher.weights.masks import Masks
from lightning_woodfisher.weights.patterns import require_pattern_fits


def prune(
    model: nn.Module,
    data: Dataset[Any] | Iterable[Any],
    loss_fn: Callable[[Any, Any], Tensor],
    *,
    target_sparsity: float | None = None,
    fisher: FisherConfig | None = None,
    selection: SelectionConfig | None = None,
    criterion: str = "woodfisher",
    update: Update = "joint",
    recompute_steps: int = 1,
    measure_loss: bool = True,
    local_model_points: int = 0,
    seed: int = 0,
    step_search: bool = True,
    update_scale: float = 1.0,
    progress: Progress | None = None,
    flops_target: float | None = None,
    recompute_spacing: Spacing = "geometric",
    reuse_gradients: bool = False,
    trust: float | None = None,
    batchnorm_recalibration_batches: int = 0,
) -> PruningReport:
    """Prune a plain PyTorch model in place; no Trainer needed.

    Weights that are exactly zero count as pruned and stay zero. With an initialised
    ``torch.distributed``, call it on every rank with the same model and data: the work and
    the memory are shared. Parameters may be sharded by ``fully_shard`` (FSDP2).

    Args:
        model: the network, changed in place; names and storages stay.
        data: a map-style Dataset of samples, or an iterable of batches in the same order
            on every rank. Of a DataLoader over a map-style Dataset the dataset, the
            samples its sampler may draw and its ``collate_fn`` are used, but neither its
            order nor its ``batch_size``: ``fisher.gradient_batch_size`` is the size.
        loss_fn: ``loss_fn(model, batch)`` returns the mean loss of the batch.
        target_sparsity: share of the selected weights that is zero afterwards, [0, 1).
        fisher: how the Fisher is estimated.
        selection: which weights may go.
        criterion: ``"woodfisher"``; ``"woodtaylor"``, which also follows the gradient of
            the loss, for networks that are not at a minimum; or as a baseline
            ``"kfac"``, ``"diagonal_fisher"``, ``"hessian_diagonal"`` or ``"magnitude"``.
        update: ``"joint"``, ``"independent"`` or ``"none"``.
        recompute_steps: reach the sparsity in this many parts, each with fresh gradients.
        measure_loss: also measure the loss after the step on the same samples.
        local_model_points: compare predicted and measured loss at so many points between
            the weights before and after each part; 0 for none, 5 is a good number.
        seed: of the samples and of anything random in the model.
        step_search: take as much of each update as gives the smallest measured loss, and
            the independent one in place of the joint one where that is better; False
            takes the update as it is.
        update_scale: share of the update that is taken; with the search, at most.
        progress: see :class:`Pruner`.
        flops_target: in place of ``target_sparsity``: prune until the masked network needs
            this share of the FLOPs of the dense one, within 0.5 %.
        recompute_spacing: where the parts end: ``"geometric"`` in the kept share,
            ``"linear"`` or ``"polynomial"``.
        reuse_gradients: all parts use the gradients of the first one, with a new inverse
            on the weights that are left.
        trust: when the loss has risen in a part by more than this multiple of the
            prediction, the parts that follow are half as long, down to an eighth.
        batchnorm_recalibration_batches: re-estimate BatchNorm's running statistics on so
            many batches after the step; 0 leaves them.

    Returns:
        What happened.

    Raises:
        ConfigurationError: for settings that cannot work, before anything is computed.
    """
    if (target_sparsity is None) == (flops_target is None):
        raise ConfigurationError("give either target_sparsity or flops_target.")
    config = PruningConfig(
        fisher=fisher or FisherConfig(),
        selection=selection or SelectionConfig(),
        criterion=criterion,
        update=update,
        recompute_steps=recompute_steps,
        measure_loss=measure_loss,
        local_model_points=local_model_points,
        seed=seed,
        flops_target=flops_target,
        step_search=step_search,
        update_scale=update_scale,
        recompute_spacing=recompute_spacing,
        reuse_gradients=reuse_gradients,
        trust=trust,
        batchnorm_recalibration_batches=batchnorm_recalibration_batches,
    )
    if target_sparsity is not None:
        check_sparsity(target_sparsity)
        require_target_fits(config.selection, target_sparsity)
    reshard(model)
    parameters = prunable_parameters(
        model, config.selection.include, config.selection.exclude
    )
    require_one_device(parameters)
    require_pattern_fits(model, parameters, config.selection.pattern)
    masks = Masks(parameters)
    take_zeros(masks, config.selection)
    comm = Communicator(next(iter(parameters.values())).device)
    config, _ = fit_into_memory(masks, config, comm)
    pruner = Pruner(masks, config, comm, progress)
    source = FunctionLoss(model, data, loss_fn)
    if target_sparsity is not None:
        return pruner.step(source, target_sparsity)
    report = pruner.step(source, 0.0)
    return dataclasses.replace(report, target_sparsity=report.sparsity)
