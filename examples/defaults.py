"""Compare settings on three trained networks, without and with retraining.

    python -m examples.defaults --data FOLDER --weights runs/cifar10/dense.pt

The networks are MLPNet on MNIST, ResNet-20 with BatchNorm on CIFAR-10 and a transformer on
Python's sources. Each is pruned at once without retraining (``one-shot``), and in six steps
over the first half of ``--steps`` optimizer steps of 64 samples (``gradual``). Prints the
accuracy on the test data; the transformer's is that of the next byte. ``--set`` changes
settings of all methods.
"""

from __future__ import annotations

import argparse
import copy
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from examples.characters.model import CharacterModel, Windows, read_sources
from examples.cifar10.model import CIFAR10, resnet20, shift_and_mirror
from examples.comparison import add_settings, format_accuracies
from examples.mnist.one_shot import load as load_mnist
from examples.mnist.one_shot import mlpnet
from lightning_woodfisher import (
    FisherConfig,
    PolynomialSchedule,
    StepConfig,
    WoodFisherPruningCallback,
    prune,
)
from lightning_woodfisher.base.text_table import format_table

BATCH_SIZE = 64
PRUNING_STEPS = 6
METHODS: dict[str, dict[str, Any]] = {
    "magnitude": {"criterion": "magnitude"},
    "default": {},
    "joint": {"update": "joint", "line_search": True},
    "independent": {"update": "independent", "line_search": False},
    # With 480 steps these are the settings of the preset "post_training".
    "layerwise": {"criterion": "layerwise", "num_gradients": 32},
}


@dataclass(frozen=True)
class Task:
    """A trained network and its data."""

    network: nn.Module
    train: Dataset[Any]
    test: Dataset[Any]
    make_optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
    augment: Callable[[Tensor], Tensor] = lambda inputs: inputs


