"""Runs inside of the launched jobs and leaves behind what the tests compare."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from lightning_woodfisher import WoodFisherPruningCallback

# Which epoch ends with waiting for a requeue; see test_slurm.py.
WAIT_AFTER_EPOCH = "TEST_WAIT_AFTER_EPOCH"
SECONDS_TO_WAIT = 120.0


class Recording(pl.Callback):
    """Saves weights and masks of its rank at every place that a test looks at.

    Stands behind the pruning callback: at the start of an epoch, the step is done.
    """

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        record(trainer, f"start-{os.environ.get('SLURM_RESTART_COUNT', '0')}")

    def on_train_epoch_start(
        self, trainer: pl.Trainer, module: pl.LightningModule
    ) -> None:
        record(trainer, f"epoch-{trainer.current_epoch}")

    def on_train_batch_start(
        self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, index: int
    ) -> None:
        # Lightning does not save random states: dropout must follow from the position.
        torch.manual_seed(1000 * trainer.current_epoch + index)

    def on_train_epoch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule
    ) -> None:
        record(trainer, f"trained-{trainer.current_epoch}")
        waits = os.environ.get(WAIT_AFTER_EPOCH) == str(trainer.current_epoch)
        if waits and "SLURM_RESTART_COUNT" not in os.environ:
            # Every rank is here when the signal comes, wherever the time has gone.
            trainer.strategy.barrier()
            Path(f"waiting-{trainer.global_rank}").touch()
            end = time.monotonic() + SECONDS_TO_WAIT
            while not trainer.received_sigterm:
                if time.monotonic() > end:
                    raise TimeoutError("nobody has ended this job")
                time.sleep(0.05)

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        record(trainer, "end")


def record(trainer: pl.Trainer, name: str) -> None:
    (pruning,) = (
        callback
        for callback in trainer.callbacks  # type: ignore[attr-defined]
        if isinstance(callback, WoodFisherPruningCallback)
    )
    state: dict[str, Any] = {
        "world_size": trainer.world_size,
        "masks": pruning.state_dict()["masks"],
        "weights": {
            name: parameter.detach().clone()
            for name, parameter in trainer.lightning_module.named_parameters()
        },
    }
    torch.save(state, f"{name}-rank-{trainer.global_rank}.pt")
