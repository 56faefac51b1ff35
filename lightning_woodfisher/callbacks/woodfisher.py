"""The callback that prunes single weights: settings and checks.

:mod:`.base` decides when a step happens, :mod:`lightning_woodfisher.pruning.pruner` what a
step does.
"""

from __future__ import annotations

__all__ = ["WoodFisherPruningCallback"]

import dataclasses
from collections.abc import Iterable
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import BaseFinetuning
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn

from lightning_woodfisher.base.errors import (
    ConfigurationError,
    PruningError,
    require_flag,
)
from lightning_woodfisher.base.keywords import explain_keywords
from lightning_woodfisher.base.lightning_names import has_callback
from lightning_woodfisher.callbacks.base import PruningCallback
from lightning_woodfisher.callbacks.checks import (
    describe_plan,
    require_enough_batches,
    training_horizon,
)
from lightning_woodfisher.callbacks.presets import preset
from lightning_woodfisher.callbacks.progress import (
    announce,
    describe_step,
    progress_bar,
)
from lightning_woodfisher.criteria import CriterionName
from lightning_woodfisher.distributed.communicator import Communicator
from lightning_woodfisher.fisher.config import FisherConfig
from lightning_woodfisher.layerwise.config import LayerwiseConfig
from lightning_woodfisher.pruning.config import (
    PruningConfig,
    SelectionConfig,
    StepConfig,
    check_sparsity,
    choose_update,
    require_target_fits,
)
from lightning_woodfisher.pruning.pruner import Pruner
from lightning_woodfisher.pruning.quotas import require_layers_fit
from lightning_woodfisher.pruning.report import PruningReport
from lightning_woodfisher.pruning.sample_counts import fit_to_data
from lightning_woodfisher.pruning.schedule import (
    ConstantSchedule,
    PlannedStep,
    PolynomialSchedule,
    PruningSchedule,
    continue_plan,
    keeps_zeros,
)
from lightning_woodfisher.pruning.selector import (
    find_untrained,
    is_too_sparse,
    layers_of,
    prune_zeros,
    weights_to_remove,
)
from lightning_woodfisher.reporting.loggers import log_end, log_settings
from lightning_woodfisher.resources.budget import (
    fit_into_memory,
    require_supported_device,
)
from lightning_woodfisher.weights.layers import (
    describe_selection,
    prunable_parameters,
)
from lightning_woodfisher.weights.patterns import require_pattern_fits

_DEFAULT_TARGET = 0.9


