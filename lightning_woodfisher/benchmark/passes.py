"""Measure a pruning step in units of the plain passes over its own samples."""

from __future__ import annotations

__all__ = ["PassesRow", "measure_passes"]

import copy
import functools
from dataclasses import dataclass

from torch import nn
from torch.utils.data import TensorDataset

from lightning_woodfisher.benchmark.collection import run_batches
from lightning_woodfisher.benchmark.networks import cross_entropy
from lightning_woodfisher.benchmark.timing import Timing, measure_alternately
from lightning_woodfisher.fisher.config import FisherConfig
from lightning_woodfisher.one_shot import prune
from lightning_woodfisher.pruning.config import StepConfig
from lightning_woodfisher.pruning.report import PruningReport
from lightning_woodfisher.weights.layers import prunable_parameters

_SPARSITY = 0.5
_BATCH = 128
_PLAIN = "plain passes"
# The defaults of prune() and of the callback.
_STEPS = {
    "step of prune()": StepConfig(),
    "step in training": StepConfig(update="independent", line_search=False),
}


@dataclass(frozen=True)
class PassesRow:
    """Time of a pruning step against plain passes over the same samples.

    Attributes:
        network: name of the network.
        action: ``"plain passes"``, ``"step of prune()"`` or ``"step in training"``.
        num_gradients: N.
        gradient_batch_size: m.
        block_size: B, None for the full Fisher.
        timing: time of the action.
        passes: seconds divided by those of the plain passes.
        processor_passes: the same in processor seconds, which depend less on other
            processes.
        batchnorm_passes: part of ``passes`` for new BatchNorm statistics, which are those
            of other samples; from the last repetition.
    """

    network: str
    action: str
    num_gradients: int
    gradient_batch_size: int
    block_size: int | None
    timing: Timing
    passes: float
    processor_passes: float
    batchnorm_passes: float


def measure_passes(
    network: str,
    model: nn.Module,
    data: TensorDataset,
    fisher: FisherConfig,
    *,
    repeats: int = 3,
) -> list[PassesRow]:
    """Measure pruning steps to 50 % sparsity, and a gradient pass over their samples.

    The plain passes are forward and backward passes in batches of 128. The steps have the
    default settings but for ``fisher``.

    Args:
        network: name of the network.
        model: the network, in evaluation mode.
        data: N·m inputs and labels.
        fisher: N, m and B.
        repeats: number of repetitions, after one that is not counted.

    Returns:
        A row for the plain passes, and one for each kind of step.
    """
    parameters = list(prunable_parameters(model).values())
    reports: dict[str, PruningReport] = {}

    def run(action: str) -> None:
        if action == _PLAIN:
            run_batches(model, data, _BATCH, parameters)
            return
        reports[action] = prune(
            copy.deepcopy(model),
            data,
            cross_entropy,
            target_sparsity=_SPARSITY,
            fisher=fisher,
            step=_STEPS[action],
        )

    timings = measure_alternately(
        {action: functools.partial(run, action) for action in (_PLAIN, *_STEPS)},
        repeats,
        parameters[0].device,
        warm_up=1,
        track_memory=False,
    )
    plain = timings[_PLAIN]
    rows = []
    for action, timing in timings.items():
        seconds = reports[action].seconds if action in reports else {}
        rows.append(
            PassesRow(
                network=network,
                action=action,
                num_gradients=fisher.num_gradients,
                gradient_batch_size=fisher.gradient_batch_size,
                block_size=fisher.block_size,
                timing=timing,
                passes=timing.seconds / plain.seconds,
                processor_passes=timing.processor_seconds / plain.processor_seconds,
                batchnorm_passes=seconds.get("recalibrate", 0.0) / plain.runs[-1],
            )
        )
    return rows
