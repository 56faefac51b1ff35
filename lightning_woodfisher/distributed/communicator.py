"""Every collective of the package. On one rank each of them is the identity.

Only integers are added, because the order of floating-point additions depends on the number
of ranks; :mod:`.exact_sum` converts floating-point numbers to integers.

A rank that fails must not leave the others waiting for it. Every collective except
:meth:`Communicator.exchange` therefore begins with :meth:`Communicator.raise_together`, the
sum of one integer over the ranks. Work that contains collectives runs inside
:meth:`Communicator.failing_together`, in which a rank that has failed takes part in the next
of these sums and reports its error there.

If a collective itself fails, because a rank has ended or does not answer within the timeout
of the process group, the ranks can no longer communicate. The rank then stops without another
collective (:meth:`Communicator.failing_alone`), and the other ranks stop because it has ended.
"""

from __future__ import annotations

__all__ = ["Communicator", "Pending", "destroy_group"]

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_woodfisher.base.errors import PruningError
from lightning_woodfisher.distributed.checksum import checksum

# Attribute of an error that the other ranks know already or cannot be told.
_SETTLED = "_settled_between_ranks"
# Before this version, gloo joins its threads while it holds the GIL. A thread that still has
# to release a tensor of the last collective then waits for the GIL forever
# (pytorch/pytorch#154976).
_GLOO_JOINS_WITHOUT_GIL = "2.8"
_SECONDS_TO_RELEASE = 0.1

T = TypeVar("T")


def destroy_group() -> None:
    """Destroy the default process group, even right after a collective."""
    if torch.__version__ < _GLOO_JOINS_WITHOUT_GIL:
        time.sleep(_SECONDS_TO_RELEASE)
    dist.destroy_process_group()


class Pending:
    """A collective that may still be running.

    Args:
        result: tensor that holds the result once the work is done.
        work: handle to wait for; None if nothing is running.
        keep: tensors that must live until the work is done.
        guard: context manager to enter while waiting.
    """

    def __init__(
        self,
        result: Tensor,
        work: Any = None,
        keep: object = None,
        guard: Callable[[], contextlib.AbstractContextManager[None]] | None = None,
    ) -> None:
        self._result = result
        self._work = work
        self._keep = keep
        self._guard = guard or contextlib.nullcontext

    def wait(self) -> Tensor:
        """Wait for the collective.

        Returns:
            Its result.
        """
        if self._work is not None:
            with self._guard():
                self._work.wait()
            self._work = self._keep = None
        return self._result


