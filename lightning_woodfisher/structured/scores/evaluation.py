"""What all scores that look at data share: the session, the batches, and the ranks.

Batch i goes to rank i mod R. What it yields is a few rows, which are put into the order of
the batches on every rank before anything is added: so no sum depends on R.
"""

from __future__ import annotations

__all__ = ["Evaluation", "calibration_batches"]

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_map

from lightning_woodfisher.base.errors import ConfigurationError, PruningError
from lightning_woodfisher.data.batches import Batches
from lightning_woodfisher.data.isolation import derive_seed, seeded
from lightning_woodfisher.data.losses import (
    LossSource,
    differentiable_loss,
    lower_loss_scale,
)
from lightning_woodfisher.distributed.communicator import Communicator
from lightning_woodfisher.gradients.hessian_rows import twice_differentiable
from lightning_woodfisher.structured.config import StructureConfig
from lightning_woodfisher.structured.scores.vectors import StructureVectors

# Given the function that makes the loss, and its scale: rows [r, width].
Rows = Callable[[Callable[[], Tensor], float], Tensor]


class Evaluation:
    """Losses of the samples of one estimate.

    Args:
        source: where losses come from.
        vectors: of the structures.
        config: which samples.
        comm: the ranks.
    """

    def __init__(
        self,
        source: LossSource,
        vectors: StructureVectors,
        config: StructureConfig,
        comm: Communicator,
    ) -> None:
        self.source = source
        self.vectors = vectors
        self.count, _ = config.batches
        self.seed = derive_seed(config.seed, "structures")
        self._config = config
        self._comm = comm

    @contextlib.contextmanager
    def session(self) -> Iterator[None]:
        """Enter before anything else; leaves no trace in the model.

        Yields:
            Nothing.
        """
        model = self.source.model
        _require_statistics(model)
        with self.source.session("eval"), twice_differentiable():
            _require_evaluation(model)
            # BatchNorm statistics differ between ranks in the middle of training.
            self._comm.broadcast(model.buffers())
            # A frozen layer has a curvature all the same; the session puts this back.
            for parameter in self.vectors.parameters:
                parameter.requires_grad_(True)
            yield

    def batches(self) -> Batches:
        """Choose the samples: the same in every call.

        Returns:
            The batches.
        """
        return calibration_batches(self.source, self._config, self.seed)

    def rows(self, batches: Batches, compute: Rows, width: int) -> Tensor:
        """Compute some rows for each batch, shared by the ranks.

        Args:
            batches: from :meth:`batches`, perhaps with other labels.
            compute: given a function that runs the model on the batch and returns its
                mean loss, and the scale by which the loss is to be multiplied: a float64
                tensor ``[r, width]`` on the CPU that is linear in the scale.
            width: numbers in a row.

        Returns:
            float64 tensor on the CPU, the rows of all batches in order, equal on every
            rank.
        """
        own: dict[int, Tensor] = {}
        failure: Exception | None = None
        try:
            for index in range(self._comm.rank, self.count, self._comm.world_size):
                own[index] = self._rows(batches, index, compute)
        except Exception as error:
            failure = error
        self._comm.raise_together(failure)
        return self._gather(own, width)

    def _rows(self, batches: Batches, index: int, compute: Rows) -> Tensor:
        scale = self.source.loss_scale
        with seeded(derive_seed(self.seed, index)):
            batch = batches.fetch(index)

        def loss() -> Tensor:
            # A loss may change its batch in place.
            value = differentiable_loss(self.source, batches, index, _copy(batch))
            _require_evaluation(self.source.model)
            return value

        while True:
            with seeded(derive_seed(self.seed, "loss", index)):
                rows = compute(loss, scale) / scale
            if bool(rows.isfinite().all()):
                return rows
            # float16 has overflowed under the scale of the GradScaler.
            lower = lower_loss_scale(scale)
            if lower is None:
                raise PruningError(
                    f"derivatives of the loss of batch {index} "
                    f"({batches.describe(index)}) are not finite"
                )
            scale = lower

    @torch.no_grad()
    def _gather(self, own: dict[int, Tensor], width: int) -> Tensor:
        """Put the rows of all batches into order on every rank."""
        comm = self._comm
        lengths = [
            int(length)
            for length in comm.gather_in_order(
                {index: float(len(rows)) for index, rows in own.items()}, self.count
            )
        ]
        shard = torch.cat([own[i].reshape(-1) for i in sorted(own)] or [torch.empty(0)])
        held = [
            list(range(rank, self.count, comm.world_size))
            for rank in range(comm.world_size)
        ]
        sizes = [width * sum(lengths[i] for i in batches) for batches in held]
        flat = comm.gather_shards(shard.double().to(comm.device), sizes).cpu()
        lengths_there = [lengths[i] for b in held for i in b]
        pieces = torch.split(flat.view(-1, width), lengths_there)
        order = {i: n for n, i in enumerate(i for b in held for i in b)}
        return torch.cat([pieces[order[i]] for i in range(self.count)])


def calibration_batches(
    source: LossSource, config: StructureConfig, seed: int
) -> Batches:
    """Choose the samples that a configuration asks for.

    Args:
        source: where they come from.
        config: how many, and how many at once.
        seed: of the choice.

    Returns:
        The batches.

    Raises:
        ConfigurationError: when there are not as many.
    """
    count, size = config.batches
    try:
        return source.batches(count, size, seed)
    except ConfigurationError as error:
        raise ConfigurationError(
            f"num_samples={config.num_samples} ({count} batches of {size}) cannot be "
            f"had; lower num_samples, or see the reason: {error}"
        ) from error


def _copy(batch: Any) -> Any:
    return tree_map(
        lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, batch
    )


def _require_evaluation(model: torch.nn.Module) -> None:
    training = [name for name, module in model.named_modules() if module.training]
    if training:
        raise ConfigurationError(
            f"structures must be scored in evaluation mode, but {training[0] or 'the model'!r}"
            " is in training mode, where a BatchNorm takes out the scale of the channel "
            "before it; do not call train() in the loss."
        )


def _require_statistics(model: torch.nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and module.running_mean is None:
            raise ConfigurationError(
                f"batch statistics missing: {name!r} keeps no running mean and variance "
                "(track_running_stats=False), so that even in evaluation mode it takes "
                "out the scale of the channel before it and structures cannot be scored; "
                "make it with track_running_stats=True and train, or use "
                "method='magnitude'."
            )
