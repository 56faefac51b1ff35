"""One structured pruning step from end to end: scores, an exact choice, masks.

The step is whole or absent: weights, masks and BatchNorm statistics are put back when
anything fails.
"""

from __future__ import annotations

__all__ = [
    "Measure",
    "StructurePruner",
    "prune_structures",
    "require_cost",
    "require_rereadable",
    "require_target",
]

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

from torch import Tensor, nn
from torch.utils.data import Dataset

from lightning_woodfisher.base.clock import PhaseClock
from lightning_woodfisher.base.errors import ConfigurationError, nearest, require_number
from lightning_woodfisher.data.batchnorm import (
    estimate_statistics,
    require_recalibration_batches,
)
from lightning_woodfisher.data.isolation import derive_seed
from lightning_woodfisher.data.losses import FunctionLoss, LossSource, mean_loss
from lightning_woodfisher.distributed.communicator import Communicator
from lightning_woodfisher.structured.config import StructureConfig
from lightning_woodfisher.structured.graph.groups import (
    Group,
    channel_masks,
    masked_parameters,
    zero_structures,
)
from lightning_woodfisher.structured.graph.tracing import trace_groups
from lightning_woodfisher.structured.network_cost import NetworkSize, Removed
from lightning_woodfisher.structured.report import GroupReport, StructureReport
from lightning_woodfisher.structured.scores.evaluation import (
    Evaluation,
    calibration_batches,
)
from lightning_woodfisher.structured.scores.methods import (
    StructureScores,
    score_structures,
)
from lightning_woodfisher.structured.scores.vectors import StructureVectors
from lightning_woodfisher.structured.selection import (
    Before,
    additive_scores,
    select_count,
    select_for_size,
)
from lightning_woodfisher.structured.shrink.implanted_conv import implant_masks
from lightning_woodfisher.structured.shrink.implants import (
    ImplantConfig,
    divide_structures,
    initialize_implants,
)
from lightning_woodfisher.weights.agreement import require_same
from lightning_woodfisher.weights.masks import Masks
from lightning_woodfisher.weights.rollback import rollback_on_error

#: What a target counts: structures, parameters, or multiply-accumulates (half the FLOPs).
Measure = Literal["structures", "parameters", "macs"]


def require_target(target: float, measure: str) -> None:
    """Check a target.

    Args:
        target: share of the measure that is removed.
        measure: what is counted.

    Raises:
        ConfigurationError: for a share outside [0, 1), or an unknown measure.
    """
    if measure not in get_args(Measure):
        raise ConfigurationError(
            f"measure={measure!r} is unknown; use one of {', '.join(get_args(Measure))}."
            f"{nearest(measure, get_args(Measure))}"
        )
    require_number("target", target)
    if not 0.0 <= target < 1.0:
        raise ConfigurationError(
            f"target={target} is outside [0, 1); it is the share that is removed, so to "
            "halve the network it is 0.5."
        )


def require_cost(config: StructureConfig, measure: str) -> None:
    """Refuse costs where the target counts structures, of which each costs one.

    Args:
        config: how structures are chosen.
        measure: what the target counts.

    Raises:
        ConfigurationError: naming the other measures.
    """
    if config.per_cost and measure == "structures":
        raise ConfigurationError(
            "per_cost=True with measure='structures' has no cost to divide by; take "
            "measure='macs' or 'parameters', or leave per_cost out."
        )


def require_rereadable(data: Any) -> None:
    """Refuse data that can be read only once.

    Args:
        data: a dataset, a loader or an iterable of batches.

    Raises:
        ConfigurationError: for an iterator.
    """
    if isinstance(data, Iterator):
        raise ConfigurationError(
            f"the data is an iterator ({type(data).__name__}), which can be read only "
            "once, but scores and losses need the same samples several times; pass a "
            "list of batches, a Dataset or a DataLoader."
        )