class Communicator:
    """The ranks of a job, as seen from one of them.

    Args:
        device: device of the tensors that are sent.

    Attributes:
        rank: this rank.
        world_size: number of ranks, R.
        bytes_sent: bytes that this rank has sent to others in row exchanges and gathers.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        active = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if active else 0
        self.world_size = dist.get_world_size() if active else 1
        self.bytes_sent = 0
        self._phase: Callable[[], str | None] = lambda: None

    def exchange(
        self, rows: Tensor, sizes: Sequence[int], counts: Sequence[int]
    ) -> Pending:
        """Exchange rows by column (all-to-all): each rank receives its columns of all rows.

        Unlike the other collectives, this one does not check first whether a rank has
        failed, because it runs while the next rows are computed. A rank that fails between
        two exchanges must hold its error back and take part in the remaining ones.

        Args:
            rows: tensor of shape ``[n, D]``; n may be 0.
            sizes: columns owned by each rank.
            counts: rows of each rank, n of this one.

        Returns:
            A pending tensor of shape ``[sum(counts), D_r]``, in order of the sender.
        """
        if self.world_size == 1:
            return Pending(rows)
        own, mine = sizes[self.rank], len(rows)
        # Not every backend supports every dtype, but all support bytes.
        width = rows.itemsize
        with self.failing_alone():
            columns = torch.split(rows, list(sizes), dim=1)
            send = torch.cat([part.reshape(-1) for part in columns])
            received = rows.new_empty(sum(counts), own)
        with self._guarded():
            work = dist.all_to_all_single(
                received.view(-1).view(torch.uint8),
                send.view(torch.uint8),
                [n * own * width for n in counts],
                [mine * size * width for size in sizes],
                async_op=True,
            )
        self.bytes_sent += (send.numel() - mine * own) * width
        return Pending(received, work, keep=send, guard=self._guarded)

    def broadcast_text(self, text: str) -> str:
        """Broadcast a string from rank 0.

        Args:
            text: ignored on the other ranks.

        Returns:
            The text of rank 0.
        """
        texts = [text]
        if self.world_size > 1:
            self.raise_together()
            with self._guarded():
                dist.broadcast_object_list(texts, 0, device=self.device)
        return texts[0]

    def gather_shards(self, shard: Tensor, sizes: Sequence[int]) -> Tensor:
        """Concatenate the shards of all ranks, on every rank.

        Args:
            shard: tensor of shape ``[D_r]``.
            sizes: length of every rank's shard.

        Returns:
            Tensor of shape ``[D]``.
        """
        if self.world_size == 1:
            return shard
        padded = shard.new_zeros(max(sizes))
        padded[: shard.numel()] = shard
        rows = self._all_gather(padded)
        self.bytes_sent += (self.world_size - 1) * padded.nbytes
        return torch.cat([rows[r, :size] for r, size in enumerate(sizes)])

    def gather_numbers(self, numbers: Sequence[float]) -> list[list[float]]:
        """Collect a few numbers from every rank.

        Args:
            numbers: the same number of them on every rank.

        Returns:
            One list for each rank, in order.
        """
        if self.world_size == 1:
            return [list(numbers)]
        own = torch.tensor(list(numbers), dtype=torch.float64, device=self.device)
        rows: list[list[float]] = self._all_gather(own).tolist()
        return rows

    def _all_gather(self, own: Tensor) -> Tensor:
        """Collect ``[n]`` from every rank into ``[R, n]``."""
        everyone = own.new_empty(self.world_size * own.numel())
        self.raise_together()
        with self._guarded():
            dist.all_gather_into_tensor(everyone, own)
        return everyone.view(self.world_size, own.numel())

    def gather_in_order(
        self, own: Mapping[int, float], count: int, at_once: int = 1
    ) -> list[float]:
        """Collect the numbers of micro-batches from the ranks, in order.

        Args:
            own: this rank's numbers by index; micro-batch k belongs to rank k mod R.
            count: how many numbers all ranks have together.
            at_once: how many numbers belong to a micro-batch.

        Returns:
            All numbers, on every rank.
        """
        starts = range(0, count, self.world_size * at_once)

        def indices(rank: int) -> list[int]:
            return [s + rank * at_once + j for s in starts for j in range(at_once)]

        rows = self.gather_numbers([own.get(i, math.nan) for i in indices(self.rank)])
        numbers: dict[int, float] = {}
        for rank, row in enumerate(rows):
            numbers.update(zip(indices(rank), row, strict=True))
        return [numbers[i] for i in range(count)]

    def sum_integers(self, values: Tensor) -> Tensor:
        """Add integer tensors over ranks, in place.

        Args:
            values: int64 tensor of equal shape on every rank.

        Returns:
            The same tensor, now the sum.
        """
        return self._all_reduce(values, dist.ReduceOp.SUM)

    def maximum(self, values: Tensor) -> Tensor:
        """Take the elementwise maximum over ranks, in place.

        Args:
            values: tensor of equal shape on every rank.

        Returns:
            The same tensor, now the maximum.
        """
        return self._all_reduce(values, dist.ReduceOp.MAX)

    def _all_reduce(self, values: Tensor, operation: Any) -> Tensor:
        if self.world_size > 1:
            self.raise_together()
            with self._guarded():
                dist.all_reduce(values, operation)
        return values

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite tensors with those of rank 0, in place.

        Args:
            tensors: same shapes and order on every rank.
        """
        if self.world_size > 1:
            # NCCL can only send tensors of its own device.
            pairs = [(tensor, tensor.to(self.device)) for tensor in tensors]
            self.raise_together()
            with self._guarded():
                for _, moved in pairs:
                    dist.broadcast(moved, 0)
            for tensor, moved in pairs:
                if moved is not tensor:
                    tensor.copy_(moved)

    def require_equal(self, tensor: Tensor, what: str) -> None:
        """Check that all ranks hold the same bits.

        Args:
            tensor: tensor of any dtype.
            what: what is compared, for the error.

        Raises:
            PruningError: if the ranks differ.
        """
        if self.world_size == 1:
            return
        if self.find_differing(checksum(tensor).reshape(1).to(self.device)):
            raise PruningError(f"the ranks disagree about {what}")

    def find_differing(self, numbers: Tensor) -> dict[int, list[int]]:
        """Find the numbers that are not the same on all ranks.

        This takes one small collective if all are the same, and two otherwise.

        Args:
            numbers: int64 ``[n]``.

        Returns:
            For the index of each such number, the ranks that differ from rank 0.
        """
        # The maximum of ~n is ~(the minimum of n), also at the ends of int64.
        largest, smallest = self.maximum(torch.stack([numbers, ~numbers]))
        differing = torch.nonzero(largest != ~smallest).flatten()
        if not len(differing):
            return {}
        rows = self._all_gather(numbers[differing])
        columns = (rows != rows[0]).cpu().T
        return {
            index: torch.nonzero(column).flatten().tolist()
            for index, column in zip(differing.tolist(), columns, strict=True)
        }

    @contextlib.contextmanager
    def failing_alone(self) -> Iterator[None]:
        """Mark an error of the body as one that the other ranks cannot be told.

        They wait in a collective that this rank will not enter, and another collective
        would wait forever. This rank therefore stops, and the others stop because it has
        ended.

        Yields:
            Nothing. :meth:`failing_together` raises such an error at once.
        """
        try:
            yield
        except Exception as error:
            _settle(error)
            raise

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        """Run a collective, and explain the error if it fails."""
        with self.failing_alone():
            try:
                yield
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                raise PruningError(
                    f"rank {self.rank} has lost the other ranks{self._in_phase()}: one of "
                    "them has ended, or has not answered within the timeout of the process "
                    "group. See the output of the other ranks for the cause. "
                    f"({type(error).__name__}: {error})"
                ) from error

    @contextlib.contextmanager
    def failing_together(
        self, phase: Callable[[], str | None] = lambda: None
    ) -> Iterator[None]:
        """Raise an error of one rank on all of them.

        The body may fail anywhere except between two calls of :meth:`exchange`: the other
        ranks receive the error in their next collective, or at the end. Put one block
        around all the work of a step.

        Args:
            phase: returns the name of the current phase, for the error.

        Yields:
            Nothing. Errors are raised as by :meth:`raise_together`.
        """
        self._phase = phase
        try:
            yield
            self.raise_together()
        except Exception as error:
            if not vars(error).get(_SETTLED):
                self.raise_together(error)
            raise
        finally:
            self._phase = lambda: None

    def run_together(self, compute: Callable[[], T]) -> T:
        """Call a function on every rank, and raise its error on every rank.

        If the function runs collectives of a model, such as those of FSDP2, a rank that
        fails between two of them stops the others only when it ends, as in training.

        Args:
            compute: the function.

        Returns:
            Its result.
        """
        error: Exception | None = None
        try:
            result = compute()
        except Exception as caught:
            error = caught
        self.raise_together(error)
        return result

    def raise_together(self, error: Exception | None = None) -> None:
        """Raise an error on every rank if any rank has one.

        A rank raises its own error unchanged. The other ranks raise a
        :class:`PruningError` that names the rank that failed and the phase.

        Args:
            error: error of this rank, or None.
        """
        if self.world_size > 1:
            failed = torch.tensor([error is not None], dtype=torch.int64)
            failed = failed.to(self.device)
            with self._guarded():
                dist.all_reduce(failed, dist.ReduceOp.SUM)
                some_failed = bool(failed)
            if some_failed:
                texts: list[str | None] = [None] * self.world_size
                own = None
                if error is not None:
                    own = f"{self._in_phase()}: {type(error).__name__}: {error}"
                with self._guarded():
                    dist.all_gather_object(texts, own)
                if error is None:
                    rank, text = next((r, t) for r, t in enumerate(texts) if t)
                    error = PruningError(f"rank {rank} failed{text}")
        if error is not None:
            _settle(error)
            raise error

    def _in_phase(self) -> str:
        phase = self._phase()
        return f" in phase {phase!r}" if phase else ""


def _settle(error: Exception) -> None:
    # On the error itself: it may pass several communicators on its way.
    vars(error)[_SETTLED] = True
