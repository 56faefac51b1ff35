"""Where losses come from: a model, its data, and how a batch becomes a loss."""

from __future__ import annotations

__all__ = ["FunctionLoss", "LossSource"]

import contextlib
import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset

from lightning_woodfisher.batches import Batches, DatasetBatches, StreamBatches
from lightning_woodfisher.isolation import ModelMode, isolated


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
