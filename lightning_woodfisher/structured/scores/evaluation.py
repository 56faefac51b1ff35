"""Run the model on the samples of a score, shared by the ranks.

Batch i is computed by rank i mod R and gives a few rows. All ranks then put the rows of all
batches into order before anything is added, so that no sum depends on R.
"""

from __future__ import annotations

__all__ = [
    "ComputeLoss",
    "Evaluation",
    "calibration_batches",
    "enough_samples",
]

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_woodfisher.base.errors import ConfigurationError, PruningError
from lightning_woodfisher.data.batches import Batches, TooFewSamplesError
from lightning_woodfisher.data.isolation import depends_on_mode, derive_seed, seeded
from lightning_woodfisher.data.losses import (
    LossSource,
    differentiable_loss,
    map_tensors,
)
from lightning_woodfisher.data.sampled_labels import (
    UnlabeledBatch,
    UnlabeledBatches,
    count_labels,
)
from lightning_woodfisher.distributed.communicator import Communicator
from lightning_woodfisher.gradients.hessian_rows import twice_differentiable
from lightning_woodfisher.structured.config import StructureConfig
from lightning_woodfisher.structured.graph.groups import Group
from lightning_woodfisher.structured.scores.vectors import StructureVectors

#: Runs the model on a batch, and returns its mean loss.
ComputeLoss = Callable[[], Tensor]
# Takes this function, a scale of the loss and the number of labels of the batch; returns
# rows [r, width].
_ComputeRows = Callable[[ComputeLoss, float, int], Tensor]


class Evaluation:
    """Losses of the samples that the scores are computed on.

    Args:
        source: where losses come from.
        groups: groups of structures of the model.
        config: number of samples, batch size and seed.
        comm: the ranks.

    Attributes:
        source: as given.
        config: as given.
        vectors: the vectors θ_s of the structures.
    """

    def __init__(
        self,
        source: LossSource,
        groups: Sequence[Group],
        config: StructureConfig,
        comm: Communicator,
    ) -> None:
        self.source = source
        self.config = config
        self.vectors = StructureVectors(source.model, groups, config.structure)
        self._comm = comm
        self._seed = derive_seed(config.seed, "structures")

    @contextlib.contextmanager
    def session(self) -> Iterator[None]:
        """Prepare the model for :meth:`compute_rows`, and restore it afterwards.

        Yields:
            Nothing.
        """
        model = self.source.model
        _require_statistics(model)
        with self.source.session("eval"), twice_differentiable():
            _require_evaluation_mode(model)
            # BatchNorm statistics differ between ranks in the middle of training.
            self._comm.broadcast(model.buffers())
            # Frozen layers are scored, too; the session restores the flag.
            for parameter in self.vectors.parameters:
                parameter.requires_grad_(True)
            yield

    def probe(self) -> Evaluation:
        """Return the same evaluation on one batch of two samples."""
        probe = copy.copy(self)
        few = min(2, self.config.num_samples)
        probe.config = dataclasses.replace(self.config, num_samples=few, batch_size=few)
        return probe

    @property
    def regroupable(self) -> bool:
        """Whether batches may have another size; those of a stream may not."""
        return calibration_batches(self.source, self.config, self._seed).regroupable

    def compute_rows(
        self,
        compute: _ComputeRows,
        width: int,
        *,
        draw_labels: bool = False,
        batch_size: int | None = None,
    ) -> Tensor:
        """Compute rows for each batch, shared by the ranks.

        Args:
            compute: takes a function that runs the model on the batch and returns its mean
                loss, the scale to multiply the loss by, and the number of labels of the
                batch; returns a float64 tensor ``[r, width]`` that is linear in the scale.
            width: length of a row.
            draw_labels: draw the labels from the predictions of the model.
            batch_size: largest number of samples in a batch, if it is less than that of the
                settings and the data can be grouped anew.

        Returns:
            float64 ``[M, width]`` on the CPU, the rows of all batches in order, equal on
            every rank.
        """
        config = self.config
        batches = calibration_batches(self.source, config, self._seed)
        if batch_size is not None and batches.regroupable:
            size = min(batch_size, config.batch_size)
            config = dataclasses.replace(config, batch_size=size)
            batches = calibration_batches(self.source, config, self._seed)
        if draw_labels:
            batches = UnlabeledBatches(batches, self._seed, self.source.model)
        comm, count = self._comm, config.num_batches
        own = comm.run_together(
            lambda: {
                index: self._rows_of_batch(batches, index, compute)
                for index in range(comm.rank, count, comm.world_size)
            }
        )
        return self._gather(own, count, width)

    def _rows_of_batch(
        self, batches: Batches, index: int, compute: _ComputeRows
    ) -> Tensor:
        with seeded(derive_seed(self._seed, index)):
            batch = batches.fetch(index)

        def loss() -> Tensor:
            # A loss may change its batch in place.
            copy = map_tensors(Tensor.clone, batch)
            value = differentiable_loss(self.source, batches, index, copy)
            _require_evaluation_mode(self.source.model)
            return value

        labels = count_labels(
            batch.batch if isinstance(batch, UnlabeledBatch) else batch
        )
        for scale in self.source.loss_scales():
            with seeded(derive_seed(self._seed, "loss", index)):
                rows = compute(loss, scale, labels) / scale
            if bool(rows.isfinite().all()):
                return rows.cpu()
        raise PruningError(
            f"derivatives of the loss of batch {index} ({batches.describe(index)}) are not "
            "finite"
        )

    @torch.no_grad()
    def _gather(self, own: dict[int, Tensor], count: int, width: int) -> Tensor:
        """Gather the rows of all batches on every rank, in order."""
        comm = self._comm
        found = {index: float(len(rows)) for index, rows in own.items()}
        lengths = [int(length) for length in comm.gather_in_order(found, count)]
        ranks = range(comm.world_size)
        sizes = [width * sum(lengths[rank :: comm.world_size]) for rank in ranks]
        shard = torch.cat([own[i].reshape(-1) for i in sorted(own)] or [torch.empty(0)])
        flat = comm.gather_shards(shard.double().to(comm.device), sizes).cpu()
        # Rank by rank, so batches 0, R, 2R, … come first.
        order = [i for rank in ranks for i in range(rank, count, comm.world_size)]
        rows = torch.split(flat.view(-1, width), [lengths[i] for i in order])
        by_batch = dict(zip(order, rows, strict=True))
        return torch.cat([by_batch[index] for index in range(count)])


