"""From mini-batches to gradient rows, spread over the ranks.

Gradient i is the gradient of the mean loss of the i-th mini-batch. Consecutive gradients
form micro-batches of a number that does not depend on the ranks: rank k mod R computes
micro-batch k, in one pass where that gives the same numbers as one by one, and each rank
receives its own slice of it.
"""

from __future__ import annotations

__all__ = ["Derivative", "collect_gradients", "iterate_chunks", "micro_batch_size"]

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

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
)
from lightning_woodfisher.distributed.communicator import Communicator, Pending
from lightning_woodfisher.fisher.config import Collection, RowDtype
from lightning_woodfisher.gradients.nonfinite import (
    NonFiniteError,
    SkippedGradients,
)
from lightning_woodfisher.gradients.per_sample import per_sample_rows, why_not

# A micro-batch holds at most so many gradients, samples, and bytes of rows.
_MOST_GRADIENTS = 32
_MOST_SAMPLES = 128
_MOST_BYTES = 2**28
# Fewer would be shared unevenly by the ranks; but tiny ones are no faster than a loop.
_MICRO_BATCHES_WANTED = 8
_FEWEST_GRADIENTS = 8
# A gradient computed with others is compared with the same one alone: in each micro-batch
# that begins another so many. Apart from rounding they must be equal.
_GRADIENTS_PER_CHECK = 128
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
_TOLERANCE_16_BIT = 1e-1
# The rounding of a batch does not shrink with the gradient of a sample that fits well.
_SHARE_OF_LARGEST = 1e-2

# Given a scalar loss and its number, one tensor (or None for zeros) for each parameter.
Derivative = Callable[[Tensor, int], Sequence[Tensor | None]]


def collect_gradients(
    source: LossSource,
    batches: Batches,
    parameters: Mapping[str, nn.Parameter],
    active: Mapping[str, Tensor],
    shard_sizes: Sequence[int],
    count: int,
    comm: Communicator,
    seed: int,
    losses: list[float],
    tick: Callable[[int], object] = lambda _: None,
    *,
    collection: Collection = "auto",
    row_dtype: RowDtype = "float32",
    note: Callable[[str], object] = lambda _: None,
    derivative: Derivative | None = None,
    skipped: SkippedGradients | None = None,
) -> Iterator[Tensor]:
    """Compute the gradients of this rank and yield this rank's slice of all of them.

    The exchange of one round runs while the next micro-batch is computed.

    Args:
        source: where losses come from, with its session entered.
        batches: the mini-batches.
        parameters: what the gradient is taken of.
        active: int64 positions of the active weights in each flattened parameter.
        shard_sizes: active weights of every rank.
        count: N.
        comm: the ranks.
        seed: gradient i runs under ``derive_seed(seed, i)``, or its micro-batch under
            that of its first one.
        losses: receives the N losses, in order, when all are done. Of a micro-batch
            computed in one pass only the mean is known; it stands for each.
        tick: called with the number of gradients that have been done by all ranks.
        collection: ``"loop"`` forbids to compute several gradients in one pass.
        row_dtype: ``"bfloat16"`` rounds the rows before they are exchanged.
        note: called when all are done with ``"per-sample"``, or ``"loop: <reason>"``;
            the same on every rank.
        derivative: what a row holds instead of the gradient, given the loss and i; goes
            with ``collection="loop"``.
        skipped: learns which gradients are not finite and left out, if any may be. Their
            losses are left out, too.

    Yields:
        Tensors of shape ``[n, D_r]``: gradients in order of i.
    """
    _require_trainable(parameters)
    skipped = skipped or SkippedGradients(0, comm)
    maker = _Rows(source, batches, parameters, active, seed, derivative, skipped)
    maker.reason = _why_loop(source, batches, parameters, collection)
    at_once = 1
    if not maker.reason:
        at_once = micro_batch_size(count, batches.size or 1, sum(shard_sizes))
        maker.reason = "" if at_once > 1 else "one gradient fills a micro-batch"
    dtype = common_dtype(parameters.values())
    sent_dtype = torch.bfloat16 if row_dtype == "bfloat16" else dtype
    pending: Pending | None = None
    kept_before: Tensor | None = None
    # BatchNorm statistics differ between ranks in the middle of training.
    comm.broadcast(source.model.buffers())
    for start in range(0, count, comm.world_size * at_once):
        firsts = [start + rank * at_once for rank in range(comm.world_size)]
        counts = [max(0, min(at_once, count - first)) for first in firsts]
        first, number = firsts[comm.rank], counts[comm.rank]
        rows: Tensor | None = None
        if number:
            # Memory that runs out here leaves nothing to send to the others.
            with comm.failing_alone():
                rows = torch.empty(
                    number, sum(shard_sizes), dtype=dtype, device=comm.device
                )
            maker.fill(first, rows)
        if start == 0 and at_once > 1:
            # The first micro-batch decides for all, and rank 0 has it.
            undecided = not maker.reason
            maker.reason = comm.broadcast_text(maker.reason)
            if rows is not None and maker.reason and undecided:
                maker.fill(first, rows)
        kept = skipped.find_kept(start, sum(counts))
        maker.failure = maker.failure or skipped.failure
        if comm.world_size == 1 and maker.failure is not None:
            raise maker.failure
        with comm.failing_alone():
            sent = None if rows is None else rows.to(sent_dtype)
        started = comm.exchange(sent, shard_sizes, counts, sent_dtype)
        if pending is not None:
            yield _chosen(pending.wait(), kept_before)
        pending, kept_before = started, kept
        tick(sum(counts))
    if pending is not None:
        yield _chosen(pending.wait(), kept_before)
    comm.raise_together(maker.failure)
    everyone = comm.gather_in_order(maker.losses, count, at_once)
    losses.extend(loss for i, loss in enumerate(everyone) if i not in skipped.indices)
    note(maker.describe(comm))