class StructurePruner:
    """Removes whole channels by masks, step by step.

    Args:
        groups: the structures of the model.
        masks: of the parameters that the groups' masks touch; changed by every step.
        config: how structures are scored and chosen.
        measure: what targets count.
        communicator: the ranks of the job.
        implants: how many of the chosen structures become 1×1 filters; none if None.
        implantable: in which layers, by group.
        recalibration_batches: batches to estimate BatchNorm's running statistics on anew
            after every step; 0 leaves them as they are.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        masks: Masks,
        config: StructureConfig,
        measure: Measure,
        communicator: Communicator,
        implants: ImplantConfig | None = None,
        implantable: Mapping[str, Sequence[str]] | None = None,
        recalibration_batches: int = 0,
    ) -> None:
        self.implants = implants or ImplantConfig()
        self.implantable = dict(implantable or {})
        self.implants.require_multiples(config.round_to)
        require_cost(config, measure)
        self.groups = tuple(groups)
        self.masks = masks
        self.config = config
        self.measure: Measure = measure
        self.comm = communicator
        self.recalibration_batches = recalibration_batches

    def step(
        self,
        source: LossSource,
        target: float,
        removed: Before | None = None,
        position: int = 0,
        implanted: Before | None = None,
    ) -> StructureReport:
        """Remove structures until a share of the measure is gone.

        A target that cannot be reached is a :class:`ConfigurationError`, a step that
        fails a :class:`PruningError`; after any exception the model is as it was.

        Args:
            source: where losses come from.
            target: share of the measure that is gone afterwards, in [0, 1).
            removed: structures that earlier steps have removed, by group.
            position: of the step in training; enters the seed.
            implanted: structures that earlier steps have implanted, by group.

        Returns:
            What happened; equal on all ranks but for the seconds.
        """
        before, early = dict(removed or {}), dict(implanted or {})
        seed = derive_seed(self.config.seed, position)
        # torch's generators take seeds of up to 63 bits.
        config = dataclasses.replace(self.config, seed=seed % 2**62)
        clock = PhaseClock()
        # Outermost: what the ranks find out together at the very end undoes it, too.
        with (
            rollback_on_error(self.masks, source.model),
            self.comm.failing_together(lambda: clock.phase),
        ):
            with clock("check"):
                require_same(self.masks, self.comm, "before the step")
            with clock("size"):
                size = self._size(source, seed)
            with clock("score"):
                scores = score_structures(source, self.groups, config, self.comm)
            with clock("select"):
                chosen, new = self._choose(scores, size, target, before, early)
            loss_before = self._loss(source, seed, clock)
            if self.implants.ratio:
                with clock("implant"):
                    self._implant(source, config, chosen, new, early)
            self.masks.grow(channel_masks(source.model, self.groups, chosen))
            self.masks.apply()
            self.masks.verify()
            batchnorm_layers = self._recalibrate(source, position, clock)
            loss_after = self._loss(source, seed, clock)
            with clock("check"):
                require_same(self.masks, self.comm, "after the step")
        return StructureReport(
            method=self.config.method,
            structure=self.config.structure,
            measure=self.measure,
            target=target,
            groups=tuple(
                GroupReport(
                    name=group.name,
                    layers=group.layers,
                    size=group.size,
                    removed_before=len(before.get(group.name, ())),
                    removed=tuple(chosen[group.name].tolist()),
                    implanted=tuple(new[group.name].tolist()),
                )
                for group in self.groups
            ),
            parameters_dense=size.dense_parameters,
            parameters=size.parameters(chosen, new),
            macs_dense=size.dense_macs,
            macs=size.macs(chosen, new),
            loss_before=loss_before,
            loss_after=loss_after,
            notes=scores.notes,
            seconds=dict(clock.seconds),
            world_size=self.comm.world_size,
            batchnorm_layers=batchnorm_layers,
        )

    def rehearse(
        self,
        source: LossSource,
        target: float,
        removed: Before | None = None,
        implanted: Before | None = None,
    ) -> None:
        """Find out early whether targets, model and data give what a step needs.

        A few samples are scored and dropped. Nothing changes.

        Args:
            source: where losses come from.
            target: the highest that is planned.
            removed: structures that earlier steps have removed, by group.
            implanted: those that they have implanted.
        """
        few = min(self.config.num_samples, 2 * self.comm.world_size)
        config = dataclasses.replace(
            self.config, num_samples=few, batch_size=1, probes=2
        )
        with self.comm.failing_together():
            size = self._size(source, 0)
            scores = score_structures(source, self.groups, config, self.comm)
            self._choose(scores, size, target, removed or {}, implanted or {})
            with source.session("eval"):
                calibration_batches(source, self.config, self.config.seed)

    def _size(self, source: LossSource, seed: int) -> NetworkSize:
        return NetworkSize.of_source(
            source, self.groups, self.comm, seed, self.implantable
        )

    def _choose(
        self,
        scores: StructureScores,
        size: NetworkSize,
        target: float,
        removed: Before,
        implanted: Before,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Choose what is removed and implanted after the step, earlier ones included."""
        config, groups, limits = self.config, self.groups, self.config.limits
        count = None
        if self.measure == "structures":
            count = round(target * sum(group.size for group in groups))
        values = additive_scores(scores, groups, limits, config.search, count)
        # An implant may be removed later, but is never whole again.
        before = {
            g.name: [*removed.get(g.name, ()), *implanted.get(g.name, ())]
            for g in groups
        }
        by_name = {g.name: s for g, s in zip(groups, scores.values, strict=True)}

        def divide(gone: Removed) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
            ratio = self.implants.ratio
            return divide_structures(gone, by_name, ratio, self.implantable, removed)

        if count is not None:
            chosen = select_count(
                groups, values, count, limits, before=before, nearest_reachable=True
            )
        else:
            left = 1.0 - target
            chosen = select_for_size(
                groups,
                values,
                size,
                limits,
                parameters_left=left if self.measure == "parameters" else None,
                macs_left=left if self.measure == "macs" else None,
                before=before,
                split=divide,
                per_cost=config.per_cost,
            )
        return divide(chosen)

    def _implant(
        self,
        source: LossSource,
        config: StructureConfig,
        removed: Removed,
        implanted: Removed,
        early: Before,
    ) -> None:
        """Set the filters of new implants and mask those of all."""
        fresh = {
            name: [s for s in structures.tolist() if s not in early.get(name, ())]
            for name, structures in implanted.items()
        }
        vectors = StructureVectors(source.model, self.groups, config.structure)
        evaluation = Evaluation(source, vectors, config, self.comm)
        initialize_implants(evaluation, self.groups, fresh, removed, self.implants.init)
        self.masks.grow(implant_masks(source.model, self.groups, implanted))

    def _recalibrate(self, source: LossSource, position: int, clock: PhaseClock) -> int:
        """Give BatchNorm the statistics of what is left; count the layers."""
        count, size = self.recalibration_batches, self.config.batch_size
        if not count:
            return 0
        with clock("recalibrate"):
            seed = derive_seed(self.config.seed, position, "batchnorm")
            with source.session("eval"):
                found = estimate_statistics(source, count, size, self.comm, seed)
            # The session has put back what was there before.
            found.write(source.model)
        return len(found.layers)

    def _loss(self, source: LossSource, seed: int, clock: PhaseClock) -> float:
        count, _ = self.config.batches
        with clock("measure"), source.session("eval"):
            batches = calibration_batches(source, self.config, seed)
            losses = mean_loss(source, batches, count, self.comm, seed)
        return sum(losses) / len(losses)


