"""One structured pruning step from end to end.

    groups of channels → scores [group.size] → exact choice → masks → (implants)
                       → (BatchNorm statistics) → report

Weights, masks and BatchNorm statistics are rolled back if a step fails.
"""

from __future__ import annotations

__all__ = [
    "StructurePruner",
    "prune_structures",
    "require_target",
]

import dataclasses
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from lightning_woodfisher.base.clock import PhaseClock
from lightning_woodfisher.base.errors import (
    ConfigurationError,
    PruningError,
    require_number,
)
from lightning_woodfisher.base.keywords import explain_keywords
from lightning_woodfisher.data.batches import known_length, require_rereadable
from lightning_woodfisher.data.batchnorm import estimate_statistics
from lightning_woodfisher.data.isolation import derive_seed, eager
from lightning_woodfisher.data.losses import (
    FunctionLoss,
    LossSource,
    choose_evaluation,
    compute_losses,
)
from lightning_woodfisher.distributed.communicator import Communicator
from lightning_woodfisher.distributed.same_settings import (
    require_same_settings,
    shapes_by_name,
)
from lightning_woodfisher.resources.budget import require_supported_device
from lightning_woodfisher.structured.config import StructureConfig
from lightning_woodfisher.structured.graph.groups import (
    Group,
    StructureIndices,
    channel_masks,
    masked_parameters,
    zero_structures,
)
from lightning_woodfisher.structured.network_cost import IndexTensors, NetworkSize
from lightning_woodfisher.structured.report import GroupReport, StructureReport
from lightning_woodfisher.structured.scores.evaluation import (
    Evaluation,
    calibration_batches,
    enough_samples,
)
from lightning_woodfisher.structured.scores.hap import count_probes
from lightning_woodfisher.structured.scores.methods import (
    StructureScores,
    score_structures,
)
from lightning_woodfisher.structured.selection import (
    additive_scores,
    select_count,
    select_for_size,
)
from lightning_woodfisher.structured.shrink.implants import (
    ImplantConfig,
    divide_structures,
    implant_masks,
    initialize_implants,
)
from lightning_woodfisher.structured.tracing import trace_groups
from lightning_woodfisher.weights.masks import Masks
from lightning_woodfisher.weights.rollback import rollback_on_error

# Correlation between halves of the probes below which a warning is given.
_LOW_AGREEMENT = 0.9


def require_target(target: float) -> None:
    """Check the target of structured pruning.

    Args:
        target: share of the measure to remove, in [0, 1).
    """
    meaning = "it is the share to remove, so use 0.5 to halve the network"
    require_number("target", target, "[0, 1)", meaning)


