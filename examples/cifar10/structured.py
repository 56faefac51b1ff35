"""Compare methods of structured pruning on ResNet-20 and CIFAR-10, at the same budget.

    python -m examples.cifar10.structured --data FOLDER --weights runs/cifar10/dense.pt

Each method removes a share of the FLOPs in one step; fine-tuning uses the same images,
order and learning rates for all methods. Prints the accuracy on the test images, the remaining
parameters, and the time of a forward pass relative to the dense network. ``--one-shot``
prints the accuracy without fine-tuning, with the old and with recalibrated BatchNorm
statistics, for all methods without implants. ``--rank-correlation`` prints the rank
correlation between the scores of 64 random channels and the measured loss after their
removal.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Subset, TensorDataset

from examples.cifar10.fitting import (
    fit_and_test,
    load_data,
    load_module,
    make_parser,
)
from examples.cifar10.model import CIFAR10, CIFAR10Classifier, resnet20
from examples.comparison import accuracy, format_accuracies, loss_fn
from lightning_woodfisher import (
    HAPPruningCallback,
    StructureConfig,
    StructuredPruningCallback,
    prune_structures,
)
from lightning_woodfisher.base.text_table import format_table
from lightning_woodfisher.data.isolation import isolated
from lightning_woodfisher.data.losses import FunctionLoss
from lightning_woodfisher.structured.graph.groups import Group, channel_masks
from lightning_woodfisher.structured.network_cost import measure_latency
from lightning_woodfisher.structured.scores.hessian_products import spearman
from lightning_woodfisher.structured.scores.methods import score_structures
from lightning_woodfisher.structured.tracing import trace_groups

# structure="bn" had the best accuracy on held-out images after BatchNorm recalibration. HAP
# has the settings of the paper, with about as many images; its probes are expensive.
SCORES: dict[str, dict[str, Any]] = {
    "SOSP-H": {"method": "sosp_h", "structure": "bn"},
    "SOSP-I": {"method": "sosp_i", "structure": "bn"},
    "HAP": {"method": "hap", "structure": "conv", "num_samples": 320, "probes": 20},
    "magnitude": {"method": "magnitude", "structure": "conv"},
    "random": {"method": "random"},
}
METHODS = (*SCORES, "HAP + implant", "SOSP-I per cost", "magnitude per cost")
IMAGE = torch.zeros(1, 3, 32, 32)


def make_config(name: str, seed: int, batches: int = 0) -> StructureConfig:
    """Make the settings of a method from its name."""
    scores = name.removesuffix(" + implant").removesuffix(" per cost")
    return StructureConfig(
        seed=seed,
        per_cost=name.endswith(" per cost"),
        batchnorm_recalibration_batches=batches,
        **SCORES[scores],
    )


def make_callback(name: str, target: float, seed: int) -> StructuredPruningCallback:
    """Return the callback that prunes at the start of training.

    Args:
        name: name in ``METHODS``.
        target: share of the FLOPs to remove.
        seed: seed of samples and probes.

    Returns:
        The callback.
    """
    config = make_config(name, seed)
    if name.endswith(" + implant"):
        return HAPPruningCallback(
            target, config, implant_ratio=0.1, implant_init="center"
        )
    return StructuredPruningCallback(target, config)


def compare(options: argparse.Namespace, data: CIFAR10) -> None:
    """Print the table of accuracies."""
    rows = []
    for removed in options.removed:
        for name in (name for name in METHODS if options.only in name):
            found = []
            for seed in options.seeds:
                module = load_module(options.weights, options.learning_rate, seed)
                callback = make_callback(name, removed, seed)
                found.append(
                    fit_and_test(
                        module,
                        data,
                        options.epochs,
                        [callback],
                        options.accelerator,
                        options.held_out,
                    )
                )
                dense, shrunk = measure_latency(
                    resnet20(), callback.shrunk_model(module).net, IMAGE, 100, 64
                )
                print(
                    f"{name} {removed:g} {seed}: {found[-1]:.2f}, "
                    f"time {shrunk / dense:.0%}",
                    flush=True,
                )
            report = callback.reports[-1]
            rows.append(
                (
                    name,
                    f"{1 - report.macs / report.macs_dense:.1%}",
                    f"{report.parameters / report.parameters_dense:.1%}",
                    *format_accuracies(found),
                    f"{shrunk / dense:.0%}",
                )
            )
    head = ("method", "FLOPs removed", "parameters left", "accuracy", "each", "time")
    print(format_table(head, rows))


def compare_untrained(options: argparse.Namespace, data: CIFAR10) -> None:
    """Print accuracies right after the removal."""
    test = data.held_out if options.held_out else data.test
    rows = []
    for removed in options.removed:
        for name in (name for name in METHODS if options.only in name):
            if name.endswith(" + implant"):
                continue
            for batches in (0, 50):
                found = []
                for seed in options.seeds:
                    model = CIFAR10Classifier(weights=options.weights).net.eval()
                    prune_structures(
                        model,
                        data.train,
                        loss_fn,
                        target=removed,
                        config=make_config(name, seed, batches),
                        example_inputs=IMAGE,
                    )
                    found.append(accuracy(model, test))
                _, each = format_accuracies(found)
                rows.append((name, f"{removed:g}", str(batches), each))
                print(*rows[-1], flush=True)
    print(format_table(("method", "FLOPs removed", "batches", "accuracy"), rows))


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
    module = CIFAR10Classifier(weights=options.weights)
    model = module.net.eval()
    groups = trace_groups(model, IMAGE).groups
    every = [(i, n) for i, group in enumerate(groups) for n in range(group.size)]
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(every), generator=generator)[:64]
    chosen = [every[i] for i in order.tolist()]
    sample = TensorDataset(*data.train[-1000:])

    @torch.no_grad()
    def loss(network: nn.Module) -> float:
        images, labels = sample.tensors
        parts = zip(images.split(500), labels.split(500), strict=True)
        return sum(float(loss_fn(network, part)) for part in parts) / 2

    truth = removal_losses(model, groups, chosen, loss)
    source = FunctionLoss(model, Subset(data.train, range(40_000)), loss_fn)
    rows = []
    for name, settings in SCORES.items():
        cells = []
        for structure in ("conv", "bn", "conv+bn"):
            config = StructureConfig(**{**settings, "structure": structure})
            scores = score_structures(source, groups, config).values
            found = torch.stack([scores[group][number] for group, number in chosen])
            cells.append(f"{spearman(found, truth):.2f}")
        rows.append((name, *cells))
    print(format_table(("rank correlation", "conv", "bn", "conv+bn"), rows))


def main() -> None:
    """Print a table."""
    parser = make_parser(__doc__.split("\n")[0])
    parser.add_argument("--rank-correlation", action="store_true")
    parser.add_argument("--one-shot", action="store_true")
    parser.add_argument("--removed", type=float, nargs="+", default=[0.5, 0.7])
    options = parser.parse_args()
    data = load_data(options.data, options.images_per_epoch)
    if options.rank_correlation:
        correlate(options, data)
    elif options.one_shot:
        compare_untrained(options, data)
    else:
        compare(options, data)


if __name__ == "__main__":
    main()
