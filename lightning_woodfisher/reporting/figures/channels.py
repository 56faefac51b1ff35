"""Draw figures of steps that remove channels."""

from __future__ import annotations

__all__ = ["draw_channels", "draw_network_size"]

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_woodfisher.reporting.figures.canvas import (
    BLUE,
    MAX_STEPS,
    ORANGE,
    add_grid,
    add_legend_below,
    annotate_rows,
    draw_losses,
    label_layers,
    locate_steps,
    new_figure,
    shorten_name,
    text_color,
)
from lightning_woodfisher.structured.report import GroupReport, StructureReport

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# With more groups than this only every nth one is labeled.
_MAX_GROUPS = 80
_INCHES_PER_GROUP = 0.2


def draw_channels(report: StructureReport) -> Figure:
    """Draw the number of channels that each group of layers keeps after a step.

    Args:
        report: report of the step.

    Returns:
        A bar for each group, in the order of the network: channels on the left, with the
        dense network as an outline; percent on the right, with a line for all groups
        together. Channels with 1×1 filters have a color of their own.
    """
    groups = report.groups
    rows = range(len(groups))
    shown = min(max(len(groups), 3), _MAX_GROUPS)
    figure = new_figure((8.6, 1.7 + _INCHES_PER_GROUP * shown))
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(1.5, 1))
    sizes = np.array([group.size for group in groups])
    implants = np.array([len(group.implanted) for group in groups])
    whole = np.array([group.kept for group in groups]) - implants
    for axes, length in ((left, sizes), (right, 100)):
        add_grid(axes)
        axes.grid(visible=False, axis="y")
        start = length * whole / sizes
        label = "kept" if axes is left else None
        axes.barh(rows, start, height=0.8, color=BLUE, label=label)
        if implants.any():
            label = "kept with 1×1 filters" if axes is left else None
            style = {"height": 0.8, "color": ORANGE, "label": label}
            axes.barh(rows, length * implants / sizes, left=start, **style)
    style = {"edgecolor": text_color(), "linewidth": 0.7, "label": "dense"}
    left.barh(rows, sizes, height=0.8, facecolor="none", **style)
    left.set_xlim(0, 1.02 * max(sizes))
    left.xaxis.get_major_locator().set_params(integer=True)
    left.set_xlabel("channels")
    kept = report.kept / report.structures
    style = {"color": text_color(), "linestyle": "--", "linewidth": 1}
    right.axvline(100 * kept, label=f"all groups: {kept:.1%}", **style)
    right.set_xlim(0, 100)
    right.set_xlabel("kept (%)")
    label_layers(left, [_name(group) for group in groups], _MAX_GROUPS)
    if len(groups) <= _MAX_GROUPS:
        left.tick_params(axis="y", labelsize="small")
        annotate_rows(right, [f"{group.kept:,} of {group.size:,}" for group in groups])
    when = "" if report.epoch is None else f", epoch {report.epoch}"
    title = f"Channels kept, {report.macs_left:.1%} of the MACs remaining{when}"
    figure.suptitle(title, fontsize="large")
    add_legend_below(figure)
    return figure


def draw_network_size(reports: Sequence[StructureReport]) -> Figure:
    """Draw the size of the network and the loss over the schedule.

    Args:
        reports: reports of the steps, in order.

    Returns:
        Above, the remaining shares of multiply-accumulates, parameters, channels and, if
        measured, time of a forward pass, starting with the dense network. Below, the loss
        before and after each step.
    """
    figure = new_figure((8.6, 5.4))
    upper, lower = figure.subplots(2, 1, sharex=True)
    at, unit = locate_steps(reports)
    pad = 0.6 if len(at) == 1 else 0.05 * (at[-1] - at[0])
    ends = (at[0] - pad, at[-1] + pad)
    lines: list[tuple[str, str, str, list[float | None]]] = [
        ("MACs", "o", BLUE, [r.macs_left for r in reports]),
        ("parameters", "s", ORANGE, [r.parameters_left for r in reports]),
        ("channels", "^", "#5f9e4c", [r.kept / r.structures for r in reports]),
        ("time", "D", "#9467bd", [r.latency_left for r in reports]),
    ]
    # A layer that is split for implants can be slower than the dense one.
    highest = 100.0
    for name, marker, color, shares in lines:
        known = [
            (x, 100 * share)
            for x, share in zip(at, shares, strict=True)
            if share is not None
        ]
        if not known:
            continue
        x, y = zip(*known, strict=True)
        highest = max(highest, *y)
        stairs = ([ends[0], *x, ends[1]], [100.0, *y, y[-1]])
        upper.plot(*stairs, drawstyle="steps-post", color=color, linewidth=1.5)
        label = f"{name} {y[-1]:.1f} %"
        upper.plot(x, y, marker, color=color, markersize=5, label=label)
    goals = [100 * (1 - report.target) for report in reports]
    label = f"target ({reports[-1].measure})"
    upper.plot(at, goals, "x", color=text_color(), markersize=7, label=label)
    upper.set_ylim(0, 1.04 * highest)
    upper.set_ylabel("share of the\ndense network (%)")
    upper.set_title("Size of the network")
    draw_losses(lower, at, reports)
    lower.set_xlabel(f"{unit} of the pruning step")
    each = -(-len(at) // MAX_STEPS)
    lower.set_xticks(at[::each], [f"{position:,}" for position in at[::each]])
    lower.set_xlim(*ends)
    for axes in (upper, lower):
        add_grid(axes)
    handles, labels = upper.get_legend_handles_labels()
    style: Any = {"fontsize": "small", "frameon": False}
    figure.legend(handles, labels, loc="outside right upper", **style)
    return figure


def _name(group: GroupReport) -> str:
    """Name a group after its first layer and the number of layers tied to it."""
    name = shorten_name(group.name)
    return name if len(group.layers) < 2 else f"{name} (+{len(group.layers) - 1})"
