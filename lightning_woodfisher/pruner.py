"""One pruning step from end to end, and :func:`prune` for a plain PyTorch model.

    batch → rows [m, D] → exchange → rows [N, D_r] → Fisher blocks → saliency [D_r]
          → exact threshold → mask → weight update [D_r] → gather → written in place

The step is whole or absent: weights and masks are put back when anything fails.
"""

from __future__ import annotations

__all__ = [
    "Pruner",
    "PruningConfig",
    "PruningReport",
    "check_sparsity",
    "is_too_sparse",
    "prune",
    "weights_to_remove",
    "within_memory",
]

import bisect
import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from lightning_woodfisher.budget import fit_into_memory, require_one_device
from lightning_woodfisher.costs import Work
from lightning_woodfisher.criteria import CRITERIA, Criterion, make_criterion
from lightning_woodfisher.distributed import Communicator
from lightning_woodfisher.errors import (
    ConfigurationError,
    PruningError,
    nearest,
    require_integer,
    require_number,
)
from lightning_woodfisher.fisher import FisherConfig, rows_in_chunk
from lightning_woodfisher.gradients import (
    collect_gradients,
    iterate_chunks,
    mean_loss,
)
from lightning_woodfisher.isolation import derive_seed
from lightning_woodfisher.layers import prunable_parameters
from lightning_woodfisher.losses import FunctionLoss, LossSource
from lightning_woodfisher.masks import Masks
from lightning_woodfisher.obs import Update
from lightning_woodfisher.partition import Partition
from lightning_woodfisher.report import LayerReport, PruningReport
from lightning_woodfisher.resources import ResourceEstimate
from lightning_woodfisher.selection import (
    Scope,
    SelectionConfig,
    removal_counts,
    removal_counts_of_parts,
    select_smallest,
)
from lightning_woodfisher.sharded_gradients import (
    collect_sharded_gradients,
    sharded_mean_loss,
)
from lightning_woodfisher.sharding import reshard, undisturbed

_SAMPLES_EVALUATED_AT_ONCE = 64
_CHECKSUM_PIECE = 2**20

Progress = Callable[
    [str, int], "contextlib.AbstractContextManager[Callable[[int], object]]"
]


@dataclass(frozen=True)
class PruningConfig:
    """How a step prunes; see :class:`~.WoodFisherPruningCallback` for the meaning."""

    fisher: FisherConfig = field(default_factory=FisherConfig)
    selection: SelectionConfig = field(default_factory=SelectionConfig)
    criterion: str = "woodfisher"
    update: Update = "joint"
    recompute_steps: int = 1
    measure_loss: bool = True
    seed: int = 0

    @property
    def reads_data(self) -> bool:
        """Whether a step looks at any sample."""
        return self.measure_loss or CRITERIA[self.criterion].uses_gradients

    def __post_init__(self) -> None:
        if self.criterion not in CRITERIA:
            raise ConfigurationError(
                f"criterion={self.criterion!r} is unknown; use one of "
                f"{', '.join(CRITERIA)}.{nearest(self.criterion, CRITERIA)}"
            )
        if self.update not in get_args(Update):
            raise ConfigurationError(
                f"update={self.update!r} is unknown; use one of "
                f"{', '.join(get_args(Update))}.{nearest(self.update, get_args(Update))}"
            )
        require_integer("recompute_steps", self.recompute_steps)
        if self.recompute_steps < 1:
            raise ConfigurationError(
                f"recompute_steps={self.recompute_steps} must be at least 1."
            )


@dataclass(frozen=True)
class _PartResult:
    """What one part of a step leaves behind for the report; layers in order."""

    thresholds: list[float | None]
    predicted: list[float] | None
    damping: float | None
    raised_damping: dict[str, float]
    fisher_bytes: int
    losses_before: list[float]
    losses_after: list[float]
    collection: str | None

    @property
    def measured(self) -> float | None:
        """Rise of the mean loss."""
        before, after = _mean(self.losses_before), _mean(self.losses_after)
        return None if before is None or after is None else after - before


