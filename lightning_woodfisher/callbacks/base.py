"""Base of the pruning callbacks: planned steps, checkpoints and reports.

Pruning happens in ``on_train_epoch_start`` (or ``on_train_batch_start`` for a schedule in
optimizer steps), so that validation and checkpoints of the epoch see the pruned weights.
"""

from __future__ import annotations

__all__ = ["PruningCallback"]

import dataclasses
import json
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import nn

from lightning_woodfisher.base.errors import (
    ConfigurationError,
    require_flag,
    require_text,
)
from lightning_woodfisher.base.lightning_names import callbacks_of
from lightning_woodfisher.callbacks.averaging import (
    mask_averages,
    require_maskable_averages,
)
from lightning_woodfisher.callbacks.checks import (
    require_masks_hold,
    require_same_selection,
    require_supported,
    require_weight_decay,
    require_writable,
    training_samples,
)
from lightning_woodfisher.callbacks.mask_guard import MaskGuard
from lightning_woodfisher.callbacks.monitors import MonitorHold, describe_early_end
from lightning_woodfisher.callbacks.progress import announce
from lightning_woodfisher.callbacks.signals import delay_signals
from lightning_woodfisher.callbacks.training_step import TrainingStepLoss
from lightning_woodfisher.data.losses import LossSource
from lightning_woodfisher.distributed.checksum import checksum
from lightning_woodfisher.distributed.communicator import Communicator
from lightning_woodfisher.distributed.dtensor import reshard
from lightning_woodfisher.distributed.same_settings import require_same_settings
from lightning_woodfisher.export.state_dict_files import write_atomically
from lightning_woodfisher.pruning.schedule import PlannedStep, PruningSchedule, Unit
from lightning_woodfisher.reporting.loggers import log_figures, log_step
from lightning_woodfisher.weights.checkpoint_state import (
    STATE_VERSION,
    require_readable,
)
from lightning_woodfisher.weights.layers import find_inputs_first
from lightning_woodfisher.weights.masks import Masks
from lightning_woodfisher.weights.untrained import looks_untrained


