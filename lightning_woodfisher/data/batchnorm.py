"""Estimate BatchNorm statistics of the pruned network on a few batches.

Every layer normalizes batch k by the statistics of that batch, as in training. The running
statistics become the mean over batches of the mean and of the unbiased variance; the moving
average of training estimates the same. Dropout is off, as in evaluation. Rank k mod R
computes batch k, and all ranks add the numbers of all batches in order of k.
"""

from __future__ import annotations

__all__ = [
    "BatchNormStatistics",
    "batchnorm_layers",
    "estimate_statistics",
    "frozen_layers",
]

import contextlib
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from lightning_woodfisher.base.errors import PruningError
from lightning_woodfisher.base.full_float32 import at_least_float32
from lightning_woodfisher.data.batches import Batches
from lightning_woodfisher.data.losses import LossSource, compute_loss
from lightning_woodfisher.distributed.communicator import Communicator
from lightning_woodfisher.distributed.dtensor import reshard

# Gradients may be those of single samples, which have no variance.
_FEWEST_SAMPLES = 64


def batchnorm_layers(model: nn.Module) -> dict[str, _BatchNorm]:
    """Find the layers that keep running statistics.

    Args:
        model: the network.

    Returns:
        Layers by name.
    """
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    }


def frozen_layers(model: nn.Module) -> frozenset[str]:
    """Find the layers that keep their statistics while the rest of the model trains.

    Args:
        model: the network; in evaluation mode no layer is frozen.

    Returns:
        Names of the layers in evaluation mode.
    """
    if not model.training:
        return frozenset()
    layers = batchnorm_layers(model).items()
    return frozenset(name for name, layer in layers if not layer.training)


@dataclass(frozen=True)
class BatchNormStatistics:
    """Running statistics by layer.

    Attributes:
        layers: mean and unbiased variance, each ``[C]``.
    """

    layers: Mapping[str, tuple[Tensor, Tensor]]

    @classmethod
    def of(cls, model: nn.Module) -> BatchNormStatistics:
        """Copy the statistics of a model.

        Args:
            model: the network.

        Returns:
            The copies.
        """
        return cls(
            {
                name: (_mean(layer).clone(), _variance(layer).clone())
                for name, layer in batchnorm_layers(model).items()
            }
        )

    @torch.no_grad()
    def write(self, model: nn.Module) -> None:
        """Write the statistics into a model, in place.

        Args:
            model: the network.
        """
        layers = batchnorm_layers(model)
        for name, (mean, variance) in self.layers.items():
            _mean(layers[name]).copy_(mean)
            _variance(layers[name]).copy_(variance)


@torch.no_grad()
def estimate_statistics(
    source: LossSource,
    count: int,
    size: int,
    comm: Communicator,
    seed: int,
    *,
    batches: Batches | None = None,
    frozen: Container[str] = (),
) -> BatchNormStatistics:
    """Estimate the running statistics at the current weights.

    Samples may repeat if the data has too few. Layers that get one value for each channel,
    which has no variance, keep their statistics.

    Args:
        source: source of losses, inside its session.
        count: number of batches.
        size: samples in a batch; at least 64 are taken.
        comm: the ranks.
        seed: seed of the samples.
        batches: at least ``count`` batches; None draws new ones.
        frozen: names of layers that keep their statistics.

    Returns:
        The statistics of the layers that were used; bit-identical on every rank and for
        any number of ranks.

    Raises:
        PruningError: if a statistic is not finite.
    """
    model = source.model
    layers = {n: x for n, x in batchnorm_layers(model).items() if n not in frozen}
    if not layers:
        return BatchNormStatistics({})
    # Other buffers may differ between ranks in the middle of training.
    comm.broadcast(model.buffers())
    if batches is None:
        batches = source.batches(count, max(size, _FEWEST_SAMPLES), seed, True)
    training = model.training
    for module in model.modules():
        # Some networks return a loss in training mode only.
        if not training or isinstance(module, _BatchNorm | _DropoutNd):
            module.eval()
    # Of each layer: whether it was used, its means and its variances.
    widths = [1 + 2 * _mean(layer).numel() for layer in layers.values()]
    own = torch.zeros(-(-count // comm.world_size), sum(widths), device=comm.device)
    for round_, first in enumerate(range(0, count, comm.world_size)):
        # A rank without a batch of its own runs the last one: layers may be sharded.
        index = min(first + comm.rank, count - 1)
        records = dict(zip(layers, torch.split(own[round_], widths), strict=True))
        with _batch_statistics(layers, records):
            compute_loss(source, batches, index, comm, seed)
    reshard(model)
    every = comm.gather_shards(own.reshape(-1), [own.numel()] * comm.world_size)
    rows = every.view(comm.world_size, *own.shape).transpose(0, 1).flatten(0, 1)
    total = torch.zeros(sum(widths), dtype=torch.float64, device=comm.device)
    for row in rows[:count]:
        total += row
    if not bool(total.isfinite().all()):
        raise PruningError("a BatchNorm statistic of the pruned network is not finite")
    statistics = {}
    for name, record in zip(layers, torch.split(total, widths), strict=True):
        if float(record[0]):
            mean, variance = (record[1:] / record[0]).chunk(2)
            statistics[name] = mean, variance
    return BatchNormStatistics(statistics)


@contextlib.contextmanager
def _batch_statistics(
    layers: Mapping[str, _BatchNorm], records: Mapping[str, Tensor]
) -> Iterator[None]:
    """Normalize by the statistics of the batch, and record those of the last call."""

    def hook(name: str) -> Callable[..., None]:
        def observe(
            layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> None:
            inputs = args[0] if args else kwargs["input"]
            values = inputs.numel() // inputs.shape[1]
            if values < 2:
                return
            norm = cast("_BatchNorm", layer)
            mean, variance = _moments(inputs)
            records[name].copy_(torch.cat([mean.new_ones(1), mean, variance]))
            # In evaluation mode the layer divides by its running statistics, and does not
            # communicate with other ranks (SyncBatchNorm).
            _mean(norm).copy_(mean)
            _variance(norm).copy_(variance * ((values - 1) / values))

        return observe

    handles = [
        layer.register_forward_pre_hook(hook(name), with_kwargs=True)
        for name, layer in layers.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _moments(inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and unbiased variance of each channel."""
    wide = at_least_float32(inputs)
    mean, variance = wide.new_zeros(2, wide.shape[1])
    # Running statistics with momentum 1; a few times faster than torch.var_mean on a CPU.
    F.batch_norm(wide, mean, variance, training=True, momentum=1.0)
    return mean, variance


def _mean(layer: _BatchNorm) -> Tensor:
    return cast("Tensor", layer.running_mean)


def _variance(layer: _BatchNorm) -> Tensor:
    return cast("Tensor", layer.running_var)
