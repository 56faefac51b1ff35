"""Gradient rows of a model whose parameters are sharded (FSDP2).

Every rank takes part in every forward and backward pass, because the passes gather
parameters. ``.backward()`` leaves each rank its shard of the gradient, averaged over the
ranks. That shard holds the columns of the row that this rank owns, so no row is exchanged.
"""

from __future__ import annotations

__all__ = ["collect_sharded_gradients"]

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from lightning_woodfisher.base.errors import PruningError
from lightning_woodfisher.data.batches import Batches
from lightning_woodfisher.data.losses import differentiable_loss
from lightning_woodfisher.distributed.dtensor import reshard, to_local
from lightning_woodfisher.gradients.task import GradientTask


def collect_sharded_gradients(
    task: GradientTask,
    size: int,
    *,
    divisible: bool = True,
    choose: Callable[[int, int, int], Batches] | None = None,
) -> Iterator[Tensor]:
    """Compute all gradients on all ranks and yield the columns of this rank.

    Gradient i has the same samples for any number of ranks. If R divides m, each rank
    evaluates m/R of them. Otherwise all ranks evaluate all m, and the mean over ranks of
    equal gradients is that gradient.

    Args:
        task: the gradients; its parameters are sharded.
        size: m.
        divisible: False if the loss of a mini-batch is not the mean of the losses of its
            samples (BatchNorm in training mode).
        choose: returns the mini-batches of N, m and a seed; those of the source by default.

    Yields:
        Tensors of shape ``[1, D_r]``: gradients in order of i.
    """
    comm, model = task.comm, task.source.model
    parts = 1
    choose = task.source.batches if choose is None else choose
    batches = choose(task.count, size, task.seed)
    if divisible and batches.regroupable and size % comm.world_size == 0:
        parts = comm.world_size
        batches = choose(task.count * parts, size // parts, task.seed)
    offset = comm.rank if parts > 1 else 0
    # BatchNorm statistics differ between ranks in the middle of training.
    comm.broadcast(model.buffers())
    own = []
    for index in range(task.count):
        row, value = _gradient(task, batches, index * parts + offset)
        own.append(value)
        yield row.unsqueeze(0)
        task.tick(1)
    reshard(model)
    everyone = comm.gather_numbers(own)[:parts]
    task.losses.extend(sum(values) / parts for values in zip(*everyone, strict=True))


def _gradient(task: GradientTask, batches: Batches, index: int) -> tuple[Tensor, float]:
    """Return this rank's columns of the mean over ranks, and this rank's loss."""
    comm = task.comm
    with task.seeded(index):
        batch = comm.run_together(lambda: batches.fetch(index))
        for scale in task.source.loss_scales():
            loss = comm.run_together(
                lambda: differentiable_loss(task.source, batches, index, batch)
            )
            (loss * scale).backward()  # type: ignore[no-untyped-call]
            row = _take_row(task).div_(scale)
            # Ranks hold different columns of the gradient, but must decide alike.
            bad = (~row.isfinite()).sum().reshape(1)
            if int(comm.sum_integers(bad)) == 0:
                return row, float(loss.detach())
    raise PruningError(f"gradient {index} ({batches.describe(index)}) is not finite")


def _take_row(task: GradientTask) -> Tensor:
    """Move the gradient out of ``.grad``, ``[D_r]``."""
    if all(parameter.grad is None for parameter in task.parameters.values()):
        raise PruningError(
            "the backward pass has left no gradient in the shards of the selected "
            "parameters: is set_requires_gradient_sync(False) in force, or does the loss "
            "not depend on them?"
        )
    pieces = []
    for name, parameter in task.parameters.items():
        where = task.positions[name]
        if parameter.grad is None:
            pieces.append(where.new_zeros(len(where), dtype=task.dtype))
        else:
            pieces.append(to_local(parameter.grad).reshape(-1)[where].to(task.dtype))
    for parameter in task.source.model.parameters():
        parameter.grad = None
    return torch.cat(pieces)
