"""Figures of reports. matplotlib is imported only when one is drawn, pyplot never."""

from __future__ import annotations

__all__ = [
    "draw_course",
    "draw_increase",
    "draw_layers",
    "draw_local_model",
    "draw_masks",
    "draw_saliencies",
    "draw_schedule",
    "draw_sweep",
    "has_matplotlib",
    "small_layers",
    "to_pixels",
    "to_svg",
]

import html
import importlib.util
import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from lightning_woodfisher.errors import ConfigurationError
from lightning_woodfisher.report import PruningReport
from lightning_woodfisher.sweeps import SweepReport, SweepResult

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

_MOST_LABELS = 24
_INCHES_PER_LETTER = 0.08
# More layers than this share labels; more steps go without numbers in the cells.
_MOST_LAYERS = 40
_MOST_CELLS = 12
_LONGEST_NAME = 34
# Weights along each side of a layer whose mask can be shown as a picture, and how many.
_LARGEST_MASK = 256
_MOST_MASKS = 12
# Two colours that can be told apart by anyone, on white and on black.
_FIRST, _SECOND = "#3a86c8", "#e08214"
_DARK = "#27608f"
# Stand-ins in an SVG for what the page decides.
_INK, _PAPER = "#1f2329", "#fdfdfb"
# How much larger than the smallest number the largest is before the axis is logarithmic.
_WIDE = 50.0


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


def draw_layers(report: PruningReport) -> Figure:
    """Draw how sparse each layer is after a step.

    Args:
        report: of the step.

    Returns:
        A bar for each layer, in the order of the network; the line is the whole.
    """
    layers = report.layers
    figure, axes = _new_figure(_height(len(layers)))
    rows = range(len(layers))
    after = [100 * layer.sparsity for layer in layers]
    axes.barh(rows, after, color=_FIRST, label="in the step")
    before = [100 * layer.zeros_before / layer.weights for layer in layers]
    axes.barh(rows, before, color=_DARK, label="before the step")
    axes.axvline(
        100 * report.sparsity, color=_SECOND, label=f"all layers: {report.sparsity:.1%}"
    )
    _label_layers(axes, [layer.name for layer in layers])
    if len(layers) <= _MOST_LAYERS:
        for row, layer in enumerate(layers):
            text = f"{layer.sparsity:.1%} of {layer.weights:,}"
            axes.annotate(text, (100, row), (4, 0), va="center", **_SMALL)
    axes.set_xlim(0, 100)
    axes.set_xlabel("zeros in the layer (%)")
    axes.set_title(f"Sparsity per layer, {_when(report)}")
    _legend_below(figure)
    return figure