def iterate_chunks(rows: Iterable[Tensor], size: int) -> Iterator[Tensor]:
    """Regroup rows into chunks of a fixed number of rows.

    Args:
        rows: tensors of shape ``[n, D_r]`` with any n.
        size: rows in a chunk; the last one may be shorter.

    Yields:
        Tensors of shape ``[size, D_r]``, each only until the next one is asked for: they
        share one memory.
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


def _why_loop(
    source: LossSource,
    batches: Batches,
    parameters: Mapping[str, nn.Parameter],
    collection: Collection,
) -> str:
    """Why gradients must be computed one by one, as far as is known before; or ``""``."""
    if collection == "loop":
        return "asked for"
    if any(module.training for module in source.model.modules()):
        return "in training mode samples of a batch may influence each other"
    if not batches.regroupable or batches.size is None:
        return batches.why_not_regroupable
    return why_not(source.model, parameters) or ""


def micro_batch_size(count: int, size: int, weights: int) -> int:
    """Choose how many gradients are computed in one pass.

    Args:
        count: N.
        size: m.
        weights: D.

    Returns:
        A number that depends on the task only, not on the ranks.
    """
    wanted = max(_FEWEST_GRADIENTS, count // _MICRO_BATCHES_WANTED)
    by_memory = _MOST_BYTES // (4 * max(1, weights))
    return max(1, min(wanted, count, _MOST_GRADIENTS, _MOST_SAMPLES // size, by_memory))


class _Rows:
    """Computes the gradients of micro-batches, in one pass where that may be done.

    Attributes:
        reason: why all gradients are computed one by one; ``""`` when they are not.
        losses: of the gradients computed here, by number.
        failure: what went wrong first; nothing is computed afterwards.
    """

    def __init__(
        self,
        source: LossSource,
        batches: Batches,
        parameters: Mapping[str, nn.Parameter],
        active: Mapping[str, Tensor],
        seed: int,
        derivative: Derivative | None,
        skipped: SkippedGradients,
    ) -> None:
        self._source = source
        self._batches = batches
        self._parameters = parameters
        self._active = active
        self._seed = seed
        self._skipped = skipped
        self._derivative = derivative or (
            lambda loss, _: torch.autograd.grad(
                loss, list(parameters.values()), allow_unused=True
            )
        )
        self.reason = ""
        self.losses: dict[int, float] = {}
        self.failure: Exception | None = None
        self._redone = 0

    def fill(self, first: int, rows: Tensor) -> None:
        """Compute a micro-batch; an error goes to ``failure``.

        Args:
            first: number of the first gradient.
            rows: ``[n, D]``; receives gradients ``first`` .. ``first + n - 1``.
        """
        # After a failure the other ranks still need rows to arrive from here.
        if self.failure is not None:
            rows.zero_()
            return
        if not self.reason and len(rows) > 1:
            loss, problem = self._try_together(first, rows)
            if not problem:
                self.losses |= dict.fromkeys(range(first, first + len(rows)), loss)
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
        """Compute a gradient; one that may be left out is noted, and its row is zero."""
        problem: NonFiniteError | None = None
        try:
            self.losses[index] = self._alone(index, row)
        except NonFiniteError as error:
            problem = error
            row.zero_()
        self._skipped.note(index, problem)

    def describe(self, comm: Communicator) -> str:
        """Tell how gradients were computed.

        Args:
            comm: the ranks.

        Returns:
            A note, the same on every rank.
        """
        redone = int(sum(row[0] for row in comm.gather_numbers([self._redone])))
        if self.reason:
            return f"loop: {self.reason}"
        return f"per-sample, but {redone} micro-batches by loop" * (redone > 0) or (
            "per-sample"
        )

    def _try_together(self, first: int, rows: Tensor) -> tuple[float, str]:
        """Fill rows in one pass; return the mean loss and what speaks against them."""
        try:
            loss, dtype = self._together(first, rows)
            return loss, self._mismatch(first, rows, dtype)
        except Exception as error:
            # If it has nothing to do with the pass, it comes again in the loop.
            return math.nan, f"{type(error).__name__}: {error}"

    def _alone(self, index: int, row: Tensor) -> float:
        with seeded(derive_seed(self._seed, index)):
            return _gradient(
                self._source,
                self._batches,
                index,
                self._parameters,
                self._active,
                row,
                self._derivative,
                # Only what may be left out must be told from other errors.
                NonFiniteError if self._skipped.allowed else PruningError,
            )

    def _together(self, first: int, rows: Tensor) -> tuple[float, torch.dtype]:
        """Fill all rows; return the mean loss and the dtype of the backward pass."""
        source, count = self._source, len(rows)
        samples = count * (self._batches.size or 1)
        batch = self._batches.fetch_group(first, count, self._seed)
        scale = source.loss_scale
        while True:
            with seeded(derive_seed(self._seed, first)):
                result = per_sample_rows(
                    source.model,
                    self._parameters,
                    self._active,
                    lambda: source.loss(batch, first),
                    rows,
                    samples,
                    scale,
                )
            if _all_finite(rows):
                return result
            lower = lower_loss_scale(scale)
            if lower is None:
                raise PruningError("a gradient is not finite")
            scale = lower

    def _mismatch(self, first: int, rows: Tensor, dtype: torch.dtype) -> str:
        """Compare some rows with the same gradients alone; tell what differs, or ``""``."""
        if first % _GRADIENTS_PER_CHECK >= len(rows):
            return ""
        largest = float(torch.linalg.vector_norm(rows, dim=1).max())
        alone = torch.empty_like(rows[0])
        for index in (0, len(rows) - 1) if first == 0 else (0,):
            self._alone(first + index, alone)
            norm = max(float(alone.norm()), _SHARE_OF_LARGEST * largest)
            error = float((alone - rows[index]).norm())
            if error > _TOLERANCE.get(dtype, _TOLERANCE_16_BIT) * norm:
                return (
                    f"gradient {first + index} alone differs by {error / norm:.1e} of its "
                    "norm, so the loss is no mean over independent samples"
                )
        return ""


def _gradient(
    source: LossSource,
    batches: Batches,
    index: int,
    parameters: Mapping[str, nn.Parameter],
    active: Mapping[str, Tensor],
    row: Tensor,
    derivative: Derivative,
    kind: type[PruningError],
) -> float:
    """Write one gradient into ``row`` and return the loss."""
    batch = batches.fetch(index)
    scale = source.loss_scale
    while True:
        loss = differentiable_loss(source, batches, index, batch, kind)
        # autograd.grad never touches .grad or the hooks that DDP hangs on it.
        gradients = derivative(loss * scale, index)
        start = 0
        for name, gradient in zip(parameters, gradients, strict=True):
            where = active[name]
            target = row[start : start + len(where)]
            start += len(where)
            if gradient is None:
                target.zero_()
            else:
                if gradient.is_sparse:
                    gradient = gradient.to_dense()
                # Converted before it is unscaled: float16 would underflow.
                target.copy_(gradient.detach().reshape(-1)[where]).div_(scale)
        if _all_finite(row):
            return float(loss.detach())
        # float16 has overflowed under the scale of the GradScaler; a smaller one may do.
        lower = lower_loss_scale(scale)
        if lower is None:
            raise kind(_name_non_finite(batches, index, parameters, gradients))
        scale = lower


def _require_trainable(parameters: Mapping[str, nn.Parameter]) -> None:
    frozen = [name for name, p in parameters.items() if not p.requires_grad]
    if frozen:
        raise PruningError(
            f"selected weights are frozen (requires_grad is False), so that they have no "
            f"gradient: {', '.join(frozen[:8])}; prune before they are frozen or after "
            "they are released, or leave them out with selection.exclude"
        )


def _name_non_finite(
    batches: Batches,
    index: int,
    parameters: Mapping[str, nn.Parameter],
    gradients: Sequence[Tensor | None],
) -> str:
    bad = [
        name
        for name, gradient in zip(parameters, gradients, strict=True)
        if gradient is not None and not bool(gradient.isfinite().all())
    ]
    return f"gradient {index} ({batches.describe(index)}) is not finite in {', '.join(bad)}"


def _chosen(rows: Tensor, kept: Tensor | None) -> Tensor:
    return rows if kept is None else rows[kept]


def _all_finite(values: Tensor) -> bool:
    # The sum is fast, but may overflow where no value does.
    return bool(values.sum().isfinite()) or bool(values.isfinite().all())
