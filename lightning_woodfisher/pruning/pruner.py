"""One pruning step from end to end.

    batch → rows [m, D] → exchange → rows [N, D_r] → Fisher blocks → saliency [D_r]
          → exact threshold → mask → weight update [D_r] → gather → written in place

The step is whole or absent: weights and masks are put back when anything fails.
"""

from __future__ import annotations

__all__ = ["Pruner"]

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_woodfisher.base.clock import PhaseClock, Progress, no_progress
from lightning_woodfisher.base.errors import (
    ConfigurationError,
)
from lightning_woodfisher.criteria import Criterion, make_criterion
from lightning_woodfisher.data.batchnorm import BatchNormStatistics, estimate_statistics
from lightning_woodfisher.data.isolation import derive_seed
from lightning_woodfisher.data.losses import LossSource
from lightning_woodfisher.distributed.communicator import Communicator
from lightning_woodfisher.pruning.config import PruningConfig, check_sparsity
from lightning_woodfisher.pruning.flops import LayerFlops, count_flops
from lightning_woodfisher.pruning.local_model import LocalModel
from lightning_woodfisher.pruning.quotas import (
    Quotas,
    flops_share_of_step,
    make_quotas,
    require_target_fits,
)
from lightning_woodfisher.pruning.report import (
    LayerReport,
    LocalModelPoint,
    PruningReport,
)
from lightning_woodfisher.pruning.sampling import Sampling
from lightning_woodfisher.pruning.selector import (
    Selector,
    is_too_sparse,
    layers_of,
)
from lightning_woodfisher.pruning.stages import Stages
from lightning_woodfisher.pruning.step_length import StepLength
from lightning_woodfisher.weights.active import ActiveWeights
from lightning_woodfisher.weights.masks import Masks
from lightning_woodfisher.weights.patterns import parse_pattern
from lightning_woodfisher.weights.rollback import rollback_on_error


@dataclass
class _Observed:
    """A criterion that has seen its gradients, and what it has removed since."""

    criterion: Criterion
    active: ActiveWeights
    losses: list[float]
    collection: str | None
    gone: Tensor


@dataclass(frozen=True)
class _StageResult:
    """What one part of a step leaves behind for the report; layers in order."""

    thresholds: list[float | None]
    quantiles: list[tuple[float, ...]]
    predicted: list[float] | None
    damping: float | None
    raised_damping: dict[str, float]
    fisher_bytes: int
    losses_before: list[float]
    losses_after: list[float]
    local_model: tuple[LocalModelPoint, ...]
    collection: str | None
    scales: Sequence[float]
    update: str

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
        # Outermost: what the ranks find out together at the very end undoes it, too.
        with (
            rollback_on_error(self.masks, source.model),
            self.comm.failing_together(lambda: clock.phase),
        ):
            with clock("check"):
                self.masks.require_equal_on_ranks(self.comm, "before the step")
            quotas = self._quotas(target_sparsity, final_sparsity)
            zeros_before = self.masks.zeros()
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
                parts, stage_halvings = self._parts(sampling, clock, selector, position)
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
                stage_halvings=stage_halvings,
                nonfinite_gradients=sampling.nonfinite,
                batchnorm_layers=len(statistics.layers),
            )
            with clock("check"):
                self.masks.require_equal_on_ranks(self.comm, "after the step")
            # On leaving the ranks agree: none may keep a step that another takes back.
        return report

    def rehearse(self, source: LossSource) -> None:
        """Find out early whether the model and the data give what a step needs.

        One gradient on each rank, or one loss, is computed and dropped. Nothing changes.

        Args:
            source: where gradients come from.
        """
        config, comm = self.config, self.comm
        most = config.fisher.max_nonfinite
        few = min(config.fisher.num_gradients, comm.world_size + most)
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
    ) -> tuple[list[_StageResult], int]:
        """Do all parts; give their results and how often parts were halved."""
        config = self.config
        way = Stages(config.recompute_steps)
        results: list[_StageResult] = []
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
        return results, way.stage_halvings

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
        return count_flops(
            source, self.masks, self.comm, number, size, seed, fisher.repeat_samples
        )

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
    ) -> _StageResult:
        """Inverse, mask and update, once through."""
        config = self.config
        criterion, active = observed.criterion, observed.active
        losses_before, collection = observed.losses, observed.collection

        search = config.searches
        # Trials of the search overwrite the weights.
        local_model = LocalModel(self.masks, config.local_model_points)
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
        # What is not needed any more makes room for what comes.
        del descent
        with clock("factorize"):
            candidates = selector.candidates(criterion, active, weights, observed.gone)
        with clock("select"):
            removed, thresholds = selector.choose(candidates, active, fraction)
            quantiles = selector.quantiles(candidates)
        del candidates
        with clock("update"):
            directions = criterion.directions(weights, removed)
            others = criterion.alternatives(weights, removed) if search else {}
        observed.gone |= removed
        with clock("search"):
            chosen = length.choose(observed.gone, directions, others)
        del directions, others, removed
        change = chosen.change
        with clock("update"):
            shares = criterion.predicted_increase(change)
            predicted = None if shares is None else active.sum_by_layer(shares)
        with clock("write"):
            active.write(weights + change, observed.gone)

        def predict(fraction: float) -> float | None:
            shares = criterion.predicted_increase(fraction * change)
            return None if shares is None else sum(active.sum_by_layer(shares))

        losses_after = chosen.losses if config.measure_loss else []
        if losses_after is None:
            losses_after = sampling.measure(seed)
        return _StageResult(
            thresholds=thresholds,
            quantiles=quantiles,
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
            scales=chosen.scales,
            update=chosen.update,
        )

    def _report(
        self,
        parts: list[_StageResult],
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
                saliency_quantiles=last.quantiles[i],
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
            stages=len(parts),
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
            updates=tuple(p.update for p in parts),
            local_model=tuple(p.local_model for p in parts if p.local_model),
        )


def _mean(losses: list[float]) -> float | None:
    return sum(losses) / len(losses) if losses else None


def _total(values: Iterable[float | None | list[float]]) -> float | None:
    present = [v for v in values if isinstance(v, float)]
    return sum(present) if present else None
