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
    "prune",
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
from lightning_woodfisher.flops import LayerFlops, count_flops
from lightning_woodfisher.isolation import derive_seed
from lightning_woodfisher.layers import prunable_parameters
from lightning_woodfisher.local_model import LocalModel, require_points
from lightning_woodfisher.losses import FunctionLoss, LossSource
from lightning_woodfisher.masks import Masks
from lightning_woodfisher.obs import Update
from lightning_woodfisher.parts import Parts, Spacing
from lightning_woodfisher.patterns import parse_pattern, require_pattern_fits
from lightning_woodfisher.quotas import (
    Quotas,
    flops_share_of_step,
    make_quotas,
    require_flops_target_fits,
    require_target_fits,
)
from lightning_woodfisher.report import LayerReport, LocalModelPoint, PruningReport
from lightning_woodfisher.resources import ResourceEstimate
from lightning_woodfisher.sampling import Sampling
from lightning_woodfisher.selection import SelectionConfig
from lightning_woodfisher.selector import (
    Selector,
    is_too_sparse,
    layers_of,
    take_zeros,
)
from lightning_woodfisher.sharding import reshard
from lightning_woodfisher.step_length import StepLength


@dataclass(frozen=True)
class PruningConfig:
    """How a step prunes; see :class:`~.WoodFisherPruningCallback` for the meaning."""

    fisher: FisherConfig = field(default_factory=FisherConfig)
    selection: SelectionConfig = field(default_factory=SelectionConfig)
    criterion: str = "woodfisher"
    update: Update = "joint"
    recompute_steps: int = 1
    measure_loss: bool = True
    local_model_points: int = 0
    seed: int = 0
    flops_target: float | None = None
    step_search: bool = False
    update_scale: float = 1.0
    recompute_spacing: Spacing = "geometric"
    reuse_gradients: bool = False
    trust: float | None = None
    batchnorm_recalibration_batches: int = 0

    @property
    def counts_flops(self) -> bool:
        """Whether a step counts FLOPs."""
        return self.flops_target is not None or self.selection.flops_power > 0

    @property
    def reads_data(self) -> bool:
        """Whether a step looks at any sample."""
        return (
            self.measure_loss
            or self.counts_flops
            or self.batchnorm_recalibration_batches > 0
            or CRITERIA[self.criterion].needs != "nothing"
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
        require_number("update_scale", self.update_scale)
        if not 0.0 <= self.update_scale <= 1.0:
            raise ConfigurationError(
                f"update_scale={self.update_scale} is outside [0, 1]; 1 is the whole "
                "update, 0 none."
            )
        if self.recompute_steps < 1:
            raise ConfigurationError(
                f"recompute_steps={self.recompute_steps} must be at least 1."
            )
        if self.flops_target is not None:
            require_flops_target_fits(self.selection, self.flops_target)
        require_points(self.local_model_points, self.measure_loss)
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
        if self.reuse_gradients and self.selection.pattern != "unstructured":
            raise ConfigurationError(
                "reuse_gradients cannot go with selection.pattern="
                f"{self.selection.pattern!r}; take new gradients for each part."
            )
        if self.trust is None:
            return
        require_number("trust", self.trust)
        if not (self.trust > 0 and math.isfinite(self.trust)):
            raise ConfigurationError(
                f"trust={self.trust} must be positive and finite: the measured rise of "
                "the loss that is tolerated, as a multiple of the predicted one."
            )
        if not self.measure_loss or criterion.needs == "nothing":
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
    local_model: tuple[LocalModelPoint, ...]
    collection: str | None
    scales: Sequence[float]

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
        make_sampling: the class that asks model and data, or one with its ways.
    """

    def __init__(
        self,
        masks: Masks,
        config: PruningConfig,
        communicator: Communicator,
        progress: Progress | None = None,
        make_sampling: Callable[..., Sampling] = Sampling,
    ) -> None:
        self.masks = masks
        self.config = config
        self.comm = communicator
        self._progress = progress or no_progress
        self._make_sampling = make_sampling

    def step(
        self,
        source: LossSource,
        target_sparsity: float,
        position: int = 0,
        final_sparsity: float | None = None,
    ) -> PruningReport:
        """Prune to a sparsity.

        Fewer zeros than there are is a :class:`ConfigurationError`, a step that fails a
        :class:`PruningError`; after any exception the model is as it was before.

        Args:
            source: where gradients come from.
            target_sparsity: share of the selected weights that is pruned afterwards.
            position: of the step in training; enters the seed, so that each step draws
                other samples and a repeated step the same.
            final_sparsity: the sparsity after the last step; on the way there targets of
                layers and of FLOPs are approached in proportion. None for a single step.

        Returns:
            What happened; equal on all ranks but for the seconds.
        """
        sent_before = self.comm.bytes_sent
        clock = PhaseClock()
        sampling = self._make_sampling(
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
            quotas = self._quotas(target_sparsity, final_sparsity)
            zeros_before = self.masks.zeros()
            with self._whole_or_absent(source.model):
                with sampling.session():
                    seed = derive_seed(self.config.seed, position, 0)
                    flops = self._count_flops(source, seed)
                    share = flops_share_of_step(
                        self.config.flops_target, target_sparsity, final_sparsity
                    )
                    selector = Selector(
                        self.masks,
                        self.config.selection,
                        self.comm,
                        quotas,
                        flops,
                        share,
                        self.config.recompute_spacing,
                    )
                    parts, halvings = self._parts(sampling, clock, selector, position)
                    self.masks.verify()
                    statistics = self._recalibrate(source, clock, position)
                # The session has put back what was there before.
                statistics.write(source.model)
                sent = self.comm.bytes_sent - sent_before
                report = self._report(
                    parts, target_sparsity, zeros_before, sent, clock.seconds
                )
                if flops is not None:
                    report = dataclasses.replace(
                        report, **flops.describe(zeros_before, self.masks.zeros())
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
            flops = self._count_flops(source, config.seed)
            if flops is not None:
                # Refuses a target that is out of reach.
                quotas = make_quotas(config.selection, layers_of(self.masks), 0.0)
                share = config.flops_target
                Selector(self.masks, config.selection, comm, quotas, flops, share)
            criterion = make_criterion(config.criterion, fisher, config.update)
            pattern = parse_pattern(config.selection.pattern)
            sampling.rehearse(criterion, config.seed, pattern)

    def _parts(
        self, sampling: Sampling, clock: PhaseClock, selector: Selector, position: int
    ) -> tuple[list[_PartResult], int]:
        """Do all parts; give their results and how often parts were halved."""
        config = self.config
        way = Parts(config.recompute_steps)
        results: list[_PartResult] = []
        observed: _Observed | None = None
        while not way.is_done:
            fraction = way.advance()
            seed = derive_seed(config.seed, position, len(results))
            if observed is None:
                observed = self._observe(sampling, selector, seed)
                first_seed = seed
            else:
                observed.criterion.restrict(~observed.gone)
                observed.losses, seed = results[-1].losses_after, first_seed
            results.append(
                self._part(sampling, clock, selector, observed, fraction, seed)
            )
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

    def _quotas(self, target_sparsity: float, final_sparsity: float | None) -> Quotas:
        """What must go in each part; nothing by number when FLOPs decide."""
        check_sparsity(target_sparsity)
        masks, selection = self.masks, self.config.selection
        require_target_fits(selection, target_sparsity, is_final=False)
        if self.config.flops_target is not None:
            target_sparsity = 0.0
        elif is_too_sparse(masks, selection, target_sparsity, final_sparsity):
            raise ConfigurationError(
                f"target sparsity {target_sparsity} is below the {masks.sparsity():.4f} "
                "that the selected weights have already; pruning can only add zeros."
            )
        spacing = self.config.recompute_spacing
        return make_quotas(
            selection, layers_of(masks), target_sparsity, final_sparsity, spacing
        )

    def _count_flops(self, source: LossSource, seed: int) -> LayerFlops | None:
        if not self.config.counts_flops:
            return None
        fisher = self.config.fisher
        number, size = fisher.num_gradients, fisher.gradient_batch_size
        return count_flops(source, self.masks, self.comm, number, size, seed)

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

    def _observe(self, sampling: Sampling, selector: Selector, seed: int) -> _Observed:
        """Show gradients of the active weights to a fresh criterion."""
        config, comm = self.config, self.comm
        criterion = make_criterion(config.criterion, config.fisher, config.update)
        active = ActiveWeights(self.masks, criterion.layout, comm, selector.pattern)
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
        selector: Selector,
        observed: _Observed,
        fraction: float,
        seed: int,
    ) -> _PartResult:
        """Inverse, mask and update, once through."""
        config = self.config
        criterion, active = observed.criterion, observed.active
        losses_before, collection = observed.losses, observed.collection

        search = config.step_search and config.update != "none"
        with clock("factorize"):
            weights = active.gather()
            descent = criterion.descent() if search else None
        length = StepLength(
            criterion,
            active,
            sampling,
            weights,
            seed,
            largest=config.update_scale,
            search=search,
        )
        with clock("search"):
            length.prepare(descent)
        with clock("factorize"):
            candidates = selector.candidates(criterion, active, weights, observed.gone)
        with clock("select"):
            removed, thresholds = selector.choose(candidates, active, fraction)
        with clock("update"):
            directions = criterion.directions(weights, removed)
        with clock("search"):
            scales, change = length.choose(removed, directions)
        with clock("update"):
            shares = criterion.predicted_increase(change)
            predicted = None if shares is None else active.sum_by_layer(shares)
        local_model = LocalModel(self.masks, config.local_model_points)
        with clock("write"):
            observed.gone |= removed
            active.write(weights + change, observed.gone)

        def predict(fraction: float) -> float | None:
            shares = criterion.predicted_increase(fraction * change)
            return None if shares is None else sum(active.sum_by_layer(shares))

        losses_after = sampling.measure(seed)
        return _PartResult(
            thresholds=thresholds,
            predicted=predicted,
            damping=criterion.damping,
            raised_damping=active.name_blocks(criterion.raised_damping()),
            fisher_bytes=criterion.state_bytes,
            losses_before=losses_before,
            losses_after=losses_after,
            local_model=local_model.check(
                predict, lambda: sampling.measure(seed), losses_before, losses_after
            ),
            collection=collection,
            scales=scales,
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
            update_scales=tuple(p.scales[0] for p in parts if p.scales),
            first_order_scales=tuple(p.scales[1] for p in parts if len(p.scales) > 1),
            local_model=tuple(p.local_model for p in parts if p.local_model),
        )


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
    step_search: bool = False,
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
            the loss, for networks that are not at a minimum (use ``step_search``); or as a
            baseline ``"kfac"``, ``"diagonal_fisher"``, ``"hessian_diagonal"`` or
            ``"magnitude"``.
        update: ``"joint"``, ``"independent"`` or ``"none"``.
        recompute_steps: reach the sparsity in this many parts, each with fresh gradients.
        measure_loss: also measure the loss after the step on the same samples.
        local_model_points: compare predicted and measured loss at so many points between
            the weights before and after each part; 0 for none, 5 is a good number.
        seed: of the samples and of anything random in the model.
        step_search: take as much of each update as lowers the loss most.
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
    config, _ = within_memory(masks, config, comm)
    pruner = Pruner(masks, config, comm, progress)
    source = FunctionLoss(model, data, loss_fn)
    if target_sparsity is not None:
        return pruner.step(source, target_sparsity)
    report = pruner.step(source, 0.0)
    return dataclasses.replace(report, target_sparsity=report.sparsity)


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
        masks.sharded,
        [p.shape for p in masks.parameters.values()],
    )
    fisher, cost = fit_into_memory(work, comm, ranks_on_host)
    return dataclasses.replace(config, fisher=fisher), cost


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


def _mean(losses: list[float]) -> float | None:
    return sum(losses) / len(losses) if losses else None


def _total(values: Iterable[float | None | list[float]]) -> float | None:
    present = [v for v in values if isinstance(v, float)]
    return sum(present) if present else None
