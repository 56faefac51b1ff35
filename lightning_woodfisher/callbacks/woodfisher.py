"""The Lightning callback: settings, and what must be checked before training starts.

When a step happens and how masks live through training is in :mod:`.masked_training`,
what a step does in :mod:`.pruner`.
"""

from __future__ import annotations

__all__ = ["WoodFisherPruningCallback"]

from collections.abc import Iterable
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn

from lightning_woodfisher.base.errors import (
    ConfigurationError,
    PruningError,
    require_flag,
)
from lightning_woodfisher.callbacks.base import PruningCallback
from lightning_woodfisher.callbacks.checks import (
    describe_plan,
    releases_weights,
    require_enough_batches,
    training_horizon,
)
from lightning_woodfisher.callbacks.presets import preset
from lightning_woodfisher.callbacks.progress import announce, log_report, progress_bar
from lightning_woodfisher.criteria import CriterionName
from lightning_woodfisher.criteria.obs import Update
from lightning_woodfisher.distributed.communicator import Communicator
from lightning_woodfisher.fisher.config import FisherConfig
from lightning_woodfisher.pruning.config import PruningConfig, check_sparsity
from lightning_woodfisher.pruning.pruner import Pruner
from lightning_woodfisher.pruning.quotas import require_target_fits
from lightning_woodfisher.pruning.report import PruningReport
from lightning_woodfisher.pruning.schedule import (
    ConstantSchedule,
    PlannedStep,
    PolynomialSchedule,
    PruningSchedule,
)
from lightning_woodfisher.pruning.selection import SelectionConfig
from lightning_woodfisher.pruning.selector import (
    is_too_sparse,
    take_zeros,
    weights_to_remove,
)
from lightning_woodfisher.pruning.stages import Spacing
from lightning_woodfisher.reporting.loggers import track_end, track_settings, track_step
from lightning_woodfisher.resources.budget import fit_into_memory, require_one_device
from lightning_woodfisher.weights.layers import prunable_parameters
from lightning_woodfisher.weights.patterns import require_pattern_fits


