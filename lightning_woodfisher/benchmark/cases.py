"""Define problem sizes of the inverse Fisher."""

from __future__ import annotations

__all__ = ["PRESETS", "Case", "custom_case", "preset_cases", "slice_case"]

import dataclasses
import math
from dataclasses import dataclass

from lightning_woodfisher.resources.network_shapes import SHAPES

# (N, B) of each network; None is the full Fisher.
_NETWORKS: dict[str, tuple[tuple[int, int | None], ...]] = {
    "resnet20": ((1000, 288), (1000, None)),
    "resnet50": ((1024, 50), (400, 2000)),
    "mobilenetv1": ((1024, 50), (400, 2000)),
    "bert_base": ((1024, 50),),
}
_HEADLINE: tuple[tuple[int, int | None, int], ...] = (
    (1024, 50, 270_000),
    (400, 2000, 200_000),
    (1000, None, 267_264),
)
PRESETS = ("headline", *_NETWORKS)


@dataclass(frozen=True)
class Case:
    """One problem size.

    Attributes:
        name: name in the table.
        num_gradients: N.
        block_size: B, or None for the full Fisher.
        segments: number of measured weights of each tensor; D is their sum.
        total_weights: number of weights of the whole network, more than D for a slice.
    """

    name: str
    num_gradients: int
    block_size: int | None
    segments: tuple[int, ...]
    total_weights: int

    @property
    def weights(self) -> int:
        """D, the number of measured weights."""
        return sum(self.segments)


def preset_cases(preset: str) -> list[Case]:
    """Return the cases of a preset.

    Args:
        preset: one of ``PRESETS``.

    Returns:
        The cases, with all weights.
    """
    if preset == "headline":
        return [custom_case(*sizes) for sizes in _HEADLINE]
    segments = tuple(math.prod(shape) for shape in SHAPES[preset].values())
    return [
        Case(preset, num_gradients, block_size, segments, sum(segments))
        for num_gradients, block_size in _NETWORKS[preset]
    ]


def custom_case(num_gradients: int, block_size: int | None, weights: int) -> Case:
    """Return a case with one tensor.

    Args:
        num_gradients: N.
        block_size: B, or None for the full Fisher.
        weights: D.

    Returns:
        The case.
    """
    name = "full Fisher" if block_size is None else f"B={block_size}"
    return Case(name, num_gradients, block_size, (weights,), weights)


def slice_case(case: Case, max_weights: int) -> Case:
    """Reduce a large case to the same share of every tensor, in whole blocks.

    Args:
        case: the case with all weights.
        max_weights: approximate number of weights to measure.

    Returns:
        The case itself, or a slice of it. At least one block of every tensor is kept.
    """
    total = case.weights
    if total <= max_weights:
        return case
    block = case.block_size or 1
    segments = tuple(
        min(weights, max(block, weights * max_weights // total // block * block))
        for weights in case.segments
    )
    return dataclasses.replace(case, segments=segments)