def calibration_batches(
    source: LossSource, config: StructureConfig, seed: int
) -> Batches:
    """Choose the samples that a configuration asks for.

    Args:
        source: where they come from.
        config: number of samples and batch size.
        seed: seed of the choice.

    Returns:
        ``config.num_batches`` batches of nearly equal size; a remainder is left out.
    """
    count = config.num_batches
    size = config.num_samples // count
    return source.batches(count, size, seed)


@contextlib.contextmanager
def enough_samples(config: StructureConfig) -> Iterator[None]:
    """Explain in the settings of structured pruning that there are too few samples.

    Args:
        config: these settings.

    Yields:
        Nothing.

    Raises:
        ConfigurationError: in place of an error that names those of the Fisher.
    """
    try:
        yield
    except TooFewSamplesError as error:
        needs, fits = f"num_samples={config.num_samples}", error.available
        if error.unit == "batches":
            needs += f" with batch_size={config.batch_size}"
            fits *= config.batch_size
        raise ConfigurationError(
            f"{needs} is more than the {error.available:,} {error.unit} that the data has; "
            f"lower num_samples to at most {fits}, or give more data."
        ) from error


def _require_evaluation_mode(model: torch.nn.Module) -> None:
    # Other modules compute the same in both modes, or their losses need training mode.
    training = [
        (name, type(module).__name__)
        for name, module in model.named_modules()
        if module.training and depends_on_mode(module)
    ]
    if training:
        name, kind = training[0]
        raise ConfigurationError(
            f"structures must be scored in evaluation mode, but the {kind} {name!r} is in "
            "training mode, where BatchNorm cancels the scale of the channel before it and "
            "dropout changes the loss. If the loss calls train(), let it put these layers "
            "back with eval()."
        )


def _require_statistics(model: torch.nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and module.running_mean is None:
            raise ConfigurationError(
                f"structures cannot be scored because {name!r} keeps no running mean and "
                "variance (track_running_stats=False), so it cancels the scale of the "
                "channel before it even in evaluation mode; create it with "
                "track_running_stats=True and train, or use method='magnitude'."
            )
