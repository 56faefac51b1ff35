"""Kronecker factors of the Fisher of whole layers, from hooks and batched passes.

A layer has inputs a and output gradients g (of the loss of one sample), S samples and P
positions (P = S without tokens and pixels)::

    A = Σ aaᵀ / S  [I, I],    G = Σ ggᵀ / P  [O, O],    F ≈ G ⊗ A  of weights [O, I]

as in Grosse & Martens (2016), who treat positions as independent and identically
distributed. The inputs of a convolution are its patches. The sums of a micro-batch are sent,
like gradient rows, to the rank that owns the layer, which adds them in order.

Legend: S samples, P positions, I/O inputs and outputs, F numbers of all factors.
"""

from __future__ import annotations

__all__ = ["KroneckerFactors", "collect_factors", "factor_sides", "require_factors"]

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from lightning_woodfisher.base.errors import ConfigurationError, PruningError
from lightning_woodfisher.data.batches import Batches
from lightning_woodfisher.data.losses import (
    differentiable_loss,
    differentiate,
)
from lightning_woodfisher.gradients.per_sample import (
    LayerCall,
    has_inputs_first,
    is_plain,
    record_calls,
    unfold,
)
from lightning_woodfisher.gradients.task import GradientTask
from lightning_woodfisher.weights.partition import Partition

# Patches of a convolution are computed for this many bytes of samples at once.
_PATCH_BYTES = 2**26


@dataclass(frozen=True)
class KroneckerFactors:
    """Kronecker factors of one layer.

    For a weight ``[I, O]`` (``Conv1D``) the factors change places.

    Attributes:
        inputs: A, float64 ``[I, I]``.
        outputs: G, float64 ``[O, O]``.
        positions: int64 positions of the active weights in the flattened ``[O, I]``.
    """

    inputs: Tensor
    outputs: Tensor
    positions: Tensor


def factor_sides(shape: Sequence[int]) -> tuple[int, int]:
    """Return the sides of the two factors.

    Args:
        shape: shape of a layer's weight.

    Returns:
        Outputs O and inputs I; O·I is the number of weights.
    """
    return shape[0], math.prod(shape[1:])


