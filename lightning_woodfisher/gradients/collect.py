"""Turn mini-batches into gradient rows, shared by the ranks.

Gradient i is the gradient of the mean loss of mini-batch i. Consecutive gradients form
micro-batches whose size does not depend on the number of ranks. Rank k mod R computes
micro-batch k, in one pass if that gives the same numbers as one pass for each gradient, and
each rank receives its own columns.
"""

from __future__ import annotations

__all__ = ["Derivative", "collect_gradients", "iterate_chunks", "micro_batch_size"]

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_woodfisher.base.errors import PruningError
from lightning_woodfisher.data.batches import Batches, leaves_of
from lightning_woodfisher.data.isolation import (
    RandomStates,
    derive_seed,
    preserve_random_states,
    reseed,
)
from lightning_woodfisher.data.losses import (
    differentiable_loss,
    differentiate,
)
from lightning_woodfisher.distributed.communicator import Pending
from lightning_woodfisher.fisher.config import Collection, RowDtype
from lightning_woodfisher.gradients.lockstep import Lockstep, SharedPass
from lightning_woodfisher.gradients.nonfinite import (
    NonFiniteError,
    SkippedGradients,
)
from lightning_woodfisher.gradients.per_sample import fill_rows, find_obstacle
from lightning_woodfisher.gradients.task import GradientTask

# Limits of a micro-batch: gradients, samples, and bytes of rows.
_MAX_GRADIENTS = 32
_MAX_SAMPLES = 128
_MAX_BYTES = 2**28
# Fewer micro-batches would be shared unevenly by the ranks, but tiny ones are no faster than
# a loop.
_MICRO_BATCHES_WANTED = 8
_FEWEST_GRADIENTS = 8
# One gradient in this number is also computed alone and compared with the one from the
# micro-batch. They must be equal except for rounding.
_GRADIENTS_PER_CHECK = 128
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
_TOLERANCE_16_BIT = 1e-1
# The rounding error of a batch does not shrink with the gradient of a well-fitted sample.
_SHARE_OF_LARGEST = 1e-2

# Maps a scalar loss and its number to one tensor (or None for zeros) for each parameter.
Derivative = Callable[[Tensor, int], Sequence[Tensor | None]]


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
    computer = _RowComputer(task, batches, derivative, skipped)
    at_once = computer.choose_micro_batch_size(collection, width)
    sent_dtype = torch.bfloat16 if row_dtype == "bfloat16" else task.dtype
    started: list[tuple[Pending, Tensor | None]] = []
    # BatchNorm statistics differ between ranks in the middle of training.
    comm.broadcast(task.source.model.buffers())
    for start in range(0, count, comm.world_size * at_once):
        firsts = [start + rank * at_once for rank in range(comm.world_size)]
        counts = [max(0, min(at_once, count - first)) for first in firsts]
        first, number = firsts[comm.rank], counts[comm.rank]
        # After an error here this rank would have nothing to send to the others.
        with comm.failing_alone():
            rows = torch.empty(number, width, dtype=task.dtype, device=comm.device)
        computer.fill(first, rows)
        if start == 0 and at_once > 1:
            computer.agree_on_method(first, rows)
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


