"""Callbacks that remove whole channels: SOSP, HAP and their baselines.

During training a removed channel is masked: its filters, biases and norm entries are zero,
so the network computes what it would compute without the channel. After training,
:meth:`~StructuredPruningCallback.shrunk_model` cuts the masked channels out.
"""

from __future__ import annotations

__all__ = [
    "HAPPruningCallback",
    "SOSPPruningCallback",
    "StructuredPruningCallback",
]

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
from torch import Tensor, nn

from lightning_woodfisher.base.errors import (
    ConfigurationError,
    require_choice,
    require_integer,
)
from lightning_woodfisher.base.keywords import explain_keywords
from lightning_woodfisher.base.wording import count_of
from lightning_woodfisher.callbacks.base import PruningCallback
from lightning_woodfisher.callbacks.checks import require_writable, training_horizon
from lightning_woodfisher.callbacks.progress import announce
from lightning_woodfisher.callbacks.training_step import TrainingStepLoss
from lightning_woodfisher.data.batches import require_rereadable
from lightning_woodfisher.data.losses import LossSource
from lightning_woodfisher.distributed.communicator import Communicator
from lightning_woodfisher.distributed.dtensor import is_sharded
from lightning_woodfisher.pruning.schedule import (
    OneShotSchedule,
    PlannedStep,
    PruningSchedule,
    continue_plan,
    keeps_zeros,
)
from lightning_woodfisher.reporting.loggers import log_end, log_settings
from lightning_woodfisher.resources.budget import require_supported_device
from lightning_woodfisher.structured.config import StructureConfig
from lightning_woodfisher.structured.graph.groups import (
    Group,
    add_prefix,
    channel_masks,
    masked_parameters,
    zero_structures,
)
from lightning_woodfisher.structured.graph.inputs import capture_inputs
from lightning_woodfisher.structured.network_cost import measure_latency
from lightning_woodfisher.structured.pruner import (
    StructurePruner,
    require_target,
)
from lightning_woodfisher.structured.report import MEASURES, StructureReport
from lightning_woodfisher.structured.shrink.files import save_shrunk
from lightning_woodfisher.structured.shrink.implants import ImplantConfig, ImplantInit
from lightning_woodfisher.structured.shrink.removal import RemovalPlan, plan_removal
from lightning_woodfisher.structured.shrink.removal_check import check_implants
from lightning_woodfisher.structured.tracing import trace_groups
from lightning_woodfisher.weights.checkpoint_state import require_readable


