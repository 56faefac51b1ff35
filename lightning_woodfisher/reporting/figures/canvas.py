"""What the figures have in common: axes, labels, and how a figure leaves matplotlib."""

from __future__ import annotations

__all__ = [
    "DARK",
    "FIRST",
    "INCHES_PER_LETTER",
    "MOST_CELLS",
    "MOST_LABELS",
    "MOST_LAYERS",
    "SECOND",
    "SMALL",
    "Step",
    "draw_losses",
    "empty_figure",
    "grid",
    "has_matplotlib",
    "height_of",
    "ink",
    "label_layers",
    "label_places",
    "legend_below",
    "new_figure",
    "places",
    "say",
    "scale_y",
    "shorten",
    "to_pixels",
    "to_svg",
]

import html
import importlib.util
import io
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from lightning_woodfisher.base.errors import ConfigurationError

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

MOST_LABELS = 24
INCHES_PER_LETTER = 0.08
# More layers than this share labels; more steps go without numbers in the cells.
MOST_LAYERS = 40
MOST_CELLS = 12
# Two colours that can be told apart by anyone, on white and on black.
FIRST, SECOND = "#3a86c8", "#e08214"
DARK = "#27608f"
SMALL: dict[str, Any] = {
    "textcoords": "offset points",
    "fontsize": "small",
    "annotation_clip": False,
}
_LONGEST_NAME = 34
# Stand-ins in an SVG for what the page decides.
_INK, _PAPER = "#1f2329", "#fdfdfb"
# How much larger than the smallest number the largest is before the axis is logarithmic.
_WIDE = 50.0


class Step(Protocol):
    """What the reports of all kinds of steps tell."""

    @property
    def epoch(self) -> int | None:
        """Epoch of the step."""

    @property
    def step(self) -> int | None:
        """Optimizer steps before it."""

    @property
    def loss_before(self) -> float | None:
        """Mean loss just before it."""

    @property
    def loss_after(self) -> float | None:
        """Mean loss just after it."""


def has_matplotlib() -> bool:
    """Tell whether figures can be drawn.

    Returns:
        Whether matplotlib is installed.
    """
    return importlib.util.find_spec("matplotlib") is not None


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


def shorten(name: str) -> str:
    """Cut a piece out of a long name: numbers in front and the end tell layers apart."""
    if len(name) > _LONGEST_NAME:
        tail = _LONGEST_NAME // 3
        name = f"{name[: _LONGEST_NAME - tail - 1]}…{name[-tail:]}"
    # Between dollars matplotlib would read a formula.
    return name.replace("$", r"\$")


def places(steps: Sequence[Step]) -> tuple[list[int], str]:
    """Where the steps were in training, in the largest unit that tells them apart."""
    units: tuple[tuple[str, Callable[[Step], int | None]], ...] = (
        ("epoch", lambda step: step.epoch),
        ("optimizer step", lambda step: step.step),
    )
    for unit, read in units:
        found = [place for step in steps if (place := read(step)) is not None]
        if len(set(found)) == len(steps):
            return found, unit
    return list(range(1, len(steps) + 1)), "number"


def label_places(axes: Any, unit: str) -> None:
    """Say what the places are, and mark whole numbers only."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(MOST_CELLS, integer=True))
    axes.set_xlabel(f"{unit} of the pruning step")


def label_layers(axes: Any, names: Sequence[str], most: int = MOST_LAYERS) -> None:
    """Name the layers from top to bottom; of more than ``most`` every so manieth."""
    each = -(-len(names) // most)
    axes.set_yticks(range(0, len(names), each), names[::each])
    axes.set_ylim(len(names) - 0.5, -0.5)


def height_of(layers: int) -> float:
    """Inches of a figure with a row for each layer."""
    return 1.9 + 0.24 * min(max(layers, 3), MOST_LAYERS)


def scale_y(axes: Any, values: Sequence[float]) -> None:
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


def draw_losses(axes: Any, at: Sequence[float], steps: Sequence[Step]) -> None:
    """Draw the loss just before and after each step."""
    measured = [
        (x, step.loss_before, step.loss_after)
        for x, step in zip(at, steps, strict=True)
        if step.loss_before is not None and step.loss_after is not None
    ]
    if measured:
        x, before, after = zip(*measured, strict=True)
        axes.vlines(x, before, after, color="grey", linewidth=1)
        axes.plot(x, before, "o", color=FIRST, label="before the step")
        axes.plot(x, after, "s", color=SECOND, label="after it")
        scale_y(axes, [*before, *after])
        above = {"loc": "lower left", "bbox_to_anchor": (0.0, 1.0), "frameon": False}
        axes.legend(ncols=2, fontsize="small", **above)
    else:
        say(axes, "not measured (measure_loss)")
    axes.set_ylabel("mean loss on\nthe samples")


def ink() -> str:
    """Colour of texts, which the page decides."""
    import matplotlib as mpl

    return str(mpl.rcParams["text.color"])


def say(axes: Any, text: str) -> None:
    """Write into axes that have nothing to show."""
    where = {"ha": "center", "va": "center", "transform": axes.transAxes}
    axes.text(0.5, 0.5, text, color="grey", **where)


def grid(axes: Any) -> None:
    """Put a faint grid behind what is drawn, and a frame on two sides."""
    axes.grid(color="grey", alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def legend_below(figure: Figure) -> None:
    """Put one legend for all axes below them."""
    figure.legend(loc="outside lower right", ncols=4, fontsize="small", frameon=False)


def new_figure(height: float = 4.5) -> tuple[Figure, Any]:
    """Make a figure with one pair of axes."""
    figure = empty_figure((7.0, height))
    axes = figure.add_subplot()
    grid(axes)
    return figure, axes


def empty_figure(inches: tuple[float, float]) -> Figure:
    """Make a figure without pyplot and its global state."""
    if not has_matplotlib():
        raise ConfigurationError(
            "figures need matplotlib; pip install 'lightning-woodfisher[figures]'."
        )
    from matplotlib.figure import Figure

    return Figure(figsize=inches, layout="constrained")
