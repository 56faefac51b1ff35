"""Prune with Lightning Fabric: the same digits, on one or several devices.

    python -m examples.plain_pytorch.fabric --devices 2

Under DDP every process calls ``prune``. They share the work and get the same weights.
"""

from __future__ import annotations

import argparse

import torch
from lightning.fabric import Fabric
from torch.utils.data import DataLoader

from examples.plain_pytorch.digits import accuracy, load_data, loss_fn, make_model
from lightning_woodfisher import FisherConfig, StepConfig, prune


def main() -> None:
    """Train with Fabric, prune, and show the accuracy."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--gradients", type=int, default=512)
    options = parser.parse_args()
    fabric = Fabric(accelerator="cpu", devices=options.devices)
    fabric.launch()
    fabric.seed_everything(0)
    data, held_out = load_data()
    bare = make_model()
    model, optimizer = fabric.setup(bare, torch.optim.Adam(bare.parameters(), lr=3e-3))
    loader = fabric.setup_dataloaders(DataLoader(data, 64, shuffle=True))
    for _ in range(options.epochs):
        for batch in loader:
            optimizer.zero_grad()
            fabric.backward(loss_fn(model, batch))
            optimizer.step()
    fabric.print(f"dense   {accuracy(bare, held_out):.1%}")

    # Pass the network without Fabric's wrapper, and the dataset in place of the loader.
    report = prune(
        bare,
        data,
        loss_fn,
        target_sparsity=0.8,
        fisher=FisherConfig(num_gradients=options.gradients, gradient_batch_size=1),
        step=StepConfig(recompute_steps=4),
    )
    fabric.print(f"pruned  {accuracy(bare, held_out):.1%}\n\n{report.to_table()}")


if __name__ == "__main__":
    main()
