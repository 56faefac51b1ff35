"""Train a small transformer on Python sources, prune it in one call, and read what it writes.

Run it from the root of the repository, as ``make demo-transformer`` does:

    python -m examples.characters.demo --sparsity 0.7
"""

from __future__ import annotations

import argparse
import copy
import time

import torch
from torch import Tensor

from examples.characters.model import (
    CharacterModel,
    continue_text,
    held_out_loss,
    read_sources,
)
from examples.characters.one_shot import METHODS, choose, run
from examples.characters.train import make_optimizer, take_step
from lightning_woodfisher.base.text_table import format_table

START = "def read_"


def train(text: Tensor, steps: int) -> CharacterModel:
    """Train a transformer of three blocks, and print its loss."""
    torch.manual_seed(0)
    model = CharacterModel(width=128, depth=3)
    optimizer = make_optimizer(model)
    for step in range(steps):
        loss = take_step(model, optimizer, text, step, steps)
        if step % 100 == 99:
            print(f"step {step + 1}: training loss {loss:.2f}", flush=True)
    return model


def compare(
    model: CharacterModel, text: Tensor, held_out: Tensor, sparsity: float
) -> list[tuple[str, CharacterModel, float, float]]:
    """Prune copies of the model.

    Args:
        model: the dense model, which is not changed.
        text: bytes to draw 256 calibration windows from.
        held_out: bytes to measure the loss on.
        sparsity: share of the weights of each layer, or of all, that is removed.

    Returns:
        Name, model, loss in nats a byte and seconds of pruning, for the dense model, for
        magnitude and for layer-wise reconstruction.
    """
    results = [("dense", model, held_out_loss(model, held_out), 0.0)]
    for name in ("magnitude", "layerwise"):
        pruned = copy.deepcopy(model)
        start = time.perf_counter()
        run(pruned, METHODS[name], str(sparsity), choose(text, 256, seed=0))
        seconds = time.perf_counter() - start
        results.append((name, pruned, held_out_loss(pruned, held_out), seconds))
    return results


def main() -> None:
    """Train, prune, and print a table and samples of text."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=1500, help="steps of training")
    parser.add_argument("--sparsity", type=float, default=0.7, help="share of zeros")
    arguments = parser.parse_args()
    text, held_out = read_sources()
    print(f"Training on {len(text):,} bytes of Python sources.")
    model = train(text, arguments.steps)
    print(f"\nPruning to {arguments.sparsity:.0%} without retraining.")
    results = compare(model, text, held_out, arguments.sparsity)
    for name, network, _, _ in results:
        print(f"\n---- {name}\n{continue_text(network, START, 300)}")
    rows = [
        (name, f"{loss:.3f}", f"{seconds:.0f}" if seconds else "")
        for name, _, loss, seconds in results
    ]
    print("\nLoss on held-out sources, in nats a byte:")
    print(format_table(("", "loss", "seconds"), rows))


if __name__ == "__main__":
    main()