class Retrained(pl.LightningModule):
    """A network that is trained on, with one cycle of the learning rate."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.net = copy.deepcopy(task.network)
        self.task = task

    def on_after_batch_transfer(
        self, batch: list[Tensor], dataloader_idx: int
    ) -> list[Tensor]:
        inputs, labels = batch
        return [self.task.augment(inputs), labels]

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return loss_fn(self.net, batch)

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = self.task.make_optimizer(self.parameters())
        scheduler = torch.optim.lr_scheduler.OneCycleLR(
            optimizer,
            optimizer.param_groups[0]["lr"],
            total_steps=self.trainer.max_steps,
            pct_start=0.25,
            cycle_momentum=False,
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }


def loss_fn(model: nn.Module, batch: Any) -> Tensor:
    """Compute the mean cross-entropy over all predictions of a batch."""
    return F.cross_entropy(model(batch[0]).flatten(0, -2), batch[1].flatten())


@torch.no_grad()
def accuracy(model: nn.Module, data: Dataset[Any]) -> float:
    """Compute the share of right predictions in percent, in evaluation mode."""
    model.eval()
    right = total = 0
    for inputs, labels in DataLoader(data, 500):
        right += int((model(inputs).argmax(-1) == labels).sum())
        total += labels.numel()
    return 100 * right / total


def make_mlpnet(options: argparse.Namespace) -> Task:
    """Load MLPNet and MNIST."""
    train, test, state = load_mnist(Path(options.data))
    sgd = torch.optim.SGD
    return Task(mlpnet(state), train, test, lambda p: sgd(p, 0.02, momentum=0.9))


def make_resnet20(options: argparse.Namespace) -> Task:
    """Load ResNet-20 and CIFAR-10; ``examples.cifar10.train`` writes the weights."""
    data = CIFAR10(options.data)
    data.setup("fit")
    network = resnet20(options.width)
    network.load_state_dict(torch.load(options.weights, weights_only=True))
    return Task(
        network.to(memory_format=torch.channels_last),
        data.train,
        data.test,
        lambda p: torch.optim.SGD(p, 0.03, momentum=0.9, weight_decay=5e-4),
        shift_and_mirror,
    )


def make_characters(options: argparse.Namespace) -> Task:
    """Load a transformer; ``examples.characters.train`` writes the weights."""
    state = torch.load(options.characters, weights_only=True)
    network = CharacterModel.from_state(state)
    train, held_out = read_sources()
    data = Windows(held_out)
    chosen = torch.linspace(0, len(data) - 1, 512).long().tolist()
    test = Subset(data, chosen)
    return Task(network, Windows(train), test, lambda p: torch.optim.AdamW(p, 5e-4))


NETWORKS = {
    "mlpnet": make_mlpnet,
    "resnet20": make_resnet20,
    "characters": make_characters,
}


def add_networks(parser: argparse.ArgumentParser) -> None:
    """Add the options that choose the networks and their data, and the seeds."""
    parser.add_argument("--data", default="data", help="folder of the images")
    parser.add_argument("--weights", default="runs/cifar10/dense.pt")
    parser.add_argument("--width", type=int, default=16, help="of ResNet-20")
    parser.add_argument("--characters", default="runs/characters/dense.pt")
    parser.add_argument("--networks", nargs="+", default=[*NETWORKS], choices=NETWORKS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])


def fit(
    module: Retrained, task: Task, steps: int, callbacks: list[pl.Callback]
) -> None:
    """Train for a number of optimizer steps."""
    trainer = pl.Trainer(
        max_steps=steps,
        max_epochs=-1,
        accelerator="cpu",
        devices=1,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(module, DataLoader(task.train, BATCH_SIZE, True, drop_last=True))


def run(
    task: Task,
    mode: str,
    sparsity: float,
    seed: int,
    steps: int,
    settings: Mapping[str, Any],
) -> float:
    """Prune a copy of a network, and train it on in the mode ``gradual``.

    Args:
        task: the network and its data.
        mode: ``"one-shot"`` or ``"gradual"``.
        sparsity: sparsity at the end.
        seed: seed of all random numbers.
        steps: number of optimizer steps of ``"gradual"``.
        settings: criterion, and fields of :class:`FisherConfig` and :class:`StepConfig`.

    Returns:
        Accuracy in percent.
    """
    pl.seed_everything(seed, verbose=False)
    options = dict(settings)
    configs: dict[str, Any] = {}
    for name, kind in (("fisher", FisherConfig), ("step", StepConfig)):
        known = {f.name for f in fields(kind)} & options.keys()
        configs[name] = {key: options.pop(key) for key in known}
    options["fisher"] = FisherConfig(**configs["fisher"])
    options["step"] = StepConfig(**{"seed": seed, **configs["step"]})
    module = Retrained(task)
    if mode == "one-shot":
        prune(module.net, task.train, loss_fn, target_sparsity=sparsity, **options)
    else:
        every = steps // (2 * PRUNING_STEPS)
        schedule = PolynomialSchedule(
            start_step=0, end_step=(PRUNING_STEPS - 1) * every, every_n_steps=every
        )
        callback = WoodFisherPruningCallback(sparsity, schedule, **options)
        fit(module, task, steps, [callback])
    return accuracy(module.net, task.test)


def main() -> None:
    """Print a table for each network and mode."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_networks(parser)
    modes = ["one-shot", "gradual"]
    parser.add_argument("--modes", nargs="+", default=modes, choices=modes)
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.8, 0.9])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--only", nargs="+", default=[*METHODS], metavar="METHOD")
    add_settings(parser)
    options = parser.parse_args()
    changes = dict(options.set)
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    for network in options.networks:
        task = NETWORKS[network](options)
        dense = accuracy(copy.deepcopy(task.network), task.test)
        print(f"{network}, dense: {dense:.2f} %", flush=True)
        for mode in options.modes:
            rows = []
            for method in options.only:
                settings = {**METHODS[method], **changes}
                for sparsity in options.sparsities:
                    start = time.perf_counter()
                    found = [
                        run(task, mode, sparsity, seed, options.steps, settings)
                        for seed in options.seeds
                    ]
                    seconds = (time.perf_counter() - start) / len(found)
                    cells = *format_accuracies(found), f"{seconds:.0f}"
                    print(network, mode, method, sparsity, changes, *cells, flush=True)
                    rows.append((method, f"{sparsity:g}", *cells))
            head = (f"{network}, {mode}", "sparsity", "mean", "by seed, %", "seconds")
            print(format_table(head, rows), flush=True)


if __name__ == "__main__":
    main()