class PruningCallback(MaskGuard, ABC):
    """Prune at planned steps and keep pruned weights zero.

    A subclass selects the parameters, plans the steps and prunes. This class runs the plan
    and handles checkpoints and reports; :class:`~.mask_guard.MaskGuard` applies the masks.

    Args:
        schedule: when to prune and how far.
        loss_method: name of a method ``(batch, batch_idx) -> loss`` of the module to
            differentiate, for a ``training_step`` that does more than compute a loss.
        dataloader: batches to use instead of those of the training dataloader.
        report_path: JSON file for the reports of all steps.
        weight_decay_off_after_last_step: set ``weight_decay`` of all parameter groups to
            zero after the last planned step.
        log_figures: draw figures for W&B and TensorBoard after the last planned step.

    Raises:
        ConfigurationError: for a value that cannot work.

    Attributes:
        masks: masks of the selected parameters, from ``on_fit_start`` on.
        reports: reports of the completed steps. With ``ddp_spawn``, ``ddp_fork`` and
            ``ddp_notebook`` they and the masks stay in the processes that train; read them
            from ``report_path`` or a checkpoint.
    """

    #: Whether ModelCheckpoint(monitor=...) and EarlyStopping count only scores from the
    #: last pruning step on; set it to False to let them count from the start.
    hold_monitors: bool = True

    #: Whether whole channels are removed. It takes a batch to find them, so parameters are
    #: selected in ``on_train_start``.
    _removes_channels: ClassVar[bool] = False
    #: Class of the reports.
    _report_class: ClassVar[type[Any]]

    def __init__(
        self,
        schedule: PruningSchedule,
        loss_method: str | None,
        dataloader: Iterable[Any] | None,
        report_path: str | None,
        weight_decay_off_after_last_step: bool,
        log_figures: bool,
    ) -> None:
        require_text("loss_method", loss_method)
        require_text("report_path", report_path)
        require_flag(
            "weight_decay_off_after_last_step", weight_decay_off_after_last_step
        )
        require_flag("log_figures", log_figures)
        super().__init__()
        if not isinstance(schedule, PruningSchedule):
            raise ConfigurationError(
                f"schedule={schedule!r} is not a schedule; give one of "
                "lightning_woodfisher, such as PolynomialSchedule(start_epoch=0)."
            )
        self.schedule = schedule
        self.weight_decay_off_after_last_step = weight_decay_off_after_last_step
        self.log_figures = log_figures
        self.loss_method = loss_method
        self.dataloader = dataloader
        self.report_path = report_path
        self.reports: list[Any] = []
        self._logged: dict[str, float] = {}
        self._plan: tuple[PlannedStep, ...] = ()
        self._needs_rehearsal = False
        self._done: list[PlannedStep] = []
        self._restored_masks: Mapping[str, Any] | None = None
        # Epoch and optimizer steps of the checkpoint that was loaded.
        self._restored_position: tuple[Any, Any] | None = None
        self._monitors = MonitorHold()

    # ------------------------------------------------------------------ for subclasses

    @abstractmethod
    def _select(
        self, trainer: pl.Trainer, module: pl.LightningModule
    ) -> dict[str, nn.Parameter]:
        """Return the parameters that may be pruned, by name."""

    @abstractmethod
    def _settings(self) -> dict[str, Any]:
        """Return the settings that must be the same on all ranks, by name."""

    @abstractmethod
    def _make_plan(self, trainer: pl.Trainer) -> tuple[PlannedStep, ...]:
        """List the steps of this training."""

    @abstractmethod
    def _prepare(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Check settings that need the Trainer, and print the plan."""

    @abstractmethod
    def _has_work(self, target: PlannedStep) -> bool:
        """Return whether a step that is due has anything to prune."""

    @abstractmethod
    def _step(
        self, trainer: pl.Trainer, module: pl.LightningModule, target: PlannedStep
    ) -> Any:
        """Prune; return a report, a frozen dataclass with ``epoch`` and ``step``."""

    @abstractmethod
    def _describe(self, report: Any) -> str:
        """Format the result of a step, to be printed."""

    @abstractmethod
    def _log_end(self, trainer: pl.Trainer) -> None:
        """Send what is known at the end of training to the loggers."""

    def _needs_data(self) -> bool:
        """Return whether a remaining step reads samples."""
        return bool(self._ahead())

    @abstractmethod
    def _rehearse(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Check on a few samples that a step will work, before hours of training."""

    @property
    @abstractmethod
    def state_key(self) -> str:
        """Key of the state in a checkpoint; two callbacks differ by what they select."""

    # ------------------------------------------------------------------ fit starts

    def setup(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str
    ) -> None:
        """Check the Trainer before anything is loaded.

        Args:
            trainer: the Trainer.
            pl_module: its module.
            stage: only ``"fit"`` is checked.

        Raises:
            ConfigurationError: for a strategy or a loss method that cannot work.
        """
        if stage != "fit":
            return
        require_supported(trainer)
        require_maskable_averages(trainer)
        if self.loss_method is not None and not callable(
            getattr(pl_module, self.loss_method, None)
        ):
            raise ConfigurationError(
                f"loss_method={self.loss_method!r} is not a method of "
                f"{type(pl_module).__name__}."
            )
        # global_step leaves out steps of bare optimizers, so the epoch is checked as well.
        if trainer.global_step == 0 and trainer.current_epoch == 0:
            # A new run: drop the state of an earlier fit. A checkpoint to resume from is
            # loaded after this.
            self.masks, self.reports, self._done = None, [], []
            self._logged = {}
            self._restored_masks = self._restored_position = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Select the parameters and load the masks of a checkpoint.

        Args:
            trainer: the Trainer.
            pl_module: its module, on its device.
        """
        settings = {
            "max_epochs": trainer.max_epochs,
            "max_steps": trainer.max_steps,
            "schedule": self.schedule,
            "loss_method": self.loss_method,
            **self._settings(),
        }
        comm = Communicator(pl_module.device)
        require_same_settings(settings, comm)
        # Each node may have a folder of its own with an older checkpoint.
        remedy = "let all ranks load the same checkpoint"
        require_same_settings(self._describe_restored(), comm, remedy)
        if not self._removes_channels:
            self._create_masks(trainer, pl_module)
            if not trainer.strategy.restore_checkpoint_after_setup:
                self._load_restored_masks()

    def on_train_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule
    ) -> None:
        """Plan the steps, print the plan, and register the optimizer hooks.

        Args:
            trainer: the Trainer.
            pl_module: its module.
        """
        comm = Communicator(pl_module.device)
        with comm.failing_together(lambda: "check"):
            samples = {"length of the training data": training_samples(trainer)}
            if trainer.is_global_zero:
                self._require_writable()
        require_same_settings(samples, comm)
        if self._removes_channels:
            self._create_masks(trainer, pl_module)
        # The checkpoint of a sharded model is loaded after on_fit_start.
        self._load_restored_masks()
        self._plan = self._make_plan(trainer)
        self._needs_rehearsal = self._needs_data()
        self._prepare(trainer, pl_module)
        if self.weight_decay_off_after_last_step:
            require_weight_decay(trainer.optimizers)
            # A checkpoint may have been loaded without optimizer states.
            self._end_weight_decay(trainer)
        self._register_hooks(trainer, pl_module)
        mask_averages(trainer, self._get_masks())
        self._publish_progress(trainer)
        self._tell_if_untrained(trainer, pl_module)
        held = self._monitors.describe(trainer)
        if held and self._holds_monitors(trainer):
            last = self._plan[-1]
            announce(
                trainer,
                f"{held}: scores count from {last.unit} {last.position} on, when the last "
                "pruning step is done, so that the best checkpoint is a pruned one.",
            )

    def _tell_if_untrained(
        self, trainer: pl.Trainer, module: pl.LightningModule
    ) -> None:
        """Say before training that the first step would prune an untrained network."""
        starts_now = bool(self._plan) and self._plan[0].position == 0
        if self._done or not starts_now or getattr(trainer, "fast_dev_run", False):
            return
        if looks_untrained(module):
            announce(
                trainer,
                "WARNING: the first pruning step happens before any training, and the "
                "network seems to be untrained, so its saliencies mean little. Load trained "
                "weights, or let the schedule begin later, for example after a tenth of "
                f"training ({type(self.schedule).__name__}).",
            )

    # ------------------------------------------------------------------ training

    def on_train_epoch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule
    ) -> None:
        """Prune if the schedule has a step at the start of this epoch.

        Args:
            trainer: the Trainer.
            pl_module: its module.
        """
        with delay_signals():
            self._prune_if_due(trainer, pl_module, "epoch", trainer.current_epoch)
        if self._holds_monitors(trainer):
            self._monitors.restart_early_stopping(trainer)

    def on_validation_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule
    ) -> None:
        """Keep EarlyStopping from counting scores before the last pruning step.

        Args:
            trainer: the Trainer.
            pl_module: its module.
        """
        if trainer.state.fn == "fit" and self._holds_monitors(trainer):
            self._monitors.restart_early_stopping(trainer)

    def on_validation_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule
    ) -> None:
        """Add the logged values to the report of the last step.

        Args:
            trainer: the Trainer.
            pl_module: its module.
        """
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._note_logged(trainer)

    def on_train_epoch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule
    ) -> None:
        """Add the logged values to the report of the last step, if nothing is validated.

        Args:
            trainer: the Trainer.
            pl_module: its module.
        """
        if not trainer.enable_validation:
            self._note_logged(trainer)

    def on_exception(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        exception: BaseException,
    ) -> None:
        """Remove all hooks.

        Args:
            trainer: the Trainer.
            pl_module: its module.
            exception: the exception that ends training.
        """
        super().on_exception(trainer, pl_module, exception)
        self._monitors.restore_thresholds()

    def on_train_batch_start(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Prune if the schedule has a step before this batch.

        Args:
            trainer: the Trainer.
            pl_module: its module.
            batch: not used.
            batch_idx: not used.
        """
        with delay_signals():
            # A run that resumes in the middle of an epoch skips on_train_epoch_start.
            self._prune_if_due(trainer, pl_module, "epoch", trainer.current_epoch)
            self._prune_if_due(trainer, pl_module, "step", trainer.global_step)
            parameters = self._get_masks().parameters.values()
            trainable = all(parameter.requires_grad for parameter in parameters)
            if self._needs_rehearsal and self._needs_data() and trainable:
                # Not when training starts, because training_step may depend on hooks of
                # the module that run later. An iterator can be read only once.
                self._needs_rehearsal = False
                if not isinstance(self.dataloader, Iterator):
                    self._rehearse(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check that pruned weights are zero, while they are on their device.

        Args:
            trainer: the Trainer.
            pl_module: its module.
        """
        super().on_train_end(trainer, pl_module)
        self._monitors.restore_thresholds()
        self._get_masks().verify()
        if self.reports and self._ahead():
            # Training has ended before the step that draws them.
            self._log_figures(trainer)
        if self.reports:
            self._share_logged(pl_module)
            self._write_reports(trainer)
        self._log_end(trainer)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check again, because callbacks that come later may have changed weights.

        Args:
            trainer: the Trainer.
            pl_module: its module, which Lightning has moved to the CPU.
        """
        # NCCL could not add the counts of sharded weights on the CPU. There are no masks
        # if nothing was left to train.
        if self.masks is not None and not self.masks.sharded:
            self.masks.verify()

    # ------------------------------------------------------------------ checkpoint

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint, in plain types that load without the package.

        Returns:
            Masks (bool tensors, True = kept), the completed steps, their reports, and the
            latest logged values.
        """
        # Restored masks belong to the restored steps, reports and weights.
        masks = self._restored_masks
        if masks is None:
            masks = {} if self.masks is None else self.masks.state_dict()
        return {
            "version": STATE_VERSION,
            "masks": dict(masks),
            "done": [[s.unit, s.position, float(s.sparsity)] for s in self._done],
            "steps_left": len(self._ahead()),
            "reports": [report.to_dict() for report in self.reports],
            "logged": dict(self._logged),
        }

    def on_load_checkpoint(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        checkpoint: dict[str, Any],
    ) -> None:
        """Check that the masks in the checkpoint are not those of another selection.

        Args:
            trainer: the Trainer.
            pl_module: its module.
            checkpoint: the whole checkpoint.
        """
        if trainer.state.fn != "fit":
            return
        self._restored_position = checkpoint.get("epoch"), checkpoint.get("global_step")
        require_same_selection(trainer, checkpoint, self)
        states = checkpoint.get("callbacks", {})
        if self.state_key in states:
            # Lightning skips an empty state.
            require_readable(states[self.state_key], "the checkpoint")
        else:
            rank_zero_info(
                f"The checkpoint has no masks of this callback ({self.state_key}): zeros "
                "in its weights may change, unless ConstantSchedule or initial_sparsity "
                "keeps them."
            )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of a checkpoint; masks take effect when fit starts.

        Args:
            state_dict: result of :meth:`state_dict`. The state of a later version of the
                package raises :class:`ConfigurationError`.
        """
        require_readable(state_dict, "the checkpoint")
        reports = [
            self._report_class.from_dict(r) for r in state_dict.get("reports", ())
        ]
        done = [PlannedStep(*step) for step in state_dict["done"]]
        self._restored_masks = state_dict["masks"]
        if self.masks is not None:
            # Outside fit nothing else loads them.
            masks = Masks(self.masks.parameters, self.masks.inputs_first)
            masks.load_state_dict(state_dict["masks"])
            self.masks = masks
        if self._handles:
            # The learning rate finder loads a state during training.
            self._restored_masks = None
        self._done, self.reports = done, reports
        logged: Mapping[str, float] = state_dict.get("logged", {})
        self._logged = dict(logged.items())

    # ------------------------------------------------------------------ the step

    def _create_masks(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Create the masks of the selected parameters."""
        # A forward pass before fit may have left gathered copies in place of shards.
        reshard(module)
        parameters = self._select(trainer, module)
        if self._restored_masks is None and self.masks is not None:
            self._restored_masks = self.masks.state_dict()
        self.masks = Masks(parameters, find_inputs_first(module, list(parameters)))
        self._require_sole_owner(trainer)

    def _prune_if_due(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        unit: Unit,
        now: int,
    ) -> None:
        due = [
            step for step in self._ahead() if step.unit == unit and step.position <= now
        ]
        if not due:
            return
        self._add_masks_of_others(trainer)
        self._share_logged(pl_module)
        target = due[-1]
        report = None
        if self._has_work(target):
            report = self._step(trainer, pl_module, target)
            report = dataclasses.replace(
                report,
                epoch=trainer.current_epoch,
                step=trainer.global_step,
                logged_before=self._logged,
            )
            # Before logging: after an exception a checkpoint may be saved.
            self.reports.append(report)
        self._done += due
        # If one rank failed here alone, the others would wait in the next batch.
        comm = Communicator(pl_module.device)
        with comm.failing_together(lambda: "log"):
            if report is not None:
                self._needs_rehearsal = False
                self._get_masks().apply_to_optimizers(trainer.optimizers)
            mask_averages(trainer, self._get_masks())
            if report is not None:
                self._publish(trainer, report)
            self._end_weight_decay(trainer)
            self._publish_progress(trainer)
            if self.hold_monitors and not self._holds_monitors(trainer):
                self._monitors.release(trainer)

    def _publish_progress(self, trainer: pl.Trainer) -> None:
        """Make the progress of pruning available to other callbacks, as metrics."""
        metrics = {"pruning/target_reached": float(not self._ahead())}
        if self.reports:
            found = self.reports[-1].metrics()
            metrics |= {name: v for name, v in found.items() if name.count("/") == 1}
        metrics["pruning/sparsity"] = self._get_masks().sparsity()
        trainer.callback_metrics.update(
            {name: torch.tensor(value) for name, value in metrics.items()}
        )

    def _holds_monitors(self, trainer: pl.Trainer) -> bool:
        """Return whether any pruning step is still planned, by any pruning callback."""
        pruning = (self, *self._others(trainer))
        return self.hold_monitors and any(callback._ahead() for callback in pruning)

    def _warn_of_missed_steps(self, trainer: pl.Trainer, achieved: str) -> bool:
        """Warn if training ended before the last pruning step, and return whether it did."""
        missed = self._ahead()
        if missed:
            cause = describe_early_end(trainer)
            rank_zero_warn(
                f"training ended at {achieved}: {len(missed)} planned step(s) did not "
                f"happen, the first at {missed[0].unit} {missed[0].position}"
                f"{f', because {cause}' if cause else ''}. Train longer, or end the "
                "schedule earlier."
            )
        return bool(missed)

    def _add_masks_of_others(self, trainer: pl.Trainer) -> None:
        """Mask the weights that other pruning callbacks have pruned."""
        mine = {id(p): name for name, p in self._get_masks().parameters.items()}
        for other in self._others(trainer):
            for name, parameter in other._get_masks().parameters.items():
                if id(parameter) in mine:
                    gone = ~other._get_masks().kept(name)
                    self._get_masks().prune({mine[id(parameter)]: gone})

    def _end_weight_decay(self, trainer: pl.Trainer) -> None:
        """Switch weight decay off after the last planned step."""
        if not self.weight_decay_off_after_last_step or not self._plan or self._ahead():
            return
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                if "weight_decay" in group:
                    group["weight_decay"] = 0.0

    def _publish(self, trainer: pl.Trainer, report: Any) -> None:
        """Print the result of a step, log it, and write ``report_path``."""
        announce(trainer, self._describe(report))
        start = time.perf_counter()
        if trainer.is_global_zero:
            # As Lightning does, so that rows of CSV files have an epoch.
            metrics = {**report.metrics(), "epoch": trainer.current_epoch}
            for logger in trainer.loggers:
                logger.log_metrics(metrics, step=trainer.global_step)
        log_step(trainer, self.reports)
        if not self._ahead():
            self._log_figures(trainer)
        seconds = {**report.seconds, "log": time.perf_counter() - start}
        self.reports[-1] = dataclasses.replace(report, seconds=seconds)
        self._write_reports(trainer)

    def _note_logged(self, trainer: pl.Trainer) -> None:
        """Keep the finite values that the module has logged, for the reports."""
        found = {name: float(x) for name, x in trainer.callback_metrics.items()}
        # Added to those from before a restart.
        self._logged = self._logged | {
            name: value
            for name, value in found.items()
            if math.isfinite(value) and not name.startswith("pruning/")
        }
        self._report_logged()

    def _share_logged(self, module: pl.LightningModule) -> None:
        """Take the logged values of rank 0, so that reports are the same on all ranks."""
        shared = Communicator(module.device).broadcast_text(json.dumps(self._logged))
        self._logged = json.loads(shared)
        self._report_logged()

    def _report_logged(self) -> None:
        """Add the logged values to the report of the last step."""
        if self.reports:
            last = dataclasses.replace(self.reports[-1], logged_after=self._logged)
            self.reports[-1] = last

    def _write_reports(self, trainer: pl.Trainer) -> None:
        """Write ``report_path``."""
        if self.report_path is not None and trainer.is_global_zero:
            reports = [report.to_dict() for report in self.reports]
            try:
                # A run that is killed here leaves the old file or the new one.
                with write_atomically(Path(self.report_path)) as unfinished:
                    unfinished.write_text(json.dumps(reports, indent=1))
            except OSError as error:
                # Hours of training are worth more than the file.
                rank_zero_warn(
                    f"report_path={self.report_path} could not be written ({error}); the "
                    "reports are in the checkpoints as well."
                )

    def _log_figures(self, trainer: pl.Trainer) -> None:
        if self.log_figures:
            masks = None if self._removes_channels else self._get_masks()
            log_figures(trainer, self.reports, masks)

    def _require_writable(self) -> None:
        """Check before training that what is written later can be written."""
        require_writable("report_path", self.report_path)

    def _source(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> LossSource:
        return TrainingStepLoss(trainer, pl_module, self.loss_method, self.dataloader)

    def _ahead(self) -> list[PlannedStep]:
        """Return the planned steps that are not done."""
        return [step for step in self._plan if step not in self._done]

    def _others(self, trainer: pl.Trainer) -> list[PruningCallback]:
        """Return the other pruning callbacks of the Trainer that have masks."""
        return [
            callback
            for callback in callbacks_of(trainer)
            if callback is not self
            and isinstance(callback, PruningCallback)
            and callback.masks is not None
        ]

    def _require_sole_owner(self, trainer: pl.Trainer) -> None:
        """Check that no other callback of this kind selects the same weights."""
        mine = {id(p): n for n, p in self._get_masks().parameters.items()}
        for other in self._others(trainer):
            if other._removes_channels != self._removes_channels:
                continue
            theirs = other._get_masks().parameters.values()
            shared = [mine[id(p)] for p in theirs if id(p) in mine]
            if shared:
                raise ConfigurationError(
                    f"two pruning callbacks select the same weights: "
                    f"{', '.join(shared[:8])}; separate them with only and exclude."
                )

    def _describe_restored(self) -> dict[str, Any]:
        """Return what all ranks must have loaded from a checkpoint, by name."""
        masks = self._restored_masks or {}
        return {
            "position (epoch, optimizer steps) in the checkpoint": self._restored_position,
            "list of pruning steps in the checkpoint": [
                (step.unit, step.position) for step in self._done
            ],
            **{
                f"hash of the mask of {name!r} in the checkpoint": int(checksum(mask))
                for name, mask in masks.items()
            },
        }

    def _load_restored_masks(self) -> None:
        if self._restored_masks is not None:
            self._get_masks().load_state_dict(self._restored_masks)
            require_masks_hold(self._get_masks())
        self._restored_masks = None
