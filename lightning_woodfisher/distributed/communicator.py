"""Every collective of the package. On one rank each of them is the identity.

Sums are of integers only, because the order of floating-point additions would go with the
ranks; :mod:`.exact_sum` makes integers of floating-point numbers.

A rank that fails must not leave the others waiting for it. So every collective but
:meth:`Communicator.exchange` begins with :meth:`Communicator.agree`, a sum of one integer,
and work with collectives in it stands in :meth:`Communicator.failing_together`, which takes
a rank that has failed to that same sum. Both are needed: the sum is where they meet.

A collective that fails itself, because a rank is gone or does not answer within the timeout
of the process group, leaves nothing to meet at. No other collective follows it: the rank
stops (:meth:`Communicator.no_return`), and its end stops the others.
"""

from __future__ import annotations

__all__ = ["Communicator", "Pending", "destroy_group"]

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_woodfisher.base.errors import PruningError

_SETTLED = "_settled_between_ranks"
# Until this version a group of gloo joins its threads with the GIL held, in which one that
# still lets go of a tensor of the last collective waits for the GIL for ever
# (pytorch/pytorch#154976).
_GLOO_JOINS_WITHOUT_GIL = "2.8"
_SECONDS_TO_LET_GO = 0.1


def destroy_group() -> None:
    """Destroy the default process group, which need not be idle for long."""
    if torch.__version__ < _GLOO_JOINS_WITHOUT_GIL:
        time.sleep(_SECONDS_TO_LET_GO)
    dist.destroy_process_group()


class Pending:
    """A collective that may still be running.

    Args:
        result: tensor that holds the result once the work is done.
        work: handle to wait for, None when nothing is running.
        keep: tensors that must live until the work is done.
        contact: entered while waiting.
    """

    def __init__(
        self,
        result: Tensor,
        work: Any = None,
        keep: object = None,
        contact: Callable[[], contextlib.AbstractContextManager[None]] | None = None,
    ) -> None:
        self._result = result
        self._work = work
        self._keep = keep
        self._contact = contact or contextlib.nullcontext

    def wait(self) -> Tensor:
        """Wait for the collective.

        Returns:
            Its result.
        """
        if self._work is not None:
            with self._contact():
                self._work.wait()
            self._work = self._keep = None
        return self._result


