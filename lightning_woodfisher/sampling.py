"""Gradients and losses of one part of a pruning step, whoever holds the parameters."""

from __future__ import annotations

__all__ = ["Sampling"]

import contextlib
from collections.abc import Callable, Iterator

from torch import Tensor

from lightning_woodfisher.active_weights import ActiveWeights
from lightning_woodfisher.clock import PhaseClock, Progress, no_progress
from lightning_woodfisher.criteria import Criterion
from lightning_woodfisher.curvature import hutchinson, twice_differentiable
from lightning_woodfisher.distributed import Communicator
from lightning_woodfisher.errors import ConfigurationError
from lightning_woodfisher.factors import KroneckerFactors, collect_factors
from lightning_woodfisher.fisher import (
    FisherConfig,
    mini_batches_in_group,
    rows_in_chunk,
)
from lightning_woodfisher.gradients import (
    LossSource,
    collect_gradients,
    iterate_chunks,
    mean_loss,
)
from lightning_woodfisher.masks import Masks
from lightning_woodfisher.sharded_gradients import (
    collect_sharded_gradients,
    sharded_mean_loss,
)
from lightning_woodfisher.sharding import undisturbed


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
        """Feed a criterion with what it needs.

        Args:
            criterion: begun.
            active: the weights that it is about.
            seed: of the samples.

        Returns:
            The losses before the step (empty when they are not measured), and how
            gradients were computed.
        """
        if criterion.needs == "nothing":
            return self.measure(seed), None
        if criterion.needs == "factors":
            losses: list[float] = []
            criterion.observe_factors(self.factors(active, seed, losses))
            # They are of the same groups as the losses after the step.
            return losses if self._measure_loss else [], "factors of layers"
        fisher, curved = self._fisher, criterion.needs == "curvature rows"
        losses = []
        notes: list[str] = []
        what = "Hessian products" if curved else "gradients"
        with (
            self._clock("collect"),
            self._progress(f"Collecting {what}", fisher.num_gradients) as tick,
        ):
            rows = self.rows(active, seed, losses, tick, notes, curved)
            try:
                for chunk in iterate_chunks(rows, rows_in_chunk(fisher)):
                    with self._clock("accumulate"):
                        criterion.observe(chunk)
            except Exception:
                # The others need this rank until the last exchange.
                for _ in rows:
                    pass
                raise
        # The loss after the step is measured in groups, and so must be the one before.
        if self._group(seed) > 1:
            losses = self.measure(seed)
        return losses, "; ".join(notes)

    def rows(
        self,
        active: ActiveWeights,
        seed: int,
        losses: list[float] | None = None,
        tick: Callable[[int], object] = lambda _: None,
        notes: list[str] | None = None,
        curved: bool = False,
    ) -> Iterator[Tensor]:
        """Compute gradients, or Hessian products.

        Args:
            active: whose gradients.
            seed: of the samples.
            losses: receives those of the mini-batches at the end.
            tick: called with the number of gradients that have been done.
            notes: receives how gradients were computed.
            curved: rows are z∘Hz (:mod:`.curvature`).

        Returns:
            This rank's slice of all gradients, in order: tensors ``[n, D_r]``.
        """
        losses = [] if losses is None else losses
        notes = [] if notes is None else notes
        fisher, parameters = self._fisher, self._masks.parameters
        count, size = fisher.num_gradients, fisher.gradient_batch_size
        if self._masks.sharded:
            if curved:
                self._require_whole_parameters("hessian_diagonal")
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
            )
        rows = collect_gradients(
            self._source,
            self._source.batches(count, size, seed),
            parameters,
            active.positions,
            active.partition.shard_sizes(),
            count,
            self._comm,
            seed,
            losses,
            tick,
            collection="loop" if curved else fisher.collection,
            row_dtype=fisher.row_dtype,
            note=(lambda _: notes.append("loop: Hessian products"))
            if curved
            else notes.append,
            derivative=hutchinson(parameters, active.positions, seed)
            if curved
            else None,
        )
        return _in_context(twice_differentiable, rows) if curved else rows

    def factors(
        self,
        active: ActiveWeights,
        seed: int,
        losses: list[float] | None = None,
    ) -> list[KroneckerFactors]:
        """Compute the Kronecker factors of whole layers.

        Args:
            active: the weights; their partition has one block for each tensor.
            seed: of the samples.
            losses: receives those of groups of mini-batches, as of :meth:`measure`.

        Returns:
            The factors of this rank's layers, in order.
        """
        self._require_whole_parameters("kfac")
        fisher, group = self._fisher, self._group(seed)
        count, size = fisher.num_gradients // group, fisher.gradient_batch_size * group
        with (
            self._clock("collect"),
            self._progress("Collecting factors", count) as tick,
        ):
            return collect_factors(
                self._source,
                self._source.batches(count, size, seed),
                self._masks.parameters,
                active.positions,
                active.partition,
                count,
                self._comm,
                seed,
                [] if losses is None else losses,
                tick,
            )

    def rehearse(self, criterion: Criterion, seed: int) -> None:
        """Compute what a criterion needs, and drop it.

        Args:
            criterion: not begun.
            seed: of the samples.
        """
        if criterion.needs == "nothing":
            self.measure(seed)
            return
        active = ActiveWeights(self._masks, criterion.layout, self._comm)
        if criterion.needs == "factors":
            self.factors(active, seed)
            return
        for _ in self.rows(active, seed, curved=criterion.needs == "curvature rows"):
            pass

    def _require_whole_parameters(self, criterion: str) -> None:
        if self._masks.sharded:
            raise ConfigurationError(
                f"criterion={criterion!r} needs whole parameters on every rank, but these "
                "are sharded (fully_shard, FSDP2); use DDP, or criterion='woodfisher' or "
                "'diagonal_fisher'."
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
            batches = self._source.batches(count, size, seed)
            measure = sharded_mean_loss if self._masks.sharded else mean_loss
            return measure(self._source, batches, count, self._comm, seed)

    def _group(self, seed: int) -> int:
        """How many mini-batches are evaluated as one."""
        fisher = self._fisher
        count, size = fisher.num_gradients, fisher.gradient_batch_size
        if not self._source.batches(count, size, seed).regroupable:
            return 1
        return mini_batches_in_group(fisher)


def _in_context(
    context: Callable[[], contextlib.AbstractContextManager[None]],
    rows: Iterator[Tensor],
) -> Iterator[Tensor]:
    """Compute each row inside a context, but use it outside."""
    while True:
        with context():
            try:
                row = next(rows)
            except StopIteration:
                return
        yield row
