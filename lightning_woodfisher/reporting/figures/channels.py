"""Figures of the steps that remove whole channels."""

from __future__ import annotations

__all__ = ["draw_channels", "draw_size"]

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lightning_woodfisher.reporting.figures.canvas import (
    FIRST,
    MOST_CELLS,
    SECOND,
    SMALL,
    draw_losses,
    empty_figure,
    grid,
    ink,
    label_layers,
    legend_below,
    places,
    shorten,
)
from lightning_woodfisher.structured.report import GroupReport, StructureReport

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# More groups than this share labels. A network has far fewer groups than layers.
_MOST_GROUPS = 80
_INCHES_PER_GROUP = 0.2


def draw_channels(report: StructureReport) -> Figure:
    """Draw how many channels each group of layers keeps after a step.

    Args:
        report: of the step.

    Returns:
        A bar for each group, in the order of the network: as numbers on the left, where
        the outline is the dense network, and in per cent on the right, where the line is
        the whole. Channels with 1×1 filters have a colour of their own.
    """
    groups = report.groups
    rows = range(len(groups))
    shown = min(max(len(groups), 3), _MOST_GROUPS)
    figure = empty_figure((8.6, 1.7 + _INCHES_PER_GROUP * shown))
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(1.5, 1))
    for axes in (left, right):
        grid(axes)
        axes.grid(visible=False, axis="y")
    whole = [group.kept - len(group.implanted) for group in groups]
    implants = [len(group.implanted) for group in groups]
    sizes = [group.size for group in groups]
    _stack(left, whole, implants, labelled=True)
    style = {"edgecolor": ink(), "linewidth": 0.7, "label": "dense"}
    left.barh(rows, sizes, height=0.8, facecolor="none", **style)
    left.set_xlim(0, 1.02 * max(sizes))
    left.xaxis.get_major_locator().set_params(integer=True)
    left.set_xlabel("channels")
    _stack(right, _percent(whole, sizes), _percent(implants, sizes))
    kept = report.kept / report.structures
    label = f"all groups: {kept:.1%}"
    right.axvline(100 * kept, color=ink(), linestyle="--", linewidth=1, label=label)
    right.set_xlim(0, 100)
    right.set_xlabel("kept (%)")
    label_layers(left, [_name(group) for group in groups], _MOST_GROUPS)
    if len(groups) <= _MOST_GROUPS:
        left.tick_params(axis="y", labelsize="small")
        for row, group in enumerate(groups):
            text = f"{group.kept:,} of {group.size:,}"
            right.annotate(text, (100, row), (4, 0), va="center", **SMALL)
    figure.suptitle(f"Channels kept, {_when(report)}", fontsize="large")
    legend_below(figure)
    return figure


def draw_size(reports: Sequence[StructureReport]) -> Figure:
    """Draw what is left of the network, and the loss, over the schedule.

    Args:
        reports: of the steps, in order.

    Returns:
        Above, what is left of the multiply-accumulates, the parameters, the channels and,
        where it was measured, the time of a forward pass; each begins with the dense
        network. The loss before and after each step below.
    """
    figure = empty_figure((8.6, 5.4))
    upper, lower = figure.subplots(2, 1, sharex=True)
    at, unit = places(reports)
    pad = 0.6 if len(at) == 1 else 0.05 * (at[-1] - at[0])
    ends = (at[0] - pad, at[-1] + pad)
    lines: list[tuple[str, str, str, list[float | None]]] = [
        ("MACs", "o", FIRST, [r.macs_left for r in reports]),
        ("parameters", "s", SECOND, [r.parameters_left for r in reports]),
        ("channels", "^", "#5f9e4c", [r.kept / r.structures for r in reports]),
        ("time", "D", "#9467bd", [r.latency_left for r in reports]),
    ]
    for name, marker, colour, shares in lines:
        known = [
            (x, 100 * share)
            for x, share in zip(at, shares, strict=True)
            if share is not None
        ]
        if not known:
            continue
        x, y = zip(*known, strict=True)
        course = ([ends[0], *x, ends[1]], [100.0, *y, y[-1]])
        upper.plot(*course, drawstyle="steps-post", color=colour, linewidth=1.5)
        label = f"{name} {y[-1]:.1f} %"
        upper.plot(x, y, marker, color=colour, markersize=5, label=label)
    goals = [100 * (1 - report.target) for report in reports]
    label = f"target ({reports[-1].measure})"
    upper.plot(at, goals, "x", color=ink(), markersize=7, label=label)
    # Small layers in pieces, as implants are, can take longer than the dense ones.
    most = max([100.0, *(max(line.get_ydata()) for line in upper.lines)])
    upper.set_ylim(0, 1.04 * most)
    upper.set_ylabel("left of the\ndense network (%)")
    upper.set_title("What the steps have left")
    draw_losses(lower, at, reports)
    lower.set_xlabel(f"{unit} of the pruning step")
    each = -(-len(at) // MOST_CELLS)
    lower.set_xticks(at[::each], [f"{place:,}" for place in at[::each]])
    lower.set_xlim(*ends)
    for axes in (upper, lower):
        grid(axes)
    handles, labels = upper.get_legend_handles_labels()
    style: Any = {"fontsize": "small", "frameon": False}
    figure.legend(handles, labels, loc="outside right upper", **style)
    return figure


def _stack(
    axes: Any,
    whole: Sequence[float],
    implants: Sequence[float],
    labelled: bool = False,
) -> None:
    rows = range(len(whole))
    label = "kept" if labelled else None
    axes.barh(rows, whole, height=0.8, color=FIRST, label=label)
    if any(implants):
        label = "kept with 1×1 filters" if labelled else None
        axes.barh(rows, implants, height=0.8, left=whole, color=SECOND, label=label)


def _percent(parts: Sequence[int], sizes: Sequence[int]) -> list[float]:
    return [100 * part / size for part, size in zip(parts, sizes, strict=True)]


def _name(group: GroupReport) -> str:
    """The group's name, and how many further layers are tied to its first one."""
    name = shorten(group.name)
    return name if len(group.layers) < 2 else f"{name} (+{len(group.layers) - 1})"


def _when(report: StructureReport) -> str:
    left = f"{report.macs_left:.1%} of the MACs left"
    return left if report.epoch is None else f"{left}, epoch {report.epoch}"
