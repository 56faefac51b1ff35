"""The Lightning callback: when to prune. What a step does is in :mod:`.pruner`.

Pruning happens in ``on_train_epoch_start`` (or ``on_train_batch_start`` for a schedule in
optimizer steps), so that validation and checkpoints of the epoch see the pruned weights.
"""

from __future__ import annotations

__all__ = ["WoodFisherPruningCallback"]

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_woodfisher.budget import require_one_device, within_memory
from lightning_woodfisher.configuration import PruningConfig, check_sparsity
from lightning_woodfisher.criteria import CriterionName
from lightning_woodfisher.distributed import Communicator
from lightning_woodfisher.errors import (
    ConfigurationError,
    PruningError,
    require_flag,
    require_text,
)
from lightning_woodfisher.fisher import FisherConfig
from lightning_woodfisher.layers import prunable_parameters
from lightning_woodfisher.loggers import announce, log_report, progress_bar
from lightning_woodfisher.masks import Masks
from lightning_woodfisher.obs import Update
from lightning_woodfisher.parts import Spacing
from lightning_woodfisher.patterns import require_pattern_fits
from lightning_woodfisher.preparation import (
    describe_plan,
    refuse_averaging,
    require_enough_batches,
    require_masks_hold,
    require_same_selection,
    require_supported,
    require_weight_decay,
    training_horizon,
)
from lightning_woodfisher.presets import preset
from lightning_woodfisher.pruner import Pruner
from lightning_woodfisher.quotas import require_target_fits
from lightning_woodfisher.report import PruningReport
from lightning_woodfisher.schedule import (
    ConstantSchedule,
    PlannedStep,
    PolynomialSchedule,
    PruningSchedule,
    Unit,
)
from lightning_woodfisher.selection import SelectionConfig
from lightning_woodfisher.selector import is_too_sparse, take_zeros, weights_to_remove
from lightning_woodfisher.sharding import reshard
from lightning_woodfisher.training_step import TrainingStepLoss

_STATE_VERSION = 1


