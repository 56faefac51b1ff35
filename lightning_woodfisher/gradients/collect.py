"""Turn mini-batches into gradient rows, shared by the ranks.

Gradient i is the gradient of the mean loss of mini-batch i. Consecutive gradients form
micro-batches whose size does not depend on the number of ranks. Rank k mod R computes
micro-batch k, in one pass if that gives the same numbers as one pass for each gradient, and
each rank receives its own columns.
"""

from __future__ import annotations

__all__ = ["collect_gradients", "iterate_chunks"]

import collections
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from lightning_woodfisher.base.errors import PruningError
from lightning_woodfisher.data.batches import Batches
from lightning_woodfisher.distributed.communicator import Pending
from lightning_woodfisher.fisher.config import Collection, RowDtype
from lightning_woodfisher.gradients.nonfinite import SkippedGradients
from lightning_woodfisher.gradients.row_computer import Derivative, RowComputer
from lightning_woodfisher.gradients.task import GradientTask


def collect_gradients(
    task: GradientTask,
    batches: Batches,
    shard_sizes: Sequence[int],
    *,
    collection: Collection = "auto",
    row_dtype: RowDtype = "float32",
    note: Callable[[str], object] = lambda _: None,
    derivative: Derivative | None = None,
    skipped: SkippedGradients | None = None,
) -> Iterator[Tensor]:
    """Compute the gradients of this rank and yield its columns of all gradients.

    The exchange of one round overlaps with the computation of the next micro-batch.

    Args:
        task: the gradients.
        batches: the mini-batches.
        shard_sizes: active weights of every rank, ``[R]``.
        collection: ``"loop"`` computes each gradient in its own pass.
        row_dtype: ``"bfloat16"`` rounds the rows before they are exchanged.
        note: called after the last gradient with ``"per-sample"`` or ``"loop: <reason>"``,
            the same text on every rank.
        derivative: computes Hessian products, one row at a time, in place of gradients.
        skipped: records the gradients that are left out because they are not finite, if
            that is allowed. Their losses are left out, too.

    Yields:
        Tensors of shape ``[n, D_r]``: gradients in order of i.
    """
    _require_trainable(task.parameters)
    comm, count, width = task.comm, task.count, sum(shard_sizes)
    skipped = skipped or SkippedGradients(0, comm)
    computer = RowComputer(task, batches, derivative, skipped)
    at_once = computer.choose_micro_batch_size(collection, width)
    sent_dtype = torch.bfloat16 if row_dtype == "bfloat16" else task.dtype
    started: list[tuple[Pending, Tensor | None]] = []
    # BatchNorm statistics differ between ranks in the middle of training.
    comm.broadcast(task.source.model.buffers())
    for start, counts, rows in _compute_rounds(computer, task, at_once, width):
        kept = skipped.find_kept(start, sum(counts))
        computer.failure = computer.failure or skipped.failure
        if comm.world_size == 1 and computer.failure is not None:
            raise computer.failure
        with comm.failing_alone():
            sent = rows.to(sent_dtype)
        started.append((comm.exchange(sent, shard_sizes, counts), kept))
        if len(started) > 1:
            yield _received(*started.pop(0))
        task.tick(sum(counts))
    for pending, kept in started:
        yield _received(pending, kept)
    comm.raise_together(computer.failure)
    losses = comm.gather_in_order(computer.losses, count, at_once)
    task.losses.extend(
        loss for i, loss in enumerate(losses) if i not in skipped.indices
    )
    note(computer.describe())


def _compute_rounds(
    computer: RowComputer, task: GradientTask, at_once: int, width: int
) -> Iterator[tuple[int, list[int], Tensor]]:
    """Compute the rows of this rank, a micro-batch in each round.

    Yields:
        The first gradient of a round, the gradients of each rank, and those of this one.
    """
    comm, count = task.comm, task.count
    # A GPU computes the next micro-batch while the host checks one.
    ahead = int(comm.device.type == "cuda")
    unchecked: collections.deque[tuple[int, list[int], Tensor, Callable[[], object]]]
    unchecked = collections.deque()
    for start in range(0, count, comm.world_size * at_once):
        firsts = [start + rank * at_once for rank in range(comm.world_size)]
        counts = [max(0, min(at_once, count - first)) for first in firsts]
        first, number = firsts[comm.rank], counts[comm.rank]
        # After an error here this rank would have nothing to send to the others.
        with comm.failing_alone():
            rows = torch.empty(number, width, dtype=task.dtype, device=comm.device)
        check = computer.start(first, rows)
        if start == 0 and at_once > 1:
            check()
            computer.agree_on_method(first, rows)
            check = _nothing
        unchecked.append((start, counts, rows, check))
        if len(unchecked) > ahead:
            yield _checked(*unchecked.popleft())
    for waiting in unchecked:
        yield _checked(*waiting)


def _checked(
    start: int, counts: list[int], rows: Tensor, check: Callable[[], object]
) -> tuple[int, list[int], Tensor]:
    check()
    return start, counts, rows


def _nothing() -> None:
    pass


def iterate_chunks(rows: Iterable[Tensor], size: int) -> Iterator[Tensor]:
    """Regroup rows into chunks of a fixed number of rows.

    Args:
        rows: tensors of shape ``[n, D_r]`` with any n.
        size: rows in a chunk; the last chunk may be shorter.

    Yields:
        Tensors of shape ``[size, D_r]``. They share one memory: a chunk is valid only until
        the next one is requested.
    """
    chunk: Tensor | None = None
    count = 0
    for piece in rows:
        rest = piece
        while not count and len(rest) >= size:
            yield rest[:size]
            rest = rest[size:]
        while len(rest):
            if chunk is None:
                chunk = rest.new_empty(size, rest.shape[1])
            taken, rest = rest[: size - count], rest[size - count :]
            chunk[count : count + len(taken)] = taken
            count += len(taken)
            if count == size:
                yield chunk
                count = 0
    if chunk is not None and count:
        yield chunk[:count]


def _require_trainable(parameters: Mapping[str, nn.Parameter]) -> None:
    frozen = [name for name, p in parameters.items() if not p.requires_grad]
    if frozen:
        raise PruningError(
            f"selected weights are frozen (requires_grad is False), so that they have no "
            f"gradient: {', '.join(frozen[:8])}; prune before they are frozen or after "
            "they are released, or leave them out with selection.exclude"
        )


def _received(pending: Pending, kept: Tensor | None) -> Tensor:
    """Wait for the rows of a round, and drop those that are left out."""
    rows = pending.wait()
    return rows if kept is None else rows[kept]
