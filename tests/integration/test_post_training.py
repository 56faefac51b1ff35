"""The preset for a trained network, against magnitude with the same retraining."""

from __future__ import annotations

import copy
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_woodfisher import WoodFisherPruningCallback
from tests.support.trained_digits import trained_digits


class Retrained(pl.LightningModule):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), 0.03, momentum=0.9)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.03, 480)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def prune_and_retrain(criterion: str) -> tuple[float, float]:
    """Return the sparsity and the loss on the test samples."""
    net, train, test = trained_digits()
    pl.seed_everything(0, verbose=False)
    module = Retrained(copy.deepcopy(net))
    callback = WoodFisherPruningCallback.from_preset(
        "post_training", target_sparsity=0.95, criterion=criterion
    )
    trainer = pl.Trainer(
        max_steps=480,
        max_epochs=-1,
        accelerator="cpu",
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(module, DataLoader(train, 64, shuffle=True, drop_last=True))
    inputs, labels = test.tensors
    with torch.no_grad():
        loss = F.cross_entropy(module.net(inputs), labels)
    return callback.reports[-1].sparsity, float(loss)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:this pruning step raised")
def test_it_ends_at_the_target_and_ahead_of_magnitude() -> None:
    sparsity, loss = prune_and_retrain("layerwise")
    baseline_sparsity, baseline = prune_and_retrain("magnitude")
    assert sparsity == baseline_sparsity
    assert abs(sparsity - 0.95) < 1e-3
    assert loss < 0.8 * baseline
