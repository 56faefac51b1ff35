"""Figures of reports. matplotlib is imported only when one is drawn."""

from __future__ import annotations

__all__ = ["draw_local_model", "draw_sweep", "has_matplotlib"]

import importlib.util
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lightning_woodfisher.errors import ConfigurationError
from lightning_woodfisher.report import PruningReport
from lightning_woodfisher.sweeps import SweepReport, SweepResult

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MOST_LABELS = 24
_INCHES_PER_LETTER = 0.08


def has_matplotlib() -> bool:
    """Tell whether figures can be drawn.

    Returns:
        Whether matplotlib is installed.
    """
    return importlib.util.find_spec("matplotlib") is not None


def draw_local_model(report: PruningReport) -> Figure:
    """Draw predicted and measured rise of the loss along the pruning direction.

    Args:
        report: of a step with ``local_model_points``.

    Returns:
        A figure with a colour for each part: the curve is predicted, the dots measured.

    Raises:
        ConfigurationError: for a report without points, or without matplotlib.
    """
    if not report.local_model:
        raise ConfigurationError(
            "the report has no points of the local model; set local_model_points=5."
        )
    figure, axes = _new_figure()
    for number, part in enumerate(report.local_model):
        colour = f"C{number % 10}"
        name = f"part {number + 1}" if len(report.local_model) > 1 else ""
        where = [point.fraction for point in part]
        label = f"{name} measured".strip()
        axes.plot(where, [p.measured for p in part], "o", color=colour, label=label)
        predicted = [p.predicted for p in part if p.predicted is not None]
        if len(predicted) == len(part):
            label = f"{name} predicted".strip()
            axes.plot(where, predicted, "-", color=colour, label=label)
    axes.set_xlabel("fraction t of the update: weights w + t·δ")
    axes.set_ylabel("rise of the mean loss")
    axes.set_title(f"Local model, to {report.sparsity:.1%}")
    if len(report.local_model) * 2 <= _MOST_LABELS:
        axes.legend()
    return figure


def draw_sweep(report: SweepReport, metric: str | None = None) -> Figure:
    """Draw a metric over the sparsity (or the first other setting), a line per setting.

    Args:
        report: of a sweep.
        metric: which one; None for the first.

    Returns:
        The figure; the dashed line is the network as it was given.
    """
    metric = report.choose_metric(metric)
    done = [result for result in report.results if metric in result.metrics]
    varying = report.varying()
    across = varying[0] if varying else "target_sparsity"
    figure, axes = _new_figure()
    lines: dict[str, list[SweepResult]] = {}
    for result in done:
        lines.setdefault(_label(result.setting, varying, across), []).append(result)
    values = [result.setting.get(across) for result in done]
    numeric = all(isinstance(value, int | float) for value in values)
    for label, results in lines.items():
        x = [result.setting.get(across, "–") for result in results]
        y = [result.metrics[metric] for result in results]
        axes.plot(x if numeric else [*map(str, x)], y, "o-", label=label or None)
    axes.axhline(report.dense[metric], color="grey", linestyle="--", label="dense")
    if across == "damping":
        axes.set_xscale("log")
    axes.set_xlabel(across)
    axes.set_ylabel(metric)
    if len(lines) < _MOST_LABELS:
        longest = max((len(label) for label in lines), default=0)
        figure.set_figwidth(7.0 + _INCHES_PER_LETTER * longest)
        figure.legend(loc="outside right upper", fontsize="small")
    return figure


def _label(setting: Mapping[str, Any], varying: list[str], across: str) -> str:
    names = [name for name in varying if name != across and name in setting]
    return ", ".join(f"{name}={setting[name]}" for name in names)


def _new_figure() -> tuple[Figure, Any]:
    """Make a figure with one pair of axes, without pyplot and its global state."""
    if not has_matplotlib():
        raise ConfigurationError(
            "figures need matplotlib; pip install 'lightning-woodfisher[figures]'."
        )
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0, 4.5), layout="constrained")
    return figure, figure.add_subplot()
