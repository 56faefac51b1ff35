"""Where losses come from: a model, its data, and how a batch becomes a loss."""

from __future__ import annotations

__all__ = [
    "FunctionLoss",
    "LossSource",
    "differentiable_loss",
    "loss_value",
    "lower_loss_scale",
    "mean_loss",
    "require_finite",
    "run_loss",
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

from lightning_woodfisher.base.errors import ConfigurationError, PruningError
from lightning_woodfisher.base.types import ModelMode
from lightning_woodfisher.data.batches import (
    Batches,
    DatasetBatches,
    Streams,
    loader_batches,
)
from lightning_woodfisher.data.isolation import (
    derive_seed,
    isolated,
    random_states_kept,
    seeded,
)
from lightning_woodfisher.data.nonfinite import leave_out
from lightning_woodfisher.data.sampled_labels import UnlabelledBatch, labelled
from lightning_woodfisher.distributed.communicator import Communicator

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
        predictor: the module that gives logits when it is called with the inputs of a
            batch.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.predictor = model
        self.loss_scale = 1.0

    @abstractmethod
    def batches(
        self, count: int, size: int, seed: int, repeat: bool = False
    ) -> Batches:
        """Choose the mini-batches of one estimate.

        Args:
            count: N.
            size: m.
            seed: different seeds give different samples where the data allows it.
            repeat: whether samples may come again when there are fewer than N·m.

        Returns:
            The batches.
        """

    @abstractmethod
    def loss(self, batch: Any, index: int) -> Tensor:
        """Run the model.

        Args:
            batch: what :class:`Batches` made; of an :class:`.UnlabelledBatch` the labels
                are drawn (:func:`.labelled`).
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

    def batches(
        self, count: int, size: int, seed: int, repeat: bool = False
    ) -> Batches:
        """Choose the mini-batches; an iterable gives them as they come.

        Args:
            count: N.
            size: m, for a Dataset.
            seed: of the choice, for a Dataset.
            repeat: whether samples may come again when there are fewer than N·m.

        Returns:
            The batches.
        """
        data = self._data
        if isinstance(data, Dataset) and not isinstance(data, IterableDataset):
            return DatasetBatches(data, count, size, seed, repeat=repeat)
        if isinstance(data, DataLoader):
            chosen = loader_batches(data, count, size, seed, repeat)
            if chosen is not None:
                return chosen
        return self._streams.batches(count, seed, repeat)

    def loss(self, batch: Any, index: int) -> Tensor:
        """Call the loss function.

        Args:
            batch: moved to the device of the model.
            index: named in errors.

        Returns:
            Scalar tensor.
        """
        device = next(self.model.parameters()).device
        drawn = batch if isinstance(batch, UnlabelledBatch) else None
        batch = _to_device(batch if drawn is None else drawn.batch, device)
        result = self._loss_fn(self.model, labelled(self.model, batch, drawn))
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


def require_finite(
    value: float,
    batches: Batches,
    index: int,
    kind: type[PruningError] = PruningError,
) -> None:
    """Refuse a loss that is not a finite number.

    Args:
        value: the loss.
        batches: the mini-batches.
        index: of which it is.
        kind: of the error that names the samples.
    """
    if not math.isfinite(value):
        raise kind(
            f"the loss of gradient {index} ({batches.describe(index)}) is {value}"
        )


def differentiable_loss(
    source: LossSource,
    batches: Batches,
    index: int,
    batch: Any,
    kind: type[PruningError] = PruningError,
) -> Tensor:
    """Run the model for a gradient.

    Args:
        source: where losses come from, with its session entered.
        batches: the mini-batches.
        index: which one.
        batch: its samples.
        kind: of the error for one that is not finite.

    Returns:
        The loss: a finite scalar tensor with a graph.

    Raises:
        PruningError: for any other.
    """
    loss = run_loss(source, batch, index)
    require_finite(float(loss.detach()), batches, index, kind)
    if not loss.requires_grad:
        raise PruningError(
            f"the loss of gradient {index} has no graph: it was detached or computed "
            "without gradients, so it cannot be differentiated"
        )
    return loss


def mean_loss(
    source: LossSource,
    batches: Batches,
    count: int,
    comm: Communicator,
    seed: int,
    *,
    finite: bool = True,
    skip: Sequence[int] = (),
) -> list[float]:
    """Compute the losses of the mini-batches without gradients, shared by the ranks.

    A loss that is not finite is a :class:`PruningError`.

    Args:
        source: where losses come from, with its session entered.
        batches: the mini-batches.
        count: N.
        comm: the ranks.
        seed: the one given to :func:`.collect_gradients`.
        finite: False lets losses that are not finite pass.
        skip: numbers of the mini-batches to leave out.

    Returns:
        The losses in order, the same on every rank.
    """
    own: dict[int, float] = {}
    failure: Exception | None = None
    try:
        for index in range(comm.rank, count, comm.world_size):
            if index in skip:
                continue
            with seeded(derive_seed(seed, index)):
                own[index] = loss_value(source, batches, index)
            if finite:
                require_finite(own[index], batches, index)
    except Exception as error:
        failure = error
    comm.agree(failure)
    return leave_out(comm.gather_in_order(own, count), skip)


def loss_value(source: LossSource, batches: Batches, index: int) -> float:
    """Compute one loss without gradients, or with them where the loss needs them.

    Args:
        source: where losses come from, with its session entered.
        batches: the mini-batches.
        index: which one.

    Returns:
        The loss.

    Raises:
        RuntimeError: whatever the loss raises.
    """
    batch = batches.fetch(index)
    try:
        with random_states_kept(), torch.no_grad():
            return float(run_loss(source, batch, index))
    except RuntimeError as error:
        if "not require grad" not in str(error):
            raise
    # A loss that differentiates inside, such as a gradient penalty. Each batch decides
    # for itself, so that the result does not depend on which rank has computed it.
    return float(run_loss(source, batch, index).detach())


def run_loss(source: LossSource, batch: Any, index: int) -> Tensor:
    """Run the model, and explain what BatchNorm makes of a single sample.

    Args:
        source: where losses come from, with its session entered.
        batch: the samples.
        index: number of the batch.

    Returns:
        What :meth:`LossSource.loss` gives.

    Raises:
        ConfigurationError: for a single sample in training mode.
        ValueError: whatever else the model raises.
    """
    try:
        return source.loss(batch, index)
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise ConfigurationError(
            f"BatchNorm in training mode has no variance of batch {index}, a single "
            "sample; raise fisher.gradient_batch_size, or set "
            "fisher.model_mode='eval'."
        ) from error


def lower_loss_scale(scale: float) -> float | None:
    """Choose the scale to try after gradients have overflowed under one.

    Args:
        scale: the one under which they have.

    Returns:
        A smaller one; None where the scale cannot be to blame.
    """
    if scale <= _SMALLEST_LOSS_SCALE:
        return None
    return max(scale / _LOSS_SCALE_STEP, _SMALLEST_LOSS_SCALE)


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