@explain_keywords()
class WoodFisherPruningCallback(PruningCallback):
    """Prune a network with second-order information while it trains.

    At the scheduled epochs (or optimizer steps) gradients of the training loss are
    collected on every rank and exchanged, so that each rank computes a share of the blocks
    of the inverse empirical Fisher. The weights of smallest saliency are set to zero, and
    the others are updated to compensate for them (Singh & Alistarh, "WoodFisher", NeurIPS
    2020). Pruned weights stay exactly zero through every optimizer step. The model stays a
    plain model: no parametrization, no renamed parameters.

    Args:
        target_sparsity: share of the selected weights that is zero at the end, in [0, 1).
        schedule: when to prune and how far; by default a cubic ramp with a step at every
            epoch, from a tenth to three quarters of training.
        criterion: saliency of a weight: ``"woodfisher"``; ``"woodtaylor"``, which also
            follows the gradient of the loss, for networks that have not converged;
            ``"layerwise"``, which reconstructs the outputs of layer after layer
            (:class:`~.criteria.layerwise.Layerwise`), for pruning without training; or a
            baseline: ``"kfac"``, ``"diagonal_fisher"``, ``"hessian_diagonal"`` or
            ``"magnitude"``.
        fisher: how the Fisher is estimated.
        selection: which weights may be pruned and what they compete for.
        step: weight update, stages and measurements of a step.
        layerwise: settings of ``criterion="layerwise"``.
        flops_target: share of the dense network's FLOPs that is left at the end. It then
            decides how many weights are pruned; ``target_sparsity`` and the schedule only
            set the pace: a step at half the target sparsity saves half of the FLOPs.
        loss_method: name of a method ``(batch, batch_idx) -> loss`` of the module to
            differentiate, for a ``training_step`` that does more than compute a loss.
        dataloader: batches to compute gradients on instead of the training data; needed
            for iterable-style data.
        report_path: JSON file for the reports of all steps; rewritten after each step.
        weight_decay_off_after_last_step: set ``weight_decay`` of all parameter groups to
            zero after the last planned step.
        log_masks: log the masks to W&B as an artifact when training ends: ``masks.pt``,
            bool tensors by parameter name, True where kept.
        log_figures: draw figures for W&B and TensorBoard after the last planned step.

    Raises:
        ConfigurationError: for a value that cannot work.
    """

    _report_class = PruningReport

    def __init__(
        self,
        target_sparsity: float = _DEFAULT_TARGET,
        schedule: PruningSchedule | None = None,
        criterion: CriterionName = "woodfisher",
        fisher: FisherConfig = FisherConfig(),
        selection: SelectionConfig = SelectionConfig(),
        step: StepConfig = StepConfig(),
        layerwise: LayerwiseConfig = LayerwiseConfig(),
        flops_target: float | None = None,
        loss_method: str | None = None,
        dataloader: Iterable[Any] | None = None,
        report_path: str | None = None,
        weight_decay_off_after_last_step: bool = False,
        log_masks: bool = False,
        log_figures: bool = True,
    ) -> None:
        check_sparsity(target_sparsity)
        self.target_sparsity = target_sparsity
        super().__init__(
            schedule if schedule is not None else PolynomialSchedule(),
            loss_method,
            dataloader,
            report_path,
            weight_decay_off_after_last_step,
            log_figures,
        )
        if isinstance(step, StepConfig):
            step = choose_update(step, criterion, trains_on=True)
        self.config = PruningConfig(
            criterion, fisher, selection, step, flops_target, layerwise
        )
        if flops_target is None:
            require_target_fits(selection, target_sparsity)
        require_flag("log_masks", log_masks)
        self.log_masks = log_masks
        # Settings of the steps: those of the user, adapted to the memory and the data.
        self._step_config = self.config

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> WoodFisherPruningCallback:
        """Create the callback with settings by name; see :mod:`.presets`.

        Args:
            name: ``"post_training"``, ``"resnet50_90"``, ``"mobilenetv1_75"``,
                ``"bert_90"`` or ``"resnet20_oneshot"``.
            overrides: arguments of the callback that replace those of the preset.

        Returns:
            The callback.
        """
        return cls(**{**preset(name), **overrides})

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(target_sparsity={self.target_sparsity}, "
            f"schedule={self.schedule!r}, criterion={self.config.criterion!r}, "
            f"fisher={self.config.fisher!r}, selection={self.config.selection!r}, "
            f"step={self.config.step!r})"
        )

    @property
    def state_key(self) -> str:
        """Key of the state in a checkpoint; two callbacks differ by what they select."""
        selection = self.config.selection
        return self._generate_state_key(
            include=selection.include,
            exclude=selection.exclude,
            only=selection.only,
        )

    # ------------------------------------------------------------------ training starts

    def _settings(self) -> dict[str, Any]:
        return {"target_sparsity": self.target_sparsity, **vars(self.config)}

    def _select(
        self, trainer: pl.Trainer, module: pl.LightningModule
    ) -> dict[str, nn.Parameter]:
        selection = self.config.selection
        parameters = prunable_parameters(
            module,
            selection.include,
            selection.exclude,
            selection.only,
            # A callback for fine-tuning may train weights later that are frozen now.
            frozen=has_callback(trainer, BaseFinetuning),
        )
        require_supported_device(module, parameters)
        require_pattern_fits(module, parameters, selection.pattern)
        return parameters

    def _prepare(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        comm = Communicator(module.device)
        config, note = self.config, ""
        if self._needs_rehearsal:
            with comm.failing_together():
                config, note = fit_to_data(config, self._source(trainer, module))
                if config.reads_data:
                    self._require_data(trainer, module, config)
        if self._plan:
            # Nothing is allocated yet, and the first step needs most memory.
            masks = self._get_masks()
            self._step_config, cost = fit_into_memory(
                masks, config, comm, trainer.num_devices
            )
            plan = describe_plan(self._plan, self._done, masks, self._describe_goal())
            selection = self.config.selection
            selected = describe_selection(
                module,
                selection.include,
                selection.exclude,
                selection.only,
                frozen=has_callback(trainer, BaseFinetuning),
            )
            lines = [plan, selected]
            lines += [cost.summary()] * bool(self._ahead())
            lines += [f"Note: {note}."] * bool(note)
            announce(trainer, "\n".join(lines))
        settings = {
            "target_sparsity": self.target_sparsity,
            **dataclasses.asdict(self.config),
        }
        log_settings(trainer, settings, self.schedule)

    def _describe_goal(self) -> str:
        """Format the target, which may be that of the signature, and the criterion."""
        target = f"target_sparsity={self.target_sparsity:g}"
        if self.config.flops_target is not None:
            target = f"flops_target={self.config.flops_target:g}"
        elif self.target_sparsity == _DEFAULT_TARGET:
            target += " (the default)"
        return f"to {target} by {self.config.criterion}"

    def _require_data(
        self, trainer: pl.Trainer, module: pl.LightningModule, config: PruningConfig
    ) -> None:
        """Check that there is enough data for the gradients of a step."""
        fisher = config.fisher
        batches = self._source(trainer, module).batches(
            fisher.num_gradients,
            fisher.gradient_batch_size,
            config.step.seed,
            fisher.repeat_samples,
        )
        if not fisher.repeat_samples:
            require_enough_batches(batches, self.dataloader, fisher.num_gradients)

    def _make_plan(self, trainer: pl.Trainer) -> tuple[PlannedStep, ...]:
        masks = self._get_masks()
        if getattr(trainer, "fast_dev_run", False):
            # One batch is too short for a schedule, so run one complete step.
            return (PlannedStep("epoch", 0, self.target_sparsity),)
        plan = self.schedule.plan(
            self.target_sparsity, training_horizon(trainer, self.schedule)
        )
        if not self._done and keeps_zeros(self.schedule):
            empty = find_untrained(masks, share=1.0)
            prune_zeros(masks, self.config.selection, empty)
            if empty:
                rank_zero_warn(
                    f"only zeros in {', '.join(empty)}, which do not count as pruned, "
                    "because pruned weights are never trained. Leave them out with "
                    "selection.exclude, or freeze them if they have to stay zero."
                )
        end = plan[-1].sparsity if plan else self.target_sparsity
        plan = continue_plan(self._done, plan)
        if self.config.flops_target is not None:
            return plan
        ahead = [step for step in plan if step not in self._done]
        may_be_lower = all(end < step.sparsity for step in self._done[-1:])
        if (
            plan
            and may_be_lower
            and is_too_sparse(masks, self.config.selection, end, self.target_sparsity)
        ):
            raise ConfigurationError(
                f"the schedule ends at sparsity {end}, but the selected "
                f"weights have {masks.sparsity():.4f} already; raise target_sparsity."
            )
        if ahead and not self._done:
            require_layers_fit(
                self.config.selection, layers_of(masks), self.target_sparsity
            )
        if plan and not ahead and any(self._missing(self.target_sparsity)):
            raise ConfigurationError(
                f"all steps of {self.schedule!r} are done, but the selected weights have "
                f"sparsity {masks.sparsity():.4f} and not target_sparsity="
                f"{self.target_sparsity}; let the schedule end later."
            )
        return plan

    # ------------------------------------------------------------------ the step

    def _has_work(self, target: PlannedStep) -> bool:
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

    def _describe(self, report: PruningReport) -> str:
        return describe_step(report)

    def _needs_data(self) -> bool:
        return super()._needs_data() and self._step_config.reads_data

    def _rehearse(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._pruner(trainer, module).rehearse(self._source(trainer, module))

    def _pruner(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Pruner:
        comm = Communicator(pl_module.device)
        return Pruner(self._get_masks(), self._step_config, comm, progress_bar(trainer))

    def _missing(self, sparsity: float) -> list[int]:
        """Return how many weights to prune by group of layers, or the steps left for FLOPs."""
        if self.config.flops_target is not None:
            # A step comes only as close to the target as whole groups allow.
            return [len(self._ahead())]
        return weights_to_remove(
            self._get_masks(), self.config.selection, sparsity, self.target_sparsity
        )

    # ------------------------------------------------------------------ fit ends

    def _log_end(self, trainer: pl.Trainer) -> None:
        log_end(trainer, self.reports, self._get_masks() if self.log_masks else None)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check that the target sparsity has been reached, or warn that it has not.

        Args:
            trainer: the Trainer.
            pl_module: its module, which Lightning has moved to the CPU.

        Raises:
            PruningError: if all steps are done, but weights are missing from the target.
        """
        super().on_fit_end(trainer, pl_module)
        masks = self._get_masks()
        if isinstance(self.schedule, ConstantSchedule):
            return
        missing = self._missing(self.target_sparsity)
        achieved = (
            f"sparsity {masks.sparsity():.4f}, not at the target {self.target_sparsity}"
        )
        if not any(missing) or self._warn_of_missed_steps(trainer, achieved):
            return
        left_dense = self.reports[-1].left_dense if self.reports else {}
        if left_dense:
            rank_zero_warn(
                f"training ended at {achieved}, because the last step could not prune "
                f"{', '.join(left_dense)} (see its report)."
            )
        else:
            raise PruningError(
                f"{sum(missing)} weights are missing from the target sparsity."
            )