@dataclass
class StructurePruner:
    """Remove whole channels with masks, step by step.

    Attributes:
        groups: groups of structures of the model.
        masks: masks of the parameters that belong to structures; changed by every step.
        config: how structures are scored and chosen.
        comm: the ranks.
        implants: share of the chosen structures that become 1×1 filters.
        implantable: names of the layers that can have 1×1 filters, by group.
        removed: structures that are removed so far; each step updates them.
        implanted: structures with 1×1 filters so far; each step updates them.
    """

    groups: Sequence[Group]
    masks: Masks
    config: StructureConfig
    comm: Communicator
    implants: ImplantConfig = field(default_factory=ImplantConfig)
    implantable: Mapping[str, Sequence[str]] = field(default_factory=dict)
    removed: StructureIndices = field(default_factory=dict)
    implanted: StructureIndices = field(default_factory=dict)

    @eager()
    def step(
        self, source: LossSource, target: float, position: int = 0
    ) -> StructureReport:
        """Remove structures until a share of the measure is gone.

        Raise a :class:`ConfigurationError` for a target that cannot be reached and a
        :class:`PruningError` if the step fails. After any exception the model is unchanged.

        Args:
            source: where losses come from.
            target: share of the measure that is removed after the step, in [0, 1).
            position: position of the step in training; part of the seed.

        Returns:
            The report; equal on all ranks except for the seconds.
        """
        seed = derive_seed(self.config.seed, position)
        # Seeds of torch's generators have up to 63 bits.
        config = dataclasses.replace(self.config, seed=seed % 2**62)
        clock = PhaseClock()
        # Outermost, so that an error on another rank at the very end is rolled back, too.
        with (
            rollback_on_error(self.masks, source.model),
            enough_samples(self.config),
            self.comm.failing_together(lambda: clock.phase),
        ):
            with clock("check"):
                self.masks.require_equal_on_ranks(self.comm, "before the step")
            with clock("size"):
                size = self._size(source, seed)
            with clock("score"):
                scores = score_structures(source, self.groups, config, self.comm)
            self._check_ranking(scores)
            with clock("select"):
                removed, implanted = self._choose(scores, size, target)
            with clock("measure"):
                loss_before = self._measure_loss(source, seed)
            if self.implants.ratio:
                with clock("implant"):
                    self._implant(source, config, removed, implanted)
            self.masks.prune(channel_masks(source.model, self.groups, removed))
            self.masks.apply()
            self.masks.verify()
            batchnorm_layers = 0
            if config.batchnorm_recalibration_batches:
                with clock("recalibrate"):
                    batchnorm_layers = self._recalibrate(source, position)
            with clock("measure"):
                loss_after = self._measure_loss(source, seed)
            with clock("check"):
                self.masks.require_equal_on_ranks(self.comm, "after the step")
        report = StructureReport(
            method=config.method,
            structure=config.structure,
            measure=config.measure,
            target=target,
            groups=tuple(
                GroupReport(
                    name=group.name,
                    layers=group.layers,
                    size=group.size,
                    removed_before=len(self.removed.get(group.name, ())),
                    removed=tuple(removed[group.name].tolist()),
                    implanted=tuple(implanted[group.name].tolist()),
                )
                for group in self.groups
            ),
            parameters_dense=size.dense_parameters,
            parameters=size.parameters(removed, implanted),
            macs_dense=size.dense_macs,
            macs=size.macs(removed, implanted),
            loss_before=loss_before,
            loss_after=loss_after,
            notes=scores.notes,
            seconds=dict(clock.seconds),
            world_size=self.comm.world_size,
            batchnorm_layers=batchnorm_layers,
        )
        self.removed, self.implanted = report.removed, report.implanted
        return report

    @eager()
    def rehearse(self, source: LossSource, target: float) -> None:
        """Check early that targets, model and data provide what a step needs.

        A few samples are scored and the scores discarded. Nothing changes.

        Args:
            source: where losses come from.
            target: the highest target that is planned.
        """
        few = min(self.config.num_samples, 2 * self.comm.world_size)
        config = dataclasses.replace(
            self.config, num_samples=few, batch_size=1, probes=2
        )
        with enough_samples(self.config), self.comm.failing_together():
            size = self._size(source, 0)
            scores = score_structures(source, self.groups, config, self.comm)
            self._choose(scores, size, target)
            with source.session("eval"):
                calibration_batches(source, self.config, self.config.seed)

    def _check_ranking(self, scores: StructureScores) -> None:
        """Refuse scores of zero; warn of a ranking that depends on random signs."""
        # A rehearsal may have them: training changes a layer initialized with zeros.
        if not any(bool(values.any()) for values in scores.values):
            raise PruningError(
                f"method={self.config.method!r} computed zero for all structures, so they "
                "cannot be ranked: the loss does not depend on them, for example below a "
                "layer initialized with zeros; train first, or use method='magnitude'"
            )
        agreement = scores.notes.get("probe_agreement", 1.0)
        if agreement >= _LOW_AGREEMENT or self.comm.rank:
            return
        probes = int(scores.notes["probes"])
        needed = count_probes(probes, agreement)
        more = f"about {needed:,.0f}" if math.isfinite(needed) else "many times more"
        warnings.warn(
            f"the scores of two halves of HAP's {probes} probes have a rank correlation of "
            f"{agreement:.2f}, so the choice of channels is mostly noise; {more} probes "
            "would settle it (0.99). Use trace='gauss_newton', or raise probes.",
            stacklevel=2,
        )

    def _size(self, source: LossSource, seed: int) -> NetworkSize:
        choose_evaluation(source, derive_seed(seed, "size"))
        return NetworkSize(source, self.groups, self.comm, seed, self.implantable)

    def _choose(
        self, scores: StructureScores, size: NetworkSize, target: float
    ) -> tuple[IndexTensors, IndexTensors]:
        """Choose what is removed and implanted after the step, earlier ones included."""
        config, groups, removed = self.config, self.groups, self.removed
        names = [group.name for group in groups]
        # An implant may be removed later, but never gets its k×k filter back.
        earlier = {n: [*removed.get(n, ()), *self.implanted.get(n, ())] for n in names}
        by_name = dict(zip(names, scores.values, strict=True))

        def divide(chosen: IndexTensors) -> tuple[IndexTensors, IndexTensors]:
            ratio = self.implants.ratio
            return divide_structures(chosen, by_name, ratio, self.implantable, removed)

        count = None
        if config.measure == "structures":
            count = round(target * sum(group.size for group in groups))
        values = additive_scores(scores, groups, config, size, count)
        if count is not None:
            return divide(select_count(groups, values, count, config, earlier))
        return divide(
            select_for_size(groups, values, size, target, config, earlier, divide)
        )

    def _implant(
        self,
        source: LossSource,
        config: StructureConfig,
        removed: IndexTensors,
        implanted: IndexTensors,
    ) -> None:
        """Set the filters of new implants, and mask the filters of all implants."""
        new = {
            name: sorted({*structures.tolist()} - {*self.implanted.get(name, ())})
            for name, structures in implanted.items()
        }
        evaluation = Evaluation(source, self.groups, config, self.comm)
        initialize_implants(evaluation, self.groups, new, removed, self.implants.init)
        self.masks.prune(implant_masks(source.model, self.groups, implanted))

    def _recalibrate(self, source: LossSource, position: int) -> int:
        """Re-estimate the BatchNorm statistics, and return the number of layers."""
        config = self.config
        with source.session("eval"):
            statistics = estimate_statistics(
                source,
                config.batchnorm_recalibration_batches,
                config.batch_size,
                self.comm,
                derive_seed(config.seed, position, "batchnorm"),
            )
        # The session has restored the old statistics.
        statistics.write(source.model)
        return len(statistics.layers)

    def _measure_loss(self, source: LossSource, seed: int) -> float:
        with source.session("eval"):
            # BatchNorm statistics differ between ranks in the middle of training.
            self.comm.broadcast(source.model.buffers())
            batches = calibration_batches(source, self.config, seed)
            indices = range(self.config.num_batches)
            losses = compute_losses(source, batches, indices, self.comm, seed)
        return sum(losses) / len(losses)


