"""Choose the samples of each gradient: numbered mini-batches, equal on every rank."""

from __future__ import annotations

__all__ = [
    "Batches",
    "CachedBatches",
    "DatasetBatches",
    "RepeatableStream",
    "StreamBatches",
    "TooFewSamplesError",
    "known_length",
    "leaves_of",
    "loader_batches",
    "require_rereadable",
]

import contextlib
import functools
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    WeightedRandomSampler,
    default_collate,
)

from lightning_woodfisher.base.errors import ConfigurationError
from lightning_woodfisher.data.isolation import (
    RandomStates,
    derive_seed,
    seeded,
)

# Samplers that visit the whole dataset.
_COMPLETE_SAMPLERS = (SequentialSampler, RandomSampler, DistributedSampler)
# Types besides tensors that a batch may contain and a loss cannot change in place.
_IMMUTABLE = (bool, int, float, complex, str, bytes, type(None))
# Generator states of torch, Python and NumPy that are cached with a batch.
_BYTES_OF_GENERATORS = 2**15


class TooFewSamplesError(ConfigurationError):
    """The data ends before all batches are drawn; the message names the Fisher's settings.

    Args:
        message: what is wrong.
        available: number of samples or batches that there are.
        unit: what is counted.
    """

    def __init__(self, message: str, available: int = 0, unit: str = "samples") -> None:
        super().__init__(message)
        self.available, self.unit = available, unit


class Batches(ABC):
    """Numbered mini-batches; batch i is the same on every rank.

    Attributes:
        regroupable: whether fewer and larger batches under the same seed contain the same
            samples in larger groups.
        why_not_regroupable: the reason if they are not regroupable.
        size: samples in a batch, m; None if it is not known.
        available: number of samples that may be drawn, or of batches if they are not
            regroupable; None if it is not known.
    """

    regroupable: bool = False
    why_not_regroupable: str = "the data comes in batches"
    size: int | None = None
    available: int | None = None

    @abstractmethod
    def fetch(self, index: int) -> Any:
        """Return one batch.

        Args:
            index: index of the batch; callers ask in increasing order.

        Returns:
            The batch, on the device of the data.
        """

    def fetch_parts(self, index: int) -> list[Any]:
        """Return one batch, in parts if its samples cannot be collated.

        Args:
            index: index of the batch; callers ask in increasing order.

        Returns:
            The batch, or one batch for each of its samples.
        """
        return [self.fetch(index)]

    @abstractmethod
    def describe(self, index: int) -> str:
        """Name the samples of a batch for an error message.

        Args:
            index: index of the batch.

        Returns:
            For example ``"samples 3, 17"``.
        """


