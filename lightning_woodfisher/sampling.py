"""Gradients and losses of one part of a pruning step, whoever holds the parameters."""

from __future__ import annotations

__all__ = ["Sampling"]

import contextlib
from collections.abc import Callable, Iterator

from torch import Tensor

from lightning_woodfisher.active_weights import ActiveWeights
from lightning_woodfisher.clock import PhaseClock, Progress, no_progress
from lightning_woodfisher.criteria import Criterion
from lightning_woodfisher.distributed import Communicator
from lightning_woodfisher.fisher import FisherConfig, rows_in_chunk
from lightning_woodfisher.gradients import (
    Batches,
    LossSource,
    collect_gradients,
    iterate_chunks,
    mean_loss,
)
from lightning_woodfisher.labels import UnlabelledBatches
from lightning_woodfisher.masks import Masks
from lightning_woodfisher.sharded_gradients import (
    collect_sharded_gradients,
    sharded_mean_loss,
)
from lightning_woodfisher.sharding import undisturbed

_SAMPLES_EVALUATED_AT_ONCE = 64


class Sampling:
    """What is asked of the model and the data.

    Args:
        source: where gradients come from.
        masks: with the parameters.
        fisher: how many gradients of how many samples.
        communicator: the ranks.
        clock: counts the seconds.
        progress: shows the collection.
        measure_loss: False makes :meth:`measure` do nothing.
    """

    def __init__(
        self,
        source: LossSource,
        masks: Masks,
        fisher: FisherConfig,
        communicator: Communicator,
        clock: PhaseClock | None = None,
        progress: Progress = no_progress,
        measure_loss: bool = True,
    ) -> None:
        self._source = source
        self._masks = masks
        self._fisher = fisher
        self._comm = communicator
        self._clock = clock or PhaseClock()
        self._progress = progress
        self._measure_loss = measure_loss

    @contextlib.contextmanager
    def session(self) -> Iterator[None]:
        """Enter before anything else; leaves no trace in the model.

        Yields:
            Nothing.
        """
        sharded = self._masks.sharded
        with (
            undisturbed(self._source.model) if sharded else contextlib.nullcontext(),
            self._source.session(self._fisher.model_mode),
        ):
            yield

    def observe(
        self, criterion: Criterion, active: ActiveWeights, seed: int
    ) -> tuple[list[float], str | None]:
        """Feed a criterion with the gradients it wants.

        Args:
            criterion: begun.
            active: whose gradients.
            seed: of the samples.

        Returns:
            The losses before the step (empty when they are not measured), and how
            gradients were computed.
        """
        if not criterion.uses_gradients:
            return self.measure(seed), None
        fisher = self._fisher
        losses: list[float] = []
        notes: list[str] = []
        with (
            self._clock("collect"),
            self._progress("Collecting gradients", fisher.num_gradients) as tick,
        ):
            rows = self.rows(active, seed, losses, tick, notes)
            try:
                for chunk in iterate_chunks(rows, rows_in_chunk(fisher)):
                    with self._clock("accumulate"):
                        criterion.observe(chunk)
            except Exception:
                # The others need this rank until the last exchange.
                for _ in rows:
                    pass
                raise
        # The loss after the step is measured in groups and on the labels of the data, and
        # so must be the one before.
        if self._group(seed) > 1 or fisher.labels == "sampled":
            losses = self.measure(seed)
        return losses, "; ".join(notes)

    def rows(
        self,
        active: ActiveWeights,
        seed: int,
        losses: list[float] | None = None,
        tick: Callable[[int], object] = lambda _: None,
        notes: list[str] | None = None,
    ) -> Iterator[Tensor]:
        """Compute gradients.

        Args:
            active: whose gradients.
            seed: of the samples.
            losses: receives those of the mini-batches at the end.
            tick: called with the number of gradients that have been done.
            notes: receives how gradients were computed.

        Returns:
            This rank's slice of all gradients, in order: tensors ``[n, D_r]``.
        """
        losses = [] if losses is None else losses
        notes = [] if notes is None else notes
        fisher, parameters = self._fisher, self._masks.parameters
        count, size = fisher.num_gradients, fisher.gradient_batch_size
        if self._masks.sharded:
            notes.append("loop: the model is sharded")
            return collect_sharded_gradients(
                self._source,
                count,
                size,
                parameters,
                active.positions,
                self._comm,
                seed,
                losses,
                tick,
                divisible=fisher.model_mode == "eval",
                choose=self._batches_of_gradients,
            )
        return collect_gradients(
            self._source,
            self._batches_of_gradients(count, size, seed),
            parameters,
            active.positions,
            active.partition.shard_sizes(),
            count,
            self._comm,
            seed,
            losses,
            tick,
            collection=fisher.collection,
            row_dtype=fisher.row_dtype,
            note=notes.append,
        )

    def measure(self, seed: int) -> list[float]:
        """Compute the losses of the samples of the gradients, at the present weights.

        Args:
            seed: of the samples.

        Returns:
            Losses of mini-batches or of groups of them; empty when not wanted.
        """
        if not self._measure_loss:
            return []
        fisher, group = self._fisher, self._group(seed)
        count, size = fisher.num_gradients // group, fisher.gradient_batch_size * group
        with self._clock("measure"):
            batches = self._batches(count, size, seed)
            measure = sharded_mean_loss if self._masks.sharded else mean_loss
            return measure(self._source, batches, count, self._comm, seed)

    def _batches(self, count: int, size: int, seed: int) -> Batches:
        return self._source.batches(count, size, seed, self._fisher.repeat_samples)

    def _batches_of_gradients(self, count: int, size: int, seed: int) -> Batches:
        batches = self._batches(count, size, seed)
        if self._fisher.labels == "true":
            return batches
        return UnlabelledBatches(batches, seed, self._source.model)

    def _group(self, seed: int) -> int:
        """How many mini-batches are evaluated as one: small ones are slow one by one."""
        fisher = self._fisher
        count, size = fisher.num_gradients, fisher.gradient_batch_size
        # In training mode BatchNorm makes the loss depend on the size of the batch.
        if (
            fisher.model_mode == "train"
            or not self._batches(count, size, seed).regroupable
        ):
            return 1
        most = max(1, _SAMPLES_EVALUATED_AT_ONCE // size)
        return max(g for g in range(1, most + 1) if count % g == 0)
