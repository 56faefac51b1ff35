"""Make axes, labels and legends for several figures, and render figures."""

from __future__ import annotations

__all__ = [
    "BLUE",
    "MAX_LAYERS",
    "MAX_LEGEND_ENTRIES",
    "MAX_STEPS",
    "ORANGE",
    "add_grid",
    "add_legend_below",
    "annotate_rows",
    "draw_logged",
    "draw_losses",
    "label_layers",
    "label_steps",
    "locate_steps",
    "new_axes",
    "new_figure",
    "new_layer_axes",
    "scale_y",
    "shorten_name",
    "text_color",
    "to_pixels",
    "to_svg",
    "write_note",
]

import html
import importlib.util
import io
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from lightning_woodfisher.base.optional_imports import import_optional
from lightning_woodfisher.pruning.report import PruningReport
from lightning_woodfisher.structured.report import StructureReport

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

_Report: TypeAlias = PruningReport | StructureReport

MAX_LEGEND_ENTRIES = 24
# With more layers than this only every nth one is labeled.
MAX_LAYERS = 40
# Most ticks of steps, and most columns of a heatmap with numbers in its cells.
MAX_STEPS = 12
# Colors that color-blind readers can tell apart on a light or dark background.
BLUE, ORANGE = "#3a86c8", "#e08214"
_LONGEST_NAME = 34
# Placeholders in an SVG for colors that the page sets.
_TEXT, _BACKGROUND = "#1f2329", "#fdfdfb"
# The y axis is logarithmic if the largest number is this many times the smallest.
_LOG_RATIO = 50.0


def has_matplotlib() -> bool:
    """Check whether matplotlib is installed.

    Returns:
        True if figures can be drawn.
    """
    return importlib.util.find_spec("matplotlib") is not None


def to_pixels(figure: Figure) -> NDArray[np.uint8]:
    """Render a figure.

    Args:
        figure: figure drawn by a function of this package.

    Returns:
        uint8 RGB image ``[height, width, 3]``.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas: Any = FigureCanvasAgg(figure)
    canvas.draw()
    pixels: NDArray[np.uint8] = np.array(canvas.buffer_rgba())[..., :3]
    return pixels


def to_svg(draw: Callable[[], Figure], name: str, title: str) -> str:
    """Draw a figure for an HTML page with a light or dark color scheme.

    Args:
        draw: function that draws the figure.
        name: prefix of the identifiers in the SVG, unique on the page.
        title: description for screen readers.

    Returns:
        An ``<svg>`` element. Lines and texts have the color ``var(--ink)``, and the
        background of legends is ``var(--paper)``.
    """
    import matplotlib as mpl

    colored = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color")
    settings: Any = {
        **dict.fromkeys((*colored, "ytick.color", "axes.titlecolor"), _TEXT),
        "axes.facecolor": "none",
        "figure.facecolor": "none",
        "legend.facecolor": _BACKGROUND,
        "svg.fonttype": "none",
        "svg.hashsalt": name,
    }
    file = io.StringIO()
    with mpl.rc_context(settings):
        draw().savefig(file, format="svg")
    svg = file.getvalue()
    # The XML header and the metadata only make sense in a separate file.
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.S)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = svg.replace(_TEXT, "var(--ink)").replace(_BACKGROUND, "var(--paper)")
    label = html.escape(title, quote=True)
    return svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)


def shorten_name(name: str) -> str:
    """Cut the middle out of a long name, and escape it for matplotlib."""
    if len(name) > _LONGEST_NAME:
        tail = _LONGEST_NAME // 3
        name = f"{name[: _LONGEST_NAME - tail - 1]}…{name[-tail:]}"
    # matplotlib reads text between dollar signs as a formula.
    return name.replace("$", r"\$")


def locate_steps(reports: Sequence[_Report]) -> tuple[list[int], str]:
    """Return the x positions of steps and their unit, the coarsest in which they differ."""
    for attribute, unit in (("epoch", "epoch"), ("step", "optimizer step")):
        positions = [getattr(report, attribute) for report in reports]
        if None not in positions and len(set(positions)) == len(positions):
            return positions, unit
    return list(range(1, len(reports) + 1)), "number"


def label_steps(axes: Any, unit: str) -> None:
    """Label the x axis with whole numbers and the unit of the steps."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(MAX_STEPS, integer=True))
    axes.set_xlabel(f"{unit} of the pruning step")


