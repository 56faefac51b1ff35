"""Bytes that a layer-wise step needs at one time, by what it does.

The formulas follow the code of :mod:`~.layerwise.step` and must change with it. Tests
compare them with counted bytes. Symbols: d inputs and o outputs of a layer, R ranks.
"""

from __future__ import annotations

__all__ = ["LayerSize", "Stage", "count_copies", "count_stages", "require_memory"]

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lightning_woodfisher.base.byte_sizes import format_bytes, parse_bytes
from lightning_woodfisher.base.errors import ConfigurationError

# Float64 matrices [d, d] and [o, d] of the layer that is pruned. The eigenvectors need two
# [d, d] more inside LAPACK. Of ADMM, each rank has its own rows of the second number.
_SUMS = 5
_EIGENVECTORS = 6, 4
_ADMM_SQUARES, _ADMM_WHOLE, _ADMM_OWN = 4.6, 4, 6.1
_ADMM_OWN_FLOAT64 = 9
_CURVES = 6, 8


@dataclass(frozen=True)
class LayerSize:
    """The sizes of a linear map.

    Attributes:
        outputs: o.
        inputs: d, the inputs of a group.
        groups: g.
        input_numbers: numbers in its inputs for one mini-batch.
        output_numbers: numbers in its outputs for one mini-batch.
    """

    outputs: int
    inputs: int
    groups: int = 1
    input_numbers: int = 0
    output_numbers: int = 0

    @property
    def square(self) -> int:
        """Bytes of a float64 matrix ``[g, d, d]``."""
        return 8 * self.groups * self.inputs**2

    @property
    def rectangle(self) -> int:
        """Bytes of a float64 matrix ``[g, o, d]``."""
        return 8 * self.groups * self.outputs * self.inputs


@dataclass(frozen=True)
class Stage:
    """Bytes in one stage of a layer.

    Attributes:
        activations: of all mini-batches of a rank, in the dense and the pruned network.
        workspace: matrices of the layer.
        state: covariances of the inputs of all layers.
    """

    activations: int
    workspace: int
    state: int

    @property
    def total(self) -> int:
        """Sum of the three."""
        return self.activations + self.workspace + self.state


def count_stages(
    layers: Sequence[LayerSize],
    mini_batches: int,
    ranks: int,
    item_bytes: int,
    *,
    competing: bool,
) -> dict[str, Stage]:
    """Count the bytes of each stage, for the layer that needs most.

    A layer holds its inputs in the pruned network and its targets and outputs in the dense
    one; both networks hold a skip of the smaller of the two sides.

    Args:
        layers: all layers.
        mini_batches: number of mini-batches of all ranks.
        ranks: R.
        item_bytes: bytes of one activation.
        competing: whether layers compete for weights, so that covariances are kept.

    Returns:
        ``"allocate"`` if layers compete, ``"collect"`` for sums of the samples,
        ``"factorize"`` for eigenvectors, and ``"update"`` for the mask and the weights.
    """
    own = math.ceil(mini_batches / ranks)
    state = sum(layer.square for layer in layers) * competing
    stages: dict[str, Stage] = {}

    def add(name: str, activations: float, workspace: float) -> None:
        stage = Stage(round(item_bytes * activations), round(workspace), state)
        stages[name] = max(stages.get(name, stage), stage, key=lambda s: s.total)

    for layer in layers:
        square, rectangle = layer.square, layer.rectangle
        if competing:
            add("allocate", 0, _CURVES[0] * square + _CURVES[1] * rectangle)
        x, y = layer.input_numbers, layer.output_numbers
        kept = own * (x + y + 2 * min(x, y))
        # The targets; the positions of the outputs of one mini-batch, as int64.
        add("collect", kept + own * y + 2 * y, _SUMS * (square + rectangle))
        add("factorize", kept, _EIGENVECTORS[0] * square + _EIGENVECTORS[1] * rectangle)
        rows = _ADMM_OWN if item_bytes < 8 else _ADMM_OWN_FLOAT64
        rows = _ADMM_WHOLE + rows / (ranks if layer.groups == 1 else 1)
        add("update", kept, _ADMM_SQUARES * square + rows * rectangle)
    return stages


def count_copies(weights: int, item_bytes: int) -> int:
    """Count the bytes of copies of weights and masks.

    Args:
        weights: number of selected weights.
        item_bytes: bytes of a weight.

    Returns:
        Weights and masks for a rollback, weights of the dense network, and new masks.
    """
    return weights * (2 * item_bytes + 2)


def require_memory(
    layers: Sequence[LayerSize],
    mini_batches: int,
    ranks: int,
    item_bytes: int,
    *,
    competing: bool,
    weights: int,
    samples: int,
    budget: str | int,
) -> None:
    """Refuse a budget that is too small for a step.

    Args:
        layers: all layers.
        mini_batches: number of mini-batches of all ranks.
        ranks: R.
        item_bytes: bytes of a weight and of an activation.
        competing: whether layers compete for weights.
        weights: number of selected weights.
        samples: number of gradients N in the mini-batches, for the message.
        budget: memory of a rank, in bytes or as text.

    Raises:
        ConfigurationError: with the bytes that are needed, and N that fits.
    """
    copies = count_copies(weights, item_bytes)

    def stage(count: int, ranks: int = ranks) -> Stage:
        stages = count_stages(layers, count, ranks, item_bytes, competing=competing)
        return max(stages.values(), key=lambda stage: stage.total)

    available = parse_bytes(budget)
    most = stage(mini_batches)
    if copies + most.total <= available:
        return
    fitting = [n for n in range(mini_batches) if copies + stage(n).total <= available]
    remedy = "no number of samples would fit; raise it"
    if fitting and fitting[-1]:
        number = samples * fitting[-1] // mini_batches
        remedy = f"num_gradients={number} would fit, or more devices"
    raise ConfigurationError(
        f"fisher.memory_budget={budget!r} is too small: criterion='layerwise' needs "
        f"{format_bytes(copies + most.total)} per rank, "
        f"{format_bytes(most.activations)} of it for the activations of all samples in "
        f"the dense and the pruned network; {remedy}."
    )
