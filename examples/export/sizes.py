"""Measure the file size of a pruned ResNet-50, and the time to write and read it.

Weights of convolutions and of the classifier are random, with zeros at random positions;
BatchNorm and biases are dense. Nothing is trained, because sizes depend only on the number
of zeros.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torchvision.models import resnet50

from lightning_woodfisher.base.byte_sizes import format_bytes
from lightning_woodfisher.base.text_table import format_table
from lightning_woodfisher.export import load_sparse, save_sparse

Result = TypeVar("Result")


def make_state(sparsity: float) -> dict[str, Tensor]:
    """Return random weights of a ResNet-50 with this share of zeros."""
    with torch.device("meta"):
        shapes = resnet50(weights=None).state_dict()
    torch.manual_seed(0)
    state = {}
    for name, shape in shapes.items():
        tensor = torch.zeros_like(shape, device="cpu")
        if tensor.is_floating_point():
            tensor.normal_()
        if tensor.dim() >= 2:
            tensor[torch.rand_like(tensor) < sparsity] = 0.0
        state[name] = tensor
    return state


def time_call(call: Callable[[], Result], repeats: int) -> tuple[Result, float]:
    """Return the result of a call and its median seconds."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        result = call()
        seconds.append(time.perf_counter() - start)
    return result, median(seconds)


def are_identical(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Check that two state dicts have the same names, dtypes, shapes and bits."""
    return list(one) == list(other) and all(
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(
            a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8)
        )
        for a, b in zip(one.values(), other.values(), strict=True)
    )


def measure(sparsity: float, repeats: int, folder: Path) -> tuple[str, ...]:
    """Measure one row of the table."""
    state = make_state(sparsity)
    dense, sparse = folder / "dense.safetensors", folder / "sparse.safetensors"
    save_file(state, dense)
    _, seconds_dense = time_call(lambda: load_file(dense), repeats)
    _, seconds_save = time_call(lambda: save_sparse(state, sparse), repeats)
    loaded, seconds_load = time_call(lambda: load_sparse(sparse), repeats)
    if not are_identical(state, loaded):
        raise SystemExit("The loaded weights differ from the saved ones.")
    size, small = dense.stat().st_size, sparse.stat().st_size
    return (
        f"{sparsity:.0%}",
        format_bytes(size),
        format_bytes(small),
        f"{small / size:.2%}",
        f"{seconds_save:.2f} s",
        f"{seconds_load:.2f} s",
        f"{seconds_dense:.2f} s",
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sparsity", nargs="+", type=float, default=[0.5, 0.9, 0.95])
    parser.add_argument("--repeats", type=int, default=5, help="repetitions")
    options = parser.parse_args()
    head = ("zeros", "dense", "sparse", "share", "save", "load", "load dense (mapped)")
    with tempfile.TemporaryDirectory() as folder:
        rows = [measure(s, options.repeats, Path(folder)) for s in options.sparsity]
    print(format_table(head, rows))
    print("Loaded weights are bit-identical.")


if __name__ == "__main__":
    main()