class DatasetBatches(Batches):
    """Batches of a map-style dataset under a seeded permutation of its own.

    No sample is drawn twice, unless ``repeat`` allows several passes over the data.

    Args:
        dataset: anything with ``__len__`` and ``__getitem__``.
        count: number of batches, N.
        size: samples in a batch, m.
        seed: seed of the permutation.
        collate: converts a list of samples to a batch.
        regroupable: False if ``collate`` can only make a batch of one item.
        indices: the samples that may be drawn; None for the whole dataset.
        repeat: whether samples may be drawn again, in another order, after all of them
            have been drawn.

    Raises:
        ConfigurationError: if there are fewer than N·m samples and none may be repeated,
            or no sample at all.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        count: int,
        size: int,
        seed: int,
        collate: Callable[[list[Any]], Any] = default_collate,
        regroupable: bool = True,
        indices: Sequence[int] | None = None,
        repeat: bool = False,
    ) -> None:
        if not isinstance(dataset, Sized):
            raise ConfigurationError(
                f"{type(dataset).__name__} has no length; give a map-style dataset or an "
                "iterable of batches."
            )
        samples = len(dataset) if indices is None else len(indices)
        where = "the dataset" if indices is None else "the sampler"
        if samples < count * size and not (repeat and samples):
            raise TooFewSamplesError(
                f"num_gradients={count} times gradient_batch_size={size} needs "
                f"{count * size} samples, but {where} has {samples}; lower one of "
                f"them (num_gradients={max(1, samples // size)} would fit), or set "
                "fisher.repeat_samples."
                if samples >= size
                else f"gradient_batch_size={size} exceeds the {samples} samples of "
                f"{where}; lower it.",
                samples,
            )
        generator = torch.Generator().manual_seed(seed)
        rounds = -(-count * size // samples)
        order = torch.cat(
            [torch.randperm(samples, generator=generator) for _ in range(rounds)]
        )[: count * size]
        self._dataset = dataset
        if indices is not None:
            order = torch.as_tensor(indices, dtype=torch.int64)[order]
        self._indices = order.view(count, size).tolist()
        self._collate = collate
        self.regroupable = regroupable
        self.size = size
        self.available = samples

    def fetch(self, index: int) -> Any:
        """Return the collated samples of one batch."""
        return self._collate(self._samples(index))

    def fetch_parts(self, index: int) -> list[Any]:
        """Return one batch, in parts if its samples cannot be collated."""
        try:
            return [self.fetch(index)]
        except Exception:
            if self.size == 1:
                raise
            return [self._collate([sample]) for sample in self._samples(index)]

    def _samples(self, index: int) -> list[Any]:
        indices = self._indices[index]
        if hasattr(self._dataset, "__getitems__"):
            return list(self._dataset.__getitems__(indices))
        return [self._dataset[i] for i in indices]

    def describe(self, index: int) -> str:
        """Name the indices of the samples in the dataset."""
        return f"samples {', '.join(map(str, self._indices[index][:8]))}"


def loader_batches(
    loader: DataLoader[Any], count: int, size: int, seed: int, repeat: bool = False
) -> Batches | None:
    """Draw batches from the dataset of a DataLoader instead of from its iterator.

    Only samples that its sampler may draw are used if the sampler exposes them: the
    ``indices`` of a ``SubsetRandomSampler``, the positive weights of a
    ``WeightedRandomSampler``. They are drawn uniformly and without replacement, whatever
    the sampler does. The ``collate_fn`` makes the batches; the ``batch_size`` is ignored.

    Args:
        loader: the DataLoader.
        count: number of batches, N.
        size: samples in a batch, m; ignored if automatic batching is off.
        seed: seed of the choice.
        repeat: as in :class:`DatasetBatches`.

    Returns:
        The batches; None if the dataset is iterable-style.
    """
    dataset, collate = loader.dataset, loader.collate_fn
    sampler: Any = loader.sampler
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__"):
        return None
    has_batching = loader.batch_sampler is not None
    if has_batching and type(loader.batch_sampler) is not BatchSampler:
        sampler = getattr(loader.batch_sampler, "sampler", loader.batch_sampler)
    return DatasetBatches(
        dataset,
        count,
        # Without automatic batching every item is a batch.
        size if has_batching else 1,
        seed,
        collate if has_batching else lambda items: collate(items[0]),
        regroupable=has_batching,
        indices=_sampled_indices(sampler),
        repeat=repeat,
    )


def _sampled_indices(sampler: Any) -> Sequence[int] | None:
    """List the samples that a sampler may draw; None for all."""
    # Lightning hides a sampler of the user in the "dataset" of a DistributedSampler.
    inner = getattr(getattr(sampler, "dataset", None), "_sampler", None)
    if inner is not None:
        return _sampled_indices(inner)
    if isinstance(sampler, WeightedRandomSampler):
        return torch.nonzero(sampler.weights).squeeze(1).tolist()
    indices = getattr(sampler, "indices", None)
    if isinstance(indices, Sequence | Tensor) or hasattr(indices, "__array__"):
        return torch.as_tensor(indices, dtype=torch.int64).tolist()
    if not isinstance(sampler, _COMPLETE_SAMPLERS):
        _warn_unknown_sampler(type(sampler).__name__)
    return None


@functools.cache
def _warn_unknown_sampler(sampler: str) -> None:
    """Warn once for each class of sampler."""
    warnings.warn(
        f"{sampler} has no attribute `indices` with the samples that it may draw, so "
        "gradients are taken of samples from the whole dataset; pass a loader over a "
        "torch.utils.data.Subset to exclude samples.",
        stacklevel=4,
    )


def known_length(data: Any) -> int | None:
    """Return the number of samples of a dataset or of the dataset of a dataloader.

    Args:
        data: a dataset, a dataloader, or an iterable of batches, which are counted.

    Returns:
        The number; None if it is not known before reading.
    """
    try:
        return len(getattr(data, "dataset", data))
    except TypeError:
        return None


class CachedBatches(Batches):
    """Batches that are fetched repeatedly, and cached while memory is left.

    A cached batch is equivalent to a new one: it is a copy, and fetching it sets the random
    generators to their state after the batch was made.

    Args:
        batches: can be fetched in any order, each under a seed of its own.
        most_bytes: largest size of the cache.
    """

    def __init__(self, batches: Batches, most_bytes: int) -> None:
        self._batches = batches
        self._bytes_left = most_bytes
        self._cache: dict[int, tuple[Any, RandomStates]] = {}
        self.regroupable = batches.regroupable
        self.size = batches.size
        self.why_not_regroupable = batches.why_not_regroupable

    def fetch(self, index: int) -> Any:
        """Return one batch, from the cache if it has been cached."""
        if index in self._cache:
            batch, states = self._cache[index]
            states.restore()
            return _copy(batch)
        batch = self._batches.fetch(index)
        size = _bytes_to_cache(batch)
        if size is not None and size <= self._bytes_left:
            self._bytes_left -= size
            self._cache[index] = _copy(batch), RandomStates.capture()
        return batch

    def fetch_parts(self, index: int) -> list[Any]:
        """Return one batch, in parts if its samples cannot be collated."""
        try:
            return [self.fetch(index)]
        except Exception:
            return self._batches.fetch_parts(index)

    def describe(self, index: int) -> str:
        """Name the samples of a batch."""
        return self._batches.describe(index)


def _bytes_to_cache(batch: Any) -> int | None:
    """Count the bytes of a batch and generator states; None if it must not be cached."""
    size = _BYTES_OF_GENERATORS
    for leaf in leaves_of(batch):
        if isinstance(leaf, Tensor) and leaf.device.type == "cpu":
            size += leaf.nbytes
        elif not isinstance(leaf, _IMMUTABLE):
            # A loss may change it in place, or it needs memory of an accelerator.
            return None
    return size


def leaves_of(data: Any) -> Iterator[Any]:
    """Iterate over what lists, tuples and mappings contain.

    Args:
        data: a batch.

    Yields:
        Tensors and other objects, in order.
    """
    if isinstance(data, Tensor):
        yield data
    elif isinstance(data, list | tuple):
        for item in data:
            yield from leaves_of(item)
    elif isinstance(data, Mapping):
        yield from leaves_of([*data.values()])
    else:
        yield data


def _copy(batch: Any) -> Any:
    # A loss may change its batch in place.
    return tree_map(
        lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, batch
    )


class StreamBatches(Batches):
    """Batches in the order of an iterable, which must be the same on every rank.

    The first :meth:`fetch` opens the iterable. Batch i is read under a seed of its own, so
    that an iterable that shuffles with the global generators does the same on all ranks.

    Args:
        iterable: iterable of batches, one for each gradient.
        count: number of batches that will be needed, N.
        seed: seed of the random numbers that the iterable draws.
        repeat: whether to open the iterable again if it ends too early.
    """

    def __init__(
        self,
        iterable: Iterable[Any],
        count: int,
        seed: int = 0,
        repeat: bool = False,
    ) -> None:
        self._iterable = iterable
        self._iterator: Iterator[Any] | None = None
        self._next = 0
        self._repeat = repeat
        # Batches since it was opened: an empty iterable is not opened again.
        self._since_opened = 0
        self._count = count
        self._seed = seed
        if isinstance(iterable, Sized):
            # The length of a loader may be unknown until it has been read.
            with contextlib.suppress(TypeError):
                self.available = len(iterable)

    def fetch(self, index: int) -> Any:
        """Read up to one batch.

        Args:
            index: index of the batch, not smaller than in earlier calls.

        Returns:
            The batch.

        Raises:
            TooFewSamplesError: if the iterable ends too early.
        """
        while True:
            with seeded(derive_seed(self._seed, "batch", self._next)):
                if self._iterator is None:
                    self._iterator = iter(self._iterable)
                try:
                    batch = next(self._iterator)
                except StopIteration:
                    if not (self._repeat and self._since_opened):
                        break
                    self._iterator, self._since_opened = None, 0
                    continue
            self._next += 1
            self._since_opened += 1
            if self._next > index:
                return batch
        raise TooFewSamplesError(
            f"the data ended after {self._next} batches, but num_gradients="
            f"{self._count} needs one batch each; lower it or give more batches, or set "
            "fisher.repeat_samples, unless the data is an iterator.",
            self._next,
            "batches",
        )

    def describe(self, index: int) -> str:
        """Name the position of a batch in the stream."""
        return f"batch {index} of the stream"


def require_rereadable(data: Any) -> None:
    """Check that data can be read several times.

    Args:
        data: a dataset, a loader or an iterable of batches.

    Raises:
        ConfigurationError: for an iterator.
    """
    if isinstance(data, Iterator):
        raise ConfigurationError(
            f"the data is an iterator ({type(data).__name__}), which can be read only "
            "once, but the same samples are needed several times; pass a list of batches, "
            "a Dataset or a DataLoader."
        )


class RepeatableStream:
    """An iterable of batches that can be read several times.

    The last N batches of an iterator, which can be read only once, are kept in memory,
    because the loss is measured on the batches of the gradients.

    Args:
        data: the iterable or iterator.
    """

    def __init__(self, data: Iterable[Any]) -> None:
        self._data = data
        self._key: tuple[int, int] | None = None
        self._read: list[Any] = []

    def batches(self, count: int, seed: int, repeat: bool = False) -> StreamBatches:
        """Start reading from the beginning.

        Args:
            count: number of batches that will be needed, N.
            seed: with an iterator, another seed continues after the last N batches.
            repeat: as in :class:`StreamBatches`.

        Returns:
            The batches; nothing is read yet.
        """
        if not isinstance(self._data, Iterator):
            return StreamBatches(self._data, count, seed, repeat)
        if self._key != (count, seed):
            self.finish()
            self._key = count, seed
        return StreamBatches(self._reading(self._data, self._read, count), count, seed)

    def finish(self) -> None:
        """Read the remaining batches, because not every rank reads the last ones."""
        if self._key is not None and isinstance(self._data, Iterator):
            for _ in self._reading(self._data, self._read, self._key[0]):
                pass
        self._key, self._read = None, []

    @staticmethod
    def _reading(data: Iterator[Any], read: list[Any], count: int) -> Iterator[Any]:
        for index in range(count):
            if index == len(read):
                try:
                    read.append(next(data))
                except StopIteration:
                    return
            yield read[index]
