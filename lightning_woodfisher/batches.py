"""Mini-batches by number: batch i is the same on every rank."""

from __future__ import annotations

__all__ = ["Batches", "DatasetBatches", "StreamBatches"]

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sized
from typing import Any

import torch
from torch.utils.data import Dataset, default_collate

from lightning_woodfisher.errors import ConfigurationError
from lightning_woodfisher.isolation import derive_seed, seeded


class Batches(ABC):
    """Mini-batches by number; batch i is the same on every rank.

    Attributes:
        regroupable: whether asking for fewer and larger batches under the same seed gives
            the same samples in larger groups.
        size: samples in a batch, m; None when nobody knows.
    """

    regroupable: bool = False
    size: int | None = None

    @abstractmethod
    def fetch(self, index: int) -> Any:
        """Make one batch.

        Args:
            index: which one; callers ask in rising order.

        Returns:
            The batch, on whatever device the data lives.
        """

    def fetch_group(self, first: int, count: int, seed: int) -> Any:
        """Make one batch of the samples of several.

        Args:
            first: number of the first batch.
            count: number of batches.
            seed: the samples of batch i are drawn under ``derive_seed(seed, i)``.

        Returns:
            The samples, in order, collated at once.

        Raises:
            NotImplementedError: when the batches cannot be regrouped.
        """
        raise NotImplementedError

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
        self.size = size

    def fetch(self, index: int) -> Any:
        """Make one batch.

        Args:
            index: which one.

        Returns:
            The collated samples.
        """
        return self._collate(self._samples(index))

    def fetch_group(self, first: int, count: int, seed: int) -> Any:
        """Make one batch of the samples of several.

        Args:
            first: number of the first batch.
            count: number of batches.
            seed: the samples of batch i are drawn under ``derive_seed(seed, i)``.

        Returns:
            The samples, in order, collated at once.
        """
        samples: list[Any] = []
        for index in range(first, first + count):
            with seeded(derive_seed(seed, index)):
                samples += self._samples(index)
        return self._collate(samples)

    def _samples(self, index: int) -> list[Any]:
        indices = self._indices[index]
        if hasattr(self._dataset, "__getitems__"):
            return list(self._dataset.__getitems__(indices))
        return [self._dataset[i] for i in indices]

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
