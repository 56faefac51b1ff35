"""Try many one-shot settings on one network, and restore it after each.

Gradients are collected once for all settings that use the same ones
(:mod:`.stored_rows`). Every setting starts from the given weights.
"""

from __future__ import annotations

__all__ = ["SweepReport", "SweepResult", "expand_grid", "run_sweep", "sweep"]

import dataclasses
import functools
import itertools
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from lightning_woodfisher.base.byte_sizes import parse_bytes
from lightning_woodfisher.base.clock import Progress, no_progress
from lightning_woodfisher.base.errors import ConfigurationError, PruningError, nearest
from lightning_woodfisher.base.keywords import explain_keywords
from lightning_woodfisher.data.batches import known_length, require_rereadable
from lightning_woodfisher.data.losses import FunctionLoss, LossSource
from lightning_woodfisher.distributed.communicator import Communicator
from lightning_woodfisher.distributed.same_settings import (
    require_same_settings,
    shapes_by_name,
)
from lightning_woodfisher.fisher.config import FisherConfig
from lightning_woodfisher.layerwise.config import LayerwiseConfig
from lightning_woodfisher.pruning.config import (
    PruningConfig,
    SelectionConfig,
    StepConfig,
    check_sparsity,
)
from lightning_woodfisher.pruning.pruner import Pruner
from lightning_woodfisher.pruning.quotas import require_layers_fit
from lightning_woodfisher.pruning.report import PruningReport
from lightning_woodfisher.pruning.sample_counts import fit_to_data
from lightning_woodfisher.pruning.selector import (
    is_too_sparse,
    layers_of,
    prune_zeros,
)
from lightning_woodfisher.resources.budget import (
    fit_into_memory,
    free_bytes,
    require_supported_device,
)
from lightning_woodfisher.sweeps.report import TARGET, SweepReport, SweepResult
from lightning_woodfisher.sweeps.stored_rows import (
    RowStore,
    StoredEvaluator,
    gradient_settings,
)
from lightning_woodfisher.weights.layers import (
    find_inputs_first,
    prunable_parameters,
)
from lightning_woodfisher.weights.masks import Masks
from lightning_woodfisher.weights.patterns import require_pattern_fits

Evaluate = Callable[[nn.Module], "float | Mapping[str, float]"]

_GROUPS: dict[str, type] = {
    "fisher": FisherConfig,
    "selection": SelectionConfig,
    "step": StepConfig,
    "layerwise": LayerwiseConfig,
}
# The settings that a grid can vary, each with its group.
_SETTINGS = {TARGET: "", "criterion": ""} | {
    field.name: group
    for group, config in _GROUPS.items()
    for field in dataclasses.fields(config)
}
# Name of a metric that is returned as a bare number.
_METRIC = "metric"
_SHARE_OF_FREE_MEMORY = 0.25
_BYTES_IF_UNKNOWN = 2**30


@dataclass(frozen=True)
class Setting:
    """One point of the grid.

    Attributes:
        values: values of the swept names, and the target sparsity.
        config: the configuration of the step.
    """

    values: Mapping[str, Any]
    config: PruningConfig

    @property
    def target_sparsity(self) -> float:
        """Share of zeros after the step."""
        return float(self.values[TARGET])


