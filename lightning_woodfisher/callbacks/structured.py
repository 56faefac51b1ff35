"""Callbacks that remove whole channels: SOSP, HAP and their baselines.

During training a removed channel is masked: its filters, biases and norm entries are zero,
which is the same as if it were not there. After it, :meth:`shrunk_model` cuts it out.
"""

from __future__ import annotations

__all__ = [
    "HAPPruningCallback",
    "SOSPPruningCallback",
    "StructuredPruningCallback",
]

import copy
import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import lightning.pytorch as pl
from torch import Tensor, nn

from lightning_woodfisher.base.errors import ConfigurationError, require_integer
from lightning_woodfisher.base.lightning_names import either_name
from lightning_woodfisher.callbacks.base import PruningCallback
from lightning_woodfisher.callbacks.checks import training_horizon
from lightning_woodfisher.callbacks.progress import announce
from lightning_woodfisher.callbacks.training_step import TrainingStepLoss
from lightning_woodfisher.data.batchnorm import require_recalibration_batches
from lightning_woodfisher.data.losses import LossSource
from lightning_woodfisher.distributed.communicator import Communicator
from lightning_woodfisher.distributed.dtensor import is_sharded
from lightning_woodfisher.pruning.schedule import (
    OneShotSchedule,
    PlannedStep,
    PruningSchedule,
)
from lightning_woodfisher.reporting.loggers import (
    track_channel_end,
    track_channel_settings,
    track_channel_step,
)
from lightning_woodfisher.structured.config import StructureConfig
from lightning_woodfisher.structured.graph.groups import (
    Group,
    add_prefix,
    masked_parameters,
)
from lightning_woodfisher.structured.graph.inputs import capture_inputs
from lightning_woodfisher.structured.graph.tracing import trace_groups
from lightning_woodfisher.structured.network_cost import Latency, measure_latency
from lightning_woodfisher.structured.pruner import (
    Measure,
    StructurePruner,
    require_cost,
    require_rereadable,
    require_target,
)
from lightning_woodfisher.structured.report import StructureReport
from lightning_woodfisher.structured.shrink.implants import ImplantConfig, ImplantInit
from lightning_woodfisher.structured.shrink.removal import (
    RemovalPlan,
    plan_removal,
    save_shrunk,
)
from lightning_woodfisher.structured.shrink.removal_check import check_implants


