"""Which samples a gradient is taken of: mini-batches by number, equal on every rank."""

from __future__ import annotations

__all__ = [
    "Batches",
    "DatasetBatches",
    "KeptBatches",
    "StreamBatches",
    "Streams",
    "loader_batches",
]

import functools
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
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
    random_states_kept,
    reseed,
    seeded,
)

# Samplers that visit the whole dataset.
_DRAW_EVERYTHING = (SequentialSampler, RandomSampler, DistributedSampler)
# What a batch may hold beside tensors that nobody can change in place.
_PLAIN = (bool, int, float, complex, str, bytes, type(None))
# States of the generators that are kept with a batch: torch's, Python's and NumPy's.
_BYTES_OF_GENERATORS = 2**15


class Batches(ABC):
    """Mini-batches by number; batch i is the same on every rank.

    Attributes:
        regroupable: whether asking for fewer and larger batches under the same seed gives
            the same samples in larger groups.
        why_whole: the reason when they are not regroupable.
        size: samples in a batch, m; None when nobody knows.
    """

    regroupable: bool = False
    why_whole: str = "the data comes in batches"
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
    """Batches of a map-style dataset under an own seeded permutation.

    No sample comes twice, unless ``repeat`` allows to go through the data again.

    Args:
        dataset: anything with ``__len__`` and ``__getitem__``.
        count: number of batches, N.
        size: samples in a batch, m.
        seed: of the permutation.
        collate: list of samples to batch.
        regroupable: False when ``collate`` can make a batch of one item only.
        indices: the samples that may be drawn; None for the whole dataset.
        repeat: whether, when all samples were drawn, they may be drawn again in another
            order.

    Raises:
        ConfigurationError: when there are fewer than N·m samples and none may be
            repeated, or no sample at all.
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
        where = "the dataset" if indices is None else "what the sampler may draw"
        if samples < count * size and not (repeat and samples):
            raise ConfigurationError(
                f"num_gradients={count} times gradient_batch_size={size} needs "
                f"{count * size} samples, but {where} has {samples}; lower one of "
                f"them (num_gradients={max(1, samples // size)} would fit), or set "
                "fisher.repeat_samples."
                if samples >= size
                else f"gradient_batch_size={size} exceeds the {samples} samples of "
                f"{where}; lower it."
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
        with random_states_kept():
            for index in range(first, first + count):
                reseed(derive_seed(seed, index))
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


def loader_batches(
    loader: DataLoader[Any], count: int, size: int, seed: int, repeat: bool = False
) -> Batches | None:
    """Draw from the dataset of a DataLoader rather than from its iterator.

    The samples are those that its sampler may draw, where the sampler says so: the
    ``indices`` of a ``SubsetRandomSampler``, the positive weights of a
    ``WeightedRandomSampler``. They are drawn uniformly and without replacement, whatever
    the sampler does. Its ``collate_fn`` makes the batches; its ``batch_size`` does not
    count.

    Args:
        loader: with its dataset.
        count: number of batches, N.
        size: samples in a batch, m; not used where automatic batching is off.
        seed: of the choice.
        repeat: as in :class:`DatasetBatches`.

    Returns:
        The batches; None when the dataset is iterable-style.
    """
    dataset, collate = loader.dataset, loader.collate_fn
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__"):
        return None
    if loader.batch_sampler is None:
        # Automatic batching is off: every item is a batch.
        return DatasetBatches(
            dataset,
            count,
            1,
            seed,
            lambda items: collate(items[0]),
            regroupable=False,
            indices=_drawn_by(loader.sampler),
            repeat=repeat,
        )
    sampler = loader.sampler
    if type(loader.batch_sampler) is not BatchSampler:
        sampler = getattr(loader.batch_sampler, "sampler", loader.batch_sampler)
    return DatasetBatches(
        dataset,
        count,
        size,
        seed,
        collate,
        indices=_drawn_by(sampler),
        repeat=repeat,
    )


def _drawn_by(sampler: Any) -> Sequence[int] | None:
    """List the samples that a sampler may draw; None stands for all."""
    # Lightning hides a sampler of the user in the "dataset" of a DistributedSampler.
    inner = getattr(getattr(sampler, "dataset", None), "_sampler", None)
    if inner is not None:
        return _drawn_by(inner)
    if isinstance(sampler, WeightedRandomSampler):
        return torch.nonzero(sampler.weights).squeeze(1).tolist()
    indices = getattr(sampler, "indices", None)
    if isinstance(indices, Sequence | Tensor) or hasattr(indices, "__array__"):
        return torch.as_tensor(indices, dtype=torch.int64).tolist()
    if not isinstance(sampler, _DRAW_EVERYTHING):
        _warn_of(type(sampler).__name__)
    return None


@functools.cache
def _warn_of(sampler: str) -> None:
    """Warn once of each kind of sampler."""
    warnings.warn(
        f"{sampler} does not tell which samples it may draw (it has no `indices`), so "
        "gradients are taken of samples from the whole dataset; pass a loader over a "
        "torch.utils.data.Subset if that is too much.",
        stacklevel=4,
    )


class KeptBatches(Batches):
    """Batches that are fetched again and again, and kept as far as memory is given.

    Whether a batch was kept cannot be told: it is a copy, and what is drawn after it is
    drawn from generators in the state in which making it leaves them.

    Args:
        batches: which can be fetched in any order, each under a seed of its own.
        most_bytes: of what is kept.
    """

    def __init__(self, batches: Batches, most_bytes: int) -> None:
        self._batches = batches
        self._left = most_bytes
        self._kept: dict[int, tuple[Any, RandomStates]] = {}
        self.regroupable = batches.regroupable
        self.size = batches.size
        self.why_whole = batches.why_whole

    def fetch(self, index: int) -> Any:
        """Make one batch, or give it once more.

        Args:
            index: which one.

        Returns:
            The batch.
        """
        if index in self._kept:
            batch, states = self._kept[index]
            states.restore()
            return _copy(batch)
        batch = self._batches.fetch(index)
        size = _bytes_to_keep(batch)
        if size is not None and size <= self._left:
            self._left -= size
            self._kept[index] = _copy(batch), RandomStates.now()
        return batch

    def fetch_group(self, first: int, count: int, seed: int) -> Any:
        """Make one batch of the samples of several.

        Args:
            first: number of the first batch.
            count: number of batches.
            seed: the samples of batch i are drawn under ``derive_seed(seed, i)``.

        Returns:
            The samples.
        """
        return self._batches.fetch_group(first, count, seed)

    def describe(self, index: int) -> str:
        """Name the samples of a batch.

        Args:
            index: which batch.

        Returns:
            Their indices in the dataset.
        """
        return self._batches.describe(index)


def _bytes_to_keep(batch: Any) -> int | None:
    """Bytes of a batch and of the generators after it; None if it is not to be kept."""
    size = _BYTES_OF_GENERATORS
    for leaf in tree_leaves(batch):
        if isinstance(leaf, Tensor) and leaf.device.type == "cpu":
            size += leaf.numel() * leaf.element_size()
        elif not isinstance(leaf, _PLAIN):
            # A loss may change it in place, or it takes memory of an accelerator.
            return None
    return size


def _copy(batch: Any) -> Any:
    # A loss may change its batch in place.
    return tree_map(
        lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, batch
    )


class StreamBatches(Batches):
    """Batches as an iterable yields them, which must be in the same order on every rank.

    The iterable is opened by the first :meth:`fetch`, and batch i is read under the seed
    of i, so that one that shuffles with the global generators does so alike on all ranks.

    Args:
        iterable: of batches; each gives one gradient.
        count: number of batches that will be needed, N.
        seed: of whatever the iterable draws.
        repeat: whether to open the iterable again when it has ended too early.
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
        # Batches since it was opened: an empty one is not opened again.
        self._since_opened = 0
        self._count = count
        self._seed = seed

    def fetch(self, index: int) -> Any:
        """Read on to one batch.

        Args:
            index: which one, not before an earlier one.

        Returns:
            The batch.

        Raises:
            ConfigurationError: when the iterable ends too early.
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
        raise ConfigurationError(
            f"the data ended after {self._next} batches, but num_gradients="
            f"{self._count} (of channels: num_samples / batch_size) needs one batch each; "
            "lower it or give more, or of gradients set fisher.repeat_samples, which an "
            "iterator cannot do."
        )

    def describe(self, index: int) -> str:
        """Name a batch.

        Args:
            index: which batch.

        Returns:
            Its number in the stream.
        """
        return f"batch {index} of the stream"


class Streams:
    """Opens an iterable of batches again and again.

    An iterator, which can be read only once, has its last N batches kept in memory: the
    loss is measured on the batches of the gradients.

    Args:
        data: the iterable or iterator.
    """

    def __init__(self, data: Iterable[Any]) -> None:
        self._data = data
        self._key: tuple[int, int] | None = None
        self._read: list[Any] = []

    def batches(self, count: int, seed: int, repeat: bool = False) -> StreamBatches:
        """Open it.

        Args:
            count: number of batches that will be needed, N.
            seed: with an iterator, another seed reads on.
            repeat: as in :class:`StreamBatches`.

        Returns:
            The batches; nothing is read yet.
        """
        if not isinstance(self._data, Iterator):
            return StreamBatches(self._data, count, seed, repeat)
        if self._key != (count, seed):
            self.finish()
            self._key, self._read = (count, seed), []
        return StreamBatches(self._reading(self._data, self._read, count), count, seed)

    def finish(self) -> None:
        """Read what is left of the N batches: not every rank has needed the last ones."""
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
