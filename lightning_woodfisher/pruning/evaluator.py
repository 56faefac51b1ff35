"""Run the model on the data in a pruning step: gradients, losses, FLOPs, statistics."""

from __future__ import annotations

__all__ = ["CollectionRecord", "Evaluator", "SearchPart"]

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from lightning_woodfisher.base.clock import PhaseClock, Progress, no_progress
from lightning_woodfisher.base.errors import ConfigurationError
from lightning_woodfisher.criteria import Criterion
from lightning_woodfisher.data.batches import Batches, CachedBatches
from lightning_woodfisher.data.batchnorm import (
    BatchNormStatistics,
    batchnorm_layers,
    estimate_statistics,
    frozen_layers,
)
from lightning_woodfisher.data.isolation import derive_seed
from lightning_woodfisher.data.losses import LossSource, compute_losses
from lightning_woodfisher.data.sampled_labels import UnlabeledBatches
from lightning_woodfisher.distributed.communicator import Communicator
from lightning_woodfisher.fisher.config import (
    FisherConfig,
    first_order_batches,
    mini_batches_in_group,
    rows_in_chunk,
)
from lightning_woodfisher.gradients.collect import collect_gradients, iterate_chunks
from lightning_woodfisher.gradients.hessian_rows import (
    make_hessian_derivative,
    twice_differentiable,
)
from lightning_woodfisher.gradients.kronecker_factors import (
    KroneckerFactors,
    collect_factors,
)
from lightning_woodfisher.gradients.nonfinite import SkippedGradients
from lightning_woodfisher.gradients.sharded import collect_sharded_gradients
from lightning_woodfisher.gradients.task import GradientTask
from lightning_woodfisher.pruning.flops import LayerFlops, count_flops
from lightning_woodfisher.pruning.line_search import screening_batches
from lightning_woodfisher.weights.active import ActiveWeights
from lightning_woodfisher.weights.masks import Masks
from lightning_woodfisher.weights.patterns import Pattern

_ROWS_ADDED_AT_ONCE = 8
# Rounding of the loss of a batch of another size.
_SAME_LOSS = 1e-3
# Samples are kept in memory up to this size, because losses on them are measured several
# times: before the step, for every trial of the line search and after the step.
_BYTES_OF_SAMPLES_KEPT = 2**28

SearchPart = Literal["all", "first", "rest"]


@dataclass
class CollectionRecord:
    """Losses, notes and progress of one collection of gradients."""

    losses: list[float] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    tick: Callable[[int], object] = lambda _: None