class StructuredPruningCallback(PruningCallback):
    """Remove whole channels while a network trains, by any of the methods.

    Args:
        target: share of the measure that is gone at the end, in [0, 1).
        measure: what the target counts: ``"macs"`` (multiply-accumulates, half the FLOPs),
            ``"parameters"`` or ``"structures"`` (channels).
        config: how channels are scored and chosen.
        schedule: when and how far; by default once, at the start of training.
        include: class paths of layers or regular expressions on their names: what may be
            pruned; empty for all.
        exclude: what may not.
        network: name of the submodule to prune, if it is not the one that holds all layers.
        loss_method: name of a method ``(batch, batch_idx) -> loss`` of the module to take
            the loss from, for a ``training_step`` that does more than compute one.
        dataloader: where samples come from, in place of the training dataloader; read
            several times.
        report_path: JSON file that receives the reports of all steps.
        export_path: folder that receives the smaller network at the end of fit: the plan
            and a ``state_dict``, for :func:`.load_shrunk`.
        latency_runs: forward passes that are timed after each step, dense and smaller in
            turns, on rank 0; the medians are in the report. 0 for none.
        batchnorm_recalibration_batches: re-estimate BatchNorm's running statistics on so
            many batches (of 64 samples or ``batch_size``, the larger) after each step; 0
            leaves them.
        weight_decay_off_after_last_step: set ``weight_decay`` of all parameter groups to
            zero once the last planned step is done.

    Raises:
        ConfigurationError: for a value that cannot work.
    """

    _selects_by_data = True

    def __init__(
        self,
        target: float = 0.5,
        measure: Measure = "macs",
        config: StructureConfig = StructureConfig(),
        schedule: PruningSchedule | None = None,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        network: str | None = None,
        loss_method: str | None = None,
        dataloader: Iterable[Any] | None = None,
        report_path: str | None = None,
        export_path: str | None = None,
        latency_runs: int = 0,
        batchnorm_recalibration_batches: int = 0,
        weight_decay_off_after_last_step: bool = False,
    ) -> None:
        require_target(target, measure)
        require_cost(config, measure)
        require_rereadable(dataloader)
        require_recalibration_batches(batchnorm_recalibration_batches)
        require_integer("latency_runs", latency_runs)
        if latency_runs < 0:
            raise ConfigurationError(
                f"latency_runs={latency_runs} must be at least 0; 0 measures nothing."
            )
        super().__init__(
            schedule if schedule is not None else OneShotSchedule(epoch=0),
            loss_method,
            dataloader,
            report_path,
            weight_decay_off_after_last_step,
        )
        self.target = target
        self.measure: Measure = measure
        self.config = config
        self.include = tuple(include)
        self.exclude = tuple(exclude)
        self.network = network
        self.export_path = export_path
        self.latency_runs = latency_runs
        self.batchnorm_recalibration_batches = batchnorm_recalibration_batches
        self._groups: tuple[Group, ...] = ()
        self._traced: tuple[Group, ...] = ()
        self._inputs: Any = None
        self._prefix = ""
        self._implants = ImplantConfig()
        self._implantable: dict[str, tuple[str, ...]] = {}

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(target={self.target}, measure={self.measure!r}, "
            f"config={self.config!r}, schedule={self.schedule!r})"
        )

    @property
    def state_key(self) -> str:
        """Key of the state in a checkpoint; two callbacks differ by what they select."""
        return self._generate_state_key(
            include=list(self.include),
            exclude=list(self.exclude),
            network=self.network,
        )

    @property
    def removed(self) -> dict[str, tuple[int, ...]]:
        """The channels that are gone, by group of the network."""
        return self._in_network(self._so_far()[0])

    @property
    def implanted(self) -> dict[str, tuple[int, ...]]:
        """The channels with 1×1 filters, by group of the network."""
        return self._in_network(self._so_far()[1])

    @property
    def latency(self) -> Latency | None:
        """Time of the dense and the smaller network after the last step, if measured."""
        last: StructureReport | None = self.reports[-1] if self.reports else None
        if last is None or last.latency_dense is None or last.latency is None:
            return None
        return Latency(last.latency_dense, last.latency, 1, last.latency_runs)

    def _in_network(
        self, found: dict[str, tuple[int, ...]]
    ) -> dict[str, tuple[int, ...]]:
        cut = len(self._prefix) + bool(self._prefix)
        return {name[cut:]: structures for name, structures in found.items()}

    # ------------------------------------------------------------------ smaller models

    def removal_plan(self, module: nn.Module) -> RemovalPlan:
        """Plan to cut the masked channels out.

        Args:
            module: the LightningModule; only its network is planned for.

        Returns:
            The plan, which ``apply`` carries out on the network.

        Raises:
            ConfigurationError: before anything was traced.
        """
        if not self._traced:
            raise ConfigurationError(
                "the groups of channels are known once fit has started; call fit first."
            )
        return plan_removal(
            module.get_submodule(self._prefix),
            self._traced,
            self.removed,
            self.implanted,
        )

    def shrunk_model(self, module: nn.Module) -> nn.Module:
        """Make the physically smaller network, which computes the same.

        Args:
            module: the LightningModule; it stays as it is.

        Returns:
            A copy of its network without the masked channels.
        """
        plan = self.removal_plan(module)
        network = module.get_submodule(self._prefix)
        # Of the whole LightningModule the Trainer would be copied, too.
        smaller = _copy_network(network)
        plan.apply(smaller)
        return smaller

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check the masks; write the smaller network where asked for.

        Args:
            trainer: the Trainer.
            pl_module: its module.
        """
        if self.masks is None:
            return  # Nothing was left to train.
        self.masks.verify()
        track_channel_end(trainer, self.reports)
        if self.export_path and self.reports and trainer.is_global_zero:
            smaller = self.shrunk_model(pl_module)
            save_shrunk(self.export_path, smaller, self.removal_plan(pl_module))

    # ------------------------------------------------------------------ training starts

    def _select(
        self, trainer: pl.Trainer, module: pl.LightningModule
    ) -> dict[str, nn.Parameter]:
        source = self._source(trainer, module)
        self._prefix, self._inputs = capture_inputs(
            source, self.network, self.config.seed
        )
        network = module.get_submodule(self._prefix)
        if any(is_sharded(parameter) for parameter in network.parameters()):
            raise ConfigurationError(
                "channels cannot be removed from parameters that are sharded over the "
                "ranks; use a single device or 'ddp'."
            )
        traced = trace_groups(
            network,
            self._inputs,
            include=self.include,
            exclude=self.exclude,
            seed=self.config.seed,
        )
        self._traced = traced.groups
        self._groups = add_prefix(traced.groups, self._prefix)
        if self._implants.ratio:
            found = check_implants(network, traced.groups, self._inputs)
            prefix = f"{self._prefix}." if self._prefix else ""
            self._implantable = {
                f"{prefix}{group}": tuple(f"{prefix}{layer}" for layer in layers)
                for group, layers in found.items()
            }
        return masked_parameters(module, self._groups)

    def _make_plan(self, trainer: pl.Trainer) -> tuple[PlannedStep, ...]:
        if getattr(trainer, "fast_dev_run", False):
            return (PlannedStep("epoch", 0, self.target),)
        return self.schedule.plan(self.target, training_horizon(trainer, self.schedule))

    def _prepare(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        structures = sum(group.size for group in self._groups)
        steps = ", ".join(
            f"{step.sparsity:.0%} at {step.unit} {step.position}"
            for step in self._ahead()
        )
        announce(
            trainer,
            f"Removing channels by {self.config.method}: {structures:,} structures in "
            f"{len(self._groups)} groups; {self.measure} removed: {steps or 'no more'}.",
        )
        settings = {
            "class": type(self).__name__,
            "target": self.target,
            "measure": self.measure,
            "include": self.include,
            "exclude": self.exclude,
            "network": self._prefix,
            "implants": dataclasses.asdict(self._implants),
            "batchnorm_recalibration_batches": self.batchnorm_recalibration_batches,
            **dataclasses.asdict(self.config),
        }
        track_channel_settings(trainer, settings, self.schedule)

    # ------------------------------------------------------------------ the step

    def _lacks(self, target: PlannedStep) -> bool:
        return target.sparsity > 0.0

    def _step(
        self, trainer: pl.Trainer, module: pl.LightningModule, target: PlannedStep
    ) -> StructureReport:
        removed, implanted = self._so_far()
        report = self._pruner(module).step(
            self._source(trainer, module),
            target.sparsity,
            removed,
            target.position,
            implanted,
        )
        if self._implants.init != "center":
            self._forget(trainer, module, report.implanted, implanted)
        return report

    def _so_far(self) -> tuple[Any, Any]:
        if not self.reports:
            return {}, {}
        return self.reports[-1].removed, self.reports[-1].implanted

    def _forget(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        implanted: dict[str, Any],
        before: dict[str, Any],
    ) -> None:
        """Set the optimizer state of filters that have begun anew to zero."""
        for group, structures in implanted.items():
            new = sorted({*structures} - {*before.get(group, ())})
            for layer in self._implantable[group]:
                weight = module.get_parameter(f"{layer}.weight")
                for optimizer in trainer.optimizers:
                    for value in optimizer.state.get(weight, {}).values():
                        if isinstance(value, Tensor) and value.shape == weight.shape:
                            value[new] = 0.0

    def _log(self, trainer: pl.Trainer, report: StructureReport) -> None:
        announce(trainer, report.to_table())
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.log_metrics(report.metrics(), step=trainer.global_step)
        track_channel_step(trainer, self.reports)

    def _publish(self, trainer: pl.Trainer, report: StructureReport) -> None:
        if self.latency_runs:
            report = self._timed(trainer.lightning_module, report)
            self.reports[-1] = report
        super()._publish(trainer, report)

    def _timed(
        self, module: pl.LightningModule, report: StructureReport
    ) -> StructureReport:
        """Measure on rank 0, and tell all ranks, whose reports are the same."""
        comm = Communicator(module.device)
        seconds = [0.0, 0.0]
        if comm.rank == 0:
            found = self._measure(module, self.latency_runs)
            seconds = [found.dense, found.shrunk]
        dense, shrunk = comm.gather_numbers(seconds)[0]
        return dataclasses.replace(
            report,
            latency_dense=dense,
            latency=shrunk,
            latency_runs=self.latency_runs,
        )

    def _measure(self, module: pl.LightningModule, runs: int) -> Latency:
        network = module.get_submodule(self._prefix)
        return measure_latency(network, self.shrunk_model(module), self._inputs, runs)

    def _reads_on(self) -> bool:
        return bool(self._ahead())

    def _rehearse(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        target = max(step.sparsity for step in self._ahead())
        self._pruner(module).rehearse(
            self._source(trainer, module), target, *self._so_far()
        )
        if self.latency_runs:
            # A network that cannot be copied or called is found out now.
            with Communicator(module.device).failing_together():
                self._measure(module, 1)

    def _source(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> LossSource:
        return TrainingStepLoss(
            trainer,
            pl_module,
            self.loss_method,
            self.dataloader,
            full_precision=True,
            network=pl_module.get_submodule(self._prefix),
        )

    def _is_alike(self, other: PruningCallback) -> bool:
        return isinstance(other, StructuredPruningCallback)

    def _read_report(self, plain: dict[str, Any]) -> StructureReport:
        return StructureReport.from_dict(plain)

    def _pruner(self, module: pl.LightningModule) -> StructurePruner:
        comm = Communicator(module.device)
        return StructurePruner(
            self._groups,
            self._get_masks(),
            self.config,
            self.measure,
            comm,
            self._implants,
            self._implantable,
            self.batchnorm_recalibration_batches,
        )


class SOSPPruningCallback(StructuredPruningCallback):
    """Remove channels by SOSP: second order, with the correlations of all channels.

    Nonnenmacher et al., "SOSP: Efficiently capturing global correlations by second-order
    structured pruning", ICLR 2022.

    Args:
        target: share of the measure that is gone at the end, in [0, 1).
        variant: ``"H"`` takes one Hessian-vector product for all channels, ``"I"`` the
            Gauss-Newton matrix of pairs of channels.
        config: how channels are scored and chosen; its ``method`` is set here.
        options: further arguments of :class:`StructuredPruningCallback`.
    """

    def __init__(
        self,
        target: float = 0.5,
        variant: Literal["I", "H"] = "H",
        config: StructureConfig = StructureConfig(),
        **options: Any,
    ) -> None:
        if variant not in ("I", "H"):
            raise ConfigurationError(f"variant={variant!r} is unknown; use 'I' or 'H'.")
        method: Literal["sosp_i", "sosp_h"] = "sosp_i" if variant == "I" else "sosp_h"
        config = dataclasses.replace(config, method=method)
        super().__init__(target, config=config, **options)


class HAPPruningCallback(StructuredPruningCallback):
    """Remove channels by HAP: the trace of the Hessian of each channel.

    Yu et al., "Hessian-aware pruning and optimal neural implant", WACV 2022. Layers that
    are added to each other lose the same channels; the authors' code scatters them.

    With ``implant_ratio`` r, the lowest (1 - r) of the chosen channels are removed and
    the others get 1×1 filters in place of their k×k filters (neural implant).

    Args:
        target: share of the measure that is gone at the end, in [0, 1); of
            ``"structures"``, removed and implanted ones together.
        config: how channels are scored and chosen; its ``method`` is set here.
        implant_ratio: r, in [0, 1).
        implant_init: what 1×1 filters begin with: ``"zero"``, ``"center"`` (the centre
            tap of the filter) or ``"lstsq"`` (fitted to what the filter gives).
        options: further arguments of :class:`StructuredPruningCallback`.
    """

    def __init__(
        self,
        target: float = 0.5,
        config: StructureConfig = StructureConfig(),
        implant_ratio: float = 0.0,
        implant_init: ImplantInit = "zero",
        **options: Any,
    ) -> None:
        config = dataclasses.replace(config, method="hap")
        super().__init__(target, config=config, **options)
        self._implants = ImplantConfig(implant_ratio, implant_init)
        self._implants.require_multiples(config.round_to)


def _copy_network(network: nn.Module) -> nn.Module:
    if not isinstance(network, either_name(pl.LightningModule)):
        return copy.deepcopy(network)
    trainer = network._trainer
    network._trainer = None
    try:
        return copy.deepcopy(network)
    finally:
        network._trainer = trainer