class WoodFisherPruningCallback(pl.Callback):
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
            the loss, for networks that are not at a minimum (use ``step_search``); or as a
            baseline ``"kfac"``, ``"diagonal_fisher"``, ``"hessian_diagonal"`` or
            ``"magnitude"``.
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
            samples, nothing if need be, so that no update makes it worse.
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
        step_search: bool = False,
        update_scale: float = 1.0,
        local_model_points: int = 0,
        recompute_spacing: Spacing = "geometric",
        reuse_gradients: bool = False,
        trust: float | None = None,
        batchnorm_recalibration_batches: int = 0,
        weight_decay_off_after_last_step: bool = False,
    ) -> None:
        check_sparsity(target_sparsity)
        self.target_sparsity = target_sparsity
        self.schedule = schedule if schedule is not None else PolynomialSchedule()
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
        require_text("loss_method", loss_method)
        require_text("report_path", report_path)
        require_flag(
            "weight_decay_off_after_last_step", weight_decay_off_after_last_step
        )
        self.weight_decay_off_after_last_step = weight_decay_off_after_last_step
        self.loss_method = loss_method
        self.dataloader = dataloader
        self.report_path = report_path
        self.masks: Masks | None = None
        self.reports: list[PruningReport] = []
        # The settings of the steps; those of the user, made to fit into memory.
        self._step_config = self.config
        self._plan: tuple[PlannedStep, ...] = ()
        self._untried = False
        self._done: list[tuple[Unit, int]] = []
        self._restored_masks: Mapping[str, Any] | None = None
        self._handles: list[RemovableHandle] = []

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

    # ------------------------------------------------------------------ fit starts

    def setup(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str
    ) -> None:
        """Refuse what cannot work, before anything is loaded.

        Args:
            trainer: the Trainer.
            pl_module: its module.
            stage: only ``"fit"`` matters.

        Raises:
            ConfigurationError: for a strategy or a loss method that cannot work.
        """
        if stage != "fit":
            return
        require_supported(trainer)
        refuse_averaging(trainer)
        if self.loss_method is not None and not callable(
            getattr(pl_module, self.loss_method, None)
        ):
            raise ConfigurationError(
                f"loss_method={self.loss_method!r} is not a method of "
                f"{type(pl_module).__name__}."
            )
        # Optimizers that are stepped bare, without Lightning's wrapper, count no steps.
        if trainer.global_step == 0 and trainer.current_epoch == 0:
            # A new run: whatever an earlier fit has left here does not belong to it.
            # A checkpoint to resume from is loaded after this.
            self.masks, self.reports, self._done = None, [], []
            self._restored_masks = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Select the parameters and take over the masks of a checkpoint.

        Args:
            trainer: the Trainer.
            pl_module: its module, on its device.
        """
        selection = self.config.selection
        # A forward pass before fit may have left gathered copies in place of shards.
        reshard(pl_module)
        parameters = prunable_parameters(
            pl_module, selection.include, selection.exclude
        )
        require_one_device(parameters)
        require_pattern_fits(pl_module, parameters, selection.pattern)
        if self._restored_masks is None and self.masks is not None:
            self._restored_masks = self.masks.state_dict()
        self.masks = Masks(parameters)
        self._require_sole_owner(trainer)
        if not trainer.strategy.restore_checkpoint_after_setup:
            self._take_restored_masks()

    def on_train_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule
    ) -> None:
        """Plan the steps, show the plan, and guard the masks from the optimizers.

        Args:
            trainer: the Trainer.
            pl_module: its module.
        """
        masks = self._get_masks()
        # A sharded model is given its checkpoint only after on_fit_start.
        self._take_restored_masks()
        self._plan = self._make_plan(trainer, masks)
        self._untried = self._reads_on()
        if self._untried:
            with Communicator(pl_module.device).failing_together():
                fisher = self.config.fisher
                batches = self._source(trainer, pl_module).batches(
                    fisher.num_gradients,
                    fisher.gradient_batch_size,
                    self.config.seed,
                    fisher.repeat_samples,
                )
                if not fisher.repeat_samples:
                    require_enough_batches(
                        batches, self.dataloader, fisher.num_gradients
                    )
        if self._plan:
            # Nothing is allocated yet; the first step is the one that needs most.
            self._step_config, cost = within_memory(
                masks,
                self.config,
                Communicator(pl_module.device),
                trainer.num_devices,
            )
            kind = self.config.criterion
            plan = describe_plan(self._plan, self._done, masks, kind)
            announce(trainer, f"{plan}\n{cost.summary()}")
        if self.weight_decay_off_after_last_step:
            require_weight_decay(trainer.optimizers)
            # A checkpoint may have been loaded without the state of its optimizers.
            self._end_weight_decay(trainer)
        for optimizer in trainer.optimizers:
            post = optimizer.register_step_post_hook(lambda *_: masks.apply())
            self._handles.append(post)
            if not pl_module.automatic_optimization:
                # on_before_optimizer_step may be passed by.
                pre = optimizer.register_step_pre_hook(
                    lambda *_: masks.apply_to_gradients()
                )
                self._handles.append(pre)

    # ------------------------------------------------------------------ training

    def on_train_epoch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule
    ) -> None:
        """Prune when the schedule says so.

        Args:
            trainer: the Trainer.
            pl_module: its module.
        """
        self._prune_if_due(trainer, pl_module, "epoch", trainer.current_epoch)

    def on_train_batch_start(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Prune when a schedule in optimizer steps says so.

        Args:
            trainer: the Trainer.
            pl_module: its module.
            batch: not used.
            batch_idx: not used.
        """
        self._prune_if_due(trainer, pl_module, "step", trainer.global_step)
        if self._untried and self._reads_on():
            # Now, and not when training starts: the module's own hooks have run, on which
            # its training_step may depend. An iterator can be read only once.
            self._untried = False
            if not isinstance(self.dataloader, Iterator):
                self._pruner(trainer, pl_module).rehearse(
                    self._source(trainer, pl_module)
                )

    def on_before_optimizer_step(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        optimizer: Optimizer,
    ) -> None:
        """Keep pruned weights out of the clipping norm and of momentum.

        Args:
            trainer: the Trainer.
            pl_module: its module.
            optimizer: about to step.
        """
        self._get_masks().apply_to_gradients()

    # ------------------------------------------------------------------ fit ends

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let go of the optimizers.

        Args:
            trainer: the Trainer.
            pl_module: its module.
        """
        self._remove_hooks()

    def on_exception(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        exception: BaseException,
    ) -> None:
        """Let go of the optimizers.

        Args:
            trainer: the Trainer.
            pl_module: its module.
            exception: what happened.
        """
        self._remove_hooks()

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

    # ------------------------------------------------------------------ checkpoint

    @property
    def state_key(self) -> str:
        """Key of the state in a checkpoint; two callbacks differ by what they select."""
        selection = self.config.selection
        return self._generate_state_key(
            include=selection.include, exclude=selection.exclude
        )

    def state_dict(self) -> dict[str, Any]:
        """Give the state for a checkpoint, in plain types that load without the package.

        Returns:
            Masks (bool tensors, True = kept), the steps done, their reports.
        """
        # Masks that wait for fit belong to the steps and reports, and to the weights.
        masks = self._restored_masks
        if masks is None:
            masks = {} if self.masks is None else self.masks.state_dict()
        return {
            "version": _STATE_VERSION,
            "masks": dict(masks),
            "done": [[unit, position] for unit, position in self._done],
            "reports": [report.to_dict() for report in self.reports],
        }

    def on_load_checkpoint(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        checkpoint: dict[str, Any],
    ) -> None:
        """Refuse to go on with a run that selected other weights: its masks would be lost.

        Args:
            trainer: the Trainer.
            pl_module: its module.
            checkpoint: all of it.
        """
        if trainer.state.fn == "fit":
            require_same_selection(trainer, checkpoint, self)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the state of a checkpoint; masks take effect when fit starts.

        Args:
            state_dict: what :meth:`state_dict` gave.

        Raises:
            ConfigurationError: for the state of a later version of the package.
        """
        if state_dict["version"] > _STATE_VERSION:
            raise ConfigurationError(
                f"the checkpoint's pruning state has version {state_dict['version']}; this "
                f"package reads up to {_STATE_VERSION}. Update lightning-woodfisher."
            )
        self._restored_masks = state_dict["masks"]
        if self.masks is not None:
            # Outside fit nothing else takes them over.
            masks = Masks(self.masks.parameters)
            masks.load_state_dict(state_dict["masks"])
            self.masks = masks
        self._done = [(unit, position) for unit, position in state_dict["done"]]
        self.reports = [PruningReport.from_dict(r) for r in state_dict["reports"]]

    # ------------------------------------------------------------------ the step

    def _prune_if_due(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        unit: Unit,
        now: int,
    ) -> None:
        due = [
            step
            for step in self._plan
            if step.unit == unit
            and step.position <= now
            and (unit, step.position) not in self._done
        ]
        if not due:
            return
        masks, target = self._get_masks(), due[-1]
        if any(self._missing(target.sparsity)):
            report = self._pruner(trainer, pl_module).step(
                self._source(trainer, pl_module),
                target.sparsity,
                target.position,
                self.target_sparsity,
            )
            self._untried = False
            masks.apply_to_optimizers(trainer.optimizers)
            report = dataclasses.replace(
                report, epoch=trainer.current_epoch, step=trainer.global_step
            )
            self.reports.append(report)
            self._done += [(unit, step.position) for step in due]
            self._publish(trainer, report)
        else:
            self._done += [(unit, step.position) for step in due]
        self._end_weight_decay(trainer)

    def _end_weight_decay(self, trainer: pl.Trainer) -> None:
        """Switch weight decay off when the last planned step is done."""
        if not self.weight_decay_off_after_last_step or not self._plan or self._ahead():
            return
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                if "weight_decay" in group:
                    group["weight_decay"] = 0.0

    def _publish(self, trainer: pl.Trainer, report: PruningReport) -> None:
        log_report(trainer, report)
        if self.report_path is not None and trainer.is_global_zero:
            path = Path(self.report_path)
            path.parent.mkdir(parents=True, exist_ok=True)
            reports = [report.to_dict() for report in self.reports]
            path.write_text(json.dumps(reports, indent=1))

    def _pruner(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Pruner:
        comm = Communicator(pl_module.device)
        return Pruner(self._get_masks(), self._step_config, comm, progress_bar(trainer))

    def _source(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule
    ) -> TrainingStepLoss:
        return TrainingStepLoss(trainer, pl_module, self.loss_method, self.dataloader)

    def _ahead(self) -> list[PlannedStep]:
        """The planned steps that are not done."""
        return [s for s in self._plan if (s.unit, s.position) not in self._done]

    def _reads_on(self) -> bool:
        """Whether a step that is left looks at any sample."""
        return bool(self._ahead()) and self.config.reads_data

    def _get_masks(self) -> Masks:
        if self.masks is None:
            raise RuntimeError("masks exist from on_fit_start on")
        return self.masks

    def _missing(self, sparsity: float) -> list[int]:
        """How many zeros each group of competitors lacks; steps if FLOPs decide."""
        if self.config.flops_target is not None:
            # A step comes as near as whole groups allow.
            return [len(self._ahead())]
        return weights_to_remove(
            self._get_masks(), self.config.selection, sparsity, self.target_sparsity
        )

    def _make_plan(self, trainer: pl.Trainer, masks: Masks) -> tuple[PlannedStep, ...]:
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

    def _require_sole_owner(self, trainer: pl.Trainer) -> None:
        mine = {id(p): n for n, p in self._get_masks().parameters.items()}
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if (
                callback is not self
                and isinstance(callback, WoodFisherPruningCallback)
                and callback.masks is not None
            ):
                shared = [
                    mine[id(p)]
                    for p in callback.masks.parameters.values()
                    if id(p) in mine
                ]
                if shared:
                    raise ConfigurationError(
                        f"two pruning callbacks select the same weights: "
                        f"{', '.join(shared[:8])}; separate them with include and exclude."
                    )

    def _take_restored_masks(self) -> None:
        if self._restored_masks is not None:
            self._get_masks().load_state_dict(self._restored_masks)
            require_masks_hold(self._get_masks())
        self._restored_masks = None

    def _remove_hooks(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
