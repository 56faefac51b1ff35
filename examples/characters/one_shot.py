"""Prune the transformer in one shot, without fine-tuning, by several methods.

    python -m examples.characters.one_shot --weights runs/characters/dense.pt

``examples.characters.train`` writes the weights. Prints the loss on held-out sources in nats
a byte. Calibration: windows of 128 bytes of the training sources.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Subset

from examples.characters.model import (
    CharacterModel,
    Windows,
    held_out_loss,
    loss_fn,
    read_sources,
)
from examples.characters.references import prune_sequentially, sparsegpt, wanda
from lightning_woodfisher import (
    FisherConfig,
    LayerwiseConfig,
    SelectionConfig,
    StepConfig,
    prune,
)
from lightning_woodfisher.base.text_table import format_table

METHODS: dict[str, dict[str, Any]] = {
    "magnitude": {"criterion": "magnitude", "selection": {"scope": "layer"}},
    "Wanda": {"function": wanda},
    "SparseGPT, sequential": {"function": sparsegpt},
    "K-FAC": {"criterion": "kfac", "step": {"line_search": False}},
    "WoodFisher, joint": {"block_size": 32},
    "layerwise, equal sparsities": {
        "criterion": "layerwise",
        "selection": {"scope": "layer"},
    },
    "layerwise, equal, without ADMM": {
        "criterion": "layerwise",
        "selection": {"scope": "layer"},
        "layerwise": {"admm_iterations": 0},
    },
    "layerwise": {"criterion": "layerwise"},
}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", default="", metavar="TEXT")
    parser.add_argument("--sparsities", nargs="+", default=["0.5", "0.7", "0.8", "2:4"])
    arguments = parser.parse_args()
    state = torch.load(arguments.weights, weights_only=True)
    train, held_out = read_sources()
    model = CharacterModel.from_state(state)
    print(f"dense: {held_out_loss(model, held_out):.4f}", flush=True)
    rows = []
    for name, method in METHODS.items():
        if arguments.only not in name:
            continue
        for target in arguments.sparsities:
            losses, seconds = [], []
            # Magnitude reads no samples.
            for seed in range(1 if name == "magnitude" else arguments.seeds):
                model.load_state_dict(state)
                start = time.process_time()
                run(model, method, target, choose(train, arguments.samples, seed))
                seconds.append(time.process_time() - start)
                losses.append(held_out_loss(model, held_out))
                print(f"{name} {target} {seed}: {losses[-1]:.4f}", flush=True)
            each = "  ".join(f"{loss:.4f}" for loss in losses)
            mean = f"{statistics.mean(losses):.4f}"
            rows.append((name, target, mean, each, f"{statistics.mean(seconds):.0f}"))
    head = ("method", "sparsity", "mean loss", "loss by seed", "CPU s")
    print(format_table(head, rows))


def choose(text: Tensor, samples: int, seed: int) -> Subset[tuple[Tensor, Tensor]]:
    """Draw calibration windows."""
    data = Windows(text)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(data), generator=generator)
    return Subset(data, order[:samples].tolist())


def run(
    model: CharacterModel,
    method: dict[str, Any],
    target: str,
    data: Subset[tuple[Tensor, Tensor]],
) -> None:
    """Prune the network in place."""
    sparsity = None if target == "2:4" else float(target)
    if "function" in method:
        places = model.positions.weight

        def embed(text: Tensor) -> Tensor:
            return model.symbols(text) + places

        prune_sequentially(
            model,
            embed,
            list(model.blocks),
            [model.norm, model.head],
            torch.stack([data[i][0] for i in range(len(data))]),
            method["function"],
            sparsity,
        )
        return
    selection = {"pattern": "2:4" if sparsity is None else "unstructured"}
    size = {"gradient_batch_size": 1}
    prune(
        model,
        data,
        loss_fn,
        target_sparsity=0.5 if sparsity is None else sparsity,
        criterion=method.get("criterion", "woodfisher"),
        fisher=FisherConfig(
            num_gradients=len(data),
            block_size=method.get("block_size", 256),
            **size,
        ),
        selection=SelectionConfig(**{**selection, **method.get("selection", {})}),
        step=StepConfig(measure_loss=False, **method.get("step", {})),
        layerwise=LayerwiseConfig(**method.get("layerwise", {})),
    )


if __name__ == "__main__":
    main()