@explain_keywords()
def prune_structures(
    model: nn.Module,
    data: Dataset[Any] | Iterable[Any],
    loss_fn: Callable[[Any, Any], Tensor],
    *,
    target: float,
    config: StructureConfig = StructureConfig(),
    example_inputs: Any = None,
    groups: Sequence[Group] | None = None,
) -> tuple[StructureReport, tuple[Group, ...]]:
    """Mask whole channels of a plain PyTorch model, without a Trainer.

    Channels that are already zero stay removed, and count towards the target.
    ``shrink(model, groups, report.removed)`` of :mod:`.shrink.removal` cuts the masked
    channels out. With an initialized ``torch.distributed``, call it on every rank with the
    same model and data.

    Args:
        model: the network, changed in place; names and storages stay the same.
        data: the data, as for :func:`~.prune`; not an iterator.
        loss_fn: ``loss_fn(model, batch)`` returns the mean loss of the batch.
        target: share of ``config.measure`` that is removed afterwards, in [0, 1).
        config: how structures are scored and chosen.
        example_inputs: inputs of the model on any device, to trace it; see
            :func:`.trace_groups`.
        groups: groups of the model from an earlier call; the model is then not traced.

    Returns:
        The report, and the groups.

    Raises:
        ConfigurationError: for settings that cannot work, before anything is computed.
    """
    comm = Communicator(next(model.parameters(), torch.empty(0)).device)
    settings = {
        "target": target,
        "config": config,
        "length of the data": known_length(data),
        **shapes_by_name(model),
    }
    require_same_settings(settings, comm)
    require_target(target)
    require_rereadable(data)
    require_supported_device(model, dict(model.named_parameters()))
    source = FunctionLoss(model, data, loss_fn)
    if groups is None:
        if example_inputs is None:
            raise ConfigurationError(
                "the model cannot be traced without inputs; pass example_inputs, or "
                "groups from an earlier call."
            )
        choose_evaluation(source, derive_seed(config.seed, "inputs"))
        groups = trace_groups(
            model,
            example_inputs,
            only=config.only,
            exclude=config.exclude,
            mode=source.evaluation,
        ).groups
    masks = Masks(masked_parameters(model, groups))
    removed = {n: s.tolist() for n, s in zero_structures(model, groups).items()}
    pruner = StructurePruner(groups, masks, config, comm, removed=removed)
    return pruner.step(source, target), tuple(groups)
