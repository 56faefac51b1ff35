"""From mini-batches to gradient rows, spread over the ranks.

Gradient i is the gradient of the mean loss of the i-th mini-batch. It has the same
samples and the same random seed whatever the number of ranks; rank i mod R computes it,
and each rank receives its own slice of it.
"""

from __future__ import annotations

__all__ = [
    "Batches",
    "DatasetBatches",
    "FunctionLoss",
    "LossSource",
    "StreamBatches",
    "collect_gradients",
    "derive_seed",
    "iterate_chunks",
    "mean_loss",
]

import contextlib
import hashlib
import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset, default_collate

from lightning_woodfisher.distributed import Communicator, Pending
from lightning_woodfisher.errors import ConfigurationError, PruningError
from lightning_woodfisher.isolation import ModelMode, isolated, seeded

# A loss scale that is lowered below this cannot be what makes gradients overflow.
_SMALLEST_LOSS_SCALE = 1.0
_LOSS_SCALE_STEP = 16.0


def derive_seed(*parts: object) -> int:
    """Mix numbers and names into one seed.

    Args:
        parts: anything with a stable ``repr``.

    Returns:
        An integer in [0, 2**63).
    """
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


class Batches(ABC):
    """Mini-batches by number; batch i is the same on every rank.

    Attributes:
        regroupable: whether asking for fewer and larger batches under the same seed gives
            the same samples in larger groups.
    """

    regroupable: bool = False

    @abstractmethod
    def fetch(self, index: int) -> Any:
        """Make one batch.

        Args:
            index: which one; callers ask in rising order.

        Returns:
            The batch, on whatever device the data lives.
        """

    @abstractmethod
    def describe(self, index: int) -> str:
        """Name the samples of a batch for an error message.

        Args:
            index: which batch.

        Returns:
            For example ``"samples 3, 17"``.
        """


class DatasetBatches(Batches):
    """Batches of a map-style dataset under an own seeded permutation, no sample twice.

    Args:
        dataset: anything with ``__len__`` and ``__getitem__``.
        count: number of batches, N.
        size: samples in a batch, m.
        seed: of the permutation.
        collate: list of samples to batch.
        regroupable: False when ``collate`` can make a batch of one item only.

    Raises:
        ConfigurationError: when the dataset has fewer than N·m samples.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        count: int,
        size: int,
        seed: int,
        collate: Callable[[list[Any]], Any] = default_collate,
        regroupable: bool = True,
    ) -> None:
        if not isinstance(dataset, Sized):
            raise ConfigurationError(
                f"{type(dataset).__name__} has no length; give a map-style dataset or an "
                "iterable of batches."
            )
        samples = len(dataset)
        if samples < count * size:
            raise ConfigurationError(
                f"num_gradients={count} times gradient_batch_size={size} needs "
                f"{count * size} samples, but the dataset has {samples}; lower one of "
                f"them (num_gradients={max(1, samples // size)} would fit)."
                if samples >= size
                else f"gradient_batch_size={size} exceeds the {samples} samples of the "
                "dataset; lower it."
            )
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(samples, generator=generator)[: count * size]
        self._dataset = dataset
        self._indices = order.view(count, size).tolist()
        self._collate = collate
        self.regroupable = regroupable

    def fetch(self, index: int) -> Any:
        """Make one batch.

        Args:
            index: which one.

        Returns:
            The collated samples.
        """
        indices = self._indices[index]
        if hasattr(self._dataset, "__getitems__"):
            return self._collate(self._dataset.__getitems__(indices))
        return self._collate([self._dataset[i] for i in indices])

    def describe(self, index: int) -> str:
        """Name the samples of a batch.

        Args:
            index: which batch.

        Returns:
            Their indices in the dataset.
        """
        return f"samples {', '.join(map(str, self._indices[index][:8]))}"


class StreamBatches(Batches):
    """Batches as an iterable yields them, which must be in the same order on every rank.

    Args:
        iterable: of batches; each gives one gradient.
        count: number of batches that will be needed, N.
    """

    def __init__(self, iterable: Iterable[Any], count: int) -> None:
        self._iterator = iter(iterable)
        self._next = 0
        self._count = count

    def fetch(self, index: int) -> Any:
        """Read on to one batch.

        Args:
            index: which one, not before an earlier one.

        Returns:
            The batch.

        Raises:
            ConfigurationError: when the iterable ends too early.
        """
        for batch in self._iterator:
            self._next += 1
            if self._next > index:
                return batch
        raise ConfigurationError(
            f"the data ended after {self._next} batches, but num_gradients="
            f"{self._count} needs one batch each; lower num_gradients or give more."
        )

    def describe(self, index: int) -> str:
        """Name a batch.

        Args:
            index: which batch.

        Returns:
            Its number in the stream.
        """
        return f"batch {index} of the stream"


class LossSource(ABC):
    """Where losses come from: a model, its data, and how a batch becomes a loss.

    Args:
        model: the network whose gradients are taken.

    Attributes:
        loss_scale: factor by which the loss is multiplied before the backward pass, to
            keep float16 gradients from vanishing.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.loss_scale = 1.0

    @abstractmethod
    def batches(self, count: int, size: int, seed: int) -> Batches:
        """Choose the mini-batches of one estimate.

        Args:
            count: N.
            size: m.
            seed: different seeds give different samples where the data allows it.

        Returns:
            The batches.
        """

    @abstractmethod
    def loss(self, batch: Any, index: int) -> Tensor:
        """Run the model.

        Args:
            batch: what :class:`Batches` made.
            index: number of the batch.

        Returns:
            Scalar tensor with a graph: the mean loss of the batch.
        """

    @contextlib.contextmanager
    def session(self, mode: ModelMode) -> Iterator[None]:
        """Enter before asking for losses; leaves no trace in the model.

        Args:
            mode: training or evaluation behaviour of the layers.

        Yields:
            Nothing.
        """
        with isolated(self.model, mode):
            yield


