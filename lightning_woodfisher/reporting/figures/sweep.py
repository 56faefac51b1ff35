"""Draw the figure of a sweep over settings."""

from __future__ import annotations

__all__ = ["draw_sweep"]

from typing import TYPE_CHECKING

from lightning_woodfisher.reporting.figures.canvas import (
    MAX_LEGEND_ENTRIES,
    new_axes,
)
from lightning_woodfisher.sweeps.report import TARGET, SweepReport, SweepResult

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_INCHES_PER_LETTER = 0.08


def draw_sweep(report: SweepReport, metric: str | None = None) -> Figure:
    """Draw a metric against the sparsity, or the first other setting that varies.

    Args:
        report: report of a sweep.
        metric: name of the metric; None for the first one.

    Returns:
        A line for each combination of the other settings, and a dashed line for the
        given network.
    """
    metric = report.choose_metric(metric)
    done = [result for result in report.results if metric in result.metrics]
    varying = report.varying()
    across = varying[0] if varying else TARGET
    figure, axes = new_axes()
    lines: dict[str, list[SweepResult]] = {}
    for result in done:
        others = [n for n in varying if n != across and n in result.setting]
        label = ", ".join(f"{name}={result.setting[name]}" for name in others)
        lines.setdefault(label, []).append(result)
    values = [result.setting.get(across) for result in done]
    numeric = all(isinstance(value, int | float) for value in values)
    for label, results in lines.items():
        x = [result.setting.get(across, "–") for result in results]
        y = [result.metrics[metric] for result in results]
        axes.plot(x if numeric else [*map(str, x)], y, "o-", label=label or None)
    axes.axhline(report.before[metric], color="gray", linestyle="--", label="before")
    if across == "damping":
        axes.set_xscale("log")
    axes.set_xlabel(across)
    axes.set_ylabel(metric)
    if len(lines) < MAX_LEGEND_ENTRIES:
        longest = max((len(label) for label in lines), default=0)
        figure.set_figwidth(7.0 + _INCHES_PER_LETTER * longest)
        figure.legend(loc="outside right upper", fontsize="small")
    return figure
