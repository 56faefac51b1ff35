"""Sweeps and the local model on 1, 2 and 3 real processes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_pool import RankPool
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_woodfisher import FisherConfig, StepConfig, prune, sweep
from lightning_woodfisher.cli.main import main

FISHER = FisherConfig(num_gradients=20, gradient_batch_size=4, block_size=16)


def network() -> nn.Module:
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(12, 23), nn.Tanh(), nn.Linear(23, 4))


def samples() -> TensorDataset:
    inputs = torch.randn(160, 12, generator=torch.Generator().manual_seed(3))
    return TensorDataset(inputs, inputs[:, :4].argmax(dim=1))


def cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def try_settings(row_memory: str | int | None) -> list[dict[str, Any]]:
    """Job: a sweep; what came out, without seconds, and that the model is back."""
    model = network()

    def evaluate(model: nn.Module) -> dict[str, float]:
        sums = {name: float(p.detach().double().sum()) for name, p in
                model.named_parameters()}  # fmt: skip
        with torch.no_grad():
            return {"loss": float(cross_entropy(model, samples().tensors)), **sums}

    grid = {
        "num_gradients": [10, 20],
        "block_size": [None, 16],
        "recompute_steps": [1, 2],
    }
    report = sweep(
        model,
        samples(),
        cross_entropy,
        evaluate,
        grid,
        fisher=FISHER,
        row_memory=row_memory,
    )
    start = network().state_dict()
    assert all(torch.equal(v, start[k]) for k, v in model.state_dict().items())
    return [{**r, "seconds": 0.0} for r in report.to_dict()["results"]]


def test_a_sweep_is_the_same_on_any_number_of_ranks(ranks: RankPool) -> None:
    (expected,) = ranks.run(1, try_settings, None)
    assert len(expected) == 8
    for size, row_memory in ((2, None), (3, None), (3, 1)):
        for found in ranks.run(size, try_settings, row_memory):
            assert found == expected


def local_models() -> dict[str, Any]:
    """Job: the points of steps of several kinds."""
    found = {}
    for block_size in (16, None):
        for criterion in ("woodfisher", "magnitude"):
            report = prune(
                network(),
                samples(),
                cross_entropy,
                target_sparsity=0.7,
                fisher=FisherConfig(20, 4, block_size),
                criterion=criterion,
                step=StepConfig(recompute_steps=2, local_model_points=4),
            )
            found[f"{criterion} {block_size}"] = report.to_dict()["local_model"]
    return found


def test_the_local_model_is_the_same_on_any_number_of_ranks(ranks: RankPool) -> None:
    (expected,) = ranks.run(1, local_models)
    assert all(len(parts) == 2 for parts in expected.values())
    for size in (2, 3):
        assert ranks.run(size, local_models) == [expected] * size


MODULE = """
import lightning.pytorch as pl
import torch
from torch import nn
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

class Net(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.net = nn.Sequential(nn.Linear(12, 23), nn.Tanh(), nn.Linear(23, 4))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.log("val_loss", loss, sync_dist=True)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

class Data(pl.LightningDataModule):
    def setup(self, stage):
        inputs = torch.randn(160, 12, generator=torch.Generator().manual_seed(3))
        self.all = TensorDataset(inputs, inputs[:, :4].argmax(1))

    def train_dataloader(self):
        return DataLoader(self.all, 20)

    def val_dataloader(self):
        return DataLoader(self.all, 20)
"""


def run_command(folder: str, devices: int, output: str) -> int:
    """Job: the command on the ranks of the pool."""
    sys.path.insert(0, folder)
    network = ["--model", "swept_on_ranks.Net", "--data", "swept_on_ranks.Data"]
    strategy = ["--trainer.strategy", "ddp", "--trainer.accelerator", "cpu"]
    grid = ["--damping", "1e-4", "1e-2", "--num_gradients", "8", "16"]
    return main([
        "sweep", "--seed_everything", "0", *network, *strategy, *grid,
        "--trainer.devices", str(devices), "--gradient_batch_size", "4",
        "--trainer.use_distributed_sampler", "true", "--output", output,
    ])  # fmt: skip


@pytest.mark.filterwarnings(
    "ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"
)
def test_the_command_under_ddp(ranks: RankPool, tmp_path: Path) -> None:
    Path(tmp_path, "swept_on_ranks.py").write_text(MODULE)
    found = []
    for size in (1, 2):
        output = str(tmp_path / f"ranks_{size}.json")
        codes = ranks.run(
            size, run_command, str(tmp_path), size, output, launch="trainer"
        )
        assert codes == [0] * size
        found.append(json.loads(Path(output).read_text()))
    one, two = found
    assert len(one["results"]) == 4
    assert two["before"] == pytest.approx(one["before"], rel=1e-5)
    for mine, theirs in zip(one["results"], two["results"], strict=True):
        assert mine["setting"] == theirs["setting"]
        assert mine["predicted_increase"] == theirs["predicted_increase"]
        assert mine["measured_increase"] == theirs["measured_increase"]
        assert theirs["metrics"] == pytest.approx(mine["metrics"], rel=1e-5)