def prune_structures(
    model: nn.Module,
    data: Dataset[Any] | Iterable[Any],
    loss_fn: Callable[[Any, Any], Tensor],
    *,
    target: float,
    measure: Measure = "structures",
    config: StructureConfig | None = None,
    groups: Sequence[Group] | None = None,
    example_inputs: Any = None,
    batchnorm_recalibration_batches: int = 0,
) -> tuple[StructureReport, tuple[Group, ...]]:
    """Mask whole channels of a plain PyTorch model; no Trainer needed.

    Channels that are zero already stay so, and count. A share of the structures is
    rounded to a whole number, and to the nearest one that ``round_to`` allows.

    With an initialised ``torch.distributed``, call it on every rank with the same model
    and data. :func:`.shrink` cuts the channels out afterwards.

    Args:
        model: the network, changed in place; names and storages stay.
        data: a map-style Dataset of samples, or an iterable of batches.
        loss_fn: ``loss_fn(model, batch)`` returns the mean loss of the batch.
        target: share of the measure that is gone afterwards, in [0, 1).
        measure: ``"structures"``, ``"parameters"`` or ``"macs"``.
        config: how structures are scored and chosen.
        groups: of the model; traced if None.
        example_inputs: what the model is called with, to trace it; see
            :func:`.trace_groups`.
        batchnorm_recalibration_batches: re-estimate BatchNorm's running statistics on so
            many batches (of 64 samples or ``batch_size``, the larger) after the step; 0
            leaves them.

    Returns:
        What happened, and the groups.

    Raises:
        ConfigurationError: for settings that cannot work, before anything is computed.
    """
    require_target(target, measure)
    require_cost(config or StructureConfig(), measure)
    require_rereadable(data)
    require_recalibration_batches(batchnorm_recalibration_batches)
    if groups is None:
        if example_inputs is None:
            raise ConfigurationError(
                "give groups, or example_inputs to trace the model with."
            )
        groups = trace_groups(model, example_inputs).groups
    masks = Masks(masked_parameters(model, groups))
    comm = Communicator(next(iter(masks.parameters.values())).device)
    pruner = StructurePruner(
        groups,
        masks,
        config or StructureConfig(),
        measure,
        comm,
        recalibration_batches=batchnorm_recalibration_batches,
    )
    removed = {n: s.tolist() for n, s in zero_structures(model, groups).items()}
    source = FunctionLoss(model, data, loss_fn)
    return pruner.step(source, target, removed), tuple(groups)
