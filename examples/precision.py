"""Count the decisions that depend on the precision of the inverse Fisher.

    python -m examples.precision --data FOLDER --weights runs/cifar10/dense.pt

Prunes MLPNet on MNIST and ResNet-20 on CIFAR-10 in one step, without retraining, with each
``FisherConfig.precision``. Prints the number of weights that are pruned by one precision and
not by ``"float64"``, and the accuracies on the test data.
"""

from __future__ import annotations

import argparse
import copy
from typing import Any

import torch
from torch import Tensor, nn

from examples.defaults import NETWORKS, accuracy, add_networks, loss_fn
from lightning_woodfisher import FisherConfig, StepConfig, prune
from lightning_woodfisher.base.text_table import format_table

PRECISIONS = ("float32", "split", "auto")
SETTINGS: dict[str, dict[str, Any]] = {
    "256 × 16, B = 256, λ = 1e-4": {},
    "1,000 × 1, B = 256, λ = 1e-5": {
        "num_gradients": 1000,
        "gradient_batch_size": 1,
        "damping": 1e-5,
    },
    "200 × 1, full, λ = 1e-5": {
        "num_gradients": 200,
        "gradient_batch_size": 1,
        "block_size": None,
        "damping": 1e-5,
    },
}


def zeros(model: nn.Module) -> Tensor:
    """Return which weights are zero, over all parameters."""
    return torch.cat([p.detach().reshape(-1) == 0 for p in model.parameters()])


def main() -> None:
    """Print a table for each network."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_networks(parser)
    parser.add_argument("--sparsity", type=float, default=0.8)
    options = parser.parse_args()
    for network in options.networks:
        task = NETWORKS[network](options)
        rows = []
        for name, settings in SETTINGS.items():
            for seed in options.seeds:
                pruned = {}
                for precision in ("float64", *PRECISIONS):
                    model = pruned[precision] = copy.deepcopy(task.network)
                    prune(
                        model,
                        task.train,
                        loss_fn,
                        target_sparsity=options.sparsity,
                        fisher=FisherConfig(precision=precision, **settings),
                        step=StepConfig(seed=seed),
                    )
                wanted = zeros(pruned["float64"])
                differing = [
                    f"{int((zeros(pruned[p]) & ~wanted).sum()):,}" for p in PRECISIONS
                ]
                found = [f"{accuracy(m, task.test):.2f}" for m in pruned.values()]
                print(network, name, seed, differing, found, flush=True)
                rows.append((name, str(seed), *differing, " ".join(found)))
        weights = f"{network}, {int(zeros(task.network).numel()):,} parameters"
        head = (weights, "seed", *PRECISIONS, "accuracy: float64, then these")
        print(format_table(head, rows), flush=True)


if __name__ == "__main__":
    main()
