"""Train, prune to 90 % with WoodFisher and with magnitude, and compare the results.

Run it from the root of the repository, as ``make demo`` does. Arguments are passed on to
``lightning-woodfisher fit``; for example, ``--trainer.devices 2`` runs two processes.
"""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import matplotlib

from lightning_woodfisher.base.text_table import format_table
from lightning_woodfisher.pruning.report import PruningReport

matplotlib.use("Agg")
import matplotlib.pyplot as plt

CONFIGS = Path("examples/digits")
RUNS = Path("runs/digits")
METHODS = ("dense", "woodfisher", "magnitude")
LABELS = {"dense": "dense", "woodfisher": "WoodFisher", "magnitude": "global magnitude"}
COLORS = {"dense": "0.55", "woodfisher": "tab:blue", "magnitude": "tab:orange"}


def fit(method: str, arguments: list[str]) -> float:
    """Run ``lightning-woodfisher fit`` and return its seconds."""
    command = [sys.executable, "-m", "lightning_woodfisher", "fit"]
    command += ["--config", str(CONFIGS / f"{method}.yaml"), *arguments]
    print(f"\n$ lightning-woodfisher {' '.join(command[3:])}", flush=True)
    quiet = {"PYTHONWARNINGS": "ignore", "WANDB_SILENT": "true"}
    start = time.perf_counter()
    subprocess.run(command, check=True, env={**os.environ, **quiet})
    return time.perf_counter() - start


def read_accuracies(method: str) -> list[float]:
    """Read the accuracy on the held-out images after each epoch."""
    with (RUNS / method / "metrics.csv").open() as file:
        rows = csv.DictReader(file)
        return [float(row["val_accuracy"]) for row in rows if row["val_accuracy"]]


def read_reports(method: str) -> list[PruningReport]:
    """Read the reports of the pruning steps."""
    plain = json.loads((RUNS / method / "pruning_report.json").read_text())
    return [PruningReport.from_dict(report) for report in plain]


def draw(path: Path) -> None:
    """Draw sparsity per layer, accuracy by epoch, predicted and measured loss increase."""
    figure, (layers, course, increase) = plt.subplots(1, 3, figsize=(15, 4.4))
    width = 0.38
    for offset, method in ((-width / 2, "woodfisher"), (width / 2, "magnitude")):
        last = read_reports(method)[-1]
        positions = [i + offset for i in range(len(last.layers))]
        bars = layers.bar(
            positions,
            [100 * layer.sparsity for layer in last.layers],
            width,
            color=COLORS[method],
            label=LABELS[method],
        )
        layers.bar_label(bars, fmt="%.0f", fontsize=8)
    names = [f"{layer.name}\n{layer.weights:,}" for layer in last.layers]
    layers.set_xticks(range(len(names)), names, fontsize=8)
    layers.set(title="Sparsity per layer at the end", ylabel="zeros, %", ylim=(0, 109))
    layers.legend(loc="upper left")

    for method in METHODS:
        values = read_accuracies(method)
        course.plot(
            [100 * value for value in values],
            marker="o",
            ms=3,
            color=COLORS[method],
            label=LABELS[method],
        )
    course.set(
        title="Accuracy on 360 held-out images", xlabel="epoch", ylabel="accuracy, %"
    )
    course.legend(loc="lower left")
    steps = read_reports("woodfisher")
    sparsity = course.twinx()
    epochs = [step.epoch or 0 for step in steps]
    sparsity.step(
        [0, *epochs, len(values) - 1],
        [0, *(100 * step.sparsity for step in steps), 100 * steps[-1].sparsity],
        where="post",
        color="0.8",
        zorder=0,
    )
    sparsity.set(ylabel="zeros, % (gray)", ylim=(0, 109))
    course.set_zorder(1)
    course.patch.set_visible(False)

    predicted = [step.predicted_increase for step in steps]
    measured = [step.measured_increase for step in steps]
    for step in steps:
        increase.annotate(
            f"epoch {step.epoch}",
            (step.predicted_increase, step.measured_increase),
            xytext=(5, -10),
            textcoords="offset points",
            fontsize=8,
        )
    increase.plot(predicted, measured, "o-", color=COLORS["woodfisher"])
    positive = [value for value in (*predicted, *measured) if value > 0]
    ends = [min(positive) / 2, max(positive) * 2]
    increase.plot(ends, ends, color="0.8", zorder=0, label="equal")
    # A measured increase may be negative, which a logarithmic axis cannot show.
    increase.set_xscale("symlog", linthresh=min(positive))
    increase.set_yscale("symlog", linthresh=min(positive))
    increase.legend(loc="upper left")
    increase.set(
        title="Loss increase in each WoodFisher step",
        xlabel="predicted by the quadratic model",
        ylabel="measured on the same samples",
    )
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main(arguments: list[str]) -> None:
    """Run the three fits and print the table."""
    seconds = {method: fit(method, arguments) for method in METHODS}
    last = {method: read_reports(method)[-1] for method in ("woodfisher", "magnitude")}
    rows = [
        (
            layer.name,
            "×".join(map(str, layer.shape)),
            f"{layer.weights:,}",
            f"{layer.zeros_after:,}",
            f"{layer.sparsity:.1%}",
            f"{other.sparsity:.1%}",
        )
        for layer, other in zip(
            last["woodfisher"].layers, last["magnitude"].layers, strict=True
        )
    ]
    woodfisher, magnitude = last["woodfisher"], last["magnitude"]
    total = ("total", "", f"{woodfisher.weights:,}", f"{woodfisher.zeros:,}")
    total += (f"{woodfisher.sparsity:.1%}", f"{magnitude.sparsity:.1%}")
    head = ("layer", "shape", "weights", "zeros", "WoodFisher", "magnitude")
    print("\n" + format_table(head, rows, total))
    results = [
        (LABELS[m], f"{read_accuracies(m)[-1]:.2%}", f"{seconds[m]:.0f} s")
        for m in METHODS
    ]
    print(
        "\n" + format_table(("same epochs, one seed", "accuracy", "whole run"), results)
    )
    print("360 held-out images: a difference of less than about 1 % is noise.")
    figure = RUNS / "pruning.png"
    draw(figure)
    wandb = sorted((RUNS / "woodfisher" / "wandb").glob("offline-run-*"))[-1]
    print(f"\nreport    {RUNS / 'woodfisher' / 'pruning_report.json'}")
    print(f"figure    {figure}")
    print(f"W&B run   {wandb}   (offline; `wandb sync` uploads it)")
    print(f"weights   {RUNS / 'woodfisher' / 'last.ckpt'}")


if __name__ == "__main__":
    main(sys.argv[1:])
