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
    "Streams",
    "collect_gradients",
    "derive_seed",
    "iterate_chunks",
    "loader_batches",
    "mean_loss",
    "scalar_loss",
]

import contextlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lightning_woodfisher.batches import (
    Batches,
    DatasetBatches,
    StreamBatches,
    Streams,
    loader_batches,
)
from lightning_woodfisher.distributed import Communicator, Pending
from lightning_woodfisher.errors import PruningError
from lightning_woodfisher.isolation import (
    ModelMode,
    derive_seed,
    isolated,
    random_states_kept,
    seeded,
)

# A loss scale that is lowered below this cannot be what makes gradients overflow.
_SMALLEST_LOSS_SCALE = 1.0
_LOSS_SCALE_STEP = 16.0


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
        data: a map-style Dataset of samples, a DataLoader, or an iterable of batches.
            Of a DataLoader over a map-style dataset only the dataset, the sampler's
            indices and the ``collate_fn`` are used (:func:`loader_batches`).
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
        self._streams = Streams(data)  # type: ignore[arg-type]

    def batches(self, count: int, size: int, seed: int) -> Batches:
        """Choose the mini-batches; an iterable gives them as they come.

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
        if isinstance(data, DataLoader):
            chosen = loader_batches(data, count, size, seed)
            if chosen is not None:
                return chosen
        return self._streams.batches(count, seed)

    def loss(self, batch: Any, index: int) -> Tensor:
        """Call the loss function.

        Args:
            batch: moved to the device of the model.
            index: named in errors.

        Returns:
            Scalar tensor.
        """
        device = next(self.model.parameters()).device
        result = self._loss_fn(self.model, _to_device(batch, device))
        return scalar_loss(
            result, index, "loss_fn", "return the mean loss of the batch"
        )

    @contextlib.contextmanager
    def session(self, mode: ModelMode) -> Iterator[None]:
        """Enter before asking for losses; leaves no trace in the model.

        Args:
            mode: training or evaluation behaviour of the layers.

        Yields:
            Nothing.
        """
        with super().session(mode):
            yield
            self._streams.finish()


def scalar_loss(result: Any, index: int, origin: str, remedy: str) -> Tensor:
    """Check what is meant to be a loss.

    Args:
        result: what came out.
        index: number of the batch.
        origin: the function that gave it.
        remedy: what to do otherwise.

    Returns:
        Tensor of shape ``[]``.

    Raises:
        PruningError: when it is no tensor of one element.
    """
    if isinstance(result, Tensor) and result.numel() == 1:
        return result.reshape(())
    found = (
        f"a tensor of shape {tuple(result.shape)}"
        if isinstance(result, Tensor)
        else type(result).__name__
    )
    raise PruningError(
        f"{origin} returned {found} for gradient {index}, not a scalar loss; {remedy}"
    )


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
    _require_trainable(parameters)
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


def mean_loss(
    source: LossSource, batches: Batches, count: int, comm: Communicator, seed: int
) -> list[float]:
    """Compute the losses of the mini-batches without gradients, shared by the ranks.

    A loss that is not finite is a :class:`PruningError`.

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
                own[index] = _value(source, batches, index)
            _require_finite(own[index], batches, index)
    except Exception as error:
        failure = error
    comm.agree(failure)
    return _in_order(own, count, comm)


def _value(source: LossSource, batches: Batches, index: int) -> float:
    """Compute one loss without gradients, or with them where the loss needs them."""
    batch = batches.fetch(index)
    try:
        with random_states_kept(), torch.no_grad():
            return float(source.loss(batch, index))
    except RuntimeError as error:
        if "not require grad" not in str(error):
            raise
    # A loss that differentiates inside, such as a gradient penalty. Each batch decides
    # for itself, so that the result does not depend on which rank has computed it.
    return float(source.loss(batch, index).detach())


def _require_finite(value: float, batches: Batches, index: int) -> None:
    if not math.isfinite(value):
        raise PruningError(
            f"the loss of gradient {index} ({batches.describe(index)}) is {value}"
        )


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
        _require_finite(value, batches, index)
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
