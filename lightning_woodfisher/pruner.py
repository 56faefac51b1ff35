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

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from lightning_woodfisher.active_weights import ActiveWeights, require_same_start
from lightning_woodfisher.batchnorm import BatchNormStatistics, estimate_statistics
from lightning_woodfisher.budget import fit_into_memory, require_one_device
from lightning_woodfisher.clock import PhaseClock, Progress, no_progress
from lightning_woodfisher.costs import Work
from lightning_woodfisher.criteria import CRITERIA, Criterion, make_criterion
from lightning_woodfisher.distributed import Communicator
from lightning_woodfisher.errors import (
    ConfigurationError,
    nearest,
    require_flag,
    require_integer,
    require_number,
)
from lightning_woodfisher.fisher import FisherConfig
from lightning_woodfisher.isolation import derive_seed
from lightning_woodfisher.layers import prunable_parameters
from lightning_woodfisher.losses import FunctionLoss, LossSource
from lightning_woodfisher.masks import Masks
from lightning_woodfisher.obs import Update
from lightning_woodfisher.parts import Parts, Spacing
from lightning_woodfisher.report import LayerReport, PruningReport
from lightning_woodfisher.resources import ResourceEstimate
from lightning_woodfisher.sampling import Sampling
from lightning_woodfisher.selection import (
    Scope,
    SelectionConfig,
    removal_counts,
    removal_counts_until,
    select_smallest,
)
from lightning_woodfisher.sharding import reshard


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
    recompute_spacing: Spacing = "geometric"
    reuse_gradients: bool = False
    trust: float | None = None
    batchnorm_recalibration_batches: int = 0

    @property
    def reads_data(self) -> bool:
        """Whether a step looks at any sample."""
        return (
            self.measure_loss
            or self.batchnorm_recalibration_batches > 0
            or CRITERIA[self.criterion].uses_gradients
        )

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
        self._check_parts()
        require_integer(
            "batchnorm_recalibration_batches", self.batchnorm_recalibration_batches
        )
        if self.batchnorm_recalibration_batches < 0:
            raise ConfigurationError(
                f"batchnorm_recalibration_batches={self.batchnorm_recalibration_batches} "
                "must be at least 0."
            )

    def _check_parts(self) -> None:
        """Refuse what cannot work about the parts of a step."""
        spacing = self.recompute_spacing
        if spacing not in get_args(Spacing):
            raise ConfigurationError(
                f"recompute_spacing={spacing!r} is unknown; use one of "
                f"{', '.join(get_args(Spacing))}.{nearest(spacing, get_args(Spacing))}"
            )
        require_flag("reuse_gradients", self.reuse_gradients)
        criterion = CRITERIA[self.criterion]
        if self.reuse_gradients and not criterion.can_restrict:
            able = [name for name, other in CRITERIA.items() if other.can_restrict]
            raise ConfigurationError(
                f"reuse_gradients cannot go with criterion={self.criterion!r}; use "
                f"{' or '.join(able)}, or new gradients for each part."
            )
        if self.trust is None:
            return
        require_number("trust", self.trust)
        if not (self.trust > 0 and math.isfinite(self.trust)):
            raise ConfigurationError(
                f"trust={self.trust} must be positive and finite: the measured rise of "
                "the loss that is tolerated, as a multiple of the predicted one."
            )
        if not self.measure_loss or not criterion.uses_gradients:
            raise ConfigurationError(
                f"trust={self.trust} compares the measured with the predicted rise of the "
                "loss; it needs measure_loss and a criterion that predicts one."
            )
        if self.recompute_steps == 1:
            raise ConfigurationError(
                f"trust={self.trust} makes the parts that follow smaller, but "
                "recompute_steps=1 has none; set recompute_steps to 2 or more."
            )


