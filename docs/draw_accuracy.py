"""Draw accuracy against sparsity: docs/images/accuracy.svg.

python docs/draw_accuracy.py

Trains a perceptron on scikit-learn's digits and prunes it in one call of ``prune()`` without
retraining, by several criteria and for three seeds, in about a minute on two cores.
"""

from __future__ import annotations

import copy
import statistics
import sys
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import themes
import torch
from matplotlib.figure import Figure

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from examples.plain_pytorch.digits import (
    accuracy,
    load_data,
    loss_fn,
    make_model,
    train,
)
from lightning_woodfisher import FisherConfig, StepConfig, prune

SPARSITIES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
SEEDS = range(3)
FISHER = FisherConfig(num_gradients=256, gradient_batch_size=1, block_size=None)
METHODS: dict[str, dict[str, Any]] = {
    "WoodFisher, 8 stages": {"fisher": FISHER, "step": StepConfig(recompute_steps=8)},
    "WoodFisher, 1 stage": {"fisher": FISHER},
    "layer-wise": {"criterion": "layerwise"},
    "global magnitude": {"criterion": "magnitude"},
}
COLORS = (themes.BLUE, themes.PALE_BLUE, themes.GREEN, themes.ORANGE)


def measure() -> tuple[float, dict[str, list[float]]]:
    """Return the accuracy of the dense networks, and those of the pruned ones in percent."""
    data, held_out = load_data()
    dense: list[float] = []
    found: dict[str, list[list[float]]] = {
        name: [[] for _ in SPARSITIES] for name in METHODS
    }
    for seed in SEEDS:
        torch.manual_seed(seed)
        model = make_model()
        train(model, data, 30)
        dense.append(100 * accuracy(model, held_out))
        for name, settings in METHODS.items():
            for values, sparsity in zip(found[name], SPARSITIES, strict=True):
                pruned = copy.deepcopy(model)
                prune(pruned, data, loss_fn, target_sparsity=sparsity, **settings)
                values.append(100 * accuracy(pruned, held_out))
    means = {
        name: [statistics.mean(values) for values in points]
        for name, points in found.items()
    }
    return statistics.mean(dense), means


def draw(dense: float, means: dict[str, list[float]], colors: dict[str, str]) -> Figure:
    """Draw a line for each method."""
    figure, axes = plt.subplots(figsize=(6.4, 3.4), layout="constrained")
    axes.axhline(dense, color=themes.TEXT, linestyle=":", linewidth=1)
    axes.annotate("dense", (50, dense), (0, 3), textcoords="offset points")
    percent = [100 * sparsity for sparsity in SPARSITIES]
    for (name, values), color in zip(means.items(), COLORS, strict=True):
        axes.plot(percent, values, marker="o", color=color, label=name)
    axes.set(xlabel="zeros, %", ylabel="accuracy, %", ylim=(0, 103))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower left")
    return figure


def main() -> None:
    """Measure, print and draw."""
    dense, means = measure()
    print(f"dense {dense:.1f}")
    for name, values in means.items():
        print(name, " ".join(f"{value:.1f}" for value in values))
    themes.save("accuracy", lambda: draw(dense, means))


if __name__ == "__main__":
    main()
