"""BatchNorm statistics of the pruned network, re-estimated on a few batches.

Batch k is normalised by its own statistics in every layer, as in training; running
statistics become the mean over batches of the mean and the unbiased variance, which is what
training's moving average estimates. Dropout is off, as when the network is used. Rank
k mod R computes batch k, and all ranks add the numbers of all batches in order of k.
"""

from __future__ import annotations

__all__ = [
    "BatchNormStatistics",
    "batchnorm_layers",
    "estimate_statistics",
    "require_recalibration_batches",
]

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_woodfisher.base.errors import PruningError, require_count
from lightning_woodfisher.data.isolation import derive_seed, seeded
from lightning_woodfisher.data.losses import LossSource, loss_value
from lightning_woodfisher.distributed.communicator import Communicator
from lightning_woodfisher.distributed.dtensor import reshard

# Gradients may be those of single samples, which have no variance.
_FEWEST_SAMPLES = 64

_T = TypeVar("_T")


def require_recalibration_batches(count: int) -> None:
    """Check ``batchnorm_recalibration_batches``.

    Args:
        count: number of batches; 0 leaves the statistics as they are.
    """
    require_count("batchnorm_recalibration_batches", count, least=0)


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


@dataclass(frozen=True)
class BatchNormStatistics:
    """Running statistics by layer, as they are or as they should be.

    Attributes:
        layers: mean and unbiased variance, each ``[C]``.
    """

    layers: Mapping[str, tuple[Tensor, Tensor]]

    @classmethod
    def of(cls, model: nn.Module) -> BatchNormStatistics:
        """Copy those of a model.

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
        """Write them into a model, in place.

        Args:
            model: the network.
        """
        layers = batchnorm_layers(model)
        for name, (mean, variance) in self.layers.items():
            _mean(layers[name]).copy_(mean)
            _variance(layers[name]).copy_(variance)


@torch.no_grad()
def estimate_statistics(
    source: LossSource, count: int, size: int, comm: Communicator, seed: int
) -> BatchNormStatistics:
    """Estimate the running statistics at the present weights.

    Samples may repeat where the data has too few.

    Args:
        source: where batches come from, with its session entered.
        count: number of batches.
        size: samples in a batch; at least 64 are taken.
        comm: the ranks.
        seed: of the samples.

    Returns:
        Those of the layers that were used; the same bits on every rank and for any number
        of ranks.

    Raises:
        PruningError: when a statistic is not finite, or a batch has one value a channel.
    """
    model = source.model
    layers = batchnorm_layers(model)
    if not layers:
        return BatchNormStatistics({})
    # Other buffers may differ between ranks in the middle of training.
    comm.broadcast(model.buffers())
    batches = source.batches(count, max(size, _FEWEST_SAMPLES), seed, True)
    model.eval()
    width = sum(2 * _mean(layer).numel() + 1 for layer in layers.values())
    own = torch.zeros(-(-count // comm.world_size), width, device=comm.device)
    for round_, first in enumerate(range(0, count, comm.world_size)):
        # A rank without a batch of its own runs the last one: layers may be sharded.
        index = min(first + comm.rank, count - 1)

        def run(index: int = index) -> dict[str, tuple[Tensor, Tensor]]:
            with seeded(derive_seed(seed, index)), _observed(layers) as seen:
                loss_value(source, batches, index)
            return seen

        seen = _together(comm, run)
        own[round_] = _as_row(layers, seen).to(comm.device)
    reshard(model)
    every = comm.gather_shards(own.reshape(-1), [own.numel()] * comm.world_size)
    rows = every.view(comm.world_size, -1, width).transpose(0, 1).reshape(-1, width)
    total = torch.zeros(width, dtype=torch.float64, device=comm.device)
    for row in rows[:count]:
        total += row
    if not bool(total.isfinite().all()):
        raise PruningError("a BatchNorm statistic of the pruned network is not finite")
    return BatchNormStatistics(dict(_averages(layers, total)))


@contextlib.contextmanager
def _observed(
    layers: Mapping[str, _BatchNorm],
) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Normalise by the statistics of the batch, and note them; the last call counts."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def hook(name: str) -> Callable[..., None]:
        def observe(
            layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> None:
            inputs = args[0] if args else kwargs["input"]
            dimensions = [d for d in range(inputs.dim()) if d != 1]
            values = inputs.numel() // inputs.shape[1]
            if values < 2:
                raise PruningError(
                    f"BatchNorm layer {name} got one value for each channel, which has no "
                    "variance; give larger batches or set "
                    "batchnorm_recalibration_batches=0"
                )
            wide = inputs if inputs.dtype == torch.float64 else inputs.float()
            variance, mean = torch.var_mean(wide, dimensions, correction=1)
            seen[name] = mean, variance
            # In evaluation mode the layer divides by what is there, and no layer of
            # another rank takes part (SyncBatchNorm).
            norm = cast("_BatchNorm", layer)
            _mean(norm).copy_(mean)
            _variance(norm).copy_(variance * ((values - 1) / values))

        return observe

    handles = [
        layer.register_forward_pre_hook(hook(name), with_kwargs=True)
        for name, layer in layers.items()
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _as_row(
    layers: Mapping[str, _BatchNorm], seen: Mapping[str, tuple[Tensor, Tensor]]
) -> Tensor:
    """Line up what was seen in every layer: whether it was, means, variances."""
    pieces = []
    for name, layer in layers.items():
        blank = torch.zeros_like(_mean(layer))
        mean, variance = seen.get(name, (blank, blank))
        pieces += [mean.new_full((1,), float(name in seen)), mean, variance]
    return torch.cat([piece.float() for piece in pieces])


def _averages(
    layers: Mapping[str, _BatchNorm], total: Tensor
) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
    """Undo :func:`_as_row` of a sum over batches; unused layers are left out."""
    start = 0
    for name, layer in layers.items():
        channels = _mean(layer).numel()
        part = total[start : start + 2 * channels + 1]
        start += len(part)
        if float(part[0]):
            averages = part[1:] / part[0]
            yield name, (averages[:channels], averages[channels:])


def _mean(layer: _BatchNorm) -> Tensor:
    return cast("Tensor", layer.running_mean)


def _variance(layer: _BatchNorm) -> Tensor:
    return cast("Tensor", layer.running_var)


def _together(comm: Communicator, compute: Callable[[], _T]) -> _T:
    """Compute on every rank, or fail on every rank."""
    result: _T | None = None
    error: Exception | None = None
    try:
        result = compute()
    except Exception as caught:
        error = caught
    comm.agree(error)
    return cast("_T", result)