class WoodFisherPruningCallback(PruningCallback):
    """Prune a network with second-order information while it trains.

    At the scheduled epochs (or optimizer steps) gradients of the training loss are
    collected on every rank, exchanged, and turned into blocks of the inverse empirical
    Fisher that are shared over the ranks; the weights of smallest saliency are set to
    zero, and the others are updated to make up for them (Singh & Alistarh, "WoodFisher",
    NeurIPS 2020). Pruned weights stay exactly zero through every optimizer step. The
    model stays a plain model: no parametrisation, no renamed parameters.

    Args:
        target_sparsity: share of the selected weights that is zero at the end, in [0, 1).
        schedule: when to prune and how far; by default the cubic ramp over the first
            three quarters of training, with a step at every epoch.
        fisher: how the Fisher is estimated.
        selection: which weights may go and what they compete for.
        criterion: ``"woodfisher"``; ``"woodtaylor"``, which also follows the gradient of
            the loss, for networks that are not at a minimum; or as a baseline
            ``"kfac"``, ``"diagonal_fisher"``, ``"hessian_diagonal"`` or ``"magnitude"``.
        update: how the kept weights make up for the removed ones: ``"joint"`` minimises
            the quadratic model, ``"independent"`` sums the single-weight updates as
            published, ``"none"`` leaves them alone.
        recompute_steps: reach each step's sparsity in this many parts, with fresh
            gradients and a fresh inverse for each part.
        loss_method: name of a method ``(batch, batch_idx) -> loss`` of the module to take
            gradients of, for a ``training_step`` that does more than compute a loss.
        dataloader: where gradient samples come from, in place of the training dataloader;
            needed for iterable-style data.
        measure_loss: measure the loss after each step on the same samples, to compare the
            rise with the predicted one.
        local_model_points: compare predicted and measured loss at so many points between
            the weights before and after each part of a step; 0 for none, 5 is a good
            number. Each but the two ends costs one more pass over the samples.
        report_path: JSON file that receives the reports of all steps; rewritten after
            each step.
        seed: of the choice of samples and of anything random in the module.
        flops_target: share of the dense network's FLOPs that is left at the end. It then
            decides how many weights go, and ``target_sparsity`` and the schedule say only
            how fast: a step at half the target sparsity saves half of the FLOPs.
        step_search: take as much of each update as gives the smallest loss measured on the
            samples, nothing if need be, so that no update makes it worse; in place of the
            joint update the independent one where that is better. Costs a few passes over
            the samples; False takes the update as it is.
        update_scale: share of the update of the kept weights that is taken, in [0, 1];
            with ``step_search`` the most that is. 0 leaves them alone, like
            ``update="none"`` and Optimal Brain Damage.
        recompute_spacing: where the parts of a step end: ``"geometric"`` in the kept
            share, ``"linear"`` or ``"polynomial"``.
        reuse_gradients: all parts of a step use the gradients of the first one, with a new
            inverse on the weights that are left.
        trust: when the loss has risen in a part by more than this multiple of the
            prediction, the parts that follow are half as long, down to an eighth.
        batchnorm_recalibration_batches: re-estimate BatchNorm's running statistics on so
            many batches (of 64 samples or ``gradient_batch_size``, the larger) after each
            step; 0 leaves them.
        weight_decay_off_after_last_step: set ``weight_decay`` of all parameter groups to
            zero once the last planned step is done.
        log_masks: give W&B the masks as an artifact when training ends: ``masks.pt``, bool
            tensors by parameter name, True where kept.

    Raises:
        ConfigurationError: for a value that cannot work.
    """

    def __init__(
        self,
        target_sparsity: float = 0.9,
        schedule: PruningSchedule | None = None,
        fisher: FisherConfig = FisherConfig(),
        selection: SelectionConfig = SelectionConfig(),
        criterion: CriterionName = "woodfisher",
        update: Update = "joint",
        recompute_steps: int = 1,
        loss_method: str | None = None,
        dataloader: Iterable[Any] | None = None,
        measure_loss: bool = True,
        report_path: str | None = None,
        seed: int = 0,
        flops_target: float | None = None,
        step_search: bool = True,
        update_scale: float = 1.0,
        local_model_points: int = 0,
        recompute_spacing: Spacing = "geometric",
        reuse_gradients: bool = False,
        trust: float | None = None,
        batchnorm_recalibration_batches: int = 0,
        weight_decay_off_after_last_step: bool = False,
        log_masks: bool = False,
    ) -> None:
        check_sparsity(target_sparsity)
        self.target_sparsity = target_sparsity
        super().__init__(
            schedule if schedule is not None else PolynomialSchedule(),
            loss_method,
            dataloader,
            report_path,
            weight_decay_off_after_last_step,
        )
        self.config = PruningConfig(
            fisher=fisher,
            selection=selection,
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
        if flops_target is None:
            require_target_fits(selection, target_sparsity)
        require_flag("log_masks", log_masks)
        self.log_masks = log_masks
        # The settings of the steps; those of the user, made to fit into memory.
        self._step_config = self.config

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> WoodFisherPruningCallback:
        """Make the callback with published settings; see :mod:`.presets`.

        Args:
            name: ``"resnet50_90"``, ``"mobilenetv1_75"``, ``"bert_90"`` or
                ``"resnet20_oneshot"``.
            overrides: arguments of the callback that replace those of the preset.

        Returns:
            The callback.
        """
        return cls(**{**preset(name), **overrides})

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(target_sparsity={self.target_sparsity}, "
            f"schedule={self.schedule!r}, criterion={self.config.criterion!r}, "
            f"update={self.config.update!r}, fisher={self.config.fisher!r}, "
            f"selection={self.config.selection!r})"
        )

    @property
    def state_key(self) -> str:
        """Key of the state in a checkpoint; two callbacks differ by what they select."""
        selection = self.config.selection
        return self._generate_state_key(
            include=selection.include, exclude=selection.exclude
        )

    # ------------------------------------------------------------------ training starts

    def _select(
        self, trainer: pl.Trainer, module: pl.LightningModule
    ) -> dict[str, nn.Parameter]:
        selection = self.config.selection
        parameters = prunable_parameters(
            module,
            selection.include,
            selection.exclude,
            frozen=releases_weights(trainer),
        )
        require_one_device(parameters)
        require_pattern_fits(module, parameters, selection.pattern)
        return parameters

    def _prepare(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        comm = Communicator(module.device)
        if self._untried:
            with comm.failing_together():
                self._require_data(trainer, module)
        if self._plan:
            # Nothing is allocated yet; the first step is the one that needs most.
            masks = self._get_masks()
            self._step_config, cost = fit_into_memory(
                masks, self.config, comm, trainer.num_devices
            )
            kind = self.config.criterion
            plan = describe_plan(self._plan, self._done, masks, kind)
            announce(trainer, f"{plan}\n{cost.summary()}")
        track_settings(trainer, self.config, self.target_sparsity, self.schedule)

    def _require_data(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Refuse data that cannot give the gradients of a step."""
        fisher = self.config.fisher
        batches = self._source(trainer, module).batches(
            fisher.num_gradients,
            fisher.gradient_batch_size,
            self.config.seed,
            fisher.repeat_samples,
        )
        if not fisher.repeat_samples:
            require_enough_batches(batches, self.dataloader, fisher.num_gradients)

    def _make_plan(self, trainer: pl.Trainer) -> tuple[PlannedStep, ...]:
        masks = self._get_masks()
        if getattr(trainer, "fast_dev_run", False):
            # One batch has no room for a schedule; try one whole step all the same.
            return (PlannedStep("epoch", 0, self.target_sparsity),)
        plan = self.schedule.plan(
            self.target_sparsity, training_horizon(trainer, self.schedule)
        )
        starts_sparse = getattr(self.schedule, "initial_sparsity", 0.0) > 0
        if not self._done and (
            starts_sparse or isinstance(self.schedule, ConstantSchedule)
        ):
            take_zeros(masks, self.config.selection)
        ahead = [step for step in plan if (step.unit, step.position) not in self._done]
        if self.config.flops_target is not None:
            return plan
        if ahead and is_too_sparse(
            masks, self.config.selection, ahead[-1].sparsity, self.target_sparsity
        ):
            raise ConfigurationError(
                f"the schedule asks for sparsity {ahead[-1].sparsity} in the end, but the "
                f"selected weights have {masks.sparsity():.4f} already; raise "
                "target_sparsity."
            )
        if plan and not ahead and any(self._missing(self.target_sparsity)):
            raise ConfigurationError(
                f"all steps of {self.schedule!r} are done, but the selected weights have "
                f"sparsity {masks.sparsity():.4f} and not target_sparsity="
                f"{self.target_sparsity}; let the schedule end later."
            )
        return plan

    # ------------------------------------------------------------------ the step

    def _lacks(self, target: PlannedStep) -> bool:
        return any(self._missing(target.sparsity))

    def _step(
        self, trainer: pl.Trainer, module: pl.LightningModule, target: PlannedStep
    ) -> PruningReport:
        return self._pruner(trainer, module).step(
            self._source(trainer, module),
            target.sparsity,
            target.position,
            self.target_sparsity,
        )

    def _log(self, trainer: pl.Trainer, report: PruningReport) -> None:
        log_report(trainer, report)
        track_step(trainer, self.reports, self._get_masks())

    def _reads_on(self) -> bool:
        return bool(self._ahead()) and self.config.reads_data

    def _rehearse(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._pruner(trainer, module).rehearse(self._source(trainer, module))

    def _read_report(self, plain: dict[str, Any]) -> PruningReport:
        return PruningReport.from_dict(plain)

    def _pruner(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Pruner:
        comm = Communicator(pl_module.device)
        return Pruner(self._get_masks(), self._step_config, comm, progress_bar(trainer))

    def _missing(self, sparsity: float) -> list[int]:
        """How many zeros each group of competitors lacks; steps if FLOPs decide."""
        if self.config.flops_target is not None:
            # A step comes as near as whole groups allow.
            return [len(self._ahead())]
        return weights_to_remove(
            self._get_masks(), self.config.selection, sparsity, self.target_sparsity
        )

    # ------------------------------------------------------------------ fit ends

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check that the promised sparsity is there.

        Args:
            trainer: the Trainer.
            pl_module: its module.

        Raises:
            PruningError: when it is not.
        """
        masks = self._get_masks()
        masks.verify()
        track_end(trainer, self.reports, masks, self.log_masks)
        missed = self._ahead()
        missing = self._missing(self.target_sparsity)
        if isinstance(self.schedule, ConstantSchedule) or not any(missing):
            return
        message = (
            f"training ended at sparsity {masks.sparsity():.4f}, not at the target "
            f"{self.target_sparsity}: {len(missed)} planned step(s) did not happen, the "
            f"first at {missed[0].unit} {missed[0].position}."
            if missed
            else f"{sum(missing)} weights are missing from the target sparsity."
        )
        if trainer.interrupted:
            rank_zero_warn(message)
        else:
            raise PruningError(f"{message} Train longer, or end the schedule earlier.")
