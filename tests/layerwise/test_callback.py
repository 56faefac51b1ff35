"""``criterion="layerwise"`` in the callback, gradually and from YAML."""

from __future__ import annotations

import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from small_task import batchnorm_network, samples
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_woodfisher import (
    FisherConfig,
    LayerwiseConfig,
    PolynomialSchedule,
    WoodFisherPruningCallback,
)
from lightning_woodfisher.cli.main import main


class Classifier(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = batchnorm_network()

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(samples(), 32, shuffle=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-2)


def test_gradual_pruning_reaches_the_target(tmp_path: Path) -> None:
    callback = WoodFisherPruningCallback(
        0.75,
        PolynomialSchedule(start_epoch=1, end_epoch=3),
        "layerwise",
        FisherConfig(num_gradients=32, gradient_batch_size=4),
        layerwise=LayerwiseConfig(admm_iterations=10),
    )
    pl.seed_everything(0, verbose=False)
    module = Classifier()
    trainer = pl.Trainer(
        max_epochs=4,
        callbacks=[callback],
        default_root_dir=tmp_path,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
    )
    trainer.fit(module)
    assert len(callback.reports) == 3
    targets = [report.target_sparsity for report in callback.reports]
    assert targets == sorted(targets)
    zeros = [(module.net[i].weight == 0).sum().item() for i in (0, 3)]
    assert sum(zeros) == round(0.75 * (8 * 16 + 16 * 4))
    for report in callback.reports:
        assert all(layer.reconstruction is not None for layer in report.layers)


@pytest.mark.filterwarnings(
    "ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"
)
def test_settings_in_yaml(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "layerwise_yaml_model.py").write_text(
        Path(__file__).read_text(encoding="utf-8"), encoding="utf-8"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    config = tmp_path / "run.yaml"
    config.write_text(
        """
model: layerwise_yaml_model.Classifier
trainer:
  max_epochs: 2
  callbacks:
    - class_path: WoodFisherPruningCallback
      init_args:
        target_sparsity: 0.5
        criterion: layerwise
        layerwise: {relative_damping: 0.05, output_weights: false}
""",
        encoding="utf-8",
    )
    try:
        assert main(["estimate", f"--config={config}", "--flops_per_second=1e9"]) == 0
    finally:
        sys.modules.pop("layerwise_yaml_model", None)
    assert "layers" in capsys.readouterr().out
