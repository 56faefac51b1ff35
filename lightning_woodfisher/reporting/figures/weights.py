"""Draw figures of steps that prune single weights."""

from __future__ import annotations

__all__ = [
    "draw_layers",
    "draw_local_model",
    "draw_loss_increase",
    "draw_masks",
    "draw_progress",
    "draw_saliencies",
    "draw_schedule",
    "small_layers",
]

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from lightning_woodfisher.base.errors import ConfigurationError
from lightning_woodfisher.pruning.report import PruningReport
from lightning_woodfisher.reporting.figures.canvas import (
    BLUE,
    MAX_LAYERS,
    MAX_LEGEND_ENTRIES,
    MAX_STEPS,
    ORANGE,
    add_grid,
    add_legend_below,
    annotate_rows,
    draw_logged,
    draw_losses,
    label_steps,
    locate_steps,
    new_axes,
    new_figure,
    new_layer_axes,
    scale_y,
    shorten_name,
    text_color,
    write_note,
)
from lightning_woodfisher.reporting.verdict import main_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_DARK_BLUE = "#27608f"
# Most rows or columns of a mask that is drawn, and most masks in a figure.
_LARGEST_MASK = 256
_MAX_MASKS = 12


def draw_local_model(report: PruningReport) -> Figure:
    """Draw the predicted and the measured rise of the loss along the update.

    Args:
        report: report of a step with ``local_model_points``.

    Returns:
        The predicted curve and the measured points, in one color for each stage.

    Raises:
        ConfigurationError: if the report has no points, or without matplotlib.
    """
    if not report.local_model:
        raise ConfigurationError(
            "the report has no points of the local model; set local_model_points=5."
        )
    figure, axes = new_axes()
    for number, stage in enumerate(report.local_model):
        color = f"C{number % 10}"
        name = f"stage {number + 1} " if len(report.local_model) > 1 else ""
        at = [point.fraction for point in stage]
        measured = [point.measured for point in stage]
        axes.plot(at, measured, "o", color=color, label=f"{name}measured")
        predicted = [p.predicted for p in stage if p.predicted is not None]
        if len(predicted) == len(stage):
            axes.plot(at, predicted, "-", color=color, label=f"{name}predicted")
    axes.set_xlabel("fraction t of the update: weights w + t·δ")
    axes.set_ylabel("rise of the mean loss")
    axes.set_title(f"Local model, to {report.sparsity:.1%}")
    if len(report.local_model) * 2 <= MAX_LEGEND_ENTRIES:
        axes.legend()
    return figure


def draw_layers(report: PruningReport) -> Figure:
    """Draw the sparsity of each layer before and after a step.

    Args:
        report: report of the step.

    Returns:
        A bar for each layer, in the order of the network, and a line for all layers
        together.
    """
    layers = report.layers
    figure, axes = new_layer_axes([layer.name for layer in layers])
    after = [100 * layer.sparsity for layer in layers]
    _draw_bars(axes, after, color=BLUE, label="pruned in this step")
    before = [100 * layer.zeros_before / layer.weights for layer in layers]
    _draw_bars(axes, before, color=_DARK_BLUE, label="pruned before")
    label = f"all layers: {report.sparsity:.1%}"
    axes.axvline(100 * report.sparsity, color=ORANGE, label=label)
    if len(layers) <= MAX_LAYERS:
        annotate_rows(axes, [f"{x.sparsity:.1%} of {x.weights:,}" for x in layers])
    axes.set_xlim(0, 100)
    axes.set_xlabel("zeros in the layer (%)")
    axes.set_title(f"Sparsity per layer, {_describe_step(report)}")
    add_legend_below(figure)
    return figure


def _draw_bars(axes: Axes, lengths: Sequence[float], **style: Any) -> None:
    """Draw horizontal bars in one piece; ``barh`` takes seconds for thousands of them."""
    from matplotlib.collections import PolyCollection

    bars = [
        [(0, row - 0.4), (length, row - 0.4), (length, row + 0.4), (0, row + 0.4)]
        for row, length in enumerate(lengths)
    ]
    axes.add_collection(PolyCollection(bars, **style), autolim=False)


