"""Whole fits of a small network with the pruning callbacks, for ``gpu-check``."""

from __future__ import annotations

__all__ = ["list_fits", "run_fit"]

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_woodfisher.benchmark.networks import (
    cross_entropy,
    make_resnet20,
    random_images,
)
from lightning_woodfisher.benchmark.timing import CPU
from lightning_woodfisher.callbacks.structured import (
    HAPPruningCallback,
    SOSPPruningCallback,
)
from lightning_woodfisher.callbacks.woodfisher import WoodFisherPruningCallback
from lightning_woodfisher.fisher.config import FisherConfig
from lightning_woodfisher.pruning.schedule import OneShotSchedule
from lightning_woodfisher.structured.config import StructureConfig

_WOODFISHER = functools.partial(
    WoodFisherPruningCallback,
    0.5,
    fisher=FisherConfig(num_gradients=32, gradient_batch_size=2, block_size=24),
)
_STRUCTURES = StructureConfig(num_samples=16, batch_size=8, probes=4)
_FEWEST_ZEROS = 0.1
_OFF = dict.fromkeys(
    ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"),
    False,
)


class _Module(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = make_resnet20(CPU, 4).train()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return cross_entropy(self.net, batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("loss", cross_entropy(self.net, batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-2, momentum=0.9)


def list_fits(device: torch.device) -> dict[str, dict[str, Any]]:
    """List ways to fit: precisions, averages of weights, continued fits, callbacks.

    Args:
        device: device of the fits.

    Returns:
        Options of :func:`run_fit` by name.
    """
    precisions = ["32-true", "bf16-mixed"]
    if device.type == "cuda":
        precisions += ["64-true", "bf16-true", "16-mixed", "16-true"]
    fits: dict[str, dict[str, Any]] = {p: {"precision": p} for p in precisions}
    fits |= {"second fit": {"runs": 2}, "resume": {"runs": 2, "resume": True}}
    swa = pl.callbacks.StochasticWeightAveraging(1e-2, swa_epoch_start=1)
    fits["SWA"] = {"beside": [swa]}
    # Since Lightning 2.6.
    if hasattr(pl.callbacks, "EMAWeightAveraging"):
        fits["EMA"] = {"beside": [pl.callbacks.EMAWeightAveraging()]}
    for kind in (SOSPPruningCallback, HAPPruningCallback):
        make = functools.partial(kind, 0.3, config=_STRUCTURES)
        fits[kind.__name__] = {"make": make}
    return fits


def run_fit(
    device: torch.device,
    make: Callable[..., Any] = _WOODFISHER,
    beside: Sequence[pl.Callback] = (),
    runs: int = 1,
    resume: bool = False,
    precision: Any = "32-true",
) -> dict[str, Any]:
    """Fit to the end and validate; then read masks and weights.

    Args:
        device: device of the Trainer.
        make: returns the pruning callback for a schedule.
        beside: other callbacks.
        runs: number of fits, one after the other.
        resume: whether each fit continues from a checkpoint of the one before, with a new
            module and callback.
        precision: of the Trainer.

    Returns:
        ``loss``, ``sparsity``, and ``passed``: whether the weights are finite and pruned
        as the masks say.
    """
    loader = DataLoader(random_images(64, 8), batch_size=8)
    cuda = device.type == "cuda"
    with TemporaryDirectory() as folder:
        path = str(Path(folder, "last.ckpt"))
        for run in range(runs):
            if resume or not run:
                module, callback = _Module(), make(schedule=OneShotSchedule(epoch=1))
            trainer = pl.Trainer(
                accelerator="gpu" if cuda else "cpu",
                devices=[device.index or 0] if cuda else 1,
                precision=precision,
                max_epochs=2 + run,
                callbacks=[callback, *beside],
                **_OFF,  # type: ignore[arg-type]
            )
            last = path if resume and run else None
            trainer.fit(module, loader, loader, ckpt_path=last)
            trainer.save_checkpoint(path)
    trainer.validate(module, loader, verbose=False)
    masks = callback.masks
    masks.verify()
    weights = [module.cpu().get_parameter(name).detach() for name in masks.parameters]
    values = torch.cat([weight.reshape(-1) for weight in weights])
    sparsity = float((values == 0).double().mean())
    passed = bool(values.isfinite().all()) and sparsity >= _FEWEST_ZEROS
    return {
        "loss": float(trainer.callback_metrics["loss"]),
        "sparsity": sparsity,
        "passed": passed and sparsity >= masks.sparsity(),
    }
