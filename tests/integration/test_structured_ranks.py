"""Scores of structures and what they choose, on one and two real processes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hand_groups import cross_entropy, images, make_residual, residual_groups
from rank_pool import RankPool
from torch import Tensor, nn
from torch.utils.data import Dataset

from lightning_woodfisher import prune_structures
from lightning_woodfisher.base.errors import PruningError
from lightning_woodfisher.data.losses import FunctionLoss
from lightning_woodfisher.distributed.communicator import Communicator
from lightning_woodfisher.structured.config import StructureConfig
from lightning_woodfisher.structured.network_cost import NetworkSize
from lightning_woodfisher.structured.scores.methods import score_structures
from lightning_woodfisher.structured.selection import additive_scores, select_for_size

CONFIGS = (
    StructureConfig(method="sosp_i", num_samples=21, batch_size=8),
    StructureConfig(method="sosp_i", labels="logits", num_samples=21, batch_size=8),
    StructureConfig(method="sosp_h", num_samples=21, batch_size=5),
    StructureConfig(method="hap", num_samples=21, batch_size=8, probes=24),
    StructureConfig(method="magnitude"),
)


def make() -> nn.Module:
    torch.set_num_threads(1)
    model = make_residual().float()
    # In the middle of training every rank has statistics of its own.
    if Communicator().rank > 0:
        for name, buffer in model.named_buffers():
            if "running" in name:
                buffer.add_(0.3)
    return model


class Augmented(Dataset[Any]):
    """Images with noise of the global generator, which differs between ranks."""

    def __init__(self) -> None:
        self.clean = images(24, torch.float32)
        torch.manual_seed(50 + Communicator().rank)

    def __len__(self) -> int:
        return len(self.clean)

    def __getitem__(self, index: int) -> Any:
        pixels, label = self.clean[index]
        return pixels + torch.randn_like(pixels), label


def uneven() -> Iterator[Any]:
    pixels, labels = images(24, torch.float32).tensors
    sizes = [7, 3, 9, 5]
    yield from zip(pixels.split(sizes), labels.split(sizes), strict=True)


def run() -> list[Tensor]:
    comm, groups, found = Communicator(), residual_groups(), []
    for config in CONFIGS:
        source = FunctionLoss(make(), Augmented(), cross_entropy)
        scores = score_structures(source, groups, config, comm)
        size = NetworkSize(source, groups, comm)
        additive = additive_scores(scores, groups, config)
        removed = select_for_size(groups, additive, size, 0.3, config)
        found += [*scores.values, *additive, *removed.values()]
    # Four batches of different sizes, of which one rank gets more samples.
    config = StructureConfig(num_samples=4, batch_size=1)
    source = FunctionLoss(make(), list(uneven()), cross_entropy)
    found.append(score_structures(source, groups, config, comm).pairs.rows)
    # Four batches, of which one of three ranks gets two.
    model = make()
    report, _ = prune_structures(
        model,
        Augmented(),
        cross_entropy,
        target=0.4,
        config=dataclasses.replace(
            CONFIGS[0], measure="structures", batchnorm_recalibration_batches=4
        ),
        groups=groups,
    )
    assert report.batchnorm_layers == 3
    losses = [report.loss_before, report.loss_after]
    found.append(torch.tensor(losses, dtype=torch.float64))
    return [*found, *(tensor.detach() for tensor in model.state_dict().values())]


def fail_on_the_last() -> str:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        comm = Communicator()
        if comm.rank == comm.world_size - 1:
            raise ValueError("broken data")
        return cross_entropy(model, batch)

    source = FunctionLoss(make(), images(24, torch.float32), loss)
    try:
        score_structures(source, residual_groups(), CONFIGS[0], Communicator())
    except (PruningError, ValueError) as error:
        return str(error)
    return ""


def test_scores_do_not_depend_on_the_ranks(ranks: RankPool) -> None:
    (alone,) = ranks.run(1, run)
    assert (24, 9) in {tensor.shape for tensor in alone}
    for world_size in (2, 3):
        for found in ranks.run(world_size, run):
            for one, other in zip(alone, found, strict=True):
                assert torch.equal(one, other)


def test_a_failing_rank_fails_all(ranks: RankPool) -> None:
    texts = ranks.run(2, fail_on_the_last)
    assert texts[1] == "broken data"
    assert texts[0] == "rank 1 failed: ValueError: broken data"


@pytest.mark.parametrize("method", ["sosp_i", "sosp_h"])
def test_a_training_step_gives_the_same_scores(method: Any, tmp_path: Path) -> None:
    import lightning.pytorch as pl
    from torch.utils.data import DataLoader

    from lightning_woodfisher.callbacks.training_step import TrainingStepLoss

    data, groups, scored = images(24, torch.float32), residual_groups(), []
    config = StructureConfig(method=method, num_samples=21, batch_size=8)

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = make()

        def forward(self, pixels: Tensor) -> Tensor:
            return self.net(pixels)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = cross_entropy(self, batch)
            self.log("loss", loss)
            return loss

        def on_train_start(self) -> None:
            inside = [_under(group, "net") for group in groups]
            source = TrainingStepLoss(self.trainer, self)
            scored.append(score_structures(source, inside, config).values)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.1)

    trainer = pl.Trainer(
        max_steps=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(Module(), DataLoader(data, batch_size=6))
    source = FunctionLoss(make(), data, cross_entropy)
    expected = score_structures(source, groups, config).values
    for one, other in zip(scored[0], expected, strict=True):
        torch.testing.assert_close(one, other)


def _under(group: Any, name: str) -> Any:
    members = tuple(
        dataclasses.replace(member, module=f"{name}.{member.module}")
        for member in group.members
    )
    return dataclasses.replace(group, members=members)