class Pruner:
    """Prunes the selected parameters of a model, step by step.

    Args:
        masks: what is selected and what is already pruned; changed by every step.
        config: how to prune.
        communicator: the ranks of the job.
        progress: given a title and a total, a context that yields a counter.
    """

    def __init__(
        self,
        masks: Masks,
        config: PruningConfig,
        communicator: Communicator,
        progress: Progress | None = None,
    ) -> None:
        self.masks = masks
        self.config = config
        self.comm = communicator
        self._progress = progress or _no_progress
        self._clock = _Clock()

    def step(
        self, source: LossSource, target_sparsity: float, position: int = 0
    ) -> PruningReport:
        """Prune to a sparsity.

        Fewer zeros than there are is a :class:`ConfigurationError`, a step that fails a
        :class:`PruningError`; after any exception the model is as it was before.

        Args:
            source: where gradients come from.
            target_sparsity: share of the selected weights that is pruned afterwards.
            position: of the step in training; enters the seed, so that each step draws
                other samples and a repeated step the same.

        Returns:
            What happened; equal on all ranks but for the seconds.
        """
        sent_before = self.comm.bytes_sent
        self._clock = _Clock()
        with self.comm.failing_together():
            self._require_same_start()
            counts = self._counts_of_parts(target_sparsity)
            zeros_before = self.masks.zeros()
            with self._whole_or_absent():
                with self._session(source):
                    parts = [
                        self._part(
                            source, removals, derive_seed(self.config.seed, position, i)
                        )
                        for i, removals in enumerate(counts)
                    ]
                    self.masks.verify()
                sent = self.comm.bytes_sent - sent_before
                report = self._report(parts, target_sparsity, zeros_before, sent)
                # No rank may keep a step that another one takes back.
                self.comm.agree()
            return report

    def rehearse(self, source: LossSource) -> None:
        """Find out early whether the model and the data give what a step needs.

        One gradient on each rank, or one loss, is computed and dropped. Nothing changes.

        Args:
            source: where gradients come from.
        """
        fisher = self.config.fisher
        few = min(fisher.num_gradients, self.comm.world_size)
        fisher = dataclasses.replace(fisher, num_gradients=few)
        config = dataclasses.replace(self.config, fisher=fisher)
        trial = Pruner(self.masks, config, self.comm)
        with self.comm.failing_together(), trial._session(source):
            criterion = make_criterion(config.criterion, fisher, config.update)
            if not criterion.uses_gradients:
                trial._measure(source, config.seed)
                return
            active = _active_positions(self.masks)
            partition = trial._layout(criterion, active)
            for _ in trial._rows(source, partition, active, config.seed):
                pass

    def _require_same_start(self) -> None:
        """Refuse ranks that hold different weights or masks."""
        if self.masks.sharded:
            return
        parameters = self.masks.parameters
        weights = _checksum(p.detach() for p in parameters.values())
        kept = _checksum(self.masks.kept(name) for name in parameters)
        self.comm.require_equal(weights, "the weights before the step")
        self.comm.require_equal(kept, "the masks before the step")

    def _counts_of_parts(self, target_sparsity: float) -> list[list[int]]:
        """How many weights each group gives up, in each part."""
        check_sparsity(target_sparsity)
        masks, scope = self.masks, self.config.selection.scope
        if is_too_sparse(masks, scope, target_sparsity):
            raise ConfigurationError(
                f"target sparsity {target_sparsity} is below the {masks.sparsity():.4f} "
                "that the selected weights have already; pruning can only add zeros."
            )
        weights, zeros = _weights_and_zeros(masks)
        parts = self.config.recompute_steps
        return removal_counts_of_parts(scope, target_sparsity, weights, zeros, parts)

    @contextlib.contextmanager
    def _whole_or_absent(self) -> Iterator[None]:
        """Put weights and masks back when the body fails."""
        masks = self.masks
        weights = {name: masks.local(name).clone() for name in masks.parameters}
        try:
            with masks.restored_on_error():
                yield
        except BaseException:
            for name, before in weights.items():
                masks.local(name).copy_(before)
            raise

    def _part(
        self, source: LossSource, counts: Sequence[int], seed: int
    ) -> _PartResult:
        """Gradients, inverse, mask and update, once through."""
        comm, clock = self.comm, self._clock
        criterion = make_criterion(
            self.config.criterion, self.config.fisher, self.config.update
        )
        active = _active_positions(self.masks)
        partition = self._layout(criterion, active)
        criterion.begin(partition, comm)
        losses_before, collection = self._observe(
            source, criterion, partition, active, seed
        )

        with clock("factorize"):
            weights = _gather(self.masks, active).to(torch.float64)
            if not self.masks.sharded:
                weights = weights[partition.shard(comm.rank)]
            scores = criterion.score(weights)
        with clock("select"):
            layers = _layer_of_weights(partition, len(active), comm)
            groups = layers if self.config.selection.scope == "layer" else None
            removed = select_smallest(scores, groups, counts, comm)
            thresholds = self._largest_removed(scores, layers, removed)
        with clock("update"):
            change = criterion.compensate(weights, removed)
            shares = criterion.predicted_increase(change)
            predicted = (
                shares
                if shares is None
                else _sum_by_layer(shares, partition, len(active), comm)
            )
        with clock("write"):
            self._write(active, partition, weights + change, removed)
        return _PartResult(
            thresholds=thresholds,
            predicted=None if predicted is None else predicted.tolist(),
            damping=criterion.damping,
            raised_damping=self._describe(
                criterion.raised_damping(), active, partition
            ),
            fisher_bytes=criterion.state_bytes,
            losses_before=losses_before,
            losses_after=self._measure(source, seed),
            collection=collection,
        )

    @contextlib.contextmanager
    def _session(self, source: LossSource) -> Iterator[None]:
        """Enter what gradients are taken in; leaves no trace in the model."""
        sharded = self.masks.sharded
        with (
            undisturbed(source.model) if sharded else contextlib.nullcontext(),
            source.session(self.config.fisher.model_mode),
        ):
            yield

    def _layout(self, criterion: Criterion, active: Mapping[str, Tensor]) -> Partition:
        """Cut the active weights into blocks and choose who owns them."""
        # Sharded parameters are numbered rank by rank, each rank's part of each tensor as
        # a segment of its own: segment r·L + l is tensor l on rank r, which owns it.
        segments = [len(positions) for positions in active.values()]
        if not self.masks.sharded:
            return criterion.layout(segments, self.comm.world_size)
        everyone = self.comm.gather_numbers([float(count) for count in segments])
        partition = criterion.layout(
            [int(count) for row in everyone for count in row], self.comm.world_size
        )
        return partition.owned_by_segment(
            [rank for rank, row in enumerate(everyone) for _ in row]
        )

    def _observe(
        self,
        source: LossSource,
        criterion: Criterion,
        partition: Partition,
        active: Mapping[str, Tensor],
        seed: int,
    ) -> tuple[list[float], str | None]:
        """Feed the criterion; return the losses, and how gradients were computed."""
        if not criterion.uses_gradients:
            return self._measure(source, seed), None
        fisher = self.config.fisher
        losses: list[float] = []
        notes: list[str] = []
        with (
            self._clock("collect"),
            self._progress("Collecting gradients", fisher.num_gradients) as tick,
        ):
            rows = self._rows(source, partition, active, seed, losses, tick, notes)
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
        if self._group(source, seed) > 1:
            losses = self._measure(source, seed)
        return losses, "; ".join(notes)

    def _rows(
        self,
        source: LossSource,
        partition: Partition,
        active: Mapping[str, Tensor],
        seed: int,
        losses: list[float] | None = None,
        tick: Callable[[int], object] = lambda _: None,
        notes: list[str] | None = None,
    ) -> Iterator[Tensor]:
        """This rank's slice of all gradients, in order."""
        losses = [] if losses is None else losses
        notes = [] if notes is None else notes
        fisher, parameters = self.config.fisher, self.masks.parameters
        count, size = fisher.num_gradients, fisher.gradient_batch_size
        if self.masks.sharded:
            notes.append("loop: the model is sharded")
            return collect_sharded_gradients(
                source,
                count,
                size,
                parameters,
                active,
                self.comm,
                seed,
                losses,
                tick,
                divisible=fisher.model_mode == "eval",
            )
        return collect_gradients(
            source,
            source.batches(count, size, seed),
            parameters,
            active,
            partition.shard_sizes(),
            count,
            self.comm,
            seed,
            losses,
            tick,
            collection=fisher.collection,
            row_dtype=fisher.row_dtype,
            note=notes.append,
        )

    def _measure(self, source: LossSource, seed: int) -> list[float]:
        """Losses of the samples that belong to a seed, at the present weights."""
        if not self.config.measure_loss:
            return []
        fisher, group = self.config.fisher, self._group(source, seed)
        count = fisher.num_gradients // group
        with self._clock("measure"):
            batches = source.batches(count, fisher.gradient_batch_size * group, seed)
            measure = sharded_mean_loss if self.masks.sharded else mean_loss
            return measure(source, batches, count, self.comm, seed)

    def _group(self, source: LossSource, seed: int) -> int:
        """How many mini-batches are evaluated as one: small ones are slow one by one."""
        fisher = self.config.fisher
        count, size = fisher.num_gradients, fisher.gradient_batch_size
        # In training mode BatchNorm makes the loss depend on the size of the batch.
        if (
            fisher.model_mode == "train"
            or not source.batches(count, size, seed).regroupable
        ):
            return 1
        most = max(1, _SAMPLES_EVALUATED_AT_ONCE // size)
        return max(g for g in range(1, most + 1) if count % g == 0)

    def _largest_removed(
        self, scores: Tensor, layers: Tensor, removed: Tensor
    ) -> list[float | None]:
        """Largest saliency that goes, by layer."""
        largest = scores.new_full((len(self.masks.parameters),), -1.0)
        largest.scatter_reduce_(0, layers[removed], scores[removed], "amax")
        values: list[float] = self.comm.maximum(largest).tolist()
        return [None if value < 0 else value for value in values]

    @torch.no_grad()
    def _write(
        self,
        active: Mapping[str, Tensor],
        partition: Partition,
        weights: Tensor,
        removed: Tensor,
    ) -> None:
        """Share the new weights, check them, and write them in place with the masks."""
        sizes = partition.shard_sizes()
        dtype = _gather_dtype(self.masks.parameters)
        # A kept weight may not underflow to zero silently, but a removed one is zero.
        new, gone = torch.where(removed, 0.0, weights).to(dtype), removed
        # Nobody else needs the weights of a shard.
        if not self.masks.sharded:
            new = self.comm.gather_shards(new, sizes)
            gone = self.comm.gather_shards(gone.to(torch.uint8), sizes).bool()
            self.comm.require_equal(_checksum([new]), "the updated weights")
            self.comm.require_equal(_checksum([gone]), "the masks")
        lengths = [len(where) for where in active.values()]
        parts = {
            name: values.to(self.masks.local(name).dtype)
            for name, values in zip(active, torch.split(new, lengths), strict=True)
        }
        # In the dtype in which they will be written: float16 overflows early.
        bad = sum(int((~values.isfinite()).sum()) for values in parts.values())
        bad = int(max(row[0] for row in self.comm.gather_numbers([bad])))
        if bad:
            raise PruningError(
                f"{bad} updated weights are not finite; "
                "raise fisher.damping or recompute_steps, or lower the step's sparsity"
            )
        pruned = {}
        for (name, where), leaving in zip(
            active.items(), torch.split(gone, lengths), strict=True
        ):
            part = self.masks.local(name)
            flat = part.reshape(-1).clone()
            flat[where] = parts[name]
            part.copy_(flat.view(part.shape))
            mask = torch.zeros_like(flat, dtype=torch.bool)
            mask[where] = leaving
            pruned[name] = mask.view(part.shape)
        self.masks.grow(pruned)

    def _describe(
        self,
        raised: Mapping[int, float],
        active: Mapping[str, Tensor],
        partition: Partition,
    ) -> dict[str, float]:
        """Name the blocks with raised damping, those of every rank."""
        most = int(max(row[0] for row in self.comm.gather_numbers([len(raised)])))
        pairs = [*raised.items(), *[(-1, 0.0)] * (most - len(raised))]
        everyone = self.comm.gather_numbers([x for pair in pairs for x in pair])
        names = list(active)
        by_start = {unit.start: unit.segment for unit in partition.units}
        starts = sorted(by_start)
        found: dict[str, float] = {}
        for row in everyone:
            for first, value in zip(row[::2], row[1::2], strict=True):
                if first >= 0:
                    unit = starts[bisect.bisect_right(starts, first) - 1]
                    found[
                        f"{names[by_start[unit] % len(names)]} from weight {int(first)}"
                    ] = value
        return found

    def _report(
        self,
        parts: list[_PartResult],
        target_sparsity: float,
        zeros_before: Mapping[str, int],
        sent: int,
    ) -> PruningReport:
        last, zeros_after = parts[-1], self.masks.zeros()
        numbers = self.comm.gather_numbers([sent, max(p.fisher_bytes for p in parts)])
        layers = tuple(
            LayerReport(
                name=name,
                shape=tuple(parameter.shape),
                weights=parameter.numel(),
                zeros_before=zeros_before[name],
                zeros_after=zeros_after[name],
                threshold=last.thresholds[i],
                predicted_increase=_total(
                    p.predicted and p.predicted[i] for p in parts
                ),
            )
            for i, (name, parameter) in enumerate(self.masks.parameters.items())
        )
        return PruningReport(
            criterion=self.config.criterion,
            layers=layers,
            target_sparsity=target_sparsity,
            threshold=max((t for t in last.thresholds if t is not None), default=None),
            damping=last.damping,
            raised_damping={k: v for p in parts for k, v in p.raised_damping.items()},
            predicted_increase=_total(p.predicted and sum(p.predicted) for p in parts),
            measured_increase=_total(p.measured for p in parts),
            loss_before=_mean(parts[0].losses_before),
            loss_after=_mean(last.losses_after),
            parts=len(parts),
            num_gradients=self.config.fisher.num_gradients,
            seconds=dict(self._clock.seconds),
            bytes_exchanged=int(sum(row[0] for row in numbers)),
            fisher_bytes=tuple(int(row[1]) for row in numbers),
            world_size=self.comm.world_size,
            collection="; ".join(
                dict.fromkeys(p.collection for p in parts if p.collection)
            )
            or None,
        )


def prune(
    model: nn.Module,
    data: Dataset[Any] | Iterable[Any],
    loss_fn: Callable[[Any, Any], Tensor],
    *,
    target_sparsity: float,
    fisher: FisherConfig | None = None,
    selection: SelectionConfig | None = None,
    criterion: str = "woodfisher",
    update: Update = "joint",
    recompute_steps: int = 1,
    measure_loss: bool = True,
    seed: int = 0,
    progress: Progress | None = None,
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
        criterion: ``"woodfisher"`` or ``"magnitude"``.
        update: ``"joint"``, ``"independent"`` or ``"none"``.
        recompute_steps: reach the sparsity in this many parts, each with fresh gradients.
        measure_loss: also measure the loss after the step on the same samples.
        seed: of the samples and of anything random in the model.
        progress: see :class:`Pruner`.

    Returns:
        What happened.
    """
    config = PruningConfig(
        fisher=fisher or FisherConfig(),
        selection=selection or SelectionConfig(),
        criterion=criterion,
        update=update,
        recompute_steps=recompute_steps,
        measure_loss=measure_loss,
        seed=seed,
    )
    reshard(model)
    parameters = prunable_parameters(
        model, config.selection.include, config.selection.exclude
    )
    require_one_device(parameters)
    masks = Masks(parameters)
    masks.take_zeros()
    comm = Communicator(next(iter(parameters.values())).device)
    config, _ = within_memory(masks, config, comm)
    pruner = Pruner(masks, config, comm, progress)
    return pruner.step(FunctionLoss(model, data, loss_fn), target_sparsity)


def within_memory(
    masks: Masks, config: PruningConfig, comm: Communicator, ranks_on_host: int = 1
) -> tuple[PruningConfig, ResourceEstimate]:
    """Check that the next step fits into memory; see :func:`~.budget.fit_into_memory`.

    Args:
        masks: what is pruned already.
        config: how to prune.
        comm: the ranks.
        ranks_on_host: how many of them share the memory of this machine.

    Returns:
        The settings, changed where only that makes it fit, and the estimate.
    """
    zeros = masks.zeros()
    weights = {name: p.numel() for name, p in masks.parameters.items()}
    work = Work(
        list(weights.values()),
        [count - zeros[name] for name, count in weights.items()],
        config.fisher,
        comm.world_size,
        config.criterion,
        config.update,
        max(p.element_size() for p in masks.parameters.values()),
        torch.get_num_threads() if comm.device.type == "cpu" else 1,
    )
    fisher, cost = fit_into_memory(work, comm, ranks_on_host)
    return dataclasses.replace(config, fisher=fisher), cost


def weights_to_remove(masks: Masks, scope: Scope, target_sparsity: float) -> list[int]:
    """Count the weights that have to go.

    Args:
        masks: what is selected and what is already pruned.
        scope: over all layers, or in each of them.
        target_sparsity: share of zeros that is wanted.

    Returns:
        What :func:`~.removal_counts` gives.
    """
    return removal_counts(scope, target_sparsity, *_weights_and_zeros(masks))


def is_too_sparse(masks: Masks, scope: Scope, target_sparsity: float) -> bool:
    """Tell whether there are more zeros than wanted, and no layer that lacks some.

    Args:
        masks: what is selected and what is already pruned.
        scope: over all layers, or in each of them.
        target_sparsity: share of zeros that is wanted.

    Returns:
        True when the target cannot be met because pruning only adds zeros.
    """
    weights, zeros = _weights_and_zeros(masks)
    above = round(target_sparsity * sum(weights)) < sum(zeros)
    return above and not any(weights_to_remove(masks, scope, target_sparsity))


def check_sparsity(target_sparsity: float) -> None:
    """Check a sparsity.

    Args:
        target_sparsity: share of zeros.

    Raises:
        ConfigurationError: outside [0, 1), or not a number.
    """
    require_number("target_sparsity", target_sparsity)
    if not 0.0 <= target_sparsity < 1.0:
        raise ConfigurationError(
            f"target_sparsity={target_sparsity} is outside [0, 1); it is the share of zeros, "
            "so 90 % is 0.9."
        )


class _Clock:
    """Adds up wall-clock seconds by phase; an inner phase is not counted in the outer."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._inner = 0.0

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        outer_inner, self._inner = self._inner, 0.0
        start = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - start
            self.seconds[phase] = self.seconds.get(phase, 0.0) + spent - self._inner
            self._inner = outer_inner + spent


@contextlib.contextmanager
def _no_progress(title: str, total: int) -> Iterator[Callable[[int], object]]:
    yield lambda _: None


def _weights_and_zeros(masks: Masks) -> tuple[list[int], list[int]]:
    weights = [parameter.numel() for parameter in masks.parameters.values()]
    return weights, list(masks.zeros().values())


def _active_positions(masks: Masks) -> dict[str, Tensor]:
    """Positions of the weights not yet pruned in each flattened parameter."""
    return {
        name: torch.nonzero(masks.kept(name).reshape(-1)).squeeze(1)
        for name in masks.parameters
    }


def _gather_dtype(parameters: Mapping[str, nn.Parameter]) -> torch.dtype:
    double = any(p.dtype == torch.float64 for p in parameters.values())
    return torch.float64 if double else torch.float32


def _gather(masks: Masks, active: Mapping[str, Tensor]) -> Tensor:
    """All active weights that this rank holds in one vector, ``[D]`` or ``[D_r]``."""
    dtype = _gather_dtype(masks.parameters)
    return torch.cat(
        [masks.local(n).reshape(-1)[where].to(dtype) for n, where in active.items()]
    )


def _layer_of_weights(partition: Partition, layers: int, comm: Communicator) -> Tensor:
    """Index of the tensor that each weight of the shard belongs to, int64 ``[D_r]``."""
    units = partition.owned(comm.rank)
    ids = torch.tensor([unit.segment % layers for unit in units], dtype=torch.int64)
    lengths = torch.tensor(
        [unit.stop - unit.start for unit in units], dtype=torch.int64
    )
    return ids.repeat_interleave(lengths).to(comm.device)


def _sum_by_layer(
    values: Tensor, partition: Partition, layers: int, comm: Communicator
) -> Tensor:
    """Add a shard vector up by layer, over ranks, float64 ``[L]``."""
    offset = partition.shard(comm.rank).start
    parts = []
    for unit in partition.owned(comm.rank):
        part = values.new_zeros(layers)
        part[unit.segment % layers] = values[
            unit.start - offset : unit.stop - offset
        ].sum()
        parts.append(part)
    largest = torch.stack([values.new_zeros(()), *(p.abs().max() for p in parts)]).max()
    return comm.sum_exactly(parts, largest * len(partition.units), (layers,))


def _checksum(tensors: Iterable[Tensor]) -> Tensor:
    """Mix the bits of tensors, one behind the other, into one int64, wrapping around."""
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    first, total = 1, torch.zeros((), dtype=torch.int64)
    for tensor in tensors:
        flat = tensor.contiguous().view(-1).view(kinds[tensor.element_size()])
        # Piece by piece: in int64 the whole would need many times the model's memory.
        for piece in torch.split(flat, _CHECKSUM_PIECE):
            last = first + len(piece)
            index = torch.arange(first, last, device=piece.device)
            mixed = (piece.to(torch.int64) + 1) * (index * 2654435761 + 97)
            total = total.to(piece.device) + mixed.sum()
            first = last
    return total


def _mean(losses: list[float]) -> float | None:
    return sum(losses) / len(losses) if losses else None


def _total(values: Iterable[float | None | list[float]]) -> float | None:
    present = [v for v in values if isinstance(v, float)]
    return sum(present) if present else None