def require_factors(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
    """Raise an error for weights whose Fisher is not a Kronecker product.

    Args:
        model: the network.
        parameters: the parameters to prune, by name.

    Raises:
        ConfigurationError: if there is such a weight; names it and its layer.
    """
    names = {id(parameter): name for name, parameter in parameters.items()}
    for module in model.modules():
        for key, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in names:
                continue
            kind = f"belongs to a {type(module).__name__}"
            if isinstance(module, _ConvNd) and module.groups > 1:
                kind += f" with groups={module.groups}"
            elif key == "weight" and is_plain(module) and parameter.requires_grad:
                continue
            elif not parameter.requires_grad:
                kind = "is frozen"
            raise ConfigurationError(
                "criterion='kfac' handles weights of linear layers and of convolutions "
                f"without groups that are trained, but {names[id(parameter)]} {kind}; "
                "leave it out with selection.exclude, or use another criterion."
            )


def collect_factors(
    task: GradientTask, batches: Batches, partition: Partition
) -> list[KroneckerFactors]:
    """Compute the factors of all layers and give each rank those that it owns.

    Rank k mod R computes micro-batch k in one forward and one backward pass.

    Args:
        task: the weights of the layers, the number of micro-batches, and their seed.
        batches: the micro-batches.
        partition: one block for each tensor that has active weights.

    Returns:
        The factors of this rank's layers, in order.
    """
    comm, count, parameters = task.comm, task.count, task.parameters
    require_factors(task.source.model, parameters)
    names = list(parameters)
    ranks = range(comm.world_size)
    owned = [[names[u.segment] for u in partition.owned(rank)] for rank in ranks]
    sides = {name: factor_sides(p.shape) for name, p in parameters.items()}
    sizes = [sum(_length(*sides[name]) for name in mine) for mine in owned]
    wanted = {name: parameters[name] for mine in owned for name in mine}
    total = torch.zeros(sizes[comm.rank], dtype=torch.float64, device=comm.device)
    own: dict[int, float] = {}
    failure: Exception | None = None
    comm.broadcast(task.source.model.buffers())
    for start in range(0, count, comm.world_size):
        index = start + comm.rank
        counts = [int(start + rank < count) for rank in ranks]
        shape = counts[comm.rank], sum(sizes)
        rows = torch.zeros(shape, dtype=task.dtype, device=comm.device)
        # After a failure the other ranks still wait for rows from this one.
        if len(rows) and failure is None:
            try:
                with task.seeded(index):
                    own[index] = _fill(task, batches, index, wanted, rows[0])
            except Exception as error:
                failure = error
        for row in comm.exchange(rows, sizes, counts).wait():
            total += row
        task.tick(sum(counts))
    comm.raise_together(failure)
    task.losses.extend(comm.gather_in_order(own, count))
    mine = owned[comm.rank]
    pieces = torch.split(total, [_length(*sides[name]) for name in mine])
    return [
        _normalize(piece, *sides[name], task.positions[name])
        for name, piece in zip(mine, pieces, strict=True)
    ]


def _fill(
    task: GradientTask,
    batches: Batches,
    index: int,
    parameters: Mapping[str, nn.Parameter],
    row: Tensor,
) -> float:
    """Write the sums of one micro-batch into ``row`` and return its loss."""
    batch = batches.fetch(index)
    for scale in task.source.loss_scales():
        with record_calls(task.source.model, parameters) as calls:
            loss = differentiable_loss(task.source, batches, index, batch)
        gradients: tuple[Tensor | None, ...] = ()
        if calls:
            gradients = differentiate(loss * scale, [call.edge for call in calls])
        row.zero_()
        _add_calls(calls, gradients, parameters, row, scale, batches.size)
        if bool(row.isfinite().all()):
            return float(loss.detach())
    raise PruningError(
        f"a Kronecker factor of micro-batch {index} ({batches.describe(index)}) is not "
        "finite"
    )


@torch.no_grad()
def _add_calls(
    calls: Sequence[LayerCall],
    gradients: Sequence[Tensor | None],
    parameters: Mapping[str, nn.Parameter],
    row: Tensor,
    scale: float,
    samples: int | None,
) -> None:
    """Add the products of each call to the part of the row of its layer."""
    lengths = [_length(*factor_sides(p.shape)) for p in parameters.values()]
    parts = dict(zip(parameters, torch.split(row, lengths), strict=True))
    for call, gradient in zip(calls, gradients, strict=True):
        name = call.names["weight"]
        outputs, inputs = factor_sides(parameters[name].shape)
        a, g, counts = torch.split(parts[name], [inputs**2, outputs**2, 2])
        at_samples, at_positions = 0, 1
        if has_inputs_first(call.layer):
            a, g, inputs, outputs = g, a, outputs, inputs
            at_samples, at_positions = 1, 0
        # Undo the mean over samples: the factors are those of single samples.
        number = samples or len(call.inputs)
        positions = 0
        for patches in _patches(call, inputs, row.dtype):
            a.view(inputs, inputs).addmm_(patches.mT, patches)
            positions += len(patches)
        if gradient is not None:
            if isinstance(call.layer, _ConvNd):
                gradient = gradient.movedim(1, -1)
            rows = gradient.reshape(-1, outputs).to(row.dtype) * (number / scale)
            g.view(outputs, outputs).addmm_(rows.mT, rows)
        # A layer that is called twice has the same samples, but more positions.
        counts[at_samples] = number
        counts[at_positions] += positions


def _patches(call: LayerCall, inputs: int, dtype: torch.dtype) -> Iterable[Tensor]:
    """Yield the inputs that the weight of a layer multiplies, ``[positions, I]``."""
    if not isinstance(call.layer, _ConvNd):
        yield call.inputs.reshape(-1, inputs).to(dtype)
        return
    # Apart from padding there are no more positions than inputs. The chunks depend on the
    # shape only, not on the free memory.
    image = call.inputs[0, 0].numel() * inputs * dtype.itemsize
    for images in torch.split(call.inputs, max(1, _PATCH_BYTES // max(1, image))):
        windows = unfold(call.layer, images.to(dtype))
        axes = windows.dim() // 2 - 1
        # [S, C, L.., k..] -> [S, L.., C, k..]
        yield windows.movedim(1, 1 + axes).reshape(-1, inputs)


def _normalize(
    sums: Tensor, outputs: int, inputs: int, positions: Tensor
) -> KroneckerFactors:
    a, g, counts = torch.split(sums, [inputs**2, outputs**2, 2])
    counts = counts.clamp(min=1.0)
    return KroneckerFactors(
        (a / counts[0]).view(inputs, inputs),
        (g / counts[1]).view(outputs, outputs),
        positions,
    )


def _length(outputs: int, inputs: int) -> int:
    """Count the numbers sent for one layer: both factors, samples and positions."""
    return inputs**2 + outputs**2 + 2