class Evaluator:
    """Evaluate the model on the data, with whole or with sharded parameters.

    Args:
        source: source of losses and gradients.
        masks: masks with the parameters.
        fisher: number and size of the mini-batches.
        communicator: the ranks.
        clock: measures the seconds of each phase.
        progress: shows the progress of the collection.
        measure_loss: whether :meth:`measure` measures losses.
        search_samples: largest number of samples on which losses are measured, rounded
            down to whole mini-batches, but at least one mini-batch.
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
        search_samples: int | None = None,
    ) -> None:
        self._source = source
        self._masks = masks
        self._fisher = fisher
        self._comm = communicator
        self.clock = clock or PhaseClock()
        self._progress = progress
        self._measure_loss = measure_loss
        self._search_samples = search_samples
        # The batches read last, by number, size and seed.
        self._kept: tuple[tuple[int, int, int], Batches] | None = None
        self._regroupable: bool | None = None
        # Tensors whose weights had no gradient but zero in the last collection.
        self.without_gradient: list[str] = []
        self._frozen: frozenset[str] = frozenset()
        self._seed = 0
        # Gradients that were left out, by seed, N and m.
        self._skipped: dict[tuple[int, int, int], SkippedGradients] = {}

    @property
    def nonfinite(self) -> int:
        """Number of gradients that were not finite and left out so far."""
        return sum(len(skipped.indices) for skipped in self._skipped.values())

    @contextlib.contextmanager
    def session(self) -> Iterator[None]:
        """Isolate the model; enter before any other method.

        Yields:
            Nothing.
        """
        self._frozen = frozen_layers(self._source.model)
        with self._source.session(self._fisher.model_mode):
            # BatchNorm statistics differ between ranks in the middle of training.
            self._comm.broadcast(self._source.model.buffers())
            yield

    def observe(
        self, criterion: Criterion, active: ActiveWeights, seed: int
    ) -> tuple[list[float], str | None]:
        """Compute what a criterion needs, and pass it to the criterion.

        Args:
            criterion: criterion after :meth:`~.Criterion.begin`.
            active: the active weights.
            seed: seed of the samples.

        Returns:
            The losses before the step (empty if they are not measured), and how gradients
            were computed.
        """
        self._seed = seed
        if criterion.needs == "nothing":
            return self.measure(seed), None
        if criterion.needs == "factors":
            losses: list[float] = []
            criterion.observe_factors(self.factors(active, seed, losses))
            if self._fisher.sample_labels:
                losses = self.measure(seed)
            # Of the same groups as the losses after the step.
            losses = losses[: self._groups_measured(seed)[0]]
            return losses if self._measure_loss else [], "factors of layers"
        fisher, hessian = self._fisher, criterion.needs == "hessian rows"
        found = CollectionRecord()
        what = "Hessian products" if hessian else "gradients"
        with (
            self.clock("collect"),
            self._progress(f"Collecting {what}", fisher.num_gradients) as tick,
        ):
            found.tick = tick
            rows = self.rows(active, seed, found, hessian=hessian)
            size = rows_in_chunk(fisher, active.partition.size)
            pieces = active.columns_by_layer()
            idle = [*pieces]

            def take(chunk: Tensor) -> None:
                # Most tensors have a gradient in the first row.
                for part in (chunk[:1], chunk[1:]):
                    idle[:] = _find_zeros(part, idle)
                criterion.observe(chunk)

            self._feed(rows, size, take)
            seen = [layer for layer, columns in pieces if (layer, columns) not in idle]
            self.without_gradient = self._find_without_gradient(seen)
            left_out = self._left_out(
                seed, fisher.num_gradients, fisher.gradient_batch_size
            )
            if left_out:
                criterion.leave_out(len(left_out))
            self._observe_first_order(criterion, active, seed)
        note = "; ".join(found.notes)
        return self._known_losses(found.losses, seed) or self.measure(seed), note

    def _find_without_gradient(self, seen: Sequence[int]) -> list[str]:
        """Return the tensors that are still dense and that no rank has ``seen``.

        A tensor that was pruned before has had gradients; its layer may be dead by now.
        """
        names, zeros = list(self._masks.parameters), self._masks.zeros()
        flags = [float(layer in seen) for layer in range(len(names))]
        of_ranks = zip(*self._comm.gather_numbers(flags), strict=True)
        return [
            name
            for name, found in zip(names, of_ranks, strict=True)
            if not any(found) and not zeros[name]
        ]

    def _known_losses(self, losses: list[float], seed: int) -> list[float]:
        """Return the losses before the step from the collection of gradients.

        They must be means over the samples, and on the labels, of the losses after it.

        Args:
            losses: of the gradients, in order; stored rows have none.
            seed: seed of the samples.

        Returns:
            The losses of some gradients; empty if they must be measured.
        """
        count, _, group = self._groups_measured(seed)
        if self._fisher.sample_labels or not losses:
            return []
        if group > 1 and not (
            self._measure_loss and self._is_mean(losses[:group], seed)
        ):
            return []
        return losses[: count * group]

    def _is_mean(self, losses: list[float], seed: int) -> bool:
        """Return whether the loss of the first group is the mean of its mini-batches'.

        Class weights and masks divide by something of the whole batch.
        """
        count, size = self._groups(seed)
        batches = self._batches(count, size, seed)
        (loss,) = compute_losses(
            self._source, batches, [0], self._comm, seed, finite=False
        )
        mean = math.fsum(losses) / len(losses)
        return math.isclose(loss, mean, rel_tol=_SAME_LOSS)

    def rows(
        self,
        active: ActiveWeights,
        seed: int,
        record: CollectionRecord | None = None,
        fisher: FisherConfig | None = None,
        hessian: bool = False,
    ) -> Iterator[Tensor]:
        """Compute gradients, or Hessian products.

        Args:
            active: the active weights.
            seed: seed of the samples.
            record: receives losses and notes, and shows the progress.
            fisher: number and size of the mini-batches, if not those of the settings.
            hessian: compute rows z∘Hz (:mod:`~.gradients.hessian_rows`).

        Returns:
            This rank's columns of all rows, in order: tensors ``[n, D_r]``.
        """
        record = record or CollectionRecord()
        if fisher is None and not hessian:
            stored = self._stored_rows(active, seed, record)
            if stored is not None:
                return stored
        # Other samples than those of the settings are read only once.
        choose = functools.partial(self._batches_of_gradients, again=fisher is None)
        fisher, parameters = fisher or self._fisher, self._masks.parameters
        count, size = fisher.num_gradients, fisher.gradient_batch_size
        skipped = SkippedGradients(fisher.max_nonfinite, self._comm)
        self._skipped[seed, count, size] = skipped
        task = GradientTask(
            self._source,
            parameters,
            active.positions,
            count,
            seed,
            self._comm,
            record.losses,
            record.tick,
        )
        if self._masks.sharded:
            if fisher.max_nonfinite:
                setting = f"fisher.max_nonfinite={fisher.max_nonfinite}"
                self.require_whole_parameters(setting, "set it to 0")
            if hessian:
                self.require_whole_parameters("criterion='hessian_diagonal'")
            record.notes.append("loop: the model is sharded")
            divisible = fisher.model_mode == "eval"
            return collect_sharded_gradients(
                task, size, divisible=divisible, choose=choose
            )
        derivative = None
        if hessian:
            derivative = make_hessian_derivative(parameters, active.positions, seed)
        rows = collect_gradients(
            task,
            choose(count, size, seed),
            active.partition.shard_sizes(),
            collection=fisher.collection,
            row_dtype=fisher.row_dtype,
            note=record.notes.append,
            derivative=derivative,
            skipped=skipped,
        )
        return _in_context(twice_differentiable, rows) if hessian else rows

    def _stored_rows(
        self,
        active: ActiveWeights,
        seed: int,
        record: CollectionRecord,
    ) -> Iterator[Tensor] | None:
        """Return gradients that a subclass has stored, or None to compute them."""
        return None

    def factors(
        self,
        active: ActiveWeights,
        seed: int,
        losses: list[float] | None = None,
    ) -> list[KroneckerFactors]:
        """Compute the Kronecker factors of whole layers.

        Args:
            active: the active weights, with one block for each tensor.
            seed: seed of the samples.
            losses: receives the losses of groups of mini-batches, as :meth:`measure`
                returns them.

        Returns:
            The factors of this rank's layers, in order.
        """
        self.require_whole_parameters("criterion='kfac'")
        count, size = self._groups(seed)
        with (
            self.clock("collect"),
            self._progress("Collecting factors", count) as tick,
        ):
            task = GradientTask(
                self._source,
                self._masks.parameters,
                active.positions,
                count,
                seed,
                self._comm,
                [] if losses is None else losses,
                tick,
            )
            batches = self._batches_of_gradients(count, size, seed)
            return collect_factors(task, batches, active.partition)

    def calibration(
        self, seed: int, labels_of_data: bool = True
    ) -> tuple[Batches, int]:
        """Return the samples of the gradients in groups, to run the network on.

        Args:
            seed: seed of the samples.
            labels_of_data: whether the labels are those of the data, whatever
                ``sample_labels`` says.

        Returns:
            The batches and their number.
        """
        count, size = self._groups(seed)
        choose = self._batches if labels_of_data else self._batches_of_gradients
        return choose(count, size, seed), count

    def rehearse(self, criterion: Criterion, seed: int, pattern: Pattern) -> None:
        """Compute what a criterion needs, and discard it.

        Args:
            criterion: a new criterion.
            seed: seed of the samples.
            pattern: pattern of the selection.
        """
        if criterion.needs == "nothing":
            self.measure(seed)
            return
        # Raises if the data has too few samples for it.
        self._first_order(criterion, seed)
        active = ActiveWeights(self._masks, criterion.layout, self._comm, pattern)
        if criterion.needs == "factors":
            self.factors(active, seed)
            return
        for _ in self.rows(active, seed, hessian=criterion.needs == "hessian rows"):
            pass

    def require_whole_parameters(
        self,
        setting: str,
        remedy: str = "use DDP, or criterion='woodfisher' or 'diagonal_fisher'",
    ) -> None:
        """Refuse sharded parameters.

        Args:
            setting: the setting that needs whole ones.
            remedy: what to do.

        Raises:
            ConfigurationError: if the parameters are sharded.
        """
        if self._masks.sharded:
            raise ConfigurationError(
                f"{setting} needs whole parameters on every rank, but these are sharded "
                f"(fully_shard, FSDP2); {remedy}."
            )

    def count_flops(self, seed: int) -> LayerFlops:
        """Count the FLOPs of the first mini-batch.

        Args:
            seed: seed of the samples.

        Returns:
            The counts of rank 0, on all ranks.
        """
        fisher = self._fisher
        batches = self._fresh_batches(
            fisher.num_gradients, fisher.gradient_batch_size, seed
        )
        return count_flops(self._source, batches, self._masks, self._comm, seed)

    def batchnorm_statistics(self, count: int, seed: int) -> BatchNormStatistics:
        """Estimate the running statistics of BatchNorm layers at the present weights.

        Batches of samples are new; those of other data are those of the last gradients.

        Args:
            count: number of batches; 0 estimates nothing.
            seed: seed of the samples.

        Returns:
            Statistics of the layers that were used, the same on all ranks.
        """
        if not count:
            return BatchNormStatistics({})
        number, size = self._fisher.num_gradients, self._fisher.gradient_batch_size
        batches: Batches | None = None
        if batchnorm_layers(self._source.model) and not self._are_regroupable(
            self._seed
        ):
            batches, seed = self._batches(number, size, self._seed), self._seed
            count = min(count, number)
        with self.clock("recalibrate"):
            return estimate_statistics(
                self._source,
                count,
                size,
                self._comm,
                seed,
                batches=batches,
                frozen=self._frozen,
            )

    def measure(self, seed: int) -> list[float]:
        """Measure the losses on samples of the gradients, at the present weights.

        Args:
            seed: seed of the samples.

        Returns:
            Losses of mini-batches or of groups of them; empty if they are not measured.
        """
        if not self._measure_loss:
            return []
        with self.clock("measure"):
            return self._losses(seed)

    def screens(self, seed: int) -> bool:
        """Return whether there are more samples than the first ones of a trial."""
        count, size, _ = self._groups_measured(seed)
        return count > screening_batches(size)

    def measure_trial(self, seed: int, part: SearchPart = "all") -> list[float]:
        """Measure the losses on the same samples at trial weights.

        Not on those of ``first_order_samples``: on these, a step along their own mean
        gradient would look better than it is.

        Args:
            seed: seed of the samples.
            part: the samples: ``"all"``, the ``"first"`` 256 (in whole batches), or the
                ``"rest"``, of which there may be none.

        Returns:
            Losses, which may be infinite or NaN.
        """
        return self._losses(seed, part, finite=False)

    def _losses(
        self, seed: int, part: SearchPart = "all", finite: bool = True
    ) -> list[float]:
        most, size, group = self._groups_measured(seed)
        count = self._fisher.num_gradients // group
        left_out = self._left_out(seed, count, size)
        measured = [i for i in range(count) if i not in left_out][:most]
        first = screening_batches(size)
        parts = {"all": measured, "first": measured[:first], "rest": measured[first:]}
        return compute_losses(
            self._source,
            self._batches(count, size, seed),
            parts[part],
            self._comm,
            seed,
            finite=finite,
        )

    def _left_out(self, seed: int, count: int, size: int) -> list[int]:
        """Return the indices of the mini-batches whose gradients were left out."""
        skipped = self._skipped.get((seed, count, size))
        return [] if skipped is None else skipped.indices

    def _observe_first_order(
        self, criterion: Criterion, active: ActiveWeights, seed: int
    ) -> None:
        """Pass the gradients of ``first_order_samples`` to a criterion that uses them."""
        sample = self._first_order(criterion, seed)
        if sample is None:
            return
        seed, count, size = sample
        fisher = dataclasses.replace(
            self._fisher,
            num_gradients=count,
            max_nonfinite=min(self._fisher.max_nonfinite, count - 1),
            gradient_batch_size=size,
            row_dtype="float32",
        )
        rows = self.rows(active, seed, fisher=fisher)
        self._feed(rows, _ROWS_ADDED_AT_ONCE, criterion.observe_first_order)

    def _feed(
        self, rows: Iterator[Tensor], size: int, take: Callable[[Tensor], None]
    ) -> None:
        """Pass all rows on in chunks that do not depend on the number of ranks."""
        try:
            for chunk in iterate_chunks(rows, size):
                with self.clock("accumulate"):
                    take(chunk)
        except Exception:
            # The other ranks need this one until the last exchange.
            for _ in rows:
                pass
            raise

    def _first_order(
        self, criterion: Criterion, seed: int
    ) -> tuple[int, int, int] | None:
        """Return seed, number and size of the mini-batches of the first-order sample."""
        fisher = self._fisher
        samples = fisher.first_order_samples
        if samples is None or not criterion.first_order:
            return None
        count, size = first_order_batches(fisher)
        seed = derive_seed(seed, "first order")
        name = f"fisher.first_order_samples={samples}"
        try:
            batches = self._source.batches(count, size, seed)
        except ConfigurationError as error:
            raise ConfigurationError(f"{name}: {error}") from error
        if not batches.regroupable:
            raise ConfigurationError(
                f"{name} needs a map-style dataset, because the data comes in batches of "
                "unknown size; set it to None, or give a dataset."
            )
        return seed, count, size

    def _fresh_batches(self, count: int, size: int, seed: int) -> Batches:
        return self._source.batches(count, size, seed, self._fisher.repeat_samples)

    def _batches(self, count: int, size: int, seed: int) -> Batches:
        """Return the batches, cached in memory up to a size."""
        key = count, size, seed
        if self._kept is None or self._kept[0] != key:
            batches = self._fresh_batches(*key)
            if not batches.regroupable:
                return batches
            self._kept = key, CachedBatches(batches, _BYTES_OF_SAMPLES_KEPT)
        return self._kept[1]

    def _groups(self, seed: int) -> tuple[int, int]:
        """Return number and size of the batches in which all samples are evaluated."""
        fisher, group = self._fisher, self._group(seed)
        return fisher.num_gradients // group, fisher.gradient_batch_size * group

    def _groups_measured(self, seed: int) -> tuple[int, int, int]:
        """Return number and size of the batches whose losses are measured.

        Returns:
            The number, the samples in each, and the mini-batches in each.
        """
        count, size = self._groups(seed)
        most = self._search_samples
        if most is not None:
            count = max(1, min(count, most // size))
        return count, size, self._group(seed)

    def _batches_of_gradients(
        self, count: int, size: int, seed: int, *, again: bool = True
    ) -> Batches:
        choose = self._batches if again else self._fresh_batches
        batches = choose(count, size, seed)
        if not self._fisher.sample_labels:
            return batches
        return UnlabeledBatches(batches, seed, self._source.model)

    def _group(self, seed: int) -> int:
        """Return how many mini-batches are evaluated as one."""
        fisher = self._fisher
        count, size = fisher.num_gradients, fisher.gradient_batch_size
        if not self._are_regroupable(seed):
            return 1
        # A group could only be left out as a whole.
        if self._left_out(seed, count, size):
            return 1
        return mini_batches_in_group(fisher)

    def _are_regroupable(self, seed: int) -> bool:
        """Return whether samples can be drawn in batches of any size."""
        if self._regroupable is None:
            count, size = self._fisher.num_gradients, self._fisher.gradient_batch_size
            self._regroupable = self._fresh_batches(count, size, seed).regroupable
        return self._regroupable

    def measure_again(
        self, statistics: BatchNormStatistics | None = None
    ) -> list[float]:
        """Measure the losses on the samples of the last gradients.

        Args:
            statistics: new statistics of BatchNorm, which the model then has until the
                session ends.

        Returns:
            As :meth:`measure`.
        """
        if statistics is not None:
            statistics.write(self._source.model)
        return self.measure(self._seed)

    def measure_without_weights(self) -> float:
        """Measure the mean loss with all selected weights zero.

        Returns:
            About the loss of a network that has learned nothing; may be NaN.
        """
        masks = self._masks
        tensors = [masks.local(name) for name in masks.parameters]
        saved = [tensor.clone() for tensor in tensors]
        try:
            with torch.no_grad():
                for tensor in tensors:
                    tensor.zero_()
            losses = self.measure_trial(self._seed)
        finally:
            with torch.no_grad():
                for tensor, before in zip(tensors, saved, strict=True):
                    tensor.copy_(before)
        return sum(losses) / len(losses)


def _find_zeros(
    rows: Tensor, pieces: Sequence[tuple[int, slice]]
) -> list[tuple[int, slice]]:
    """Return the pieces of columns that are zero in all rows."""
    if not pieces:
        return []
    flags = torch.stack([rows[:, columns].any() for _, columns in pieces]).tolist()
    return [x for x, nonzero in zip(pieces, flags, strict=True) if not nonzero]


def _in_context(
    context: Callable[[], contextlib.AbstractContextManager[None]],
    rows: Iterator[Tensor],
) -> Iterator[Tensor]:
    """Compute each row inside a context, and yield it outside."""
    while True:
        with context():
            try:
                row = next(rows)
            except StopIteration:
                return
        yield row
