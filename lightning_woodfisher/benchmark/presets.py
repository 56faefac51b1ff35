"""Named sets of cases: problem sizes of the literature."""

from __future__ import annotations

__all__ = ["PRESETS", "custom_case", "preset_cases", "slice_case"]

import dataclasses
import math

from lightning_woodfisher.base.errors import ConfigurationError
from lightning_woodfisher.benchmark.inverse import Case, slice_segments
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


def preset_cases(preset: str) -> list[Case]:
    """Make the cases of a preset.

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


def slice_case(case: Case, most: int) -> Case:
    """Cut a case that is too large down to the same share of every tensor.

    Args:
        case: with all weights.
        most: about so many weights stay.

    Returns:
        The case itself, or a slice that remembers ``total_weights``.
    """
    segments = slice_segments(case.segments, most, case.block_size)
    return dataclasses.replace(case, segments=segments)


def custom_case(num_gradients: int, block_size: int | None, weights: int) -> Case:
    """Make a case of one tensor.

    Args:
        num_gradients: N.
        block_size: B, or None for the full Fisher.
        weights: D.

    Returns:
        The case.

    Raises:
        ConfigurationError: when a number is below one.
    """
    if min(num_gradients, block_size or 1, weights) < 1:
        raise ConfigurationError(
            f"the case {num_gradients},{block_size},{weights} must have N, B and D of at "
            "least 1."
        )
    name = "full Fisher" if block_size is None else f"B={block_size}"
    return Case(name, num_gradients, block_size, (weights,), weights)
