"""One structured pruning step from end to end: scores, an exact choice, masks.

The step is whole or absent: weights and masks are put back when anything fails.
"""

from __future__ import annotations

__all__ = ["Measure", "StructurePruner", "prune_structures", "require_target"]

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from lightning_woodfisher.agreement import require_same
from lightning_woodfisher.clock import PhaseClock
from lightning_woodfisher.distributed import Communicator
from lightning_woodfisher.errors import ConfigurationError, nearest, require_number
from lightning_woodfisher.gradients import mean_loss
from lightning_woodfisher.isolation import derive_seed
from lightning_woodfisher.losses import FunctionLoss, LossSource
from lightning_woodfisher.masks import Masks
from lightning_woodfisher.structured.channels import channel_masks, masked_parameters
from lightning_woodfisher.structured.configuration import StructureConfig
from lightning_woodfisher.structured.groups import Group
from lightning_woodfisher.structured.network_size import NetworkSize
from lightning_woodfisher.structured.report import GroupReport, StructureReport
from lightning_woodfisher.structured.scores import StructureScores, score_structures
from lightning_woodfisher.structured.selection import (
    additive_scores,
    select_count,
    select_for_size,
)
from lightning_woodfisher.structured.tracing import trace_groups

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


class StructurePruner:
    """Removes whole channels by masks, step by step.

    Args:
        groups: the structures of the model.
        masks: of the parameters that the groups' masks touch; changed by every step.
        config: how structures are scored and chosen.
        measure: what targets count.
        communicator: the ranks of the job.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        masks: Masks,
        config: StructureConfig,
        measure: Measure,
        communicator: Communicator,
    ) -> None:
        self.groups = tuple(groups)
        self.masks = masks
        self.config = config
        self.measure: Measure = measure
        self.comm = communicator

    def step(
        self,
        source: LossSource,
        target: float,
        removed: Mapping[str, Sequence[int]] | None = None,
        position: int = 0,
    ) -> StructureReport:
        """Remove structures until a share of the measure is gone.

        A target that cannot be reached is a :class:`ConfigurationError`, a step that
        fails a :class:`PruningError`; after any exception the model is as it was.

        Args:
            source: where losses come from.
            target: share of the measure that is gone afterwards, in [0, 1).
            removed: structures that earlier steps have removed, by group.
            position: of the step in training; enters the seed.

        Returns:
            What happened; equal on all ranks but for the seconds.
        """
        before = dict(removed or {})
        seed = derive_seed(self.config.seed, position)
        # torch's generators take seeds of up to 63 bits.
        config = dataclasses.replace(self.config, seed=seed % 2**62)
        clock = PhaseClock()
        # Outermost: what the ranks find out together at the very end undoes it, too.
        with (
            self._whole_or_absent(),
            self.comm.failing_together(lambda: clock.phase),
        ):
            with clock("check"):
                require_same(self.masks, self.comm, "before the step")
            with clock("size"):
                size = NetworkSize.of_source(source, self.groups, self.comm, seed)
            with clock("score"):
                scores = score_structures(source, self.groups, config, self.comm)
            with clock("select"):
                chosen = self._choose(scores, size, target, before)
            loss_before = self._loss(source, seed, clock)
            self._check_growth(before, chosen)
            self.masks.grow(channel_masks(source.model, self.groups, chosen))
            self.masks.apply()
            self.masks.verify()
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
                    layers=tuple(m.module for m in group.of_role("producer")),
                    size=group.size,
                    removed_before=len(before.get(group.name, ())),
                    removed=tuple(chosen[group.name].tolist()),
                )
                for group in self.groups
            ),
            parameters_dense=size.dense_parameters,
            parameters=size.parameters(chosen),
            macs_dense=size.dense_macs,
            macs=size.macs(chosen),
            loss_before=loss_before,
            loss_after=loss_after,
            notes=scores.notes,
            seconds=dict(clock.seconds),
            world_size=self.comm.world_size,
        )

    def rehearse(self, source: LossSource) -> None:
        """Find out early whether targets, model and data give what a step needs.

        A few samples are scored and dropped. Nothing changes.

        Args:
            source: where losses come from.
        """
        few = min(self.config.num_samples, 2 * self.comm.world_size)
        config = dataclasses.replace(
            self.config, num_samples=few, batch_size=1, probes=2
        )
        with self.comm.failing_together():
            score_structures(source, self.groups, config, self.comm)

    def _choose(
        self,
        scores: StructureScores,
        size: NetworkSize,
        target: float,
        before: Mapping[str, Sequence[int]],
    ) -> dict[str, Tensor]:
        """Choose all structures that are gone after the step, earlier ones included."""
        config, groups = self.config, self.groups
        count = None
        if self.measure == "structures":
            count = round(target * sum(group.size for group in groups))
        values = additive_scores(scores, groups, config.limits, config.search, count)
        lowest = min(float(v[v.isfinite()].min()) for v in scores.values)
        fixed = []
        for group, value in zip(groups, values, strict=True):
            value = value.clone()
            # What is gone comes first, below any score.
            value[list(before.get(group.name, ()))] = min(lowest, 0.0) - 1.0
            fixed.append(value)
        if count is not None:
            return select_count(groups, fixed, count, config.limits)
        left = {f"{self.measure}_left": 1.0 - target}
        return select_for_size(groups, fixed, size, config.limits, **left)

    def _check_growth(
        self, before: Mapping[str, Sequence[int]], chosen: Mapping[str, Tensor]
    ) -> None:
        back = [n for n, s in before.items() if not {*s} <= {*chosen[n].tolist()}]
        if back:
            raise ConfigurationError(
                f"the target would bring back channels of {', '.join(back)}; what is "
                "removed stays removed: raise the target."
            )

    def _loss(self, source: LossSource, seed: int, clock: PhaseClock) -> float:
        count, size = self.config.batches
        with clock("measure"), source.session("eval"):
            batches = source.batches(count, size, seed)
            losses = mean_loss(source, batches, count, self.comm, seed)
        return sum(losses) / len(losses)

    @contextlib.contextmanager
    def _whole_or_absent(self) -> Iterator[None]:
        masks = self.masks
        weights = {name: masks.local(name).clone() for name in masks.parameters}
        try:
            with masks.restored_on_error():
                yield
        except BaseException:
            with torch.no_grad():
                for name, value in weights.items():
                    masks.local(name).copy_(value)
            raise


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
) -> tuple[StructureReport, tuple[Group, ...]]:
    """Mask whole channels of a plain PyTorch model; no Trainer needed.

    With an initialised ``torch.distributed``, call it on every rank with the same model
    and data. ``structured.export.shrink(model, groups, report.removed)`` cuts them out.

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

    Returns:
        What happened, and the groups.

    Raises:
        ConfigurationError: for settings that cannot work, before anything is computed.
    """
    require_target(target, measure)
    if groups is None:
        if example_inputs is None:
            raise ConfigurationError(
                "give groups, or example_inputs to trace the model with."
            )
        groups = trace_groups(model, example_inputs).groups
    masks = Masks(masked_parameters(model, groups))
    comm = Communicator(next(iter(masks.parameters.values())).device)
    pruner = StructurePruner(groups, masks, config or StructureConfig(), measure, comm)
    return pruner.step(FunctionLoss(model, data, loss_fn), target), tuple(groups)
