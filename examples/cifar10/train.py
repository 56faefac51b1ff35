"""Train a dense network and write its ``state_dict`` to ``runs/cifar10/dense.pt``.

python -m examples.cifar10.train --data FOLDER --epochs 18
"""

from __future__ import annotations

import argparse
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import CSVLogger

from examples.cifar10.model import CIFAR10, CIFAR10Classifier


def main() -> None:
    """Train, test and save."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", default="data", help="folder of the images")
    parser.add_argument("--epochs", type=int, default=18)
    parser.add_argument("--learning-rate", type=float, default=0.2, help="maximum")
    parser.add_argument("--network", default="resnet20", help="or mobilenet")
    parser.add_argument("--weights", help="initial weights, such as an earlier --out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/cifar10/dense.pt"))
    arguments = parser.parse_args()
    pl.seed_everything(arguments.seed)
    module = CIFAR10Classifier(
        arguments.learning_rate, weights=arguments.weights, network=arguments.network
    )
    module.to(memory_format=torch.channels_last)
    trainer = pl.Trainer(
        max_epochs=arguments.epochs,
        logger=CSVLogger("runs", "cifar10", arguments.out.stem),
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    data = CIFAR10(arguments.data)
    trainer.fit(module, data)
    trainer.test(module, data)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    torch.save(module.net.state_dict(), arguments.out)


if __name__ == "__main__":
    main()
