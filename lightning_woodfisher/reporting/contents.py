"""Collect the tables, figures and key numbers that the loggers and the page show."""

from __future__ import annotations

__all__ = ["Contents", "Reports", "Rows", "Table", "collect_contents"]

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from torch import Tensor

from lightning_woodfisher.pruning.report import (
    SALIENCY_SHARES,
    PruningReport,
    format_steps,
)
from lightning_woodfisher.reporting import figures
from lightning_woodfisher.reporting.verdict import describe_result, main_metrics
from lightning_woodfisher.structured.report import (
    MEASURES,
    StructureReport,
    format_structure_steps,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Reports of the steps of one callback, in order.
Reports: TypeAlias = Sequence[PruningReport] | Sequence[StructureReport]
Rows: TypeAlias = Sequence[Mapping[str, Any]]

_WEIGHT_STEP_COLUMNS = (
    "epoch",
    "step",
    "target_sparsity",
    "sparsity",
    "predicted_increase",
    "measured_increase",
    "loss_before",
    "loss_after",
    "loss_recalibrated",
    "threshold",
    "damping",
    "flops_share",
    "stages",
)
_CHANNEL_STEP_COLUMNS = (
    "epoch",
    "step",
    "method",
    "measure",
    "target",
    "structures",
    "kept",
    "macs_dense",
    "macs",
    "macs_left",
    "parameters_dense",
    "parameters",
    "parameters_left",
    "latency_dense",
    "latency",
    "loss_before",
    "loss_after",
)
_QUANTILE_COLUMNS = [f"saliency_{share:.0%}" for share in SALIENCY_SHARES]


@dataclass(frozen=True)
class Table:
    """Rows for the loggers and the page.

    Attributes:
        name: key in loggers, below ``pruning/``.
        rows: values by column name, at least one row; None for unknown values.
        text: the table as TensorBoard shows it.
        bar_chart: chart in W&B: key below ``pruning/``, column of the labels, column of
            the values, and title.
    """

    name: str
    rows: Rows
    text: str = ""
    bar_chart: tuple[str, str, str, str] | None = None


@dataclass(frozen=True)
class Contents:
    """Everything to show about the steps of one callback.

    Attributes:
        verdict: sentences that say how the run went.
        key_numbers: formatted values by label.
        figures: functions that draw the figures for which the reports have data, by key
            in loggers, below ``pruning/figures/``.
        steps: one row for each step.
        layers: one row for each layer, or group of channels, after the last step.
        layer_history: the rows of ``layers`` of every step, with epoch and step.
        local_model_points: points of the local model in the last step, if measured.
        raised_damping: one line for each block whose damping was raised.
    """

    verdict: Sequence[str]
    key_numbers: Mapping[str, str]
    figures: Mapping[str, Callable[[], Figure]]
    steps: Table
    layers: Table
    layer_history: Rows
    local_model_points: Table | None = None
    raised_damping: Sequence[str] = ()


def collect_contents(
    reports: Reports, masks: Mapping[str, Tensor], steps_left: int = 0
) -> Contents:
    """Collect tables, figures and key numbers from the reports of one callback.

    Args:
        reports: reports of all steps, in order; at least one.
        masks: bool tensors by parameter name, True where kept; only those of small layers
            are drawn.
        steps_left: number of planned steps that have not happened.

    Returns:
        The contents, with figures that are not drawn yet.
    """
    verdict = describe_result(reports, steps_left)
    channels = [report for report in reports if isinstance(report, StructureReport)]
    if channels:
        return _collect_channels(channels, verdict)
    weights = [report for report in reports if isinstance(report, PruningReport)]
    return _collect_weights(weights, masks, verdict)


def _collect_weights(
    reports: Sequence[PruningReport],
    masks: Mapping[str, Tensor],
    verdict: Sequence[str],
) -> Contents:
    last = reports[-1]
    key_numbers = {
        f"zeros (target {last.target_sparsity:.2%})": f"{last.sparsity:.2%}",
        "weights pruned": f"{last.zeros:,} of {last.weights:,}",
        "criterion": last.criterion,
        **_common_key_numbers(reports),
    }
    if last.model_sparsity is not None:
        key_numbers["zeros in the whole model"] = f"{last.model_sparsity:.2%}"
    if last.flops_share is not None:
        key_numbers["FLOPs left"] = f"{last.flops_share:.1%}"
    if last.damping is not None:
        key_numbers["damping λ"] = f"{last.damping:.3g}"
    points = [
        {"stage": number, **asdict(point)}
        for number, stage in enumerate(last.local_model)
        for point in stage
    ]
    return Contents(
        verdict=verdict,
        key_numbers=key_numbers,
        figures=_weight_figures(reports, masks),
        steps=Table(
            "steps",
            _step_rows(reports, _WEIGHT_STEP_COLUMNS),
            format_steps(reports),
        ),
        layers=Table(
            "layers",
            _layer_rows(last),
            last.to_table(),
            ("sparsity_per_layer", "layer", "sparsity", "Sparsity per layer"),
        ),
        layer_history=_rows_of_all_steps(reports, _layer_rows),
        local_model_points=Table("local_model_points", points) if points else None,
        raised_damping=[
            f"{block}: λ = {damping:.3g}"
            for block, damping in last.raised_damping.items()
        ],
    )


def _collect_channels(
    reports: Sequence[StructureReport], verdict: Sequence[str]
) -> Contents:
    last = reports[-1]
    measure = MEASURES.get(last.measure, last.measure)
    key_numbers = {
        f"{measure} removed (target {last.target:.1%})": f"{last.removed_share:.1%}",
        "MACs left": f"{last.macs_left:.1%}",
        "parameters left": f"{last.parameters_left:.1%}",
        "channels left": f"{last.kept:,} of {last.structures:,}",
    }
    implants = sum(map(len, last.implanted.values()))
    if implants:
        key_numbers["of them with 1×1 filters"] = f"{implants:,}"
    key_numbers |= {"method": last.method, **_common_key_numbers(reports)}
    if last.latency is not None and last.latency_dense is not None:
        times = f"{1e3 * last.latency_dense:.3g} → {1e3 * last.latency:.3g} ms"
        key_numbers["forward pass of one sample"] = times
    return Contents(
        verdict=verdict,
        key_numbers=key_numbers,
        figures={
            "channels": lambda: figures.draw_channels(last),
            "network_size": lambda: figures.draw_network_size(reports),
        },
        steps=Table(
            "channel_steps",
            _step_rows(reports, _CHANNEL_STEP_COLUMNS),
            format_structure_steps(reports),
        ),
        layers=Table(
            "channels",
            _group_rows(last),
            last.to_table(),
            ("channels_per_group", "group", "kept_share", "Share of channels kept"),
        ),
        layer_history=_rows_of_all_steps(reports, _group_rows),
    )


def _common_key_numbers(reports: Reports) -> dict[str, str]:
    last = reports[-1]
    numbers = {"pruning steps": f"{len(reports)}", "ranks": f"{last.world_size}"}
    if last.loss_before is not None and last.loss_after is not None:
        losses = f"{last.loss_before:.3g} → {last.loss_after:.3g}"
        if isinstance(last, PruningReport) and last.loss_recalibrated is not None:
            losses += f" ({last.loss_recalibrated:.3g} with new BatchNorm statistics)"
        numbers["loss in the last step"] = losses
    for name in main_metrics(reports):
        before, after = reports[0].logged_before.get(name), last.logged_after.get(name)
        found = [f"{x:.4g}" for x in (before, after) if x is not None]
        if found:
            numbers[name] = " → ".join(found)
    return numbers


def _weight_figures(
    reports: Sequence[PruningReport], masks: Mapping[str, Tensor]
) -> dict[str, Callable[[], Figure]]:
    last = reports[-1]
    found: dict[str, Callable[[], Figure]] = {
        "progress": lambda: figures.draw_progress(reports),
        "loss_increase": lambda: figures.draw_loss_increase(reports),
        "layers": lambda: figures.draw_layers(last),
        "schedule": lambda: figures.draw_schedule(reports),
        "saliencies": lambda: figures.draw_saliencies(last),
    }
    if last.local_model:
        found["local_model"] = lambda: figures.draw_local_model(last)
    names = figures.small_layers({name: mask.shape for name, mask in masks.items()})
    if names:
        small = {name: masks[name] for name in names}
        found["masks"] = lambda: figures.draw_masks(small)
    return found


def _layer_rows(report: PruningReport) -> list[dict[str, Any]]:
    return [
        {
            "layer": layer.name,
            "shape": "x".join(map(str, layer.shape)),
            "weights": layer.weights,
            "zeros": layer.zeros_after,
            "sparsity": layer.sparsity,
            "threshold": layer.threshold,
            "damping": report.damping_of(layer),
            "predicted_increase": layer.predicted_increase,
            # There are no quantiles if no weight of the layer could be removed.
            **dict.fromkeys(_QUANTILE_COLUMNS),
            **dict(zip(_QUANTILE_COLUMNS, layer.saliency_quantiles, strict=False)),
        }
        for layer in report.layers
    ]


def _group_rows(report: StructureReport) -> list[dict[str, Any]]:
    return [
        {
            "group": group.name,
            "layers": ", ".join(group.layers),
            "size": group.size,
            "kept": group.kept,
            "implanted": len(group.implanted),
            "kept_share": group.kept / max(1, group.size),
        }
        for group in report.groups
    ]


def _step_rows(reports: Reports, columns: Sequence[str]) -> Rows:
    metrics = main_metrics(reports)
    return [
        {
            **{name: getattr(report, name) for name in columns},
            # Those of the validation after the step, when training has gone on.
            **{name: report.logged_after.get(name) for name in metrics},
            "seconds": sum(report.seconds.values()),
        }
        for report in reports
    ]


def _rows_of_all_steps(
    reports: Sequence[Any], rows_of: Callable[[Any], Rows]
) -> list[dict[str, Any]]:
    """Return the rows of every step, each with the epoch and optimizer step."""
    return [
        {"epoch": report.epoch, "step": report.step, **row}
        for report in reports
        for row in rows_of(report)
    ]