@explain_keywords()
def sweep(
    model: nn.Module,
    data: Dataset[Any] | Iterable[Any],
    loss_fn: Callable[[Any, Any], Tensor],
    evaluate: Evaluate,
    grid: Mapping[str, Sequence[Any]],
    *,
    target_sparsity: float = 0.9,
    criterion: str = "woodfisher",
    fisher: FisherConfig = FisherConfig(),
    selection: SelectionConfig = SelectionConfig(),
    step: StepConfig = StepConfig(),
    layerwise: LayerwiseConfig = LayerwiseConfig(),
    row_memory: str | int | None = None,
    progress: Progress | None = None,
) -> SweepReport:
    """Try every combination of one-shot settings on a plain PyTorch model.

    The model is restored, bit for bit, after each setting. Gradients are collected once
    for all settings with the same ``gradient_batch_size``; a smaller ``num_gradients``
    uses the first of them. Later stages of ``recompute_steps`` need new gradients. If
    ``torch.distributed`` is initialized, call it on every rank. A setting that cannot work
    raises a ConfigurationError before any is tried.

    Args:
        model: the network.
        data: the data, as for :func:`~.prune`; not an iterator.
        loss_fn: ``loss_fn(model, batch)`` returns the mean loss of the batch.
        evaluate: ``evaluate(model)`` returns a metric, or several by name. It is called
            once for the given network, and after each setting.
        grid: values by the name of a setting: ``target_sparsity``, ``damping``,
            ``num_gradients``, ``block_size``, ``update``, ``recompute_steps``, or any other
            field of :class:`FisherConfig`, :class:`SelectionConfig`,
            :class:`StepConfig` and :class:`LayerwiseConfig`.
        target_sparsity: target sparsity if the grid has none.
        criterion: criterion if the grid has none.
        fisher: settings of the Fisher that the grid does not vary.
        selection: settings of the selection that the grid does not vary.
        step: settings of the step that the grid does not vary.
        layerwise: settings of ``criterion="layerwise"`` that the grid does not vary.
        row_memory: host memory for stored gradients, such as ``"8GB"``; beyond it a
            temporary file is used. None for a quarter of the free memory.
        progress: called with a title and a total; returns a context manager that yields a
            function, which is called with the number of finished items.

    Returns:
        The results, in the order of the grid; its last name changes fastest.
    """
    require_rereadable(data)
    config = PruningConfig(criterion, fisher, selection, step, layerwise=layerwise)
    settings = expand_grid(grid, config, target_sparsity)
    found = {
        "number of settings": len(settings),
        **{f"setting {i}": s.config for i, s in enumerate(settings)},
        **{f"setting {i}.{TARGET}": s.target_sparsity for i, s in enumerate(settings)},
        "length of the data": known_length(data),
        **shapes_by_name(model),
    }
    device = next(model.parameters(), torch.empty(0)).device
    require_same_settings(found, Communicator(device))
    return run_sweep(
        FunctionLoss(model, data, loss_fn), evaluate, settings, row_memory, progress
    )


def expand_grid(
    grid: Mapping[str, Sequence[Any]], base: PruningConfig, target_sparsity: float
) -> list[Setting]:
    """Make a configuration for every combination of values.

    Magnitude has neither gradients nor an update, so it appears once for each sparsity
    and selection.

    Args:
        grid: values by name.
        base: the settings that are not in the grid.
        target_sparsity: target sparsity if the grid has none.

    Returns:
        The settings; the last name of the grid changes fastest.

    Raises:
        ConfigurationError: if a name is unknown or has no values.
    """
    for name, values in grid.items():
        if name not in _SETTINGS:
            raise ConfigurationError(
                f"{name!r} is not a setting of a sweep.{nearest(name, _SETTINGS)}"
            )
        if isinstance(values, str) or not isinstance(values, Sequence) or not values:
            raise ConfigurationError(
                f"grid[{name!r}]={values!r} must be a list of values to try."
            )
    every = {TARGET: [target_sparsity], **grid}
    settings: dict[str, Setting] = {}
    for chosen in itertools.product(*every.values()):
        picked = dict(zip(every, chosen, strict=True))
        check_sparsity(picked[TARGET])
        config = _configure(base, picked)
        if config.criterion == "magnitude":
            # Omit the names that make no difference.
            picked = {
                name: value
                for name, value in picked.items()
                if _SETTINGS[name] != "fisher"
                and name not in {"update", "recompute_steps"}
            }
        settings.setdefault(repr(picked), Setting(picked, config))
    return list(settings.values())


def run_sweep(
    source: LossSource,
    evaluate: Evaluate,
    settings: Sequence[Setting],
    row_memory: str | int | None = None,
    progress: Progress | None = None,
) -> SweepReport:
    """Try settings on a network and restore it after each. Call on all ranks.

    Args:
        source: source of the losses.
        evaluate: see :func:`sweep`.
        settings: the settings to try.
        row_memory: see :func:`sweep`.
        progress: see :func:`sweep`.

    Returns:
        The results, in the order of the settings.
    """
    progress = progress or no_progress
    start = _SavedState(source.model)
    comm = Communicator(next(source.model.parameters()).device)
    settings = [_prepare(setting, source, comm) for setting in settings]
    store = RowStore(_row_bytes(row_memory, comm), _most_gradients(settings))
    evaluator = functools.partial(StoredEvaluator, store=store, is_start=start.equals)
    results: dict[int, SweepResult] = {}
    try:
        with progress("Trying settings", len(settings)) as tick:
            before = _metrics(evaluate(source.model))
            # Settings that share gradients follow each other.
            for i in sorted(range(len(settings)), key=lambda i: _sort_key(settings[i])):
                start.restore()
                masks = _make_masks(source.model, settings[i].config.selection)
                pruner = Pruner(masks, settings[i].config, comm, progress, evaluator)
                results[i] = _try_setting(settings[i], pruner, source, evaluate)
                tick(1)
    finally:
        start.restore()
        store.close()
    ordered = tuple(results[i] for i in range(len(settings)))
    return SweepReport(before, ordered, store.collections)


