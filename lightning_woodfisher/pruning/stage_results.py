"""Results of the stages of a pruning step, and their summary in a report."""

from __future__ import annotations

__all__ = ["StageResult", "mean_loss", "summarize"]

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from lightning_woodfisher.distributed.communicator import Communicator
from lightning_woodfisher.fisher.linalg import ARITHMETICS
from lightning_woodfisher.pruning.config import PruningConfig
from lightning_woodfisher.pruning.report import (
    LayerReport,
    LocalModelPoint,
    PruningReport,
    Reconstruction,
)
from lightning_woodfisher.weights.layers import count_zeros
from lightning_woodfisher.weights.masks import Masks


@dataclass(frozen=True)
class StageResult:
    """Result of one stage for the report; values by layer are in the order of layers."""

    thresholds: list[float | None]
    quantiles: list[tuple[float, ...]]
    predicted: list[float] | None
    damping: float | None
    raised_damping: dict[str, float]
    fisher_bytes: int
    losses_before: list[float]
    losses_after: list[float]
    local_model: tuple[LocalModelPoint, ...]
    collection: str | None
    scales: Sequence[float]
    update: str
    reconstructions: Sequence[Reconstruction] = ()
    arithmetics: Mapping[str, int] = field(default_factory=dict)

    @property
    def measured(self) -> float | None:
        """Rise of the mean loss; None when it was not measured."""
        before, after = mean_loss(self.losses_before), mean_loss(self.losses_after)
        return None if before is None or after is None else after - before

    def exceeds(self, trust_ratio: float) -> bool:
        """Return whether the loss has risen by more than a multiple of the prediction."""
        if self.measured is None or self.predicted is None:
            return False
        return self.measured > trust_ratio * sum(self.predicted)


def summarize(
    results: Sequence[StageResult],
    config: PruningConfig,
    masks: Masks,
    model: nn.Module,
    zeros_before: Mapping[str, int],
    communicator: Communicator,
    *,
    sent: int,
    **fields: Any,
) -> PruningReport:
    """Summarize the stages of a step. Call on all ranks.

    Args:
        results: one for each stage, in order.
        config: settings of the step.
        masks: masks after the step.
        model: the network after the step.
        zeros_before: pruned weights of each parameter before the step.
        communicator: the ranks.
        sent: bytes that this rank has sent.
        fields: further fields of the report.

    Returns:
        The report; equal on all ranks except for the seconds.
    """
    last, zeros_after = results[-1], masks.zeros()
    largest = max(r.fisher_bytes for r in results)
    counts = [last.arithmetics.get(kind, 0) for kind in ARITHMETICS]
    numbers = communicator.gather_numbers([sent, largest, *counts])
    totals = [sum(row[2 + i] for row in numbers) for i in range(len(ARITHMETICS))]
    layers = tuple(
        LayerReport(
            name=name,
            shape=tuple(parameter.shape),
            weights=parameter.numel(),
            zeros_before=zeros_before[name],
            zeros_after=zeros_after[name],
            threshold=last.thresholds[i],
            predicted_increase=_total(r.predicted and r.predicted[i] for r in results),
            saliency_quantiles=last.quantiles[i],
            reconstruction=last.reconstructions[i] if last.reconstructions else None,
        )
        for i, (name, parameter) in enumerate(masks.parameters.items())
    )
    model_zeros, model_parameters = count_zeros(model, communicator)
    notes = dict.fromkeys(r.collection for r in results if r.collection)
    return PruningReport(
        criterion=config.criterion,
        layers=layers,
        threshold=max((t for t in last.thresholds if t is not None), default=None),
        damping=last.damping,
        raised_damping={k: v for r in results for k, v in r.raised_damping.items()},
        predicted_increase=_total(r.predicted and sum(r.predicted) for r in results),
        measured_increase=_total(r.measured for r in results),
        loss_before=mean_loss(results[0].losses_before),
        loss_after=mean_loss(last.losses_after),
        stages=len(results),
        num_gradients=config.fisher.num_gradients,
        bytes_exchanged=int(sum(row[0] for row in numbers)),
        fisher_bytes=tuple(int(row[1]) for row in numbers),
        arithmetics={
            kind: total / sum(totals)
            for kind, total in zip(ARITHMETICS, totals, strict=True)
            if total
        },
        world_size=communicator.world_size,
        collection="; ".join(notes) or None,
        update_scales=tuple(r.scales[0] for r in results if r.scales),
        first_order_scales=tuple(r.scales[1] for r in results if len(r.scales) > 1),
        updates=tuple(r.update for r in results),
        local_model=tuple(r.local_model for r in results if r.local_model),
        model_parameters=model_parameters,
        model_zeros=model_zeros,
        **fields,
    )


def mean_loss(losses: Sequence[float]) -> float | None:
    """Return the mean; None without losses."""
    return sum(losses) / len(losses) if losses else None


def _total(values: Iterable[float | None | list[float]]) -> float | None:
    present = [v for v in values if isinstance(v, float)]
    return sum(present) if present else None