def draw_schedule(reports: Sequence[PruningReport]) -> Figure:
    """Draw the sparsity of each layer after each step as a heatmap.

    Args:
        reports: reports of the steps, in order, of the same layers.

    Returns:
        Layers from top to bottom, steps from left to right.
    """
    layers = reports[-1].layers
    figure, axes = new_layer_axes([layer.name for layer in layers])
    shares = [
        [100 * report.layers[row].sparsity for report in reports]
        for row in range(len(layers))
    ]
    axes.grid(visible=False)
    scale = {"cmap": "viridis", "vmin": 0, "vmax": 100, "interpolation": "nearest"}
    limits = axes.get_ylim()
    image = axes.imshow(shares, aspect="auto", **scale)
    axes.set_ylim(limits)
    if len(reports) <= MAX_STEPS and len(layers) <= MAX_LAYERS:
        style = {"ha": "center", "va": "center", "fontsize": "small"}
        for row, cells in enumerate(shares):
            for column, share in enumerate(cells):
                color = "black" if share > 60 else "white"
                axes.text(column, row, f"{share:.0f}", color=color, **style)
    at, unit = locate_steps(reports)
    each = -(-len(reports) // MAX_STEPS)
    axes.set_xticks(range(0, len(reports), each), [f"{x:,}" for x in at[::each]])
    axes.set_xlabel(f"{unit} of the pruning step")
    axes.set_title("Sparsity per layer over the schedule")
    figure.colorbar(image, ax=axes, label="zeros in the layer (%)")
    return figure


def draw_loss_increase(reports: Sequence[PruningReport]) -> Figure:
    """Draw the predicted and the measured rise of the loss in each step.

    Args:
        reports: reports of the steps, in order.

    Returns:
        Two points for each step. The y axis is logarithmic if the numbers differ much; a
        rise below zero means that the step lowered the loss.
    """
    figure, axes = new_axes()
    at, unit = locate_steps(reports)
    drawn: list[float] = []
    for name, style, color in (
        ("predicted", "o-", BLUE),
        ("measured", "s--", ORANGE),
    ):
        values = [getattr(report, f"{name}_increase") for report in reports]
        known = [(x, y) for x, y in zip(at, values, strict=True) if y is not None]
        if known:
            x, y = zip(*known, strict=True)
            axes.plot(x, y, style, color=color, label=name)
            drawn += y
    scale_y(axes, drawn)
    if drawn:
        axes.legend()
    else:
        write_note(axes, "neither predicted nor measured")
    label_steps(axes, unit)
    axes.set_ylabel("rise of the mean loss in the step")
    axes.set_title("Rise of the loss, predicted and measured")
    return figure


def draw_progress(reports: Sequence[PruningReport]) -> Figure:
    """Draw sparsity and loss over the schedule.

    Args:
        reports: reports of the steps, in order.

    Returns:
        Sparsity above, loss before and after each step below, and a logged metric.
    """
    names = [n for n in main_metrics(reports)[:1] if n in reports[-1].logged_before]
    figure = new_figure((7.0, 5.4 + 2.2 * len(names)))
    upper, lower, *rest = figure.subplots(2 + len(names), 1, sharex=True)
    at, unit = locate_steps(reports)
    targets = [100 * report.target_sparsity for report in reports]
    # The two curves usually coincide; dashes on top of a line show both.
    upper.plot(at, targets, "--", color=ORANGE, label="target", zorder=3)
    reached = [100 * report.sparsity for report in reports]
    upper.plot(at, reached, "o-", color=BLUE, label="reached")
    upper.set_ylim(0, 100)
    upper.set_ylabel("zeros (%)")
    upper.set_title("Progress of pruning")
    upper.legend(loc="lower right")
    draw_losses(lower, at, reports)
    for axes, name in zip(rest, names, strict=True):
        draw_logged(axes, at, reports, name)
    label_steps([lower, *rest][-1], unit)
    for axes in (upper, lower, *rest):
        add_grid(axes)
    return figure


def draw_saliencies(report: PruningReport) -> Figure:
    """Draw the range of the saliencies of each layer, and the largest one removed.

    Args:
        report: report of a step.

    Returns:
        For each layer, the central 50 % and 90 % of its saliencies, their median, and the
        largest saliency removed.
    """
    layers = report.layers
    figure, axes = new_layer_axes([layer.name for layer in layers])
    known = [row for row, layer in enumerate(layers) if layer.saliency_quantiles]
    quantiles = np.array([layers[row].saliency_quantiles for row in known])
    pruned = [row for row, layer in enumerate(layers) if layer.threshold]
    thresholds = np.array([layers[row].threshold for row in pruned])
    positive = [*quantiles[quantiles > 0], *thresholds]
    if positive:
        # A logarithmic axis has no zero: zeros are drawn at its left end.
        low, first, middle, third, high = quantiles.reshape(-1, 5).clip(min(positive)).T
        thin = min(1.0, MAX_LAYERS / len(layers))
        style = {"color": BLUE, "label": "5–95 %"}
        axes.hlines(known, low, high, linewidth=1.5 * thin, **style)
        style["label"] = "25–75 %"
        axes.hlines(known, first, third, linewidth=6 * thin, **style)
        style = {"color": text_color(), "label": "median"}
        axes.plot(middle, known, "|", markersize=11 * thin, **style)
        style = {"color": ORANGE, "label": "largest removed"}
        axes.plot(thresholds, pruned, "D", markersize=5 * thin, **style)
        axes.set_xscale("log")
        # More labels between the powers of ten would overlap.
        axes.xaxis.set_minor_formatter("")
        if max(positive) < 1e3 * min(positive):
            axes.xaxis.get_major_locator().set_params(subs=(1.0, 3.0))
        add_legend_below(figure)
    else:
        write_note(axes, "no saliencies in the report")
    axes.set_xlabel("saliency: predicted rise of the loss when the weight is removed")
    if report.criterion == "magnitude":
        axes.set_xlabel("saliency: magnitude of the weight")
    axes.set_title(f"Saliencies before the step, {_describe_step(report)}")
    return figure


def small_layers(shapes: Mapping[str, Sequence[int]]) -> list[str]:
    """Select the layers whose masks can be drawn weight by weight.

    Args:
        shapes: shapes of the parameters by name.

    Returns:
        Names of the first few layers that, as a matrix of outputs by inputs, have at most
        256 rows and columns.
    """
    small = [
        name
        for name, shape in shapes.items()
        if max(_matrix_shape(shape)) <= _LARGEST_MASK
    ]
    return small[:_MAX_MASKS]


def draw_masks(masks: Mapping[str, Tensor]) -> Figure:
    """Draw the masks of small layers, one pixel for each weight.

    Args:
        masks: bool tensors by name, True where kept, at least one; see
            :func:`small_layers`.

    Returns:
        A panel for each mask: outputs from top to bottom, inputs from left to right (for
        a convolution, inputs times kernel positions). Kept weights are black.
    """
    columns = min(3, len(masks))
    rows = -(-len(masks) // columns)
    figure = new_figure((2.3 * columns + 0.3, 2.3 * rows + 0.4))
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, (name, mask) in zip(panels, masks.items(), strict=False):
        matrix = mask.reshape(_matrix_shape(mask.shape)).cpu().numpy()
        # Pixels are square unless the matrix is very narrow.
        ratio = max(matrix.shape) / min(matrix.shape)
        aspect = "equal" if ratio < 4 else "auto"
        scale = {"cmap": "gray", "vmin": 0, "vmax": 1, "interpolation": "nearest"}
        axes.imshow(~matrix, aspect=aspect, **scale)
        shape = "×".join(map(str, mask.shape))
        zeros = 1 - mask.float().mean().item()
        title = f"{shorten_name(name)}\n{shape}, {zeros:.1%} zeros"
        axes.set_title(title, fontsize="small")
        axes.set(xticks=[], yticks=[])
    for axes in panels[len(masks) :]:
        axes.set_axis_off()
    figure.supxlabel("inputs", fontsize="small")
    figure.supylabel("outputs", fontsize="small")
    return figure


def _matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """Return the numbers of outputs and of weights of each output."""
    return shape[0], math.prod(shape[1:])


def _describe_step(report: PruningReport) -> str:
    when = "" if report.epoch is None else f" in epoch {report.epoch}"
    return f"to {report.sparsity:.1%}{when}"
