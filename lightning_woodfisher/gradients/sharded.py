"""Gradient rows of a model whose parameters are sharded (FSDP2).

Every rank takes part in every forward and backward pass, for those gather parameters.
``.backward()`` leaves each rank its shard of the gradient, averaged over the ranks: it is
this rank's slice of the row already, and no row is exchanged.
"""

from __future__ import annotations

__all__ = ["collect_sharded_gradients", "sharded_mean_loss"]

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_woodfisher.base.errors import PruningError
from lightning_woodfisher.base.types import common_dtype
from lightning_woodfisher.data.batches import Batches
from lightning_woodfisher.data.isolation import derive_seed, seeded
from lightning_woodfisher.data.losses import (
    LossSource,
    differentiable_loss,
    lower_loss_scale,
    run_loss,
)
from lightning_woodfisher.distributed.communicator import Communicator
from lightning_woodfisher.distributed.dtensor import reshard, to_local


def collect_sharded_gradients(
    source: LossSource,
    count: int,
    size: int,
    parameters: Mapping[str, nn.Parameter],
    active: Mapping[str, Tensor],
    comm: Communicator,
    seed: int,
    losses: list[float],
    tick: Callable[[int], object] = lambda _: None,
    divisible: bool = True,
    choose: Callable[[int, int, int], Batches] | None = None,
) -> Iterator[Tensor]:
    """Compute all gradients on all ranks and yield this rank's slice of them.

    Gradient i has the same samples for any number of ranks. Where R divides m each rank
    evaluates m/R of them; otherwise all ranks evaluate all m, and the mean over ranks of
    equal gradients is that gradient.

    Args:
        source: where losses come from, with its session entered.
        count: N.
        size: m.
        parameters: what the gradient is taken of, sharded.
        active: int64 positions of the active weights in each flattened local part.
        comm: the ranks.
        seed: of the samples; gradient i runs under ``derive_seed(seed, i)``.
        losses: receives the N losses, in order, when all are done.
        tick: called with the number of gradients that have been done.
        divisible: False when the loss of a mini-batch is not the mean of its samples'
            (BatchNorm in training mode).
        choose: makes the mini-batches of N, m and a seed; by default those of the source.

    Yields:
        Tensors of shape ``[1, D_r]``: gradients in order of i.
    """
    parts = 1
    choose = source.batches if choose is None else choose
    batches = choose(count, size, seed)
    if divisible and batches.regroupable and size % comm.world_size == 0:
        parts = comm.world_size
        batches = choose(count * parts, size // parts, seed)
    offset = comm.rank if parts > 1 else 0
    # BatchNorm statistics differ between ranks in the middle of training.
    comm.broadcast(source.model.buffers())
    own = []
    for index in range(count):
        row, value = _gradient(
            source, batches, index * parts + offset, parameters, active, comm, seed
        )
        own.append(value)
        yield row.unsqueeze(0)
        tick(1)
    reshard(source.model)
    everyone = comm.gather_numbers(own)[:parts]
    losses.extend(sum(values) / parts for values in zip(*everyone, strict=True))


@torch.no_grad()
def sharded_mean_loss(
    source: LossSource, batches: Batches, count: int, comm: Communicator, seed: int
) -> list[float]:
    """Compute the losses of the mini-batches without gradients, shared by the ranks.

    Args:
        source: where losses come from, with its session entered.
        batches: the mini-batches.
        count: N.
        comm: the ranks.
        seed: the one given to :func:`collect_sharded_gradients`.

    Returns:
        N losses in order, the same on every rank.
    """
    values: list[float] = []
    batch: Any = None
    for first in range(0, count, comm.world_size):
        # A rank that is left without a batch must still gather parameters with the others.
        index = min(first + comm.rank, count - 1)
        with seeded(derive_seed(seed, index)):
            if first == 0 or first + comm.rank < count:
                batch = comm.run_together(functools.partial(batches.fetch, index))
            else:
                comm.raise_together()
            value = comm.run_together(functools.partial(run_loss, source, batch, index))
            values.append(float(value))
    reshard(source.model)
    columns = comm.gather_numbers(values)
    return [columns[i % comm.world_size][i // comm.world_size] for i in range(count)]


def _gradient(
    source: LossSource,
    batches: Batches,
    index: int,
    parameters: Mapping[str, nn.Parameter],
    active: Mapping[str, Tensor],
    comm: Communicator,
    seed: int,
) -> tuple[Tensor, float]:
    """Give this rank's slice of the mean over ranks, and this rank's loss."""
    scale = source.loss_scale
    with seeded(derive_seed(seed, index)):
        batch = comm.run_together(lambda: batches.fetch(index))
        while True:
            loss = comm.run_together(
                lambda: differentiable_loss(source, batches, index, batch)
            )
            (loss * scale).backward()  # type: ignore[no-untyped-call]
            row = _take_row(source.model, parameters, active).div_(scale)
            # Ranks see different parts of the gradient, but must decide alike.
            bad = (~row.isfinite()).sum().reshape(1)
            if int(comm.sum_integers(bad)) == 0:
                return row, float(loss.detach())
            # float16 has overflowed under the scale of the GradScaler.
            lower = lower_loss_scale(scale)
            if lower is None:
                raise PruningError(
                    f"gradient {index} ({batches.describe(index)}) is not finite"
                )
            scale = lower


def _take_row(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    active: Mapping[str, Tensor],
) -> Tensor:
    """Move the gradient out of ``.grad``, ``[D_r]``."""
    dtype = common_dtype(parameters.values())
    if all(parameter.grad is None for parameter in parameters.values()):
        raise PruningError(
            "the backward pass has left no gradient in the shards of the selected "
            "parameters: is set_requires_gradient_sync(False) in force, or does the loss "
            "not depend on them?"
        )
    pieces = []
    for name, parameter in parameters.items():
        where = active[name]
        if parameter.grad is None:
            pieces.append(torch.zeros(len(where), dtype=dtype, device=where.device))
        else:
            pieces.append(to_local(parameter.grad).reshape(-1)[where].to(dtype))
    for parameter in model.parameters():
        parameter.grad = None
    return torch.cat(pieces)