def label_layers(axes: Any, names: Sequence[str], most: int = MAX_LAYERS) -> None:
    """Name the layers from top to bottom, only every nth if there are more than ``most``."""
    each = -(-len(names) // most)
    axes.set_yticks(range(0, len(names), each), names[::each])
    axes.set_ylim(len(names) - 0.5, -0.5)


def annotate_rows(axes: Any, texts: Sequence[str]) -> None:
    """Write a text to the right of each row; the x axis must end at 100."""
    style = {"textcoords": "offset points", "fontsize": "small", "va": "center"}
    for row, text in enumerate(texts):
        axes.annotate(text, (100, row), (4, 0), annotation_clip=False, **style)


def scale_y(axes: Any, values: Sequence[float]) -> None:
    """Make the y axis logarithmic if a linear one would hide small numbers."""
    sizes = [abs(value) for value in values if value]
    if sizes and max(sizes) > _LOG_RATIO * min(sizes):
        if min(values) > 0:
            axes.set_yscale("log")
        else:
            # Linear below the threshold, logarithmic above it in both directions.
            axes.set_yscale("symlog", linthresh=max(min(sizes), 1e-4 * max(sizes)))
    if values and min(values) < 0:
        axes.axhline(0, color="gray", linewidth=1)


def draw_losses(axes: Any, at: Sequence[float], reports: Sequence[_Report]) -> None:
    """Draw the loss just before and after each step at the x positions ``at``."""
    pairs = [(report.loss_before, report.loss_after) for report in reports]
    drawn = _draw_pairs(axes, at, pairs, "after the step")
    if drawn:
        scale_y(axes, drawn)
    else:
        write_note(axes, "not measured (measure_loss)")
    axes.set_ylabel("mean loss on\nthe samples")


def draw_logged(
    axes: Any, at: Sequence[float], reports: Sequence[_Report], name: str
) -> None:
    """Draw a logged value before each step and before the next one."""
    pairs = [(r.logged_before.get(name), r.logged_after.get(name)) for r in reports]
    _draw_pairs(axes, at, pairs, "after the training that followed")
    axes.set_ylabel(shorten_name(name))


def _draw_pairs(
    axes: Any,
    at: Sequence[float],
    pairs: Sequence[tuple[float | None, float | None]],
    after_what: str,
) -> list[float]:
    """Draw two points for each step, with a line between them; return what is drawn."""
    known = [
        (x, before, after)
        for x, (before, after) in zip(at, pairs, strict=True)
        if before is not None and after is not None
    ]
    if not known:
        return []
    x, before, after = zip(*known, strict=True)
    axes.vlines(x, before, after, color="gray", linewidth=1)
    axes.plot(x, before, "o", color=BLUE, label="before the step")
    axes.plot(x, after, "s", color=ORANGE, label=after_what)
    above = {"loc": "lower left", "bbox_to_anchor": (0.0, 1.0), "frameon": False}
    axes.legend(ncols=2, fontsize="small", **above)
    return [*before, *after]


def text_color() -> str:
    """Return the color of texts; :func:`to_svg` changes it."""
    import matplotlib as mpl

    return str(mpl.rcParams["text.color"])


def write_note(axes: Any, text: str) -> None:
    """Write a note in the middle of empty axes."""
    where = {"ha": "center", "va": "center", "transform": axes.transAxes}
    axes.text(0.5, 0.5, text, color="gray", **where)


def add_grid(axes: Any) -> None:
    """Add a faint grid behind the data, and remove the frame at the top and right."""
    axes.grid(color="gray", alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def add_legend_below(figure: Figure) -> None:
    """Add one legend for all axes below the axes."""
    figure.legend(loc="outside lower right", ncols=4, fontsize="small", frameon=False)


def new_axes(height: float = 4.5) -> tuple[Figure, Any]:
    """Make a figure with one plot; ``height`` is in inches."""
    figure = new_figure((7.0, height))
    axes = figure.add_subplot()
    add_grid(axes)
    return figure, axes


def new_layer_axes(names: Sequence[str]) -> tuple[Figure, Any]:
    """Make a figure with a labeled row for each layer."""
    figure, axes = new_axes(1.9 + 0.24 * min(max(len(names), 3), MAX_LAYERS))
    label_layers(axes, [shorten_name(name) for name in names])
    return figure, axes


def new_figure(inches: tuple[float, float]) -> Figure:
    """Make an empty figure, without the global state of pyplot."""
    figure_class = import_optional("matplotlib.figure", "a figure").Figure
    figure: Figure = figure_class(figsize=inches, layout="constrained")
    return figure
