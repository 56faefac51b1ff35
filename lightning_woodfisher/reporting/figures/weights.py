"""Figures of the steps that prune single weights."""

from __future__ import annotations

__all__ = [
    "draw_course",
    "draw_increase",
    "draw_layers",
    "draw_local_model",
    "draw_masks",
    "draw_saliencies",
    "draw_schedule",
    "small_layers",
]

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from lightning_woodfisher.base.errors import ConfigurationError
from lightning_woodfisher.pruning.report import PruningReport
from lightning_woodfisher.reporting.figures.canvas import (
    DARK,
    FIRST,
    MOST_CELLS,
    MOST_LABELS,
    MOST_LAYERS,
    SECOND,
    SMALL,
    draw_losses,
    empty_figure,
    grid,
    height_of,
    ink,
    label_layers,
    label_places,
    legend_below,
    new_figure,
    places,
    say,
    scale_y,
    shorten,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Weights along each side of a layer whose mask can be shown as a picture, and how many.
_LARGEST_MASK = 256
_MOST_MASKS = 12


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
    figure, axes = new_figure()
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
    if len(report.local_model) * 2 <= MOST_LABELS:
        axes.legend()
    return figure


def draw_layers(report: PruningReport) -> Figure:
    """Draw how sparse each layer is after a step.

    Args:
        report: of the step.

    Returns:
        A bar for each layer, in the order of the network; the line is the whole.
    """
    layers = report.layers
    figure, axes = new_figure(height_of(len(layers)))
    rows = range(len(layers))
    after = [100 * layer.sparsity for layer in layers]
    axes.barh(rows, after, color=FIRST, label="in the step")
    before = [100 * layer.zeros_before / layer.weights for layer in layers]
    axes.barh(rows, before, color=DARK, label="before the step")
    axes.axvline(
        100 * report.sparsity, color=SECOND, label=f"all layers: {report.sparsity:.1%}"
    )
    label_layers(axes, [shorten(layer.name) for layer in layers])
    if len(layers) <= MOST_LAYERS:
        for row, layer in enumerate(layers):
            text = f"{layer.sparsity:.1%} of {layer.weights:,}"
            axes.annotate(text, (100, row), (4, 0), va="center", **SMALL)
    axes.set_xlim(0, 100)
    axes.set_xlabel("zeros in the layer (%)")
    axes.set_title(f"Sparsity per layer, {_when(report)}")
    legend_below(figure)
    return figure


def draw_schedule(reports: Sequence[PruningReport]) -> Figure:
    """Draw the sparsity of each layer after each step as a heatmap.

    Args:
        reports: of the steps, in order, of the same layers.

    Returns:
        Layers from top to bottom, steps from left to right.
    """
    layers = reports[-1].layers
    figure, axes = new_figure(height_of(len(layers)))
    shares = [
        [100 * report.layers[row].sparsity for report in reports]
        for row in range(len(layers))
    ]
    axes.grid(visible=False)
    image = axes.imshow(
        shares, aspect="auto", cmap="viridis", vmin=0, vmax=100, interpolation="nearest"
    )
    if len(reports) <= MOST_CELLS and len(layers) <= MOST_LAYERS:
        for row, cells in enumerate(shares):
            for column, share in enumerate(cells):
                colour = "black" if share > 60 else "white"
                style = {"ha": "center", "va": "center", "fontsize": "small"}
                axes.text(column, row, f"{share:.0f}", color=colour, **style)
    label_layers(axes, [shorten(layer.name) for layer in layers])
    at, unit = places(reports)
    each = -(-len(reports) // MOST_CELLS)
    axes.set_xticks(range(0, len(reports), each), [f"{p:,}" for p in at[::each]])
    axes.set_xlabel(f"{unit} of the pruning step")
    axes.set_title("Sparsity per layer over the schedule")
    figure.colorbar(image, ax=axes, label="zeros in the layer (%)")
    return figure


def draw_increase(reports: Sequence[PruningReport]) -> Figure:
    """Draw the predicted and the measured rise of the loss in each step.

    Args:
        reports: of the steps, in order.

    Returns:
        A point for each of the two and each step. The axis is logarithmic where the
        numbers differ much; a rise below zero means that the step has lowered the loss.
    """
    figure, axes = new_figure()
    at, unit = places(reports)
    every = []
    for name, style, colour in (
        ("predicted", "o-", FIRST),
        ("measured", "s--", SECOND),
    ):
        values = [getattr(report, f"{name}_increase") for report in reports]
        known = [(x, y) for x, y in zip(at, values, strict=True) if y is not None]
        every += [y for _, y in known]
        if known:
            x, y = zip(*known, strict=True)
            axes.plot(x, y, style, color=colour, label=name)
    scale_y(axes, every)
    if every:
        axes.legend()
    else:
        say(axes, "neither predicted nor measured")
    label_places(axes, unit)
    axes.set_ylabel("rise of the mean loss in the step")
    axes.set_title("Rise of the loss, predicted and measured")
    return figure


def draw_course(reports: Sequence[PruningReport]) -> Figure:
    """Draw sparsity and loss over the schedule.

    Args:
        reports: of the steps, in order.

    Returns:
        Sparsity above, loss before and after each step below.
    """
    figure = empty_figure((7.0, 5.4))
    upper, lower = figure.subplots(2, 1, sharex=True)
    at, unit = places(reports)
    wanted = [100 * report.target_sparsity for report in reports]
    # The two are mostly the same: dashes above the line show both.
    upper.plot(at, wanted, "--", color=SECOND, label="target", zorder=3)
    reached = [100 * report.sparsity for report in reports]
    upper.plot(at, reached, "o-", color=FIRST, label="reached")
    upper.set_ylim(0, 100)
    upper.set_ylabel("zeros (%)")
    upper.set_title("Course of the pruning")
    upper.legend(loc="lower right")
    draw_losses(lower, at, reports)
    label_places(lower, unit)
    for axes in (upper, lower):
        grid(axes)
    return figure


def draw_saliencies(report: PruningReport) -> Figure:
    """Draw where the saliencies of each layer lie, and up to where they were removed.

    Args:
        report: of a step.

    Returns:
        For each layer the middle half and nine tenths of its saliencies, the median, and
        the largest saliency that went.
    """
    layers = report.layers
    figure, axes = new_figure(height_of(len(layers)))
    found = [(row, x.saliency_quantiles) for row, x in enumerate(layers)]
    found = [(row, values) for row, values in found if values]
    gone = [(row, x.threshold) for row, x in enumerate(layers) if x.threshold]
    positive = [v for _, values in found for v in values if v > 0]
    positive += [value for _, value in gone]
    if not positive:
        say(axes, "no saliencies in the report")
    else:
        least = min(positive)
        rows = [row for row, _ in found]
        # Zero has no place on the axis: it is drawn at the left end.
        low, first, middle, third, high = (
            zip(
                *(tuple(max(v, least) for v in values) for _, values in found),
                strict=True,
            )
            if found
            else ((),) * 5
        )
        thin = min(1.0, MOST_LAYERS / len(layers))
        style = {"color": FIRST, "label": "5–95 %"}
        axes.hlines(rows, low, high, linewidth=1.5 * thin, **style)
        style["label"] = "25–75 %"
        axes.hlines(rows, first, third, linewidth=6 * thin, **style)
        style = {"color": ink(), "label": "median"}
        axes.plot(middle, rows, "|", markersize=11 * thin, **style)
        rows, largest = [row for row, _ in gone], [value for _, value in gone]
        style = {"color": SECOND, "label": "largest gone"}
        axes.plot(largest, rows, "D", markersize=5 * thin, **style)
        axes.set_xscale("log")
        legend_below(figure)
    label_layers(axes, [shorten(layer.name) for layer in layers])
    axes.set_xlabel("saliency: predicted rise of the loss when the weight goes")
    if report.criterion == "magnitude":
        axes.set_xlabel("saliency: magnitude of the weight")
    axes.set_title(f"Saliencies before the step, {_when(report)}")
    return figure


def small_layers(shapes: Mapping[str, Sequence[int]]) -> list[str]:
    """Choose the layers whose masks can be shown weight by weight.

    Args:
        shapes: of the parameters, by name.

    Returns:
        The first few that have, seen as outputs by inputs, at most 256 of both.
    """
    fitting = []
    for name, shape in shapes.items():
        rows, columns = _as_matrix(shape)
        if max(rows, columns) <= _LARGEST_MASK:
            fitting.append(name)
    return fitting[:_MOST_MASKS]


def draw_masks(masks: Mapping[str, Tensor]) -> Figure:
    """Draw the masks of small layers, a point for each weight.

    Args:
        masks: bool tensors by name, True where kept; :func:`small_layers` chooses them.

    Returns:
        A panel for each: outputs from top to bottom, inputs (of a convolution with the
        places of its kernel) from left to right; kept weights are black.
    """
    across = min(3, max(1, len(masks)))
    down = max(1, -(-len(masks) // across))
    figure = empty_figure((2.3 * across + 0.3, 2.3 * down + 0.4))
    panels = figure.subplots(down, across, squeeze=False).flatten()
    for axes, (name, mask) in zip(panels, masks.items(), strict=False):
        matrix = mask.reshape(_as_matrix(mask.shape)).cpu().numpy()
        # Weights are squares unless the layer is a narrow strip.
        ratio = max(matrix.shape) / min(matrix.shape)
        axes.imshow(
            ~matrix,
            cmap="gray",
            vmin=0,
            vmax=1,
            interpolation="nearest",
            aspect="equal" if ratio < 4 else "auto",
        )
        share = 1 - mask.float().mean().item()
        title = f"{shorten(name)}\n{_shape(mask.shape)}, {share:.1%} zeros"
        axes.set_title(title, fontsize="small")
        axes.set_xticks([])
        axes.set_yticks([])
    for axes in panels[len(masks) :]:
        axes.set_axis_off()
    figure.supxlabel("inputs", fontsize="small")
    figure.supylabel("outputs", fontsize="small")
    return figure


def _as_matrix(shape: Sequence[int]) -> tuple[int, int]:
    """Rows and columns: outputs, and all that leads to one."""
    return shape[0], math.prod(shape[1:])


def _shape(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape))


def _when(report: PruningReport) -> str:
    if report.epoch is None:
        return f"to {report.sparsity:.1%}"
    return f"to {report.sparsity:.1%} in epoch {report.epoch}"