@dataclass
class _Observed:
    """A criterion that has seen its gradients, and what it has removed since."""

    criterion: Criterion
    active: ActiveWeights
    losses: list[float]
    collection: str | None
    gone: Tensor


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

    def is_beyond(self, trust: float) -> bool:
        """Whether the loss has risen by more than that multiple of the prediction."""
        if self.measured is None or self.predicted is None:
            return False
        return self.measured > trust * sum(self.predicted)


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
        self._progress = progress or no_progress

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
        clock = PhaseClock()
        sampling = Sampling(
            source,
            self.masks,
            self.config.fisher,
            self.comm,
            clock,
            self._progress,
            self.config.measure_loss,
        )
        with self.comm.failing_together():
            require_same_start(self.masks, self.comm)
            self._check_target(target_sparsity)
            zeros_before = self.masks.zeros()
            with self._whole_or_absent(source.model):
                with sampling.session():
                    parts, halvings = self._parts(
                        sampling, clock, target_sparsity, position
                    )
                    self.masks.verify()
                    statistics = self._recalibrate(source, clock, position)
                # The session has put back what was there before.
                statistics.write(source.model)
                sent = self.comm.bytes_sent - sent_before
                report = self._report(
                    parts, target_sparsity, zeros_before, sent, clock.seconds
                )
                report = dataclasses.replace(
                    report,
                    halvings=halvings,
                    batchnorm_layers=len(statistics.layers),
                )
                # No rank may keep a step that another one takes back.
                self.comm.agree()
            return report

    def rehearse(self, source: LossSource) -> None:
        """Find out early whether the model and the data give what a step needs.

        One gradient on each rank, or one loss, is computed and dropped. Nothing changes.

        Args:
            source: where gradients come from.
        """
        config, comm = self.config, self.comm
        few = min(config.fisher.num_gradients, comm.world_size)
        fisher = dataclasses.replace(config.fisher, num_gradients=few)
        sampling = Sampling(
            source, self.masks, fisher, comm, measure_loss=config.measure_loss
        )
        with comm.failing_together(), sampling.session():
            criterion = make_criterion(config.criterion, fisher, config.update)
            if not criterion.uses_gradients:
                sampling.measure(config.seed)
                return
            active = ActiveWeights(self.masks, criterion.layout, comm)
            for _ in sampling.rows(active, config.seed):
                pass

    def _parts(
        self, sampling: Sampling, clock: PhaseClock, target: float, position: int
    ) -> tuple[list[_PartResult], int]:
        """Do all parts; give their results and how often parts were halved."""
        config, scope = self.config, self.config.selection.scope
        start = _weights_and_zeros(self.masks)
        way = Parts(config.recompute_steps)
        results: list[_PartResult] = []
        observed: _Observed | None = None
        removed = [0] * len(removal_counts(scope, target, *start))
        while not way.is_done:
            until = removal_counts_until(
                scope, target, *start, way.advance(), config.recompute_spacing
            )
            counts = [b - a for a, b in zip(removed, until, strict=True)]
            removed = until
            seed = derive_seed(config.seed, position, len(results))
            if observed is None:
                observed = self._observe(sampling, seed)
                first_seed = seed
            else:
                observed.criterion.restrict(~observed.gone)
                observed.losses, seed = results[-1].losses_after, first_seed
            results.append(self._part(sampling, clock, observed, counts, seed))
            if not config.reuse_gradients:
                # Its Fisher must be gone before there is another one.
                observed = None
            if config.trust is not None and results[-1].is_beyond(config.trust):
                way.halve()
        return results, way.halvings

    def _recalibrate(
        self, source: LossSource, clock: PhaseClock, position: int
    ) -> BatchNormStatistics:
        """Estimate BatchNorm statistics of the pruned network, where asked for."""
        count = self.config.batchnorm_recalibration_batches
        if not count:
            return BatchNormStatistics({})
        with clock("recalibrate"):
            seed = derive_seed(self.config.seed, position, "batchnorm")
            size = self.config.fisher.gradient_batch_size
            return estimate_statistics(source, count, size, self.comm, seed)

    def _check_target(self, target_sparsity: float) -> None:
        """Refuse a sparsity that pruning cannot reach."""
        check_sparsity(target_sparsity)
        masks, scope = self.masks, self.config.selection.scope
        if is_too_sparse(masks, scope, target_sparsity):
            raise ConfigurationError(
                f"target sparsity {target_sparsity} is below the {masks.sparsity():.4f} "
                "that the selected weights have already; pruning can only add zeros."
            )

    @contextlib.contextmanager
    def _whole_or_absent(self, model: nn.Module) -> Iterator[None]:
        """Put weights, masks and BatchNorm statistics back when the body fails."""
        masks = self.masks
        statistics = BatchNormStatistics.of(model)
        weights = {name: masks.local(name).clone() for name in masks.parameters}
        try:
            with masks.restored_on_error():
                yield
        except BaseException:
            for name, before in weights.items():
                masks.local(name).copy_(before)
            statistics.write(model)
            raise

    def _observe(self, sampling: Sampling, seed: int) -> _Observed:
        """Show gradients of the active weights to a fresh criterion."""
        config, comm = self.config, self.comm
        criterion = make_criterion(config.criterion, config.fisher, config.update)
        active = ActiveWeights(self.masks, criterion.layout, comm)
        criterion.begin(active.partition, comm)
        losses, collection = sampling.observe(criterion, active, seed)
        gone = torch.zeros(
            active.partition.shard_sizes()[comm.rank],
            dtype=torch.bool,
            device=comm.device,
        )
        return _Observed(criterion, active, losses, collection, gone)

    def _part(
        self,
        sampling: Sampling,
        clock: PhaseClock,
        observed: _Observed,
        counts: Sequence[int],
        seed: int,
    ) -> _PartResult:
        """Inverse, mask and update, once through."""
        config, comm = self.config, self.comm
        criterion, active = observed.criterion, observed.active
        losses_before, collection = observed.losses, observed.collection

        with clock("factorize"):
            weights = active.gather()
            scores = criterion.score(weights).masked_fill(observed.gone, math.inf)
        with clock("select"):
            groups = active.layers() if config.selection.scope == "layer" else None
            removed = select_smallest(scores, groups, counts, comm)
            thresholds = active.largest_by_layer(scores, removed)
        with clock("update"):
            change = criterion.compensate(weights, removed)
            shares = criterion.predicted_increase(change)
            predicted = None if shares is None else active.sum_by_layer(shares)
        with clock("write"):
            observed.gone |= removed
            active.write(weights + change, observed.gone)
        return _PartResult(
            thresholds=thresholds,
            predicted=predicted,
            damping=criterion.damping,
            raised_damping=active.name_blocks(criterion.raised_damping()),
            fisher_bytes=criterion.state_bytes,
            losses_before=losses_before,
            losses_after=sampling.measure(seed),
            collection=collection,
        )

    def _report(
        self,
        parts: list[_PartResult],
        target_sparsity: float,
        zeros_before: Mapping[str, int],
        sent: int,
        seconds: Mapping[str, float],
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
            seconds=dict(seconds),
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
        criterion: ``"woodfisher"`` or ``"magnitude"``.
        update: ``"joint"``, ``"independent"`` or ``"none"``.
        recompute_steps: reach the sparsity in this many parts, each with fresh gradients.
        measure_loss: also measure the loss after the step on the same samples.
        seed: of the samples and of anything random in the model.
        progress: see :class:`Pruner`.
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
    """
    config = PruningConfig(
        fisher=fisher or FisherConfig(),
        selection=selection or SelectionConfig(),
        criterion=criterion,
        update=update,
        recompute_steps=recompute_steps,
        measure_loss=measure_loss,
        seed=seed,
        recompute_spacing=recompute_spacing,
        reuse_gradients=reuse_gradients,
        trust=trust,
        batchnorm_recalibration_batches=batchnorm_recalibration_batches,
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


def _weights_and_zeros(masks: Masks) -> tuple[list[int], list[int]]:
    weights = [parameter.numel() for parameter in masks.parameters.values()]
    return weights, list(masks.zeros().values())


def _mean(losses: list[float]) -> float | None:
    return sum(losses) / len(losses) if losses else None


def _total(values: Iterable[float | None | list[float]]) -> float | None:
    present = [v for v in values if isinstance(v, float)]
    return sum(present) if present else None
