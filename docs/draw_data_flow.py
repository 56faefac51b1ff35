"""Draw the data flow of one pruning step: docs/images/data-flow.svg.

python docs/draw_data_flow.py
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyBboxPatch

# What each rank holds, from top to bottom, and a note.
STAGES = (
    ("own mini-batches", "every R-th one of the same N"),
    ("gradient rows [N/R, D]", "of all weights"),
    ("rows [N, D/R]", "all gradients, own blocks"),
    ("inverse Fisher", "of the own blocks"),
    ("saliency [D/R]", "cost of removing each weight"),
    ("mask [D/R]", "weights to remove"),
    ("update [D/R]", "kept weights compensate"),
    ("weights and masks [D]", "verified, written in place"),
)
# Messages between the ranks, below the stage of this index.
BETWEEN = {
    1: "exchange\n(all_to_all)",
    4: "threshold\n(all_reduce of counts)",
    6: "gather\n(all_gather)",
}
RANKS = (("rank 0", 1.75, "tab:blue"), ("rank 1", 7.25, "tab:orange"))
BOX = (3.2, 0.62)
STEP = 1.0


def draw(path: Path) -> None:
    """Draw the figure."""
    # Without date and random identifiers, so that every run writes the same file.
    plt.rcParams.update({"svg.hashsalt": "data-flow", "svg.fonttype": "path"})
    figure, axes = plt.subplots(figsize=(8, 7.2))
    axes.set(xlim=(0, 9), ylim=(-len(STAGES) * STEP + 0.25, 0.95))
    axes.axis("off")
    for name, center, _ in RANKS:
        axes.text(center, 0.62, name, ha="center", fontsize=12, weight="bold")
    for index, (title, note) in enumerate(STAGES):
        height = -index * STEP
        for _, center, color in RANKS:
            corner = (center - BOX[0] / 2, height - BOX[1] / 2)
            axes.add_patch(
                FancyBboxPatch(
                    corner,
                    *BOX,
                    boxstyle="round,pad=0.02,rounding_size=0.1",
                    facecolor=(*matplotlib.colors.to_rgb(color), 0.14),
                    edgecolor=color,
                )
            )
            axes.text(
                center, height + 0.09, title, ha="center", va="center", fontsize=11
            )
            axes.text(
                center,
                height - 0.17,
                note,
                ha="center",
                va="center",
                fontsize=8.5,
                color="0.35",
            )
        if index == len(STAGES) - 1:
            break
        top, bottom = height - BOX[1] / 2 - 0.02, height - STEP + BOX[1] / 2 + 0.02
        style = {"arrowstyle": "-|>", "color": "0.3", "shrinkA": 0, "shrinkB": 0}
        pairs = [(center, center) for _, center, _ in RANKS]
        if index in BETWEEN:
            left, right = RANKS[0][1], RANKS[1][1]
            pairs += [(left + 1.3, right - 1.3), (right - 1.3, left + 1.3)]
            axes.text(4.5, height - 0.1, BETWEEN[index], ha="center", fontsize=9.5)
        for start, end in pairs:
            axes.annotate("", xy=(end, bottom), xytext=(start, top), arrowprops=style)
    figure.tight_layout(pad=0.2)
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    draw(Path(__file__).parent / "images" / "data-flow.svg")
