"""Stages of a step that prunes one layer after another (``criterion="layerwise"``)."""

from __future__ import annotations

__all__ = ["rehearse_by_layer", "run_by_layer"]

from collections.abc import Iterator, Sequence

from lightning_woodfisher.base.clock import Progress
from lightning_woodfisher.data.isolation import derive_seed
from lightning_woodfisher.data.losses import LossSource
from lightning_woodfisher.distributed.communicator import Communicator
from lightning_woodfisher.layerwise.memory import require_memory
from lightning_woodfisher.layerwise.step import LayerResult, LayerwiseStep, StageSamples
from lightning_woodfisher.layerwise.survey import Surveyed
from lightning_woodfisher.pruning.config import PruningConfig
from lightning_woodfisher.pruning.evaluator import Evaluator
from lightning_woodfisher.pruning.quotas import Quotas
from lightning_woodfisher.pruning.report import Reconstruction
from lightning_woodfisher.pruning.stage_results import StageResult
from lightning_woodfisher.pruning.stages import Stages
from lightning_woodfisher.weights.masks import Masks
from lightning_woodfisher.weights.patterns import parse_pattern


def run_by_layer(
    source: LossSource,
    masks: Masks,
    config: PruningConfig,
    comm: Communicator,
    evaluator: Evaluator,
    quotas: Quotas,
    stages: Stages,
    position: int,
    progress: Progress,
) -> Iterator[StageResult]:
    """Run all stages of a step. Call on all ranks.

    Args:
        source: source of losses, inside its session.
        masks: masks with the parameters; changed.
        config: settings of the step.
        comm: the ranks.
        evaluator: chooses the samples and measures losses.
        quotas: numbers of weights to remove.
        stages: the stages.
        position: position of the step in training.
        progress: shows the progress over layers.

    Yields:
        The result of each stage.
    """
    evaluator.require_whole_parameters("criterion='layerwise'")
    clock, step = evaluator.clock, config.step
    pattern = parse_pattern(config.selection.pattern)
    work = _make_step(source, masks, config, comm)
    start = list(masks.zeros().values())
    sizes = [parameter.numel() for parameter in masks.parameters.values()]
    caps = sizes
    if quotas.caps is not None:
        caps = [zeros + cap for zeros, cap in zip(start, quotas.caps, strict=True)]
    competing = pattern.sparsity is None and len(quotas.groups) < len(sizes)
    number = 0
    while not stages.is_done:
        fraction = stages.advance()
        seed = derive_seed(step.seed, position, number)
        before = evaluator.measure(seed)
        totals = [
            zeros + count
            for (_, _, zeros), count in zip(
                quotas.groups, quotas.until(fraction), strict=True
            )
        ]
        with clock("collect"):
            # Labels that are drawn would run the network a second time.
            drawn = StageSamples(*evaluator.calibration(seed, False), seed)
            maps = work.survey(drawn, competing)
            _require_memory(maps, config, masks, comm, competing, drawn.count)
        with clock("select"):
            counts = work.allocate(maps, quotas.group_of_layer, totals, caps)
        with clock("update"), progress("Reconstructing layers", len(maps)) as tick:
            samples = StageSamples(*evaluator.calibration(seed), seed)
            results = work.prune(maps, counts, samples, tick)
        after = evaluator.measure(seed)
        number += 1
        yield StageResult(
            thresholds=[None] * len(sizes),
            quantiles=[()] * len(sizes),
            predicted=None,
            damping=None,
            raised_damping={},
            fisher_bytes=0,
            losses_before=before,
            losses_after=after,
            local_model=(),
            collection=_describe(results),
            scales=(),
            update=config.update,
            reconstructions=[_merge(results, name) for name in masks.parameters],
        )


def rehearse_by_layer(
    source: LossSource,
    masks: Masks,
    config: PruningConfig,
    comm: Communicator,
    evaluator: Evaluator,
    gradients: int,
) -> None:
    """Run the dense network on one mini-batch and look for its layers.

    Args:
        source: source of losses, inside its session.
        masks: masks with the parameters.
        config: settings of the step.
        comm: the ranks.
        evaluator: chooses the samples.
        gradients: number of gradients that it has samples for, of those of a step.
    """
    evaluator.require_whole_parameters("criterion='layerwise'")
    batches, count = evaluator.calibration(config.step.seed, False)
    samples = StageSamples(batches, min(count, 1), config.step.seed)
    maps = _make_step(source, masks, config, comm).survey(samples, competing=False)
    pattern = parse_pattern(config.selection.pattern)
    competing = pattern.sparsity is None and config.selection.scope == "global"
    mini_batches = -(-config.fisher.num_gradients * count // gradients)
    _require_memory(maps, config, masks, comm, competing, mini_batches)


def _require_memory(
    maps: Sequence[Surveyed],
    config: PruningConfig,
    masks: Masks,
    comm: Communicator,
    competing: bool,
    mini_batches: int,
) -> None:
    """Check the budget again, now that the activations are known."""
    if config.fisher.memory_budget is None:
        return
    parameters = masks.parameters.values()
    require_memory(
        [each.size for each in maps],
        mini_batches,
        comm.world_size,
        max(parameter.element_size() for parameter in parameters),
        competing=competing,
        weights=sum(parameter.numel() for parameter in parameters),
        samples=config.fisher.num_gradients,
        budget=config.fisher.memory_budget,
    )


def _make_step(
    source: LossSource, masks: Masks, config: PruningConfig, comm: Communicator
) -> LayerwiseStep:
    pattern = parse_pattern(config.selection.pattern)
    updates = config.update != "none"
    return LayerwiseStep(source, masks, config.layerwise, updates, pattern, comm)


def _describe(results: Sequence[LayerResult]) -> str:
    skips = sum(result.target == "residual sum" for result in results)
    return f"{len(results)} layers, {skips} of them with residual targets"


def _merge(results: Sequence[LayerResult], name: str) -> Reconstruction:
    """Combine the maps of one parameter, which may be several packed projections."""
    own = [result for result in results if result.name == name]
    total = sum(result.variance for result in own) or 1.0

    def mean(values: Sequence[float]) -> float:
        shares = [result.variance / total for result in own]
        return sum(s * v for s, v in zip(shares, values, strict=True))

    return Reconstruction(
        error_masked=mean([result.error_masked for result in own]),
        error=mean([result.error for result in own]),
        iterations=max(result.iterations for result in own),
        damping=max(result.damping for result in own),
        target=", ".join(dict.fromkeys(result.target for result in own)),
    )
