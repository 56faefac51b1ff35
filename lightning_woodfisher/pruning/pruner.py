"""One pruning step from end to end.

    batch → rows [m, D] → exchange → rows [N, D_r] → Fisher blocks → saliency [D_r]
          → exact threshold → mask → weight update [D_r] → gather → written in place

A failed step is rolled back: weights, masks and BatchNorm statistics are restored.
"""

from __future__ import annotations

__all__ = ["Pruner"]

import dataclasses
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_woodfisher.base.clock import PhaseClock, Progress, no_progress
from lightning_woodfisher.base.errors import ConfigurationError
from lightning_woodfisher.criteria import Criterion, make_criterion
from lightning_woodfisher.data.batchnorm import BatchNormStatistics
from lightning_woodfisher.data.isolation import derive_seed
from lightning_woodfisher.data.losses import LossSource
from lightning_woodfisher.distributed.communicator import Communicator
from lightning_woodfisher.pruning.by_layer import rehearse_by_layer, run_by_layer
from lightning_woodfisher.pruning.config import (
    PruningConfig,
    check_sparsity,
    require_target_fits,
)
from lightning_woodfisher.pruning.evaluator import Evaluator
from lightning_woodfisher.pruning.local_model import LocalModel
from lightning_woodfisher.pruning.quotas import (
    Quotas,
    flops_share_of_step,
    make_quotas,
    require_layers_fit,
)
from lightning_woodfisher.pruning.report import PruningReport
from lightning_woodfisher.pruning.selector import (
    Selector,
    find_untrained,
    is_too_sparse,
    layers_of,
)
from lightning_woodfisher.pruning.stage_results import (
    StageResult,
    mean_loss,
    summarize,
)
from lightning_woodfisher.pruning.stages import Stages
from lightning_woodfisher.pruning.step_length import StepLength
from lightning_woodfisher.weights.active import ActiveWeights
from lightning_woodfisher.weights.masks import Masks
from lightning_woodfisher.weights.patterns import parse_pattern
from lightning_woodfisher.weights.rollback import rollback_on_error

# Share of the rise to the loss of a network without weights that calls for a warning.
_WRECKED = 0.5


@dataclass
class _Observed:
    """A criterion that has observed its gradients, and the weights removed since then."""

    criterion: Criterion
    active: ActiveWeights
    seed: int
    losses: list[float]
    collection: str | None
    removed: Tensor


