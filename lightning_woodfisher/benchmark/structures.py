"""Measure scores of structures against a gradient pass over the same samples."""

from __future__ import annotations

__all__ = ["METHODS", "StructureRow", "load_torchvision_network", "measure_structures"]

import dataclasses
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.data import TensorDataset

from lightning_woodfisher.base.errors import ConfigurationError
from lightning_woodfisher.base.optional_imports import import_optional
from lightning_woodfisher.benchmark.collection import run_batches
from lightning_woodfisher.benchmark.networks import cross_entropy
from lightning_woodfisher.benchmark.timing import Timing, measure_alternately
from lightning_woodfisher.data.losses import FunctionLoss
from lightning_woodfisher.structured.config import StructureConfig
from lightning_woodfisher.structured.scores.methods import (
    StructureScores,
    score_structures,
)
from lightning_woodfisher.structured.tracing import trace_groups

_REFERENCE = "gradient pass"
METHODS: Mapping[str, StructureConfig] = {
    "SOSP-H": StructureConfig(method="sosp_h", structure="conv"),
    "SOSP-H of norms": StructureConfig(method="sosp_h"),
    "SOSP-I, labels of the data": StructureConfig(method="sosp_i", labels="true"),
    "SOSP-I, sampled labels": StructureConfig(method="sosp_i"),
}


@dataclass(frozen=True)
class StructureRow:
    """One method to score the structures of a network.

    Attributes:
        method: ``"gradient pass"`` (forward and backward, in evaluation mode: the
            reference) or a scoring method.
        structures: S.
        samples: N'.
        timing: time and memory of the scores of all structures.
        ratio: seconds divided by those of the gradient pass.
        pair_bytes: bytes that represent the correlations of all pairs (SOSP-I).
        squared_bytes: bytes of a float32 matrix of all pairs, 4·S².
    """

    method: str
    structures: int
    samples: int
    timing: Timing
    ratio: float
    pair_bytes: int | None
    squared_bytes: int


def load_torchvision_network(name: str = "resnet50") -> nn.Module:
    """Return a network of torchvision with random weights.

    Args:
        name: name in torchvision.

    Returns:
        The network in evaluation mode.

    Raises:
        ConfigurationError: if torchvision is not installed or has no such network.
    """
    models = import_optional("torchvision.models", f"the network {name}")
    torch.manual_seed(0)
    try:
        model: nn.Module = models.get_model(name, weights=None)
    except ValueError as error:
        raise ConfigurationError(f"--structures {name}: {error}.") from error
    return model.eval()


def measure_structures(
    model: nn.Module,
    data: TensorDataset,
    *,
    batch_size: int = 8,
    repeats: int = 3,
    methods: Mapping[str, StructureConfig] = METHODS,
) -> list[StructureRow]:
    """Measure the scores of structures against a gradient pass.

    Args:
        model: the network, in evaluation mode.
        data: N' images and labels.
        batch_size: number of images in a batch, for all methods.
        repeats: number of repetitions, after one that is not counted.
        methods: how structures are scored, by name.

    Returns:
        The gradient pass, then the methods.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    device = parameters[0].device
    groups = trace_groups(model, data[0][0].unsqueeze(0).to(device)).groups
    source = FunctionLoss(model, data, cross_entropy)
    size = sum(group.size for group in groups)
    scores: dict[str, StructureScores] = {}

    def score(name: str, config: StructureConfig) -> None:
        config = dataclasses.replace(
            config, num_samples=len(data), batch_size=batch_size
        )
        scores[name] = score_structures(source, groups, config)

    actions: dict[str, Callable[[], object]] = {
        _REFERENCE: lambda: run_batches(model, data, batch_size, parameters)
    }
    for name, config in methods.items():
        actions[name] = functools.partial(score, name, config)
    timings = measure_alternately(actions, repeats, device, warm_up=1)
    rows = []
    for name, timing in timings.items():
        pairs = scores[name].pairs if name in scores else None
        rows.append(
            StructureRow(
                method=name,
                structures=size,
                samples=len(data),
                timing=timing,
                ratio=timing.seconds / timings[_REFERENCE].seconds,
                pair_bytes=pairs.rows.nbytes if pairs else None,
                squared_bytes=4 * size**2,
            )
        )
    return rows