class FunctionLoss(LossSource):
    """Losses of a plain model, data and function.

    Args:
        model: the network.
        data: a map-style Dataset of samples, or an iterable of batches.
        loss_fn: ``loss_fn(model, batch)`` returns the mean loss of the batch.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Dataset[Any] | Iterable[Any],
        loss_fn: Callable[[Any, Any], Tensor],
    ) -> None:
        super().__init__(model)
        self._data = data
        self._loss_fn = loss_fn
        self._read: tuple[tuple[int, int], list[Any]] | None = None

    def batches(self, count: int, size: int, seed: int) -> Batches:
        """Choose the mini-batches; an iterable gives them as they come.

        An iterator, which can be read only once, has its last N batches kept in memory.

        Args:
            count: N.
            size: m, for a Dataset.
            seed: of the choice, for a Dataset.

        Returns:
            The batches.
        """
        data = self._data
        if isinstance(data, Dataset) and not isinstance(data, IterableDataset):
            return DatasetBatches(data, count, size, seed)
        if isinstance(data, Iterator):
            # It can be read only once, but the loss is measured on the same batches.
            if self._read is None or self._read[0] != (count, seed):
                self._read = (count, seed), list(itertools.islice(data, count))
            return StreamBatches(self._read[1], count)
        return StreamBatches(data, count)

    def loss(self, batch: Any, index: int) -> Tensor:
        """Call the loss function.

        Args:
            batch: moved to the device of the model.
            index: not used.

        Returns:
            Scalar tensor.
        """
        device = next(self.model.parameters()).device
        return self._loss_fn(self.model, _to_device(batch, device))


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
) -> Iterator[Tensor]:
    """Compute the gradients of this rank and yield this rank's slice of all of them.

    The exchange of one round runs while the next gradient is computed.

    Args:
        source: where losses come from, with its session entered.
        batches: the mini-batches.
        parameters: what the gradient is taken of.
        active: int64 positions of the active weights in each flattened parameter.
        shard_sizes: active weights of every rank.
        count: N.
        comm: the ranks.
        seed: gradient i runs under ``derive_seed(seed, i)``.
        losses: receives the N losses, in order, when all are done.
        tick: called with the number of gradients that have been done by all ranks.

    Yields:
        Tensors of shape ``[n, D_r]``: gradients in order of i.
    """
    failure: Exception | None = None
    own: dict[int, float] = {}
    pending: Pending | None = None
    device = comm.device
    dtype = _row_dtype(parameters.values())
    # BatchNorm statistics differ between ranks in the middle of training.
    comm.broadcast(source.model.buffers())
    for first in range(0, count, comm.world_size):
        senders = min(comm.world_size, count - first)
        index = first + comm.rank
        row: Tensor | None = None
        if index < count:
            row = torch.zeros(sum(shard_sizes), dtype=dtype, device=device)
            # After a failure the other ranks still need rows to arrive from here.
            if failure is None:
                try:
                    with seeded(derive_seed(seed, index)):
                        own[index] = _gradient(
                            source, batches, index, parameters, active, row
                        )
                except Exception as error:
                    failure = error
                    if comm.world_size == 1:
                        raise
        started = comm.exchange(row, shard_sizes, senders, dtype)
        if pending is not None:
            yield pending.wait()
        pending = started
        tick(senders)
    if pending is not None:
        yield pending.wait()
    comm.agree(failure)
    losses.extend(_in_order(own, count, comm))


def iterate_chunks(rows: Iterable[Tensor], size: int) -> Iterator[Tensor]:
    """Regroup rows into chunks of a fixed number of rows.

    Args:
        rows: tensors of shape ``[n, D_r]`` with any n.
        size: rows in a chunk; the last one may be shorter.

    Yields:
        Tensors of shape ``[size, D_r]``.
    """
    waiting: list[Tensor] = []
    count = 0
    for piece in rows:
        rest = piece
        while len(rest):
            taken, rest = rest[: size - count], rest[size - count :]
            waiting.append(taken)
            count += len(taken)
            if count == size:
                yield torch.cat(waiting)
                waiting, count = [], 0
    if waiting:
        yield torch.cat(waiting)


@torch.no_grad()
def mean_loss(
    source: LossSource, batches: Batches, count: int, comm: Communicator, seed: int
) -> list[float]:
    """Compute the losses of the mini-batches without gradients, shared by the ranks.

    Args:
        source: where losses come from, with its session entered.
        batches: the mini-batches.
        count: N.
        comm: the ranks.
        seed: the one given to :func:`collect_gradients`.

    Returns:
        N losses in order, the same on every rank.
    """
    own: dict[int, float] = {}
    failure: Exception | None = None
    try:
        for index in range(comm.rank, count, comm.world_size):
            with seeded(derive_seed(seed, index)):
                own[index] = float(source.loss(batches.fetch(index), index))
    except Exception as error:
        failure = error
    comm.agree(failure)
    return _in_order(own, count, comm)


def _gradient(
    source: LossSource,
    batches: Batches,
    index: int,
    parameters: Mapping[str, nn.Parameter],
    active: Mapping[str, Tensor],
    row: Tensor,
) -> float:
    """Write one gradient into ``row`` and return the loss."""
    batch = batches.fetch(index)
    scale = source.loss_scale
    while True:
        loss = source.loss(batch, index)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise PruningError(
                f"the loss of gradient {index} ({batches.describe(index)}) is {value}"
            )
        if not loss.requires_grad:
            raise PruningError(
                f"the loss of gradient {index} has no graph: it was detached or computed "
                "without gradients, so it cannot be differentiated"
            )
        # autograd.grad never touches .grad or the hooks that DDP hangs on it.
        gradients: tuple[Tensor | None, ...] = torch.autograd.grad(
            loss * scale, list(parameters.values()), allow_unused=True
        )
        start = 0
        for name, gradient in zip(parameters, gradients, strict=True):
            where = active[name]
            target = row[start : start + len(where)]
            start += len(where)
            if gradient is None:
                target.zero_()
            else:
                # Converted before it is unscaled: float16 would underflow.
                target.copy_(gradient.detach().reshape(-1)[where]).div_(scale)
        if bool(row.isfinite().all()):
            return value
        if scale <= _SMALLEST_LOSS_SCALE:
            raise PruningError(_name_non_finite(batches, index, parameters, gradients))
        # float16 has overflowed under the scale of the GradScaler; a smaller one may do.
        scale = max(scale / _LOSS_SCALE_STEP, _SMALLEST_LOSS_SCALE)


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


def _row_dtype(parameters: Iterable[nn.Parameter]) -> torch.dtype:
    double = any(parameter.dtype == torch.float64 for parameter in parameters)
    return torch.float64 if double else torch.float32


def _in_order(own: Mapping[int, float], count: int, comm: Communicator) -> list[float]:
    """Put numbers that rank i mod R holds into the order of i, on every rank."""
    rounds = -(-count // comm.world_size)
    mine = [own.get(r * comm.world_size + comm.rank, math.nan) for r in range(rounds)]
    columns = comm.gather_numbers(mine)
    return [columns[i % comm.world_size][i // comm.world_size] for i in range(count)]


def _to_device(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return type(batch)({k: _to_device(v, device) for k, v in batch.items()})  # type: ignore[call-arg]
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(_to_device(v, device) for v in batch))
    if isinstance(batch, list | tuple):
        return type(batch)(_to_device(v, device) for v in batch)
    return batch