class Pruner:
    """Prune the selected parameters of a model, step by step.

    Args:
        masks: which weights are selected and which are pruned already; every step
            changes them.
        config: settings of the step.
        communicator: the ranks of the job.
        progress: called with a title and a total; returns a context manager that yields a
            function, which is called with the number of finished items.
        make_evaluator: class that evaluates the model on the data.
    """

    def __init__(
        self,
        masks: Masks,
        config: PruningConfig,
        communicator: Communicator,
        progress: Progress | None = None,
        make_evaluator: Callable[..., Evaluator] = Evaluator,
    ) -> None:
        self.masks = masks
        self.config = config
        self.comm = communicator
        self._progress = progress or no_progress
        self._make_evaluator = make_evaluator

    def step(
        self,
        source: LossSource,
        target_sparsity: float,
        position: int = 0,
        final_sparsity: float | None = None,
    ) -> PruningReport:
        """Prune to a sparsity.

        A target below the present sparsity is a :class:`ConfigurationError`, a failed step
        a :class:`PruningError`. After any exception the model is as it was before.

        Args:
            source: source of losses and gradients.
            target_sparsity: share of the selected weights that is pruned afterwards.
            position: position of the step in training. It enters the seed: every step
                draws other samples, and a repeated step draws the same.
            final_sparsity: sparsity after the last step. Before the last step, targets of
                layers and of FLOPs are scaled in proportion. None for a single step.

        Returns:
            The report; equal on all ranks except for the seconds.
        """
        clock, sent_before = PhaseClock(), self.comm.bytes_sent
        evaluator = self._make_evaluator(
            source,
            self.masks,
            self.config.fisher,
            self.comm,
            clock,
            self._progress,
            self.config.step.measure_loss,
            self.config.step.search_samples,
        )
        # Outermost: an error that the ranks agree on at the very end is rolled back, too.
        with (
            rollback_on_error(self.masks, source.model),
            self.comm.failing_together(lambda: clock.phase),
        ):
            with clock("check"):
                self.masks.require_equal_on_ranks(self.comm, "before the step")
            untrained = find_untrained(self.masks)
            quotas = self._quotas(target_sparsity, final_sparsity, untrained)
            zeros_before = self.masks.zeros()
            with evaluator.session():
                share = flops_share_of_step(
                    self.config.flops_target, target_sparsity, final_sparsity
                )
                selector = self._selector(evaluator, quotas, share, position)
                selector.left_dense.update(
                    dict.fromkeys(untrained, "(nearly) all weights are exactly zero")
                )
                stages = Stages(self.config.step.recompute_steps)
                run = self._run(stages, evaluator, selector, position)
                if self.config.by_layer:
                    run = run_by_layer(
                        source,
                        self.masks,
                        self.config,
                        self.comm,
                        evaluator,
                        quotas,
                        stages,
                        position,
                        self._progress,
                    )
                results = list(run)
                shifted = BatchNormStatistics({})
                if self.config.by_layer:
                    shifted = BatchNormStatistics.of(source.model)
                self.masks.verify()
                statistics = evaluator.batchnorm_statistics(
                    self.config.recalibration_batches,
                    derive_seed(self.config.step.seed, position, "batchnorm"),
                )
                self._warn_of_left_dense(selector.left_dense)
                recalibrated = None
                if statistics.layers and self.config.step.measure_loss:
                    recalibrated = mean_loss(evaluator.measure_again(statistics))
                self._warn_if_wrecked(evaluator, results, recalibrated)
            # After the session, which restores the statistics that it has found.
            shifted.write(source.model)
            statistics.write(source.model)
            report = summarize(
                results,
                self.config,
                self.masks,
                source.model,
                zeros_before,
                self.comm,
                target_sparsity=target_sparsity,
                sent=self.comm.bytes_sent - sent_before,
                seconds=clock.seconds,
                stage_halvings=stages.halvings,
                nonfinite_gradients=evaluator.nonfinite,
                batchnorm_layers=len(statistics.layers),
                left_dense=selector.left_dense,
                loss_recalibrated=recalibrated,
                **selector.flops_before_and_after(),
            )
            with clock("check"):
                self.masks.require_equal_on_ranks(self.comm, "after the step")
        return report

    def rehearse(self, source: LossSource) -> None:
        """Check with a few samples that model and data support a pruning step.

        Computes one gradient, or one loss, on each rank and discards it. Nothing changes.

        Args:
            source: source of losses and gradients.
        """
        config, comm = self.config, self.comm
        few = comm.world_size + config.fisher.max_nonfinite
        fisher = dataclasses.replace(
            config.fisher, num_gradients=min(config.fisher.num_gradients, few)
        )
        evaluator = Evaluator(
            source, self.masks, fisher, comm, measure_loss=config.step.measure_loss
        )
        with comm.failing_together(), evaluator.session():
            if config.counts_flops:
                # Raises an error for a target that is out of reach.
                quotas = make_quotas(config.selection, layers_of(self.masks), 0.0)
                self._selector(evaluator, quotas, config.flops_target, None)
            if config.by_layer:
                count = fisher.num_gradients
                rehearse_by_layer(source, self.masks, config, comm, evaluator, count)
                return
            criterion = make_criterion(config.criterion, fisher, config.update)
            pattern = parse_pattern(config.selection.pattern)
            evaluator.rehearse(criterion, config.step.seed, pattern)

    def _quotas(
        self,
        target_sparsity: float,
        final_sparsity: float | None,
        untrained: Collection[str],
    ) -> Quotas:
        """Count the weights that must be removed; none if there is a ``flops_target``."""
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
        elif final_sparsity is None:
            # Earlier steps of a schedule may have a target below the zeros of a layer.
            require_layers_fit(selection, layers_of(masks), target_sparsity)
        return make_quotas(
            selection,
            layers_of(masks),
            target_sparsity,
            final_sparsity,
            self.config.step.recompute_spacing,
            untrained,
        )

    def _selector(
        self,
        evaluator: Evaluator,
        quotas: Quotas,
        flops_share: float | None,
        position: int | None,
    ) -> Selector:
        """Make the selector of a step; count FLOPs if the settings need them."""
        seed = self.config.step.seed
        if position is not None:
            seed = derive_seed(seed, position, 0)
        return Selector(
            self.masks,
            self.config.selection,
            self.comm,
            quotas,
            evaluator.count_flops(seed) if self.config.counts_flops else None,
            flops_share,
        )

    def _run(
        self, stages: Stages, evaluator: Evaluator, selector: Selector, position: int
    ) -> Iterator[StageResult]:
        """Run all stages of a step, with fresh or reused gradients."""
        step, number = self.config.step, 0
        observed: _Observed | None = None
        losses: list[float] = []
        while not stages.is_done:
            fraction = stages.advance()
            if observed is None:
                seed = derive_seed(step.seed, position, number)
                observed = self._observe(evaluator, selector, seed)
            else:
                observed.criterion.restrict(~observed.removed)
                observed.losses = losses
            result = self._stage(evaluator, selector, observed, fraction)
            if not step.reuse_gradients:
                # Free this Fisher before the next one is made.
                observed = None
            if step.trust_ratio is not None and result.exceeds(step.trust_ratio):
                stages.halve()
            losses, number = result.losses_after, number + 1
            yield result

    def _leave_idle_dense(self, evaluator: Evaluator, selector: Selector) -> None:
        """Leave tensors without any gradient dense, unless no other can be pruned.

        Their saliencies are those of λ alone. They would lose all weights at once, such as
        LoRA's ``lora_A`` before the first optimizer step, while ``lora_B`` is zero.
        """
        zeros = self.masks.zeros()
        others = {
            name
            for name, parameter in self.masks.parameters.items()
            if zeros[name] < parameter.numel() and name not in selector.left_dense
        }
        idle = others.intersection(evaluator.without_gradient)
        if idle != others:
            selector.leave_dense(idle, "all gradients of its weights are zero")

    def _warn_if_wrecked(
        self,
        evaluator: Evaluator,
        results: Sequence[StageResult],
        recalibrated: float | None,
    ) -> None:
        """Warn if most of what the network has learned is lost.

        The loss is compared with that of a network without any of the selected weights,
        which is measured only if the loss has doubled.
        """
        before = mean_loss(results[0].losses_before)
        after = mean_loss(results[-1].losses_after)
        if recalibrated is not None:
            after = recalibrated
        if before is None or after is None or after <= 2.0 * before:
            return
        nothing = evaluator.measure_without_weights()
        # False for NaN.
        if after - before >= _WRECKED * (nothing - before) and self.comm.rank == 0:
            stages = self.config.step.recompute_steps
            warnings.warn(
                f"this pruning step raised the loss from {before:.3g} to {after:.3g}; with "
                f"all selected weights zero it is {nothing:.3g}, so most of what the network "
                "has learned is lost. Reach the sparsity in smaller steps: a schedule with "
                f"more steps, step.recompute_steps={max(8, 2 * stages)}, or a lower target.",
                stacklevel=3,
            )

    def _warn_of_left_dense(self, left_dense: Mapping[str, str]) -> None:
        if left_dense and self.comm.rank == 0:
            found = "; ".join(f"{name}: {why}" for name, why in left_dense.items())
            warnings.warn(
                f"not pruned in this step, because the saliencies are unknown: {found}. The "
                "other weights alone reach the sparsity. Prune after these have been "
                "trained, or leave them out with selection.exclude.",
                stacklevel=3,
            )

    def _observe(
        self, evaluator: Evaluator, selector: Selector, seed: int
    ) -> _Observed:
        """Collect gradients of the active weights for a fresh criterion."""
        config, comm = self.config, self.comm
        criterion = make_criterion(config.criterion, config.fisher, config.update)
        active = ActiveWeights(self.masks, criterion.layout, comm, selector.pattern)
        criterion.begin(active.partition, comm)
        losses, collection = evaluator.observe(criterion, active, seed)
        size = active.partition.shard_sizes()[comm.rank]
        removed = torch.zeros(size, dtype=torch.bool, device=comm.device)
        return _Observed(criterion, active, seed, losses, collection, removed)

    def _stage(
        self,
        evaluator: Evaluator,
        selector: Selector,
        observed: _Observed,
        fraction: float,
    ) -> StageResult:
        """Run one stage: invert, select, update and write."""
        step, search, clock = self.config.step, self.config.searches, evaluator.clock
        criterion, active, seed = observed.criterion, observed.active, observed.seed
        self._leave_idle_dense(evaluator, selector)
        # Before the line search, whose trials overwrite the weights.
        local_model = LocalModel(self.masks, step.local_model_points)
        with clock("factorize"):
            weights = active.read()
            descent = criterion.descent() if search else None
        length = StepLength(
            criterion,
            active,
            evaluator,
            weights,
            seed,
            largest=step.update_scale,
            search=search,
        )
        with clock("search"):
            length.prepare(descent)
        # Tensors that are not needed any more make room for the next ones.
        del descent
        with clock("factorize"):
            candidates = selector.candidates(
                criterion, active, weights, observed.removed
            )
        with clock("select"):
            removed, thresholds = selector.choose(candidates, active, fraction)
            quantiles = selector.quantiles(candidates)
        del candidates
        with clock("update"):
            directions = criterion.directions(weights, removed)
            others = criterion.alternatives(weights, removed) if search else {}
        observed.removed |= removed
        with clock("search"):
            chosen = length.choose(observed.removed, directions, others)
        del directions, others, removed

        def predict(fraction: float = 1.0) -> list[float] | None:
            shares = criterion.predicted_increase(fraction * chosen.change)
            return None if shares is None else active.sum_by_layer(shares)

        with clock("update"):
            predicted = predict()
        with clock("write"):
            active.write(weights + chosen.change, observed.removed)
        losses_after = chosen.losses if step.measure_loss else []
        if losses_after is None:
            losses_after = evaluator.measure(seed)
        return StageResult(
            thresholds=thresholds,
            quantiles=quantiles,
            predicted=predicted,
            damping=criterion.damping,
            raised_damping=active.name_blocks(criterion.raised_damping()),
            fisher_bytes=criterion.state_bytes,
            arithmetics=criterion.count_arithmetics(),
            losses_before=observed.losses,
            losses_after=losses_after,
            local_model=local_model.check(
                predict, lambda: evaluator.measure(seed), observed.losses, losses_after
            ),
            collection=observed.collection,
            scales=chosen.scales,
            update=chosen.update,
        )