@explain_keywords()
class StructuredPruningCallback(PruningCallback):
    """Remove whole channels while a network trains, with any of the methods.

    Args:
        target: share of ``config.measure`` that is removed at the end, in [0, 1).
        config: how channels are scored and chosen, and which layers may be pruned.
        schedule: when to prune and how far; by default once, after a tenth of training. For
            a trained network give ``OneShotSchedule(epoch=0)``.
        network: name of the submodule to prune; by default the first module that is called
            and holds all Conv and Linear layers.
        loss_method: name of a method ``(batch, batch_idx) -> loss`` of the module to take
            the loss from, for a ``training_step`` that does more than compute one.
        dataloader: batches to use instead of the training data; read several times.
        report_path: JSON file for the reports of all steps.
        export_path: folder for the smaller network, written at the end of fit: the plan and
            a ``state_dict``, for :func:`.load_shrunk`.
        latency_runs: number of forward passes of the dense and of the smaller network that
            are timed on rank 0 after each step, for the report; 0 times nothing.
        weight_decay_off_after_last_step: set ``weight_decay`` of all parameter groups to
            zero after the last planned step.
        log_figures: draw figures for W&B and TensorBoard after the last planned step.

    Raises:
        ConfigurationError: for a value that cannot work.
    """

    _removes_channels = True
    _report_class = StructureReport

    def __init__(
        self,
        target: float = 0.5,
        config: StructureConfig = StructureConfig(),
        schedule: PruningSchedule | None = None,
        network: str | None = None,
        loss_method: str | None = None,
        dataloader: Iterable[Any] | None = None,
        report_path: str | None = None,
        export_path: str | None = None,
        latency_runs: int = 0,
        weight_decay_off_after_last_step: bool = False,
        log_figures: bool = True,
    ) -> None:
        require_target(target)
        require_rereadable(dataloader)
        require_integer(
            "latency_runs", latency_runs, least=0, hint="use 0 to time nothing"
        )
        super().__init__(
            schedule if schedule is not None else OneShotSchedule(share=0.1),
            loss_method,
            dataloader,
            report_path,
            weight_decay_off_after_last_step,
            log_figures,
        )
        self.target = target
        self.config = config
        self.network = network
        self.export_path = export_path
        self.latency_runs = latency_runs
        # Found when fit starts: the network within the LightningModule, an example of its
        # inputs, and its groups.
        self._prefix = ""
        self._inputs: Any = None
        self._groups: tuple[Group, ...] = ()
        # Channels that were zero before the first step and stay so, by group.
        self._zero_channels: dict[str, tuple[int, ...]] = {}
        self._removal_plan: RemovalPlan | None = None
        self._implants = ImplantConfig()
        self._implantable: dict[str, tuple[str, ...]] = {}

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(target={self.target}, config={self.config!r}, "
            f"schedule={self.schedule!r})"
        )

    @property
    def state_key(self) -> str:
        """Key of the state in a checkpoint; two callbacks differ by what they select."""
        return self._generate_state_key(
            only=list(self.config.only),
            exclude=list(self.config.exclude),
            network=self.network,
        )

    @property
    def removed(self) -> dict[str, tuple[int, ...]]:
        """The removed channels, by group of the network."""
        return self._names_of_network(self._removed_so_far())

    @property
    def implanted(self) -> dict[str, tuple[int, ...]]:
        """The channels with 1×1 filters, by group of the network."""
        return self._names_of_network(self._implanted_so_far())

    def _removed_so_far(self) -> dict[str, tuple[int, ...]]:
        return self.reports[-1].removed if self.reports else self._zero_channels

    def _implanted_so_far(self) -> dict[str, tuple[int, ...]]:
        return self.reports[-1].implanted if self.reports else {}

    def _names_of_network(self, groups: dict[str, Any]) -> dict[str, Any]:
        prefix = self._module_name("")
        return {name.removeprefix(prefix): found for name, found in groups.items()}

    def _module_name(self, name: str) -> str:
        """Return the name within the module of a group or layer of the network."""
        return f"{self._prefix}.{name}" if self._prefix else name

    # ------------------------------------------------------------------ smaller models

    @property
    def removal_plan(self) -> RemovalPlan:
        """How to cut the masked channels out of the network; ``apply`` changes it.

        A checkpoint contains it.

        Raises:
            ConfigurationError: before fit has traced the network or a checkpoint was loaded.
        """
        if self._removal_plan is None:
            raise ConfigurationError(
                "the channels to cut out are not known: call fit first, or load_shrunk with a "
                "checkpoint of a run that has removed channels, also after ddp_spawn."
            )
        return self._removal_plan

    def _plan_removal(self, module: nn.Module) -> None:
        self._removal_plan = plan_removal(
            module.get_submodule(self._prefix),
            self._groups,
            self.removed,
            self.implanted,
        )

    def shrunk_model(self, module: nn.Module) -> nn.Module:
        """Build the smaller network, which computes the same as the masked one.

        Args:
            module: the LightningModule that holds the network; it is left unchanged.

        Returns:
            A copy of its network without the masked channels.
        """
        network = module.get_submodule(self._prefix)
        return self.removal_plan.apply_to_copy(network)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check the masks, and export the smaller network if ``export_path`` is set.

        Args:
            trainer: the Trainer.
            pl_module: its module, which Lightning has moved to the CPU.
        """
        super().on_fit_end(trainer, pl_module)
        if self.masks is not None:  # Otherwise nothing was left to train.
            steps = f"{len(self.reports)} of {len(self._plan)} pruning steps"
            self._warn_of_missed_steps(trainer, steps)
        pruned = self.reports or self._zero_channels
        if self.export_path and pruned and trainer.is_global_zero:
            smaller = self.shrunk_model(pl_module).state_dict()
            save_shrunk(self.export_path, smaller, self.removal_plan)

    # ------------------------------------------------------------------ checkpoint

    def setup(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str
    ) -> None:
        """Forget the plan of an earlier fit, as everything else of it.

        Args:
            trainer: the Trainer.
            pl_module: its module.
            stage: only ``"fit"`` matters.
        """
        super().setup(trainer, pl_module, stage)
        if not self.reports:
            self._removal_plan = None

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint, which also cuts channels out without a fit.

        Returns:
            The state of :class:`PruningCallback`, the name of the network in the module,
            and the plan, with names of the module.
        """
        state = super().state_dict()
        if self._removal_plan is not None:
            prefix = self._module_name("")
            plan = self._removal_plan.with_prefix(prefix)
            state |= {"network": self._prefix, "removal_plan": plan.to_dict()}
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of a checkpoint.

        Args:
            state_dict: result of :meth:`state_dict`.
        """
        require_readable(state_dict, "the checkpoint")
        plan = None
        if "removal_plan" in state_dict:
            plan = RemovalPlan.from_dict(state_dict["removal_plan"])
        super().load_state_dict(state_dict)
        if plan is not None:
            self._prefix = state_dict.get("network", "")
            self._removal_plan = plan.without_prefix(self._module_name(""))

    # ------------------------------------------------------------------ training starts

    def _settings(self) -> dict[str, Any]:
        return {
            "target": self.target,
            "network": self.network,
            "config": self.config,
            "implants": self._implants,
        }

    def _select(
        self, trainer: pl.Trainer, module: pl.LightningModule
    ) -> dict[str, nn.Parameter]:
        config = self.config
        source = self._source(trainer, module)
        self._prefix, self._inputs = capture_inputs(source, self.network, config.seed)
        network = module.get_submodule(self._prefix)
        if any(is_sharded(parameter) for parameter in network.parameters()):
            raise ConfigurationError(
                "channels cannot be removed from parameters that are sharded over the "
                "ranks; use a single device or 'ddp'."
            )
        require_supported_device(module, dict(network.named_parameters()))
        self._groups = trace_groups(
            network,
            self._inputs,
            only=config.only,
            exclude=config.exclude,
            mode=source.evaluation,
            seed=config.seed,
        ).groups
        if self._implants.ratio:
            found = check_implants(network, self._groups, self._inputs)
            self._implantable = {
                self._module_name(group): tuple(map(self._module_name, layers))
                for group, layers in found.items()
            }
        return masked_parameters(module, add_prefix(self._groups, self._prefix))

    def _make_plan(self, trainer: pl.Trainer) -> tuple[PlannedStep, ...]:
        self._zero_channels = {}
        if not self._done and keeps_zeros(self.schedule):
            self._keep_zero_channels(trainer.lightning_module)
        if getattr(trainer, "fast_dev_run", False):
            return (PlannedStep("epoch", 0, self.target),)
        horizon = training_horizon(trainer, self.schedule)
        return continue_plan(self._done, self.schedule.plan(self.target, horizon))

    def _prepare(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._plan_removal(module)
        structures = sum(group.size for group in self._groups)
        steps = ", ".join(
            f"{step.sparsity:.0%} at {step.unit} {step.position}"
            for step in self._ahead()
        )
        announce(
            trainer,
            f"Removing channels by {self.config.method}: "
            f"{count_of(structures, 'structure')} in "
            f"{count_of(len(self._groups), 'group')}; share of "
            f"{MEASURES[self.config.measure]} to remove: {steps or 'no step is left'}.",
        )
        settings = {
            "class": type(self).__name__,
            "target": self.target,
            "network": self._prefix,
            "implants": dataclasses.asdict(self._implants),
            **dataclasses.asdict(self.config),
        }
        log_settings(trainer, settings, self.schedule, prefix="channel_")

    def _keep_zero_channels(self, module: nn.Module) -> None:
        """Count channels that are zero as removed."""
        groups = add_prefix(self._groups, self._prefix)
        removed = zero_structures(module, groups)
        self._get_masks().prune(channel_masks(module, groups, removed))
        self._zero_channels = {n: tuple(s.tolist()) for n, s in removed.items()}

    # ------------------------------------------------------------------ the step

    def _has_work(self, target: PlannedStep) -> bool:
        return target.sparsity > 0.0

    def _step(
        self, trainer: pl.Trainer, module: pl.LightningModule, target: PlannedStep
    ) -> StructureReport:
        source = self._source(trainer, module)
        report = self._pruner(module).step(source, target.sparsity, target.position)
        if self._implants.init != "center":
            self._reset_optimizers(trainer, module, report)
        return report

    def _reset_optimizers(
        self, trainer: pl.Trainer, module: pl.LightningModule, report: StructureReport
    ) -> None:
        """Set the optimizer state of new 1×1 filters to zero."""
        earlier = self._implanted_so_far()
        for group, structures in report.implanted.items():
            new = sorted({*structures} - {*earlier.get(group, ())})
            for layer in self._implantable[group]:
                weight = module.get_parameter(f"{layer}.weight")
                for optimizer in trainer.optimizers:
                    for value in optimizer.state.get(weight, {}).values():
                        if isinstance(value, Tensor) and value.shape == weight.shape:
                            value[new] = 0.0

    def _describe(self, report: StructureReport) -> str:
        return report.to_table()

    def _log_end(self, trainer: pl.Trainer) -> None:
        log_end(trainer, self.reports)

    def _publish(self, trainer: pl.Trainer, report: StructureReport) -> None:
        self._plan_removal(trainer.lightning_module)
        if self.latency_runs:
            module = trainer.lightning_module
            comm = Communicator(module.device)
            seconds = 0.0, 0.0
            if comm.rank == 0:
                seconds = self._measure_latency(module, self.latency_runs)
            # The times of rank 0 for all ranks, so that their reports are the same.
            dense, shrunk = comm.gather_numbers(seconds)[0]
            report = self.reports[-1] = dataclasses.replace(
                report,
                latency_dense=dense,
                latency=shrunk,
                latency_runs=self.latency_runs,
            )
        super()._publish(trainer, report)

    def _measure_latency(
        self, module: pl.LightningModule, runs: int
    ) -> tuple[float, float]:
        network = module.get_submodule(self._prefix)
        return measure_latency(network, self.shrunk_model(module), self._inputs, runs)

    def _require_writable(self) -> None:
        super()._require_writable()
        if self.export_path is not None:
            require_writable("export_path", Path(self.export_path, "plan.json"))

    def _rehearse(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        target = max(step.sparsity for step in self._ahead())
        self._pruner(module).rehearse(self._source(trainer, module), target)
        if self.latency_runs:
            # A network that cannot be copied or called is reported early.
            with Communicator(module.device).failing_together():
                self._measure_latency(module, 1)

    def _source(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> LossSource:
        return TrainingStepLoss(
            trainer,
            pl_module,
            self.loss_method,
            self.dataloader,
            full_precision=True,
            network=pl_module.get_submodule(self._prefix),
        )

    def _pruner(self, module: pl.LightningModule) -> StructurePruner:
        return StructurePruner(
            add_prefix(self._groups, self._prefix),
            self._get_masks(),
            self.config,
            Communicator(module.device),
            self._implants,
            self._implantable,
            self._removed_so_far(),
            self._implanted_so_far(),
        )


@explain_keywords()
class SOSPPruningCallback(StructuredPruningCallback):
    """Remove channels by SOSP: second order, with the correlations of all channels.

    Nonnenmacher et al., "SOSP: Efficiently capturing global correlations by second-order
    structured pruning", ICLR 2022.

    Args:
        target: as for :class:`StructuredPruningCallback`.
        variant: ``"I"`` uses the Gauss-Newton matrix of pairs of channels, ``"H"`` one
            Hessian-vector product for all channels.
        config: as for :class:`StructuredPruningCallback`; ``method`` is set here.
        options: other arguments of :class:`StructuredPruningCallback`.
    """

    def __init__(
        self,
        target: float = 0.5,
        variant: Literal["I", "H"] = "I",
        config: StructureConfig = StructureConfig(),
        **options: Any,
    ) -> None:
        require_choice("variant", variant, ("I", "H"))
        config = dataclasses.replace(
            config, method="sosp_i" if variant == "I" else "sosp_h"
        )
        super().__init__(target, config, **options)


@explain_keywords()
class HAPPruningCallback(StructuredPruningCallback):
    """Remove channels by HAP: the trace of the Hessian of each channel.

    Yu et al., "Hessian-aware pruning and optimal neural implant", WACV 2022. Layers whose
    outputs are added lose the same channels; the authors' code scatters the remaining
    channels instead.

    With ``implant_ratio`` r, the share 1 - r of the chosen channels with the lowest scores is
    removed. The k×k filters of the others are replaced by 1×1 filters (neural implant).

    Args:
        target: as for :class:`StructuredPruningCallback`; a share of ``"structures"``
            counts removed and implanted channels together.
        config: as for :class:`StructuredPruningCallback`; ``method`` is set here.
        implant_ratio: r, in [0, 1).
        implant_init: initial value of the 1×1 filters: ``"zero"``, ``"center"`` (the center
            tap of the filter) or ``"lstsq"`` (fitted to the output of the filter).
        options: other arguments of :class:`StructuredPruningCallback`.
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
        super().__init__(target, config, **options)
        self._implants = ImplantConfig(implant_ratio, implant_init)
        if implant_ratio and config.round_to > 1:
            raise ConfigurationError(
                f"round_to={config.round_to} counts whole channels, and implants are not "
                "whole; use round_to=1 or implant_ratio=0."
            )
