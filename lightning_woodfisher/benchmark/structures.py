"""What scores of structures cost, against a gradient pass over the same samples."""

from __future__ import annotations

__all__ = ["StructureRow", "measure_structures", "torchvision_network"]

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.data import Subset

from lightning_woodfisher.base.errors import ConfigurationError
from lightning_woodfisher.base.optional_imports import import_optional
from lightning_woodfisher.benchmark.networks import RandomImages, cross_entropy
from lightning_woodfisher.benchmark.timing import Tick, measure_alternately
from lightning_woodfisher.data.losses import FunctionLoss
from lightning_woodfisher.structured.config import StructureConfig
from lightning_woodfisher.structured.graph.tracing import trace_groups
from lightning_woodfisher.structured.scores.methods import (
    StructureScores,
    score_structures,
)

_UNIT = "gradient pass"
_METHODS: dict[str, StructureConfig] = {
    "SOSP-H": StructureConfig(method="sosp_h"),
    "SOSP-H of norms": StructureConfig(method="sosp_h", structure="bn"),
    "SOSP-I, labels of the data": StructureConfig(method="sosp_i", labels="true"),
    "SOSP-I, sampled labels": StructureConfig(method="sosp_i"),
}


@dataclass(frozen=True)
class StructureRow:
    """One way to score the structures of a network.

    Attributes:
        way: ``"gradient pass"`` (forward and backward, in evaluation mode: the unit) or a
            method.
        structures: S.
        samples: N'.
        seconds: median.
        runs: seconds of every repetition.
        cores: processor seconds per second.
        ratio: seconds over those of the gradient pass.
        peak_bytes: most memory beyond what was in use before, of batches and network, too.
        pair_bytes: that hold the correlations of all pairs (SOSP-I).
        squared_bytes: of a float32 matrix of all pairs, 4·S².
    """

    way: str
    structures: int
    samples: int
    seconds: float
    runs: tuple[float, ...]
    cores: float
    ratio: float
    peak_bytes: int | None
    pair_bytes: int | None
    squared_bytes: int


def torchvision_network(name: str = "resnet50") -> nn.Module:
    """Make a network of torchvision at random weights.

    Args:
        name: as torchvision calls it.

    Returns:
        It, in evaluation mode.

    Raises:
        ConfigurationError: without torchvision, or for a name that it does not know.
    """
    get_model = import_optional("torchvision.models", "--structures").get_model
    torch.manual_seed(0)
    try:
        model: nn.Module = get_model(name, weights=None)
    except ValueError as error:
        raise ConfigurationError(f"--structures {name}: {error}.") from error
    return model.eval()


def measure_structures(
    model: nn.Module,
    samples: int = 16,
    *,
    batch_size: int = 8,
    image_size: int = 224,
    repeats: int = 3,
    device: torch.device | str = "cpu",
    tick: Tick = lambda _: None,
) -> list[StructureRow]:
    """Measure SOSP against a gradient pass.

    Args:
        model: classifies images ``[n, 3, image_size, image_size]`` into ten classes or
            more.
        samples: N'; random images.
        batch_size: images at once, in all ways.
        image_size: height and width.
        repeats: repetitions, after one that is not counted.
        device: where.
        tick: called after each run.

    Returns:
        The gradient pass, then the methods.
    """
    device = torch.device(device)
    model = model.to(device)
    data = RandomImages(samples, image_size)
    example = data[0][0].unsqueeze(0).to(device)
    groups = trace_groups(model, example).groups
    source = FunctionLoss(model, data, cross_entropy)
    size = sum(group.size for group in groups)
    held: dict[str, StructureScores] = {}

    def gradient_pass() -> None:
        parameters = [p for p in model.parameters() if p.requires_grad]
        totals = [torch.zeros_like(p) for p in parameters]
        for start in range(0, samples, batch_size):
            part = Subset(data, range(start, min(start + batch_size, samples)))
            images = torch.stack([part[i][0] for i in range(len(part))]).to(device)
            labels = torch.stack([part[i][1] for i in range(len(part))]).to(device)
            loss: Tensor = cross_entropy(model, (images, labels))
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
            for total, gradient in zip(totals, gradients, strict=True):
                if gradient is not None:
                    total += gradient

    def scoring(name: str) -> Callable[[], None]:
        config = dataclasses.replace(
            _METHODS[name], num_samples=samples, batch_size=batch_size
        )

        def score() -> None:
            held[name] = score_structures(source, groups, config)

        return score

    actions: dict[str, Callable[[], object]] = {_UNIT: gradient_pass}
    actions |= {name: scoring(name) for name in _METHODS}
    model.eval()
    measure_alternately(actions, 1, device, tick)
    timings = measure_alternately(actions, repeats, device, tick)
    rows = []
    for name, timing in timings.items():
        pairs = held[name].pairs if name in held else None
        rows.append(
            StructureRow(
                way=name,
                structures=size,
                samples=samples,
                seconds=timing.seconds,
                runs=timing.runs,
                cores=timing.cores,
                ratio=timing.seconds / timings[_UNIT].seconds,
                peak_bytes=timing.peak_bytes,
                pair_bytes=pairs.rows.nbytes if pairs else None,
                squared_bytes=4 * size**2,
            )
        )
    return rows
