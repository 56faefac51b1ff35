"""What the dense network tells about its linear maps before anything is pruned.

A few batches show in which order maps run, how much each of their outputs matters for the
loss, and, where layers compete, the covariance of their inputs. All ranks compute the same.
"""

from __future__ import annotations

__all__ = ["SURVEYED_BATCHES", "Surveyed", "survey"]

import itertools
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_woodfisher.base.errors import ConfigurationError, PruningError
from lightning_woodfisher.base.full_float32 import at_least_float32
from lightning_woodfisher.data.batches import Batches
from lightning_woodfisher.data.isolation import (
    derive_seed,
    preserve_random_states,
    seeded,
)
from lightning_woodfisher.data.losses import (
    LossSource,
    differentiable_loss,
    differentiate,
    map_tensors,
    run_loss,
)
from lightning_woodfisher.layerwise.interception import Interception
from lightning_woodfisher.layerwise.maps import (
    LinearCall,
    LinearMap,
    MapKey,
    WeightTable,
)
from lightning_woodfisher.layerwise.memory import LayerSize
from lightning_woodfisher.layerwise.moments import require_finite
from lightning_woodfisher.layerwise.padding import Side, TokenMasks

#: Mini-batches that are looked at.
SURVEYED_BATCHES = 4
# Numbers of each output that are compared between two runs, and by how much of the largest
# one they may differ, as sums on a GPU do.
_COMPARED = 64
_DIFFERENCE = 0.01
# A first-order change of the loss smaller than this share of it is rounding.
_SMALLEST_GRADIENT = 1e-6


@dataclass
class Surveyed:
    """One map of the dense network.

    Attributes:
        map: the map.
        output_weights: mean squared gradient of each output, float64 ``[g, o]``.
        inputs: Σxxᵀ of the mini-batches, float64 ``[g, d, d]``; None if not wanted.
        input_numbers: most numbers in the inputs for one mini-batch.
        output_numbers: most numbers in the outputs for one mini-batch.
    """

    map: LinearMap
    output_weights: Tensor
    inputs: Tensor | None = None
    input_numbers: int = 0
    output_numbers: int = 0

    @property
    def size(self) -> LayerSize:
        """The sizes that its memory depends on."""
        groups, outputs, inputs = self.map.sides
        numbers = self.input_numbers, self.output_numbers
        return LayerSize(outputs, inputs, groups, *numbers)


def survey(
    source: LossSource,
    parameters: Mapping[str, nn.Parameter],
    batches: Batches,
    count: int,
    seed: int,
    *,
    output_weights: bool,
    inputs: bool,
) -> list[Surveyed]:
    """Run the dense network on a few batches. Call on all ranks.

    Args:
        source: source of losses, inside its session.
        parameters: the selected parameters by name.
        batches: the mini-batches.
        count: number of mini-batches.
        seed: seed of the samples.
        output_weights: whether the loss is differentiated.
        inputs: whether products of inputs are added up.

    Returns:
        The maps in the order in which they run for the first time. A selected weight that
        does not run as a linear map raises :class:`ConfigurationError`.
    """
    table = WeightTable(parameters)
    found: dict[MapKey, Surveyed] = {}
    leaves: list[tuple[Surveyed, Tensor, Side | None]] = []
    scale = 0.0

    def visit(call: LinearCall) -> Tensor:
        linear, parameter = call.map, parameters[call.map.name]
        # Not detached: gradient checkpointing runs the layer a second time without this
        # function, and must save the same tensors.
        output = call.run(linear.rows_of(parameter), call.bias)
        if not index:
            seen_once.append(_sample(call, output))
        if linear.key not in found and not _overlaps(linear, found):
            g, o, _ = linear.sides
            nothing = torch.zeros(g, o, dtype=torch.float64, device=output.device)
            found[linear.key] = Surveyed(linear, nothing)
        surveyed = found.get(linear.key)
        if surveyed is None or any(surveyed is other for other in first):
            return output
        # Drawing labels runs the network without gradients.
        if output_weights and not torch.is_grad_enabled():
            return output
        first.append(surveyed)
        side = interception.side(call.inputs)
        surveyed.input_numbers = max(surveyed.input_numbers, call.inputs.numel())
        surveyed.output_numbers = max(surveyed.output_numbers, output.numel())
        if inputs:
            seen = tokens.drop(linear, side, call.inputs.detach(), output.detach())
            require_finite(linear, batches, index, *seen)
            _add_inputs(surveyed, *seen)
        if output_weights:
            # Whatever is frozen. A copy, because the network may change it in place.
            if not output.requires_grad:
                output.requires_grad_()
            leaves.append((surveyed, output, side))
            output = output.clone()
        return output

    number = min(count, SURVEYED_BATCHES)
    seen_once: list[tuple[str, Tensor]] = []
    for index in range(number):
        first: list[Surveyed] = []
        leaves.clear()
        with seeded(derive_seed(seed, index)):
            batch = batches.fetch(index)
            if not index:
                again = _run_once(source, parameters, table, batch)
            tokens = TokenMasks(batch)
            interception = Interception(table, visit, sources=tokens.sources())
            with interception:
                if output_weights:
                    loss = differentiable_loss(source, batches, index, batch)
                else:
                    with torch.no_grad():
                        run_loss(source, batch, index)
            if not index:
                # Drawing labels has run the network before.
                _require_equal(again, seen_once[-len(again) :])
        if leaves:
            gradients = differentiate(loss, [leaf for _, leaf, _ in leaves])
            for (surveyed, _, side), gradient in zip(leaves, gradients, strict=True):
                if gradient is not None:
                    (kept,) = tokens.drop(surveyed.map, side, gradient)
                    scale += _add_gradient(surveyed, kept)
            scale -= _SMALLEST_GRADIENT * (1e-3 + abs(float(loss.detach())))
    _require_all(parameters, list(found.values()), number)
    if not output_weights or not scale > 0:
        _count_outputs_alike(found.values(), warn=output_weights)
    return list(found.values())