def draw_schedule(reports: Sequence[PruningReport]) -> Figure:
    """Draw the sparsity of each layer after each step as a heatmap.

    Args:
        reports: of the steps, in order, of the same layers.

    Returns:
        Layers from top to bottom, steps from left to right.
    """
    layers = reports[-1].layers
    figure, axes = _new_figure(_height(len(layers)))
    shares = [
        [100 * report.layers[row].sparsity for report in reports]
        for row in range(len(layers))
    ]
    axes.grid(visible=False)
    image = axes.imshow(
        shares, aspect="auto", cmap="viridis", vmin=0, vmax=100, interpolation="nearest"
    )
    if len(reports) <= _MOST_CELLS and len(layers) <= _MOST_LAYERS:
        for row, cells in enumerate(shares):
            for column, share in enumerate(cells):
                colour = "black" if share > 60 else "white"
                style = {"ha": "center", "va": "center", "fontsize": "small"}
                axes.text(column, row, f"{share:.0f}", color=colour, **style)
    _label_layers(axes, [layer.name for layer in layers])
    places, unit = _places(reports)
    each = -(-len(reports) // _MOST_CELLS)
    axes.set_xticks(range(0, len(reports), each), [f"{p:,}" for p in places[::each]])
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
    figure, axes = _new_figure()
    places, unit = _places(reports)
    every = []
    for name, style, colour in (
        ("predicted", "o-", _FIRST),
        ("measured", "s--", _SECOND),
    ):
        values = [getattr(report, f"{name}_increase") for report in reports]
        known = [(x, y) for x, y in zip(places, values, strict=True) if y is not None]
        every += [y for _, y in known]
        if known:
            x, y = zip(*known, strict=True)
            axes.plot(x, y, style, color=colour, label=name)
    _scale_y(axes, every)
    if every:
        axes.legend()
    else:
        _say(axes, "neither predicted nor measured")
    _label_places(axes, unit)
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
    figure = _empty_figure((7.0, 5.4))
    upper, lower = figure.subplots(2, 1, sharex=True)
    places, unit = _places(reports)
    wanted = [100 * report.target_sparsity for report in reports]
    # The two are mostly the same: dashes above the line show both.
    upper.plot(places, wanted, "--", color=_SECOND, label="target", zorder=3)
    reached = [100 * report.sparsity for report in reports]
    upper.plot(places, reached, "o-", color=_FIRST, label="reached")
    upper.set_ylim(0, 100)
    upper.set_ylabel("zeros (%)")
    upper.set_title("Course of the pruning")
    upper.legend(loc="lower right")
    measured = [
        (x, report.loss_before, report.loss_after)
        for x, report in zip(places, reports, strict=True)
        if report.loss_before is not None and report.loss_after is not None
    ]
    if measured:
        x, before, after = zip(*measured, strict=True)
        lower.vlines(x, before, after, color="grey", linewidth=1)
        lower.plot(x, before, "o", color=_FIRST, label="before the step")
        lower.plot(x, after, "s", color=_SECOND, label="after it")
        _scale_y(lower, [*before, *after])
        above = {"loc": "lower left", "bbox_to_anchor": (0.0, 1.0), "frameon": False}
        lower.legend(ncols=2, fontsize="small", **above)
    else:
        _say(lower, "not measured (measure_loss)")
    lower.set_ylabel("mean loss on\nthe samples")
    _label_places(lower, unit)
    for axes in (upper, lower):
        _grid(axes)
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
    figure, axes = _new_figure(_height(len(layers)))
    found = [(row, x.saliency_quantiles) for row, x in enumerate(layers)]
    found = [(row, values) for row, values in found if values]
    gone = [(row, x.threshold) for row, x in enumerate(layers) if x.threshold]
    positive = [v for _, values in found for v in values if v > 0]
    positive += [value for _, value in gone]
    if not positive:
        _say(axes, "no saliencies in the report")
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
        thin = min(1.0, _MOST_LAYERS / len(layers))
        style = {"color": _FIRST, "label": "5–95 %"}
        axes.hlines(rows, low, high, linewidth=1.5 * thin, **style)
        style["label"] = "25–75 %"
        axes.hlines(rows, first, third, linewidth=6 * thin, **style)
        style = {"color": _ink(), "label": "median"}
        axes.plot(middle, rows, "|", markersize=11 * thin, **style)
        rows, largest = [row for row, _ in gone], [value for _, value in gone]
        style = {"color": _SECOND, "label": "largest gone"}
        axes.plot(largest, rows, "D", markersize=5 * thin, **style)
        axes.set_xscale("log")
        _legend_below(figure)
    _label_layers(axes, [layer.name for layer in layers])
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
    figure = _empty_figure((2.3 * across + 0.3, 2.3 * down + 0.4))
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
        title = f"{_shorten(name)}\n{_shape(mask.shape)}, {share:.1%} zeros"
        axes.set_title(title, fontsize="small")
        axes.set_xticks([])
        axes.set_yticks([])
    for axes in panels[len(masks) :]:
        axes.set_axis_off()
    figure.supxlabel("inputs", fontsize="small")
    figure.supylabel("outputs", fontsize="small")
    return figure


def to_pixels(figure: Figure) -> NDArray[np.uint8]:
    """Render a figure.

    Args:
        figure: what a function here has drawn.

    Returns:
        ``[height, width, 3]``.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas: Any = FigureCanvasAgg(figure)
    canvas.draw()
    pixels: NDArray[np.uint8] = np.array(canvas.buffer_rgba())[..., :3]
    return pixels


def to_svg(draw: Callable[[], Figure], name: str, title: str) -> str:
    """Draw a figure to stand in an HTML page whose colours may be light or dark.

    Args:
        draw: draws it.
        name: unlike that of any other figure of the page.
        title: what a reader hears who does not see it.

    Returns:
        An ``<svg>`` element. Lines and texts have the colour ``var(--ink)``, and behind
        legends is ``var(--paper)``.
    """
    import matplotlib as mpl

    ink = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color")
    settings: Any = {
        **dict.fromkeys((*ink, "ytick.color", "axes.titlecolor"), _INK),
        "axes.facecolor": "none",
        "figure.facecolor": "none",
        "legend.facecolor": _PAPER,
        "svg.fonttype": "none",
        "svg.hashsalt": name,
    }
    text = io.StringIO()
    with mpl.rc_context(settings):
        about = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        draw().savefig(text, format="svg", metadata=about)
    svg = text.getvalue()
    # Without what is for a file of its own.
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.S)
    # Names must be unlike those of the other figures.
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = svg.replace(_INK, "var(--ink)").replace(_PAPER, "var(--paper)")
    label = html.escape(title, quote=True)
    return svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)


def _label(setting: Mapping[str, Any], varying: list[str], across: str) -> str:
    names = [name for name in varying if name != across and name in setting]
    return ", ".join(f"{name}={setting[name]}" for name in names)


_SMALL: dict[str, Any] = {
    "textcoords": "offset points",
    "fontsize": "small",
    "annotation_clip": False,
}


def _as_matrix(shape: Sequence[int]) -> tuple[int, int]:
    """Rows and columns: outputs, and all that leads to one."""
    return shape[0], math.prod(shape[1:])


def _shape(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape))


def _shorten(name: str) -> str:
    """Cut a piece out of a long name: numbers in front and the end tell layers apart."""
    if len(name) > _LONGEST_NAME:
        tail = _LONGEST_NAME // 3
        name = f"{name[: _LONGEST_NAME - tail - 1]}…{name[-tail:]}"
    # Between dollars matplotlib would read a formula.
    return name.replace("$", r"\$")


def _when(report: PruningReport) -> str:
    if report.epoch is None:
        return f"to {report.sparsity:.1%}"
    return f"to {report.sparsity:.1%} in epoch {report.epoch}"


def _places(reports: Sequence[PruningReport]) -> tuple[list[int], str]:
    """Where the steps were in training, in the largest unit that tells them apart."""
    units: tuple[tuple[str, Callable[[PruningReport], int | None]], ...] = (
        ("epoch", lambda report: report.epoch),
        ("optimizer step", lambda report: report.step),
    )
    for unit, read in units:
        places = [place for report in reports if (place := read(report)) is not None]
        if len(set(places)) == len(reports):
            return places, unit
    return list(range(1, len(reports) + 1)), "number"


def _label_places(axes: Any, unit: str) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(_MOST_CELLS, integer=True))
    axes.set_xlabel(f"{unit} of the pruning step")


def _label_layers(axes: Any, names: Sequence[str]) -> None:
    """Name the layers from top to bottom; of very many only every so manieth."""
    each = -(-len(names) // _MOST_LAYERS)
    axes.set_yticks(range(0, len(names), each), [_shorten(n) for n in names[::each]])
    axes.set_ylim(len(names) - 0.5, -0.5)


def _height(layers: int) -> float:
    return 1.9 + 0.24 * min(max(layers, 3), _MOST_LAYERS)


def _scale_y(axes: Any, values: Sequence[float]) -> None:
    """Make the axis logarithmic where that is the only way to see small numbers."""
    sizes = [abs(value) for value in values if value]
    if sizes and max(sizes) > _WIDE * min(sizes):
        if min(values) > 0:
            axes.set_yscale("log")
        else:
            # Linear below this, and logarithmic above in both directions.
            axes.set_yscale("symlog", linthresh=max(min(sizes), 1e-4 * max(sizes)))
    if values and min(values) < 0:
        axes.axhline(0, color="grey", linewidth=1)


def _ink() -> str:
    """Colour of texts, which the page decides."""
    import matplotlib as mpl

    return str(mpl.rcParams["text.color"])


def _say(axes: Any, text: str) -> None:
    where = {"ha": "center", "va": "center", "transform": axes.transAxes}
    axes.text(0.5, 0.5, text, color="grey", **where)


def _grid(axes: Any) -> None:
    axes.grid(color="grey", alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _legend_below(figure: Figure) -> None:
    figure.legend(loc="outside lower right", ncols=4, fontsize="small", frameon=False)


def _new_figure(height: float = 4.5) -> tuple[Figure, Any]:
    """Make a figure with one pair of axes."""
    figure = _empty_figure((7.0, height))
    axes = figure.add_subplot()
    _grid(axes)
    return figure, axes


def _empty_figure(inches: tuple[float, float]) -> Figure:
    """Make a figure without pyplot and its global state."""
    if not has_matplotlib():
        raise ConfigurationError(
            "figures need matplotlib; pip install 'lightning-woodfisher[figures]'."
        )
    from matplotlib.figure import Figure

    return Figure(figsize=inches, layout="constrained")
