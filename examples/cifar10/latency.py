"""Show what a forward pass without half of the FLOPs still spends its time on.

    python -m examples.cifar10.latency --data FOLDER --weights runs/cifar10/dense.pt

Removes channels as ``structured.py`` does, and prints three tables of the dense network and of
the smaller ones: the whole pass, its operations, and its convolutions.
Times are those of one thread of the CPU for 64 images, the shortest of several passes of all
networks in turns. ``--width 64`` takes a new network with four times the channels.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils._python_dispatch import TorchDispatchMode

from examples.cifar10.fitting import load_data
from examples.cifar10.model import resnet20
from examples.cifar10.structured import IMAGE, METHODS, load, remove_channels
from examples.comparison import loss_fn
from lightning_woodfisher import StructureConfig
from lightning_woodfisher.base.text_table import format_table
from lightning_woodfisher.data.losses import FunctionLoss
from lightning_woodfisher.distributed.communicator import Communicator
from lightning_woodfisher.structured.network_cost import NetworkSize
from lightning_woodfisher.structured.scores.methods import score_structures
from lightning_woodfisher.structured.tracing import trace_groups

IMAGES = 64
OPERATIONS = {
    "convolution": "convolution",
    "native_batch_norm": "BatchNorm",
    "relu": "ReLU",
    "add": "addition",
}


def shortest(
    models: Sequence[nn.Module], measure: Callable[[nn.Module], Counter[str]], runs: int
) -> list[dict[str, float]]:
    """Measure models in turns, and return the smallest numbers in milliseconds."""
    found: list[dict[str, float]] = [{} for _ in models]
    with torch.no_grad():
        for _ in range(runs):
            for model, numbers in zip(models, found, strict=True):
                for name, seconds in measure(model).items():
                    numbers[name] = min(1e3 * seconds, numbers.get(name, math.inf))
    return found


def time_pass(images: Tensor) -> Callable[[nn.Module], Counter[str]]:
    """Measure the whole pass."""

    def measure(model: nn.Module) -> Counter[str]:
        start = time.process_time()
        model(images)
        return Counter({"": time.process_time() - start})

    return measure


class Stopwatch(TorchDispatchMode):
    """Measure each operation; PyTorch's profiler counts other processes' time, too."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run an operation."""
        start = time.process_time()
        result = func(*args, **(kwargs or {}))
        name = OPERATIONS.get(func.overloadpacket.__name__, "other")
        self.found[name] += time.process_time() - start
        return result


def time_operations(images: Tensor) -> Callable[[nn.Module], Counter[str]]:
    """Measure the operations."""

    def measure(model: nn.Module) -> Counter[str]:
        with Stopwatch() as stopwatch:
            model(images)
        return stopwatch.found

    return measure


def time_convolutions(images: Tensor) -> Callable[[nn.Module], Counter[str]]:
    """Measure each convolution."""

    def measure(model: nn.Module) -> Counter[str]:
        found: Counter[str] = Counter()
        hooks = []
        for name, layer in convolutions(model):

            def start(*_: object, name: str = name) -> None:
                found[name] -= time.process_time()

            def stop(*_: object, name: str = name) -> None:
                found[name] += time.process_time()

            hooks.append(layer.register_forward_pre_hook(start))
            hooks.append(layer.register_forward_hook(stop))
        model(images)
        for hook in hooks:
            hook.remove()
        return found

    return measure


def convolutions(model: nn.Module) -> Iterator[tuple[str, nn.Conv2d]]:
    """Iterate over the convolutions and their names."""
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d):
            yield name, layer


def fold_norms(model: nn.Module) -> nn.Module:
    """Fold BatchNorm into the convolution before it."""
    folded = copy.deepcopy(model)
    for parent in folded.modules():
        children = [*parent.named_children()]
        for (name, layer), (after, norm) in zip(children, children[1:], strict=False):
            if isinstance(layer, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(parent, name, fuse_conv_bn_eval(layer, norm))
                setattr(parent, after, nn.Identity())
    return folded


def print_shares(
    title: str, heads: Sequence[str], rows: Mapping[str, Sequence[float]]
) -> None:
    """Print numbers of the dense network, and those of others as shares of them."""
    cells = [
        (name, f"{dense:.2f}", *(f"{other / dense:.0%}" for other in others))
        for name, (dense, *others) in rows.items()
    ]
    print(f"\n{format_table((title, 'dense', *heads), cells)}", flush=True)


def main() -> None:
    """Print three tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", default="data", help="folder of the images")
    parser.add_argument("--weights", default="runs/cifar10/dense.pt")
    parser.add_argument("--network", default="resnet20", help="or mobilenet")
    parser.add_argument("--width", type=int, help="of a new ResNet-20; see above")
    parser.add_argument("--removed", type=float, default=0.5, help="share of the FLOPs")
    parser.add_argument(
        "--methods", nargs="+", default=["SOSP-I, signed"], choices=METHODS
    )
    parser.add_argument("--round-to", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--compile", action="store_true", help="also torch.compile")
    options = parser.parse_args()
    torch.set_num_threads(1)
    data = load_data(options.data, None)
    dense = resnet20(options.width).eval() if options.width else load(options)
    groups = trace_groups(dense, IMAGE).groups
    source = FunctionLoss(copy.deepcopy(dense), data.train, loss_fn)
    size = NetworkSize(source, groups, Communicator())
    models, heads, flops = [dense], [], [1e-6 * size.dense_macs]
    for method in options.methods:
        scores = score_structures(source, groups, StructureConfig(**METHODS[method]))
        for multiple in options.round_to:
            config = StructureConfig(round_to=multiple, **METHODS[method])
            model, chosen = remove_channels(
                dense, groups, size, scores, options.removed, config
            )
            models.append(model)
            heads.append(f"{method}, {multiple}")
            flops.append(1e-6 * size.macs(chosen))
    rows = {"million MACs": flops}
    builds: dict[str, Callable[[nn.Module], nn.Module]] = {"": lambda model: model}
    builds["BatchNorm folded"] = fold_norms
    if options.compile:
        builds["torch.compile"] = torch.compile
    for layout in (torch.contiguous_format, torch.channels_last):
        images = torch.randn(IMAGES, *IMAGE.shape[1:]).to(memory_format=layout)
        placed = [copy.deepcopy(model).to(memory_format=layout) for model in models]
        for name, build in builds.items():
            built = [build(model) for model in placed]
            times = shortest(built, time_pass(images), options.runs)
            title = f"{str(layout).removeprefix('torch.')} {name}"
            rows[title] = [numbers[""] for numbers in times]
    print_shares("whole pass", heads, rows)
    # The last layout, channels last, is the faster one.
    times = shortest(placed, time_operations(images), options.runs)
    names = (name for name in (*OPERATIONS.values(), "other") if name in times[0])
    rows = {name: [numbers[name] for numbers in times] for name in names}
    print_shares("operation", heads, rows)
    times = shortest(placed, time_convolutions(images), options.runs)
    sizes = [{n: c.weight.numel() for n, c in convolutions(model)} for model in models]
    cells = []
    for name, seconds in times[0].items():
        cells.append((name, f"{seconds:.2f}"))
        for found, size_of in zip(times[1:], sizes[1:], strict=True):
            work = size_of[name] / sizes[0][name]
            cells[-1] += (f"{work:.0%} in {found[name] / seconds:.0%}",)
    print(
        "\nConvolutions: the share of their FLOPs that is left, in this share of the time"
    )
    print(format_table(("", "dense", *heads), cells))


if __name__ == "__main__":
    main()