def _count_outputs_alike(maps: Iterable[Surveyed], warn: bool) -> None:
    if warn:
        warnings.warn(
            "the loss has no gradient at the dense network (as with a loss that compares the "
            "network with itself), so all outputs of a layer count the same; draw labels "
            "with fisher.sample_labels=True, or set layerwise.output_weights=False.",
            stacklevel=3,
        )
    for surveyed in maps:
        surveyed.output_weights.fill_(1.0)


@torch.no_grad()
def _run_once(
    source: LossSource,
    parameters: Mapping[str, nn.Parameter],
    table: WeightTable,
    batch: Any,
) -> list[tuple[str, Tensor]]:
    """Run the network on a copy of a mini-batch; return some outputs of each call."""
    seen: list[tuple[str, Tensor]] = []

    def visit(call: LinearCall) -> Tensor:
        output = call.run(call.map.rows_of(parameters[call.map.name]), call.bias)
        seen.append(_sample(call, output))
        return output

    with preserve_random_states(), Interception(table, visit):
        run_loss(source, map_tensors(Tensor.clone, batch), 0)
    return seen


def _sample(call: LinearCall, output: Tensor) -> tuple[str, Tensor]:
    """Copy a few of the outputs of a layer, so that the others can be freed."""
    step = max(1, output.numel() // _COMPARED)
    chosen = output.detach().flatten()[::step]
    return call.map.name, chosen.to(torch.float32, copy=True)


def _require_equal(
    first: Sequence[tuple[str, Tensor]], second: Sequence[tuple[str, Tensor]]
) -> None:
    """Compare the outputs of two runs on the same mini-batch."""
    for (name, one), (other_name, other) in itertools.zip_longest(
        first, second, fillvalue=("nothing", torch.empty(0))
    ):
        close = name == other_name and torch.allclose(
            one, other, 0.0, _DIFFERENCE * float(one.abs().max()), equal_nan=True
        )
        if not close:
            raise PruningError(
                f"{name} computes other values when the network runs a second time on the "
                "same mini-batch with the same random numbers, so that its outputs cannot "
                "be reconstructed; look for state that a forward pass changes, and for "
                "random numbers from a generator of the network's own"
            )


@torch.no_grad()
def _add_inputs(surveyed: Surveyed, inputs: Tensor, outputs: Tensor) -> None:
    for x, _ in surveyed.map.pieces(inputs, outputs):
        x = at_least_float32(x)
        # Autocast of the loss would round the sums to 16 bits.
        with torch.autocast(x.device.type, enabled=False):
            product = (x.mT @ x).double()
        surveyed.inputs = (
            product if surveyed.inputs is None else surveyed.inputs + product
        )


def _add_gradient(surveyed: Surveyed, gradient: Tensor) -> float:
    """Add the mean squares of the gradients of the outputs; return their sum."""
    rows = surveyed.map.channels_last(gradient).flatten(0, -2)
    squares = at_least_float32(rows).square().sum(dim=0, dtype=torch.float64)
    if not bool(squares.isfinite().all()):
        raise PruningError(
            f"the gradient of the outputs of {surveyed.map.name} is not finite; set "
            "layerwise.output_weights=False"
        )
    each = squares / max(1, len(rows))
    surveyed.output_weights += each.view(surveyed.output_weights.shape)
    return float(squares.sum().sqrt())


def _overlaps(linear: LinearMap, found: Mapping[MapKey, Surveyed]) -> bool:
    """Return whether rows of a weight have run already in another combination."""
    return any(
        other.map.name == linear.name
        and linear.first < other.map.first + other.map.shape[0]
        and other.map.first < linear.first + linear.shape[0]
        for other in found.values()
    )


def _require_all(
    parameters: Mapping[str, nn.Parameter], found: Sequence[Surveyed], number: int
) -> None:
    missing = []
    for name, parameter in parameters.items():
        rows = sum(s.map.shape[0] for s in found if s.map.name == name)
        if rows != parameter.shape[0]:
            missing.append(name)
    if missing:
        raise ConfigurationError(
            f"criterion='layerwise' prunes linear and convolution layers that run in every "
            f"forward pass, but these weights did not run as such on {number} mini-batches: "
            f"{', '.join(missing[:8])}; leave them out with selection.exclude, or use "
            "another criterion."
        )