def _try_setting(
    setting: Setting, pruner: Pruner, source: LossSource, evaluate: Evaluate
) -> SweepResult:
    try:
        with warnings.catch_warnings():
            # The metrics show it, and other settings may be meant to go too far.
            warnings.filterwarnings("ignore", "this pruning step raised the loss")
            report: PruningReport = pruner.step(source, setting.target_sparsity)
    except PruningError as error:
        # A setting that fails must not discard the results of the others.
        return SweepResult(setting.values, {}, error=str(error))
    return SweepResult(
        setting.values,
        _metrics(evaluate(source.model)),
        report.sparsity,
        report.predicted_increase,
        report.measured_increase,
        sum(report.seconds.values()),
    )


def _prepare(setting: Setting, source: LossSource, comm: Communicator) -> Setting:
    """Check a setting; return it with the changes that make it fit into memory."""
    config, target = setting.config, setting.target_sparsity
    masks = _make_masks(source.model, config.selection)
    if masks.sharded:
        raise ConfigurationError(
            "a sweep needs whole parameters on every rank, but these are sharded; run it "
            "on one device or with DDP."
        )
    if is_too_sparse(masks, config.selection, target):
        raise ConfigurationError(
            f"target_sparsity={target} is below the {masks.sparsity():.4f} that the "
            "network already has; pruning can only add zeros."
        )
    require_layers_fit(config.selection, layers_of(masks), target)
    config, _ = fit_to_data(config, source)
    if config.reads_data:
        fisher = config.fisher
        source.batches(
            fisher.num_gradients, fisher.gradient_batch_size, config.step.seed
        )
    config, _ = fit_into_memory(masks, config, comm, comm.world_size)
    return dataclasses.replace(setting, config=config)


def _make_masks(model: nn.Module, selection: SelectionConfig) -> Masks:
    parameters = prunable_parameters(
        model, selection.include, selection.exclude, selection.only
    )
    require_supported_device(model, parameters)
    require_pattern_fits(model, parameters, selection.pattern)
    masks = Masks(parameters, find_inputs_first(model, list(parameters)))
    prune_zeros(masks, selection)
    return masks


class _SavedState:
    """A copy of the parameters and buffers of a model, to be restored."""

    def __init__(self, model: nn.Module) -> None:
        tensors = (*model.parameters(), *model.buffers())
        self._saved = [(tensor, tensor.detach().clone()) for tensor in tensors]

    @torch.no_grad()
    def restore(self) -> None:
        for tensor, saved in self._saved:
            tensor.copy_(saved)

    def equals(self, masks: Masks) -> bool:
        """Return whether the selected weights are those that were saved."""
        saved = {id(tensor): content for tensor, content in self._saved}
        return all(
            torch.equal(p.detach(), saved[id(p)]) for p in masks.parameters.values()
        )


def _configure(base: PruningConfig, values: Mapping[str, Any]) -> PruningConfig:
    changed: dict[str, Any] = {}
    for group in _GROUPS:
        own = {name: v for name, v in values.items() if _SETTINGS[name] == group}
        changed[group] = dataclasses.replace(getattr(base, group), **own)
    if "criterion" in values:
        changed["criterion"] = values["criterion"]
    return dataclasses.replace(base, **changed)


def _most_gradients(settings: Sequence[Setting]) -> dict[int, int]:
    """Return the largest N of the settings, by their m."""
    configs = sorted(
        (setting.config.fisher for setting in settings), key=lambda f: f.num_gradients
    )
    return {fisher.gradient_batch_size: fisher.num_gradients for fisher in configs}


def _sort_key(setting: Setting) -> tuple[str, ...]:
    """Return a sort key by which settings with the same gradients are neighbors."""
    config = setting.config
    fisher, selection = config.fisher, config.selection
    # The blocks decide which rank owns a weight, and so which rank stores its gradients.
    return (
        repr((selection.include, selection.exclude, selection.only)),
        repr(gradient_settings(fisher)),
        repr(config.step.seed),
        repr(fisher.block_size),
        repr(fisher.num_gradients),
    )


def _row_bytes(row_memory: str | int | None, comm: Communicator) -> int:
    if row_memory is not None:
        return parse_bytes(row_memory, "row_memory")
    free = free_bytes(torch.device("cpu"))
    if free is None:
        return _BYTES_IF_UNKNOWN
    return int(_SHARE_OF_FREE_MEMORY * free / comm.world_size)


def _metrics(found: float | Mapping[str, float]) -> dict[str, float]:
    if isinstance(found, Mapping):
        return {name: float(value) for name, value in found.items()}
    return {_METRIC: float(found)}
