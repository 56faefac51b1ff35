"""Roll back weights, masks and BatchNorm statistics if a pruning step fails."""

from __future__ import annotations

__all__ = ["rollback_on_error"]

import contextlib
from collections.abc import Iterator

from torch import nn

from lightning_woodfisher.data.batchnorm import BatchNormStatistics
from lightning_woodfisher.distributed.dtensor import to_local
from lightning_woodfisher.weights.masks import Masks


@contextlib.contextmanager
def rollback_on_error(masks: Masks, model: nn.Module) -> Iterator[None]:
    """Restore weights, vectors, masks and BatchNorm statistics if the body fails.

    Args:
        masks: masks of the weights that the body may change.
        model: the network that holds them.

    Yields:
        Nothing.
    """
    statistics = BatchNormStatistics.of(model)
    weights = {name: masks.local(name).clone() for name in masks.parameters}
    # Biases, which layer-wise reconstruction changes.
    vectors = [
        (part, part.clone())
        for part in (to_local(p) for p in model.parameters() if p.dim() == 1)
    ]
    try:
        with masks.restored_on_error():
            yield
    except BaseException:
        for name, before in weights.items():
            masks.local(name).copy_(before)
        for part, before in vectors:
            part.copy_(before)
        statistics.write(model)
        raise
