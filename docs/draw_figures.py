"""Draw all figures of a report from a short run: docs/images/figure-*.png.

python docs/draw_figures.py
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path

import lightning.pytorch as pl
import torch
from matplotlib.figure import Figure
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from examples.digits.model import Digits, DigitsClassifier
from lightning_woodfisher import (
    FisherConfig,
    PolynomialSchedule,
    StepConfig,
    WoodFisherPruningCallback,
    sweep,
)
from lightning_woodfisher.reporting import figures

EPOCHS = 14
IMAGES = ROOT / "docs" / "images"


def train(
    model: DigitsClassifier, data: Digits, callbacks: Sequence[pl.Callback]
) -> None:
    """Train for as many epochs as `make demo`."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            max_epochs=EPOCHS,
            accelerator="cpu",
            devices=1,
            logger=False,
            callbacks=list(callbacks),
            default_root_dir=folder,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(model, datamodule=data)


def accuracy(model: nn.Module, data: Digits) -> dict[str, float]:
    """Compute the accuracy on the held-out images."""
    images, labels = data.held_out.tensors
    with torch.no_grad():
        return {"accuracy": float((model(images).argmax(1) == labels).float().mean())}


def draw() -> dict[str, Figure]:
    """Train, prune, and draw each figure of lightning_woodfisher.reporting.figures."""
    pl.seed_everything(0)
    data = Digits()
    data.setup("fit")
    pruning = WoodFisherPruningCallback(
        target_sparsity=0.9,
        schedule=PolynomialSchedule(start_epoch=5, end_epoch=10),
        fisher=FisherConfig(num_gradients=256, gradient_batch_size=4),
        step=StepConfig(local_model_points=6),
    )
    pruned = DigitsClassifier()
    train(pruned, data, [pruning])
    reports = pruning.reports
    masks = {name: value != 0 for name, value in pruned.named_parameters()}
    small = figures.small_layers(
        {layer.name: layer.shape for layer in reports[-1].layers}
    )
    dense = DigitsClassifier()
    train(dense, data, [])
    swept = sweep(
        dense,
        data.train,
        lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1]),
        lambda model: accuracy(model, data),
        {
            "target_sparsity": [0.5, 0.7, 0.8, 0.9, 0.95],
            "criterion": ["magnitude", "woodfisher"],
            "gradient_batch_size": [4],
        },
    )
    return {
        "course": figures.draw_progress(reports),
        "increase": figures.draw_loss_increase(reports),
        "layers": figures.draw_layers(reports[1]),
        "schedule": figures.draw_schedule(reports),
        "saliencies": figures.draw_saliencies(reports[-1]),
        "local-model": figures.draw_local_model(reports[2]),
        "masks": figures.draw_masks({name: masks[name] for name in small}),
        "sweep": figures.draw_sweep(swept),
    }


def main() -> None:
    """Write the figures to docs/images."""
    warnings.filterwarnings("ignore", module="lightning")
    for name, figure in draw().items():
        path = IMAGES / f"figure-{name}.png"
        # Without the version of matplotlib, so that every run writes the same file.
        figure.savefig(path, dpi=110, metadata={"Software": None})
        print(f"{path.relative_to(ROOT)}  {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
