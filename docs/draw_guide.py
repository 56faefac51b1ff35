"""Draw which method to use, and the life of a run: docs/images/method.svg, life.svg.

python docs/draw_guide.py

The run is that of draw_figures.py: scikit-learn's digits, pruned to 90 % in six steps.
"""

from __future__ import annotations

import warnings
from typing import Any

import lightning.pytorch as pl
import matplotlib.pyplot as plt
import themes
from draw_figures import EPOCHS, train
from matplotlib.figure import Figure
from themes import BLUE, GREEN, ORANGE, TEXT

from examples.digits.model import Digits, DigitsClassifier
from lightning_woodfisher import (
    FisherConfig,
    PolynomialSchedule,
    WoodFisherPruningCallback,
)

# Center, text and color of each box; boxes with a color are answers.
BOXES = {
    "goal": (4.6, 5.2, "What do you want?", None),
    "channels": (1.4, 3.6, "Remove channels\nSOSPPruningCallback", GREEN),
    "2:4": (4.6, 3.6, 'For sparse tensor cores:\nadd pattern="2:4"', ORANGE),
    "train": (8.0, 2.7, "Can you train it further?", None),
    "gradual": (3.4, 1.2, "Prune during training\nWoodFisherPruningCallback", BLUE),
    "layers": (8.0, 1.1, "Is it a transformer?", None),
    "layerwise": (6.0, -0.7, 'Layer by layer\nprune(criterion="layerwise")', BLUE),
    "stages": (9.9, -0.7, "In eight stages\nprune(), recompute_steps=8", BLUE),
}
ARROWS = (
    ("goal", "channels", "faster\nanywhere"),
    ("goal", "2:4", ""),
    ("goal", "train", "fewer weights,\na smaller file"),
    ("2:4", "train", ""),
    ("train", "gradual", "yes"),
    ("train", "layers", "no"),
    ("layers", "layerwise", "yes"),
    ("layers", "stages", "no"),
)


def draw_method() -> Figure:
    """Draw the questions and answers from top to bottom."""
    figure, axes = plt.subplots(figsize=(9.2, 5.4), layout="constrained")
    axes.set(xlim=(0, 11.6), ylim=(-1.3, 5.6))
    axes.axis("off")
    drawn = {}
    for name, (x, y, text, color) in BOXES.items():
        edge = TEXT if color is None else color
        shape = "round4" if color is None else "round"
        drawn[name] = axes.annotate(
            text,
            (x, y),
            ha="center",
            va="center",
            fontsize=10,
            linespacing=1.5,
            bbox={"boxstyle": f"{shape},pad=0.6", "fc": "none", "ec": edge, "lw": 1.8},
        )
    for start, end, text in ARROWS:
        (x, y), (to_x, to_y) = BOXES[start][:2], BOXES[end][:2]
        axes.annotate(
            "",
            (to_x, to_y),
            (x, y),
            arrowprops={
                "arrowstyle": "-|>",
                "color": TEXT,
                "patchA": drawn[start].get_bbox_patch(),
                "patchB": drawn[end].get_bbox_patch(),
                "shrinkA": 0,
                "shrinkB": 0,
            },
        )
        side = "left" if to_x > x else "right"
        shift = 0.1 if to_x == x else 0.35
        place = ((x + to_x) / 2 + (shift if side == "left" else -shift), (y + to_y) / 2)
        axes.annotate(text, place, ha=side, va="bottom", fontsize=9, style="italic")
    return figure


class Watch(pl.Callback):
    """Keep the loss of each batch and the accuracy after each epoch."""

    def __init__(self) -> None:
        self.losses: list[tuple[float, float]] = []
        self.accuracies: list[tuple[float, float]] = []

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep the loss."""
        epoch = trainer.global_step / trainer.num_training_batches
        self.losses.append((epoch, float(outputs["loss"])))

    def on_validation_end(self, trainer: pl.Trainer, module: Any) -> None:
        """Keep the accuracy."""
        if not trainer.sanity_checking:
            accuracy = float(trainer.callback_metrics["val_accuracy"])
            self.accuracies.append((trainer.current_epoch + 1, 100 * accuracy))


def run() -> tuple[Watch, list[tuple[float, float]]]:
    """Train and prune; return what was seen, and the zeros after each step in percent."""
    pl.seed_everything(0)
    watch, data = Watch(), Digits()
    pruning = WoodFisherPruningCallback(
        target_sparsity=0.9,
        schedule=PolynomialSchedule(start_epoch=5, end_epoch=10),
        fisher=FisherConfig(num_gradients=256, gradient_batch_size=4),
    )
    train(DigitsClassifier(), data, [pruning, watch])
    return watch, [(r.epoch, 100 * r.sparsity) for r in pruning.reports]


def draw_life(watch: Watch, zeros: list[tuple[float, float]]) -> Figure:
    """Draw zeros, loss and accuracy over the epochs."""
    figure, panels = plt.subplots(
        3, 1, figsize=(7.2, 5.6), sharex=True, layout="constrained"
    )
    first, last = zeros[0][0], zeros[-1][0]
    stairs = [(0.0, 0.0), *zeros, (EPOCHS, zeros[-1][1])]
    x, y = zip(*stairs, strict=True)
    panels[0].plot(x, y, drawstyle="steps-post", color=BLUE)
    panels[0].plot(*zip(*zeros, strict=True), "o", color=BLUE)
    panels[0].set(ylabel="zeros (%)", ylim=(0, 100))
    phases = ((0, first, "train"), (first, last, "prune"), (last, EPOCHS, "recover"))
    for start, end, name in phases:
        panels[0].annotate(
            name,
            ((start + end) / 2, 1.06),
            xycoords=("data", "axes fraction"),
            ha="center",
        )
    panels[1].plot(*zip(*watch.losses, strict=True), color=ORANGE, lw=0.9)
    panels[1].set(ylabel="training loss", yscale="log")
    panels[2].plot(*zip(*watch.accuracies, strict=True), "o-", color=GREEN)
    panels[2].set(ylabel="validation\naccuracy (%)", xlabel="epoch", xlim=(0, EPOCHS))
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        for epoch, _ in zeros:
            axes.axvline(epoch, color=TEXT, lw=0.6, ls=":")
    return figure


def main() -> None:
    """Draw both."""
    warnings.filterwarnings("ignore", module="lightning")
    themes.save("method", draw_method)
    watch, zeros = run()
    themes.save("life", lambda: draw_life(watch, zeros))


if __name__ == "__main__":
    main()