def micro_batch_size(count: int, size: int, weights: int) -> int:
    """Choose how many gradients are computed in one pass.

    Args:
        count: N.
        size: m.
        weights: D.

    Returns:
        A number that does not depend on the ranks.
    """
    wanted = max(_FEWEST_GRADIENTS, count // _MICRO_BATCHES_WANTED)
    by_memory = _MAX_BYTES // (4 * max(1, weights))
    return max(1, min(wanted, count, _MAX_GRADIENTS, _MAX_SAMPLES // size, by_memory))


class _RowComputer:
    """Computes the gradients of micro-batches, in one pass if possible.

    Attributes:
        reason: why all gradients are computed one by one; ``""`` if they are not.
        losses: losses of the gradients computed here, by number.
        failure: the first error; nothing is computed afterwards.
    """

    def __init__(
        self,
        task: GradientTask,
        batches: Batches,
        derivative: Derivative | None,
        skipped: SkippedGradients,
    ) -> None:
        self._task = task
        self._batches = batches
        self._skipped = skipped
        self._derivative = derivative
        self.reason = ""
        self.losses: dict[int, float] = {}
        self.failure: Exception | None = None
        self._redone = 0
        self._lockstep = Lockstep(task.source.model, task.parameters)
        # With a pattern, all weights of a tensor may come in another order.
        self._whole = {
            name
            for name, parameter in task.parameters.items()
            if len(where := task.positions[name]) == parameter.numel()
            and torch.equal(where, torch.arange(len(where), device=where.device))
        }

    def choose_micro_batch_size(self, collection: Collection, width: int) -> int:
        """Return how many gradients of D = ``width`` weights form a micro-batch."""
        self.reason = self._reason_for_loop(collection)
        if self.reason:
            return 1
        at_once = micro_batch_size(self._task.count, self._batches.size or 1, width)
        self.reason = "" if at_once > 1 else "one gradient fills a micro-batch"
        return at_once

    def _reason_for_loop(self, collection: Collection) -> str:
        """Return why gradients must be computed one by one, if known in advance, or ``""``."""
        model, batches = self._task.source.model, self._batches
        if self._derivative is not None:
            return "Hessian products"
        if collection == "loop":
            return "requested"
        if any(module.training for module in model.modules()):
            return "in training mode samples of a batch may influence each other"
        if not batches.regroupable or batches.size is None:
            return batches.why_not_regroupable
        return find_obstacle(model, self._task.parameters) or ""

    def agree_on_method(self, first: int, rows: Tensor) -> None:
        """Use the method of the first micro-batch, which rank 0 has, on all ranks."""
        was_together = not self.reason
        self.reason = self._task.comm.broadcast_text(self.reason)
        if self.reason and was_together:
            self.fill(first, rows)

    def fill(self, first: int, rows: Tensor) -> None:
        """Compute a micro-batch; an error is stored in ``failure``.

        Args:
            first: number of the first gradient.
            rows: ``[n, D]``; receives gradients ``first`` .. ``first + n - 1``.
        """
        # After a failure the other ranks still wait for rows from this one.
        if self.failure is not None:
            rows.zero_()
            return
        if not self.reason and len(rows) > 1:
            losses, problem = self._try_together(first, rows)
            if not problem:
                self.losses |= dict(enumerate(losses, start=first))
                return
            if first == 0:
                self.reason = problem
            else:
                self._redone += 1
        try:
            for index, row in enumerate(rows, start=first):
                self._fill_one(index, row)
        except Exception as error:
            self.failure = error
            rows.zero_()

    def _fill_one(self, index: int, row: Tensor) -> None:
        """Compute a gradient; one that may be left out is recorded, and its row is zero."""
        problem: NonFiniteError | None = None
        try:
            self.losses[index] = self._alone(index, row)
        except NonFiniteError as error:
            problem = error
            row.zero_()
        self._skipped.record(index, problem)

    def describe(self) -> str:
        """Describe how gradients were computed; the same text on every rank."""
        counts = self._task.comm.gather_numbers([self._redone])
        redone = int(sum(row[0] for row in counts))
        if self.reason:
            return f"loop: {self.reason}"
        return "per-sample" + f", but {redone} micro-batches by loop" * (redone > 0)

    def _try_together(self, first: int, rows: Tensor) -> tuple[list[float], str]:
        """Fill rows in one pass; return the losses and the problem found, or ``""``."""
        try:
            losses, dtype = self._together(first, rows)
            return losses, self._mismatch(first, rows, dtype)
        except PruningError as error:
            return [], str(error)
        except Exception as error:
            # An error that does not come from the single pass is raised again in the loop.
            return [], f"{type(error).__name__}: {error}"

    def _together(self, first: int, rows: Tensor) -> tuple[list[float], torch.dtype]:
        """Fill all rows; return the losses and the dtype of the backward pass."""
        task, count = self._task, len(rows)
        positions = {name: task.positions[name] for name in task.parameters}
        batches: list[Any] = []
        states: list[RandomStates] = []
        versions: list[int] = []

        def compute(number: int) -> Tensor:
            if number < len(batches):
                states[number].restore()
            else:
                reseed(derive_seed(task.seed, first + number))
                batches.append(self._batches.fetch(first + number))
                versions.extend(_versions(batches[-1]))
                states.append(RandomStates.capture())
            return task.source.loss(batches[number], first + number)

        with preserve_random_states():
            for scale in task.loss_scales():
                # Another one is compared in each micro-batch.
                compared = first // count % (count - 1)
                found = self._lockstep.run(count, compute, compared)
                if _versions(batches) != versions:
                    raise PruningError("the loss changes its batch in place")
                losses = torch.stack([loss.detach().double() for loss in found.losses])
                if not bool(losses.isfinite().all()):
                    raise PruningError("a loss is not finite")
                dtype = fill_rows(
                    found.layers, found.losses, positions, self._whole, rows, scale
                )
                self._require_exact(found, dtype)
                if _all_finite(rows):
                    return losses.tolist(), dtype
        raise PruningError("a gradient is not finite")

    def _require_exact(self, found: SharedPass, dtype: torch.dtype) -> None:
        """Raise an error if the losses cannot be those of a loop."""
        if found.unequal and bool(torch.stack(found.unequal).any()):
            raise PruningError(
                "a loss that is computed twice calls the network with other inputs"
            )
        for distance, norm in found.distances:
            error = float(distance / norm.clamp(min=torch.finfo(torch.float64).tiny))
            if error > _tolerance(dtype):
                raise PruningError(
                    f"the outputs of the network alone differ by {error:.1e} of their "
                    "norm, so samples of a batch influence each other"
                )

    def _alone(self, index: int, row: Tensor) -> float:
        """Write one gradient into ``row`` and return its loss."""
        task, batches = self._task, self._batches
        # Other errors must stay errors if non-finite gradients are left out.
        kind = NonFiniteError if self._skipped.allowed else PruningError
        positions = [task.positions[name] for name in task.parameters]
        targets = torch.split(row, [len(where) for where in positions])
        gradients: Sequence[Tensor | None] = ()
        with task.seeded(index):
            batch = batches.fetch(index)
            for scale in task.loss_scales():
                loss = differentiable_loss(task.source, batches, index, batch, kind)
                if self._derivative is not None:
                    gradients = self._derivative(loss * scale, index)
                else:
                    gradients = differentiate(loss * scale, [*task.parameters.values()])
                for target, where, gradient in zip(
                    targets, positions, gradients, strict=True
                ):
                    if gradient is None:
                        target.zero_()
                        continue
                    if gradient.is_sparse:
                        gradient = gradient.to_dense()
                    # Converted before it is unscaled: float16 would underflow.
                    target.copy_(gradient.detach().reshape(-1)[where]).div_(scale)
                if _all_finite(row):
                    return float(loss.detach())
        bad = [
            name
            for name, gradient in zip(task.parameters, gradients, strict=True)
            if gradient is not None and not bool(gradient.isfinite().all())
        ]
        raise kind(
            f"gradient {index} ({batches.describe(index)}) is not finite in "
            f"{', '.join(bad)}"
        )

    def _mismatch(self, first: int, rows: Tensor, dtype: torch.dtype) -> str:
        """Compare some rows with gradients computed alone; return a difference, or ``""``."""
        if first % _GRADIENTS_PER_CHECK >= len(rows):
            return ""
        largest = float(torch.linalg.vector_norm(rows, dim=1).max())
        alone = torch.empty_like(rows[0])
        for index in (0, len(rows) - 1) if first == 0 else (0,):
            self._alone(first + index, alone)
            norm = max(float(alone.norm()), _SHARE_OF_LARGEST * largest)
            error = float((alone - rows[index]).norm())
            if error > _tolerance(dtype) * norm:
                return (
                    f"gradient {first + index} alone differs by {error / norm:.1e} of its "
                    "norm, so samples of a batch influence each other"
                )
        return ""


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


def _tolerance(dtype: torch.dtype) -> float:
    return _TOLERANCE.get(dtype, _TOLERANCE_16_BIT)


def _versions(batches: Any) -> list[int]:
    """Count the changes in place of each tensor."""
    return [leaf._version for leaf in leaves_of(batches) if isinstance(leaf, Tensor)]


def _all_finite(values: Tensor) -> bool:
    # The sum is fast, but may overflow although all values are finite.
    return bool(values.sum().isfinite()) or bool(values.isfinite().all())
