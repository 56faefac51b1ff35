"""Labels drawn from what the model predicts, for the true Fisher.

The draw of a sample is fixed by its number in the estimate. So it does not depend on which
rank computes it, nor on how many samples go through the model at once.
"""

from __future__ import annotations

__all__ = ["UnlabelledBatch", "UnlabelledBatches", "labelled"]

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_woodfisher.base.errors import PruningError
from lightning_woodfisher.data.batches import Batches
from lightning_woodfisher.data.isolation import derive_seed, random_states_kept

_METHOD = "sample_labels"
_REMEDY = (
    f"; give the model a method {_METHOD}(batch) that returns the batch with labels drawn "
    "from what the model predicts, or use labels='true'"
)


@dataclass(frozen=True)
class UnlabelledBatch:
    """A batch whose labels are still to be drawn.

    Attributes:
        batch: with the labels of the data.
        seed: of the draws.
        first: number of its first sample.
    """

    batch: Any
    seed: int
    first: int


class UnlabelledBatches(Batches):
    """Mini-batches whose labels are to be drawn.

    Args:
        batches: the samples.
        seed: of the draws.
        model: one with a method ``sample_labels`` draws for a whole batch, so that the
            batches must not be grouped in another way.
    """

    def __init__(self, batches: Batches, seed: int, model: nn.Module) -> None:
        self._batches = batches
        self._seed = derive_seed(seed, "labels")
        self.regroupable = batches.regroupable and _method(model) is None
        self.size = batches.size
        if batches.regroupable and not self.regroupable:
            self.why_whole = f"{_METHOD} draws the labels of a whole batch"

    def fetch(self, index: int) -> UnlabelledBatch:
        """Make one batch.

        Args:
            index: which one.

        Returns:
            The batch and the numbers of its samples.
        """
        batch = self._batches.fetch(index)
        if self._batches.regroupable and self.size is not None:
            return UnlabelledBatch(batch, self._seed, index * self.size)
        return UnlabelledBatch(batch, derive_seed(self._seed, "batch", index), 0)

    def fetch_group(self, first: int, count: int, seed: int) -> UnlabelledBatch:
        """Make one batch of the samples of several.

        Args:
            first: number of the first batch.
            count: number of batches.
            seed: as in :meth:`.Batches.fetch_group`.

        Returns:
            The batch and the numbers of its samples.
        """
        batch = self._batches.fetch_group(first, count, seed)
        return UnlabelledBatch(batch, self._seed, first * (self.size or 1))

    def describe(self, index: int) -> str:
        """Name the samples of a batch.

        Args:
            index: which batch.

        Returns:
            What the batches say.
        """
        return self._batches.describe(index)


def labelled(
    model: nn.Module,
    batch: Any,
    drawn: UnlabelledBatch | None,
    predictor: nn.Module | None = None,
) -> Any:
    """Draw the labels of a batch, y ~ softmax(model(inputs)).

    Args:
        model: in the mode in which the loss will be computed; sees the inputs with the
            random states that the loss will see, so that dropout drops the same.
        batch: ``(inputs, labels)`` on the device of the model; int64 labels ``[n, ...]``
            and logits ``[n, C, ...]``. Negative labels (ignored positions) stay.
        drawn: says which draws belong to it; None returns the batch as it is.
        predictor: what gives the logits, if it is not the model.

    Returns:
        The batch with other labels.

    Raises:
        PruningError: for a batch or an output of another form.
    """
    if drawn is None:
        return batch
    method = _method(model)
    if method is not None:
        with torch.no_grad():
            return method(batch)
    inputs, labels = _inputs_and_labels(batch)
    model = model if predictor is None else predictor
    with random_states_kept(), torch.no_grad():
        try:
            logits = model(inputs)
        except (NotImplementedError, TypeError) as error:
            raise PruningError(
                f"labels='sampled' calls {type(model).__name__} with the inputs of "
                f"a batch, which failed ({type(error).__name__}: {error}){_REMEDY}"
            ) from error
    _require_logits(model, logits, labels)
    uniform = torch.stack(
        [
            torch.rand(
                labels.shape[1:],
                generator=torch.Generator().manual_seed(
                    derive_seed(drawn.seed, drawn.first + index)
                ),
                dtype=torch.float64,
            )
            for index in range(len(labels))
        ]
    ).to(logits.device)
    # Inverse of the distribution function; rounding must not give a class C.
    ends = logits.double().softmax(dim=1).cumsum(dim=1)
    chosen = (ends <= uniform.unsqueeze(1)).sum(dim=1).clamp(max=logits.shape[1] - 1)
    chosen = torch.where(labels < 0, labels, chosen.to(labels.dtype))
    if hasattr(batch, "_fields"):
        return type(batch)(inputs, chosen)
    return type(batch)((inputs, chosen))


def _method(model: nn.Module) -> Callable[[Any], Any] | None:
    method = getattr(model, _METHOD, None)
    return method if callable(method) else None


def _inputs_and_labels(batch: Any) -> tuple[Any, Tensor]:
    pair = isinstance(batch, list | tuple) and len(batch) == 2
    if pair and isinstance(batch[1], Tensor):
        labels = batch[1]
        if labels.dim() and labels.dtype in {torch.int64, torch.int32, torch.uint8}:
            return batch[0], labels
    kinds = [
        f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        for x in (batch if isinstance(batch, list | tuple) else [batch])
    ]
    raise PruningError(
        "labels='sampled' needs batches (inputs, integer class labels), but found "
        f"({', '.join(kinds)}){_REMEDY}"
    )


def _require_logits(model: nn.Module, logits: Any, labels: Tensor) -> None:
    if (
        isinstance(logits, Tensor)
        and logits.is_floating_point()
        and logits.dim() == labels.dim() + 1
        and logits.shape[1] > 1
        and (logits.shape[0], *logits.shape[2:]) == tuple(labels.shape)
    ):
        return
    found = (
        f"{logits.dtype} {tuple(logits.shape)}"
        if isinstance(logits, Tensor)
        else type(logits).__name__
    )
    raise PruningError(
        f"labels='sampled' needs logits [n, C, ...] for labels of shape "
        f"{tuple(labels.shape)}, but {type(model).__name__} gave {found}{_REMEDY}"
    )
