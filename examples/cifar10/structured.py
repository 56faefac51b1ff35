"""Compare methods of structured pruning on CIFAR-10 at the same budgets.

    python -m examples.cifar10.structured --data FOLDER --weights runs/cifar10/dense.pt

Each method scores the channels of a trained network once for each seed. For every measure
(FLOPs, parameters) and share of it, with and without dividing scores by costs, the channels
are removed, BatchNorm statistics are estimated anew, and the smaller network is fine-tuned
on the same images in the same order. Prints the accuracies on test images before and after
fine-tuning, and the mean over seeds. ``dense`` is the dense network, trained on for as long.
``--rank-correlation`` prints the rank correlation between the scores of 64 random channels
and the loss without each of them, with new BatchNorm statistics.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import itertools
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Subset, TensorDataset

from examples.cifar10.fitting import load_data, make_parser
from examples.cifar10.model import (
    CIFAR10,
    CIFAR10Classifier,
    shift_and_mirror,
)
from examples.comparison import accuracy, loss_fn
from lightning_woodfisher import StructureConfig
from lightning_woodfisher.base.text_table import format_table
from lightning_woodfisher.data.batchnorm import estimate_statistics
from lightning_woodfisher.data.isolation import isolated
from lightning_woodfisher.data.losses import FunctionLoss
from lightning_woodfisher.distributed.communicator import Communicator
from lightning_woodfisher.structured.graph.groups import Group, channel_masks
from lightning_woodfisher.structured.network_cost import IndexTensors, NetworkSize
from lightning_woodfisher.structured.scores.hap import spearman
from lightning_woodfisher.structured.scores.methods import (
    StructureScores,
    score_structures,
)
from lightning_woodfisher.structured.selection import (
    additive_scores,
    select_for_size,
)
from lightning_woodfisher.structured.shrink.removal import shrink
from lightning_woodfisher.structured.tracing import trace_groups

# Scores of the gates behind norms were better than those of filters in each method; HAP has
# the filters and about the number of images of the paper, and its probes are expensive.
METHODS: dict[str, dict[str, Any]] = {
    "magnitude": {"method": "magnitude", "structure": "conv"},
    "diagonal": {"method": "diagonal", "structure": "bn"},
    "SOSP-I, signed": {"method": "sosp_i", "structure": "bn", "search": "signed"},
    "SOSP-I, greedy": {"method": "sosp_i", "structure": "bn", "search": "greedy"},
    "SOSP-H": {"method": "sosp_h", "structure": "bn"},
    "HAP, Gauss-Newton": {
        "method": "hap",
        "structure": "conv",
        "trace": "gauss_newton",
    },
    "random": {"method": "random"},
    "HAP, 20 probes": {
        "method": "hap",
        "structure": "conv",
        "num_samples": 320,
        "probes": 20,
    },
}
IMAGE = torch.zeros(1, 3, 32, 32)


def recalibrate(model: nn.Module, images: TensorDataset, batches: int) -> None:
    """Estimate the BatchNorm statistics of a network anew."""
    source = FunctionLoss(model, images, loss_fn)
    with source.session("eval"):
        found = estimate_statistics(source, batches, 128, Communicator(), 0)
    found.write(model)


def fine_tune(
    model: nn.Module, data: CIFAR10, steps: int, learning_rate: float, seed: int
) -> None:
    """Train with one cycle of the learning rate, on the same images for every method."""
    if not steps:
        return
    images, labels = data.train.tensors
    torch.manual_seed(seed)
    optimizer = torch.optim.SGD(
        model.parameters(), learning_rate, 0.9, weight_decay=5e-4, nesterov=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, learning_rate, total_steps=steps, pct_start=0.25
    )
    order = torch.cat([torch.randperm(len(labels)) for _ in range(1 + steps // 300)])
    model.train()
    for batch in order.split(128)[:steps]:
        optimizer.zero_grad()
        loss_fn(model, (shift_and_mirror(images[batch]), labels[batch])).backward()
        optimizer.step()
        schedule.step()


def compare(options: argparse.Namespace, data: CIFAR10, test: TensorDataset) -> None:
    """Print accuracies and their means."""
    dense = load(options)
    groups = trace_groups(dense, IMAGE).groups
    size = NetworkSize(FunctionLoss(dense, data.train, loss_fn), groups, Communicator())
    found: dict[tuple[str, ...], list[tuple[float, float]]] = defaultdict(list)
    shares: dict[tuple[str, ...], tuple[float, ...]] = {}

    def test_network(key: tuple[str, ...], model: nn.Module, seed: int) -> None:
        model.to(memory_format=torch.channels_last)
        before = accuracy(model, test)
        fine_tune(model, data, options.steps, options.learning_rate, seed)
        found[key].append((before, accuracy(model, test)))
        print(*key, seed, *(f"{value:.1f}" for value in found[key][-1]), flush=True)

    for seed in options.seeds:
        test_network(("dense", "", ""), copy.deepcopy(dense), seed)
        for name, settings in METHODS.items():
            if name not in options.methods:
                continue
            config = StructureConfig(seed=seed, round_to=options.round_to, **settings)
            source = FunctionLoss(copy.deepcopy(dense), data.train, loss_fn)
            scores = score_structures(source, groups, config)
            for measure, removed, per_cost in itertools.product(
                options.measures, options.removed, options.per_cost
            ):
                divide = {"no": False, "yes": True, "default": None}[per_cost]
                config = dataclasses.replace(config, measure=measure, per_cost=divide)
                model, chosen = remove_channels(
                    dense, groups, size, scores, removed, config
                )
                recalibrate(model, data.train, options.batches)
                label = f"{name} per cost" if config.is_per_cost else name
                key = (label, measure, f"{removed:.0%}")
                shares[key] = (
                    size.macs(chosen) / size.dense_macs,
                    size.parameters(chosen) / size.dense_parameters,
                )
                test_network(key, model, seed)
    head = ("method", "measure", "removed", "FLOPs", "parameters", "before", "after")
    rows = [
        (
            *key,
            *(f"{share:.0%}" for share in shares.get(key, (1.0, 1.0))),
            *map(_format, zip(*results, strict=True)),
        )
        for key, results in found.items()
    ]
    print(format_table(head, rows))


def remove_channels(
    dense: nn.Module,
    groups: Sequence[Group],
    size: NetworkSize,
    scores: StructureScores,
    share: float,
    config: StructureConfig,
) -> tuple[nn.Module, IndexTensors]:
    """Return a copy without a share of the measure, and the removed structures."""
    values = additive_scores(scores, groups, config, size)
    chosen = select_for_size(groups, values, size, share, config)
    model = copy.deepcopy(dense)
    shrink(model, groups, chosen)
    return model, chosen


def _format(values: Sequence[float]) -> str:
    spread = max(values) - min(values)
    return f"{statistics.mean(values):.1f} ± {spread / 2:.1f}"


def load(options: argparse.Namespace) -> nn.Module:
    """Load the trained network in evaluation mode."""
    module = CIFAR10Classifier(weights=options.weights, network=options.network)
    return module.net.eval()


def removal_losses(
    model: nn.Module,
    groups: Sequence[Group],
    structures: Sequence[tuple[int, int]],
    loss: Callable[[nn.Module], float | Tensor],
) -> Tensor:
    """Measure how much the loss rises when one structure at a time is masked.

    Masking is the same as removal if the activation of zero is zero. The model is left
    unchanged.

    Args:
        model: the network; evaluated with running statistics.
        groups: its groups.
        structures: (index of the group, index in the group) of each structure.
        loss: computes the loss of a model, on the same samples in every call.

    Returns:
        float64 ``[n]``: the loss without the structure minus the loss of the whole
        network.
    """
    rises = []
    with isolated(model, "eval"), torch.no_grad():
        whole = float(loss(model))
        for place, number in structures:
            group = groups[place]
            masks = channel_masks(model, [group], {group.name: [number]})
            weights = {name: model.get_parameter(name) for name in masks}
            before = {name: weight.clone() for name, weight in weights.items()}
            for name, weight in weights.items():
                weight.masked_fill_(masks[name], 0.0)
            rises.append(float(loss(model)) - whole)
            for name, weight in weights.items():
                weight.copy_(before[name])
    return torch.tensor(rises, dtype=torch.float64)


def correlate(options: argparse.Namespace, data: CIFAR10) -> None:
    """Print rank correlations of scores and measured losses."""
    model = load(options)
    groups = trace_groups(model, IMAGE).groups
    every = [(i, n) for i, group in enumerate(groups) for n in range(group.size)]
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(every), generator=generator)[:64]
    chosen = [every[i] for i in order.tolist()]
    sample = TensorDataset(*data.train[-1000:])

    def loss(network: nn.Module) -> Tensor:
        recalibrate(network, sample, 7)
        images, labels = sample.tensors
        parts = zip(images.split(500), labels.split(500), strict=True)
        return sum((loss_fn(network, part) for part in parts), torch.zeros(())) / 2

    truth = removal_losses(model, groups, chosen, loss)
    source = FunctionLoss(model, Subset(data.train, range(40_000)), loss_fn)
    rows = []
    for name, settings in METHODS.items():
        if name == "SOSP-I, signed":
            continue  # The row sums are the same for both searches.
        cells = []
        for structure in ("conv", "bn", "conv+bn"):
            config = StructureConfig(**{**settings, "structure": structure})
            scores = score_structures(source, groups, config).values
            found = torch.stack([scores[group][number] for group, number in chosen])
            cells.append(f"{spearman(found, truth):.2f}")
        rows.append((name, *cells))
        print(*rows[-1], flush=True)
    print(format_table(("rank correlation", "conv", "bn", "conv+bn"), rows))


def main() -> None:
    """Print a table."""
    parser = make_parser(__doc__.split("\n")[0])
    parser.add_argument("--network", default="resnet20", help="or mobilenet")
    parser.add_argument("--rank-correlation", action="store_true")
    parser.add_argument("--removed", type=float, nargs="+", default=[0.5, 0.7])
    parser.add_argument("--measures", nargs="+", default=["macs", "parameters"])
    parser.add_argument("--methods", nargs="+", default=[*METHODS], choices=METHODS)
    parser.add_argument(
        "--per-cost", nargs="+", default=["no", "yes"], metavar="no|yes|default"
    )
    parser.add_argument("--round-to", type=int, default=1)
    parser.add_argument("--steps", type=int, default=350, help="of fine-tuning")
    parser.add_argument("--batches", type=int, default=30, help="for BatchNorm")
    parser.add_argument("--test-images", type=int, default=10_000)
    options = parser.parse_args()
    data = load_data(options.data, options.images_per_epoch)
    if options.rank_correlation:
        correlate(options, data)
        return
    test = data.held_out if options.held_out else data.test
    compare(options, data, TensorDataset(*test[: options.test_images]))


if __name__ == "__main__":
    main()
