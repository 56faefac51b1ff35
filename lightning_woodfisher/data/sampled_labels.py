"""Draw labels from the predictions of the model, for the true Fisher.

The label of a sample depends on its number in the estimate. It does not depend on the rank
that computes it, or on the number of samples in a forward pass.
"""

from __future__ import annotations

__all__ = ["UnlabeledBatch", "UnlabeledBatches", "count_labels", "draw_labels"]

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_woodfisher.base.errors import PruningError
from lightning_woodfisher.base.host_copy import upload
from lightning_woodfisher.data.batches import Batches
from lightning_woodfisher.data.isolation import derive_seed, preserve_random_states

_METHOD = "sample_labels"
_REMEDY = (
    f"; give the model a method {_METHOD}(batch) that returns the batch with labels drawn "
    "from its predictions, or use the labels of the data (fisher.sample_labels=False, or "
    "labels='true' for channels)"
)


@dataclass(frozen=True)
class UnlabeledBatch:
    """A batch whose labels must be drawn.

    Attributes:
        batch: the batch, with the labels of the data.
        seed: seed of the labels.
        first: number of its first sample.
    """

    batch: Any
    seed: int
    first: int


class UnlabeledBatches(Batches):
    """Mini-batches whose labels must be drawn.

    Args:
        batches: the samples.
        seed: seed of the labels.
        model: the network. If it has a method ``sample_labels``, which draws the labels of
            a whole batch, the batches cannot be regrouped.
    """

    def __init__(self, batches: Batches, seed: int, model: nn.Module) -> None:
        self._batches = batches
        self._seed = derive_seed(seed, "labels")
        self.regroupable = batches.regroupable and _method(model) is None
        self.size = batches.size
        if batches.regroupable and not self.regroupable:
            self.why_not_regroupable = f"{_METHOD} draws the labels of a whole batch"

    def fetch(self, index: int) -> UnlabeledBatch:
        """Return one batch and the number of its first sample."""
        batch = self._batches.fetch(index)
        if self._batches.regroupable and self.size is not None:
            return UnlabeledBatch(batch, self._seed, index * self.size)
        return UnlabeledBatch(batch, derive_seed(self._seed, "batch", index), 0)

    def describe(self, index: int) -> str:
        """Name the samples of a batch."""
        return self._batches.describe(index)


def draw_labels(
    model: nn.Module,
    batch: Any,
    unlabeled: UnlabeledBatch | None,
    predictor: nn.Module | None = None,
) -> Any:
    """Draw the labels of a batch, y ~ softmax(model(inputs)).

    Args:
        model: the network, in the mode in which the loss will be computed. It runs with the
            random states of the loss, so that dropout zeroes the same elements.
        batch: ``(inputs, labels)`` on the device of the model; int64 labels ``[n, ...]``
            and logits ``[n, C, ...]``. Negative labels (ignored positions) stay.
        unlabeled: the batch with its seed; None returns ``batch`` unchanged.
        predictor: the module that returns the logits, if it is not the model.

    Returns:
        The batch with drawn labels.

    Raises:
        PruningError: if the batch or the output of the model has another form.
    """
    if unlabeled is None:
        return batch
    method = _method(model)
    if method is not None:
        with torch.no_grad():
            return method(batch)
    inputs, labels = _inputs_and_labels(batch)
    model = model if predictor is None else predictor
    with preserve_random_states(), torch.no_grad():
        try:
            logits = model(inputs)
        except (NotImplementedError, TypeError) as error:
            raise PruningError(
                f"drawing labels calls {type(model).__name__} with the inputs of "
                f"a batch, which failed ({type(error).__name__}: {error}){_REMEDY}"
            ) from error
    _require_logits(model, logits, labels)
    uniform = torch.stack(
        [
            torch.rand(
                labels.shape[1:],
                generator=torch.Generator().manual_seed(
                    derive_seed(unlabeled.seed, unlabeled.first + index)
                ),
                dtype=torch.float64,
            )
            for index in range(len(labels))
        ]
    )
    uniform = upload(uniform, logits.device)
    # Inverse of the distribution function; rounding must not lead to a class C.
    ends = logits.double().softmax(dim=1).cumsum(dim=1)
    chosen = (ends <= uniform.unsqueeze(1)).sum(dim=1).clamp(max=logits.shape[1] - 1)
    chosen = torch.where(labels < 0, labels, chosen.to(labels.dtype))
    if hasattr(batch, "_fields"):
        return type(batch)(inputs, chosen)
    return type(batch)((inputs, chosen))


def count_labels(batch: Any) -> int:
    """Count the labels that are drawn for a batch.

    Args:
        batch: ``(inputs, labels)``; int64 labels ``[n, ...]``, for a sequence or an image
            several for each sample. Negative labels (ignored positions) do not count.

    Returns:
        Their number; for a batch of another form the length of its first tensor.
    """
    try:
        _, labels = _inputs_and_labels(batch)
    except PruningError:
        lengths = (
            len(t) for t in tree_leaves(batch) if isinstance(t, Tensor) and t.dim()
        )
        return next(lengths, 1)
    return max(1, int((labels >= 0).sum()))


def _method(model: nn.Module) -> Callable[[Any], Any] | None:
    method = getattr(model, _METHOD, None)
    return method if callable(method) else None


def _inputs_and_labels(batch: Any) -> tuple[Any, Tensor]:
    pair = isinstance(batch, list | tuple) and len(batch) == 2
    if pair and isinstance(batch[1], Tensor):
        labels = batch[1]
        if labels.dim() and labels.dtype in {torch.int64, torch.int32, torch.uint8}:
            return batch[0], labels
    kinds = map(_describe, batch if isinstance(batch, list | tuple) else [batch])
    raise PruningError(
        "drawing labels needs batches (inputs, integer class labels), but found "
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
    raise PruningError(
        f"drawing labels needs logits [n, C, ...] for labels of shape "
        f"{tuple(labels.shape)}, but {type(model).__name__} returned "
        f"{_describe(logits)}{_REMEDY}"
    )


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} {tuple(value.shape)}"
    return type(value).__name__