class Communicator:
    """The ranks of a job, as seen from one of them.

    Args:
        device: device of the tensors that are sent.
        group: process group; None takes the default group when there is one.

    Attributes:
        rank: own rank.
        world_size: number of ranks, R.
        bytes_sent: bytes that this rank has sent to others in row exchanges and gathers.
    """

    def __init__(self, device: torch.device | str = "cpu", group: Any = None) -> None:
        self.device = torch.device(device)
        self._group = group
        active = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank(group) if active else 0
        self.world_size = dist.get_world_size(group) if active else 1
        self.bytes_sent = 0
        self._phase: Callable[[], str | None] = _no_phase

    def exchange(
        self,
        rows: Tensor | None,
        sizes: Sequence[int],
        counts: Sequence[int],
        dtype: torch.dtype = torch.float32,
    ) -> Pending:
        """Send each rank its columns of our rows and collect our columns of all rows.

        Alone among the collectives it does not ask first whether a rank has failed: it
        runs while the next row is computed. A rank that fails between two exchanges must
        hold its error back and take part in those that are left.

        Args:
            rows: tensor of shape ``[n, D]``, or None when this rank has none this time.
            sizes: columns owned by each rank.
            counts: rows that each rank has.
            dtype: of the rows, also where this rank has none.

        Returns:
            A pending tensor of shape ``[sum(counts), D_r]``, in order of the sender.

        Raises:
            ValueError: on a single rank without rows.
        """
        if self.world_size == 1:
            if rows is None:
                raise ValueError("a single rank must have rows")
            return Pending(rows)
        own, total, mine = sizes[self.rank], sum(counts), counts[self.rank]
        # Backends do not know every dtype, but all know bytes.
        width = dtype.itemsize
        with self.no_return():
            send = torch.empty(0, dtype=dtype, device=self.device)
            if rows is not None:
                columns = torch.split(rows, list(sizes), dim=1)
                send = torch.cat([part.reshape(-1) for part in columns])
            received = torch.empty(total, own, dtype=dtype, device=self.device)
        with self._contact():
            work = dist.all_to_all_single(
                received.view(-1).view(torch.uint8),
                send.view(torch.uint8),
                [n * own * width for n in counts],
                [mine * size * width for size in sizes],
                group=self._group,
                async_op=True,
            )
        self.bytes_sent += (send.numel() - mine * own) * width
        return Pending(received, work, keep=send, contact=self._contact)

    def share_text(self, text: str) -> str:
        """Tell every rank what rank 0 says.

        Args:
            text: only that of rank 0 counts.

        Returns:
            The text of rank 0.
        """
        everyone: list[str] = [text]
        if self.world_size > 1:
            self.agree()
            with self._contact():
                dist.broadcast_object_list(
                    everyone, 0, group=self._group, device=self.device
                )
        return everyone[0]

    def gather_shards(self, shard: Tensor, sizes: Sequence[int]) -> Tensor:
        """Put the shards of all ranks one behind the other, on every rank.

        Args:
            shard: tensor of shape ``[D_r]``.
            sizes: length of every rank's shard.

        Returns:
            Tensor of shape ``[D]``.
        """
        if self.world_size == 1:
            return shard
        longest = max(sizes)
        padded = shard.new_zeros(longest)
        padded[: shard.numel()] = shard
        gathered = shard.new_empty(longest * self.world_size)
        self.agree()
        with self._contact():
            dist.all_gather_into_tensor(gathered, padded, group=self._group)
        self.bytes_sent += (
            (self.world_size - 1) * padded.numel() * padded.element_size()
        )
        rows = gathered.view(self.world_size, longest)
        return torch.cat([rows[r, :size] for r, size in enumerate(sizes)])

    def gather_numbers(self, numbers: Sequence[float]) -> list[list[float]]:
        """Collect a few numbers from every rank.

        Args:
            numbers: equally many on every rank.

        Returns:
            One list for each rank, in order.
        """
        if self.world_size == 1:
            return [list(numbers)]
        mine = torch.tensor(list(numbers), dtype=torch.float64, device=self.device)
        everyone = mine.new_empty(self.world_size * mine.numel())
        self.agree()
        with self._contact():
            dist.all_gather_into_tensor(everyone, mine, group=self._group)
        rows: list[list[float]] = everyone.view(self.world_size, -1).tolist()
        return rows

    def gather_in_order(
        self, own: Mapping[int, float], count: int, at_once: int = 1
    ) -> list[float]:
        """Put numbers that the ranks hold, micro-batch by micro-batch, into order.

        Args:
            own: this rank's numbers by i; micro-batch k belongs to rank k mod R.
            count: how many there are on all ranks.
            at_once: numbers of a micro-batch.

        Returns:
            All numbers, on every rank.
        """
        size = self.world_size
        mine = [
            own.get((r * size + self.rank) * at_once + j, math.nan)
            for r in range(-(-count // (size * at_once)))
            for j in range(at_once)
        ]
        columns = self.gather_numbers(mine)
        places = (divmod(i, at_once) for i in range(count))
        return [columns[k % size][k // size * at_once + j] for k, j in places]

    def sum_integers(self, values: Tensor) -> Tensor:
        """Add integer tensors over ranks, in place.

        Args:
            values: int64 tensor of equal shape on every rank.

        Returns:
            The same tensor, now the sum.
        """
        if self.world_size > 1:
            self.agree()
            with self._contact():
                dist.all_reduce(values, dist.ReduceOp.SUM, group=self._group)
        return values

    def maximum(self, values: Tensor) -> Tensor:
        """Take the elementwise maximum over ranks, in place.

        Args:
            values: tensor of equal shape on every rank.

        Returns:
            The same tensor, now the maximum.
        """
        if self.world_size > 1:
            self.agree()
            with self._contact():
                dist.all_reduce(values, dist.ReduceOp.MAX, group=self._group)
        return values

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite tensors with those of rank 0, in place.

        Args:
            tensors: same shapes and order on every rank.
        """
        if self.world_size > 1:
            # An NCCL broadcast needs the device of the group.
            pairs = [(tensor, tensor.to(self.device)) for tensor in tensors]
            self.agree()
            with self._contact():
                for _, moved in pairs:
                    dist.broadcast(moved, 0, group=self._group)
            for tensor, moved in pairs:
                if moved is not tensor:
                    tensor.copy_(moved)

    def require_equal(self, checksum: Tensor, what: str) -> None:
        """Check that all ranks have computed the same.

        Args:
            checksum: int64 scalar.
            what: named in the error.

        Raises:
            PruningError: when the ranks differ.
        """
        if self.who_differs(checksum.reshape(1)):
            raise PruningError(f"the ranks disagree about {what}")

    def who_differs(self, numbers: Tensor) -> dict[int, list[int]]:
        """Find the numbers that are not the same on all ranks.

        One small collective where they are, which is always but for a fault.

        Args:
            numbers: int64 ``[n]``.

        Returns:
            By the place of a number, the ranks that have another one than rank 0.
        """
        if self.world_size == 1:
            return {}
        count = len(numbers)
        extremes = self.maximum(torch.cat([numbers, ~numbers]))
        differ = torch.nonzero(extremes[:count] != ~extremes[count:]).flatten()
        if not len(differ):
            return {}
        everyone = self.gather_shards(numbers[differ], [len(differ)] * self.world_size)
        rows = everyone.view(self.world_size, -1)
        others = (rows != rows[0]).cpu()
        return {
            place: torch.nonzero(others[:, i]).flatten().tolist()
            for i, place in enumerate(differ.tolist())
        }

    @contextlib.contextmanager
    def no_return(self) -> Iterator[None]:
        """Stand around what the other ranks cannot be told about when it fails.

        They wait in a collective that this rank will not enter. If it asked for another
        one, it would only wait with them; so it stops, and its end stops them.

        Yields:
            Nothing. :meth:`failing_together` passes an error from here on at once.
        """
        try:
            yield
        except Exception as error:
            _settle(error)
            raise

    @contextlib.contextmanager
    def _contact(self) -> Iterator[None]:
        """Stand around a collective; say what it means when it fails."""
        with self.no_return():
            try:
                yield
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                phase = self._phase()
                raise PruningError(
                    f"rank {self.rank} has lost the other ranks"
                    f"{f' in phase {phase!r}' if phase else ''}: one of them has ended, or "
                    "has not answered within the timeout of the process group. The output "
                    f"of the other ranks tells why. ({type(error).__name__}: {error})"
                ) from error

    @contextlib.contextmanager
    def failing_together(
        self, phase: Callable[[], str | None] | None = None
    ) -> Iterator[None]:
        """Raise the error of one rank on all of them.

        The body may fail anywhere outside of :meth:`exchange`: the other ranks learn of it
        in their next collective, or at the end. One such block stands around a whole
        piece of work.

        Args:
            phase: tells what is being done, for the error.

        Yields:
            Nothing. An error of this rank is raised as it is, that of another one by
            :meth:`agree`.
        """
        self._phase = phase or _no_phase
        try:
            yield
            self.agree()
        except Exception as error:
            if not vars(error).get(_SETTLED):
                self.agree(error)
            raise
        finally:
            self._phase = _no_phase

    def agree(self, error: Exception | None = None) -> None:
        """Let every rank fail when one has failed, so that none waits for it forever.

        The own error is raised as it is, that of another rank as a :class:`PruningError`
        that names the rank and what it was doing.

        Args:
            error: what went wrong here, or None.
        """
        if self.world_size > 1:
            failed = torch.tensor([error is not None], dtype=torch.int64)
            failed = failed.to(self.device)
            with self._contact():
                dist.all_reduce(failed, dist.ReduceOp.SUM, group=self._group)
                some_failed = bool(failed)
            if some_failed:
                everyone: list[str | None] = [None] * self.world_size
                mine = None
                if error is not None:
                    phase = self._phase()
                    where = f" in phase {phase!r}" if phase else ""
                    mine = f"{where}: {type(error).__name__}: {error}"
                with self._contact():
                    dist.all_gather_object(everyone, mine, group=self._group)
                if error is None:
                    rank, text = next((r, t) for r, t in enumerate(everyone) if t)
                    error = PruningError(f"rank {rank} failed{text}")
        if error is not None:
            _settle(error)
            raise error


def _settle(error: Exception) -> None:
    """Mark an error as known to all ranks, or as one that they cannot be told."""
    # On the error: it may pass several communicators on its way.
    vars(error)[_SETTLED] = True


def _no_phase() -> None:
    return None
