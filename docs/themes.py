"""Write figures that follow the light or dark color scheme of the browser."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

IMAGES = Path(__file__).parent / "images"
# Colors by name, for a light and for a dark page.
COLORS = {
    "blue": ("#1f6fb2", "#6cb6ff"),
    "pale-blue": ("#7db4e0", "#3d78ab"),
    "green": ("#2e8b57", "#5fc48f"),
    "orange": ("#d9822b", "#f0a050"),
    "text": ("#222222", "#dddddd"),
    "paper": ("#fefefe", "#16181c"),
}
BLUE, PALE_BLUE, GREEN, ORANGE, TEXT, PAPER = (light for light, _ in COLORS.values())


def save(name: str, draw: Callable[[], Figure]) -> None:
    """Write docs/images/<name>.svg.

    Args:
        name: name of the file.
        draw: function that draws the figure with the colors of this module.
    """
    keys = ["text.color", "axes.edgecolor", "axes.labelcolor", "axes.titlecolor"]
    keys += ["xtick.color", "ytick.color"]
    style = {**dict.fromkeys(keys, TEXT), "axes.facecolor": "none"}
    file = io.StringIO()
    with plt.rc_context({"svg.fonttype": "path", "svg.hashsalt": name, **style}):
        figure = draw()
        # Without a date, so that every run writes the same file.
        figure.savefig(file, format="svg", facecolor=PAPER, metadata={"Date": None})
        plt.close(figure)
    svg = file.getvalue()
    schemes = ["", ""]
    for color, pair in COLORS.items():
        svg = svg.replace(pair[0], f"var(--{color})")
        for scheme, value in enumerate(pair):
            schemes[scheme] += f"--{color}: {value}; "
    css = (
        f"<style>svg {{ {schemes[0]}}}\n@media (prefers-color-scheme: dark) "
        f"{{ svg {{ {schemes[1]}}} }}</style>"
    )
    path = IMAGES / f"{name}.svg"
    path.write_text(re.sub(r"(<svg[^>]*>)", rf"\1\n{css}", svg, count=1))
    print(f"{path.relative_to(IMAGES.parents[1])}")
