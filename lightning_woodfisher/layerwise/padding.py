"""Find the tokens of a mini-batch that are padding, which do not count.

A mask ``[n, t]`` in the mini-batch says which tokens count. An encoder and a decoder have
different tokens, perhaps equally many: which of them a layer works on is told by the tensors
of the mini-batch that its inputs are computed from.
"""

from __future__ import annotations

__all__ = ["Side", "TokenMasks"]

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from torch import Tensor

from lightning_woodfisher.data.sampled_labels import UnlabeledBatch
from lightning_woodfisher.layerwise.maps import LinearMap

Side = Literal["encoder", "decoder"]

# Ignored by the losses of PyTorch, and by those of Hugging Face's transformers.
_IGNORED_LABEL = -100


class TokenMasks:
    """Tokens of a mini-batch that count.

    A mapping may have an ``attention_mask`` ``[n, t]``, not zero for tokens that count. For
    the decoder of an encoder-decoder network, this is ``decoder_attention_mask``, or without
    one the labels ``[n, t]`` other than -100.

    Args:
        batch: a mini-batch of any form.
    """

    def __init__(self, batch: Any) -> None:
        if isinstance(batch, UnlabeledBatch):
            batch = batch.batch
        self._batch = _find_mapping(batch)
        self._masks: dict[Side, Tensor] = {}
        decoder = self._tensor("decoder_attention_mask")
        labels = self._tensor("labels")
        if decoder is None and labels is not None:
            decoder = labels != _IGNORED_LABEL
        found: dict[Side, Tensor | None] = {
            "encoder": self._tensor("attention_mask"),
            "decoder": decoder,
        }
        for side, mask in found.items():
            if mask is not None and not bool(mask.all()):
                self._masks[side] = mask.bool()

    def _tensor(self, key: str) -> Tensor | None:
        value = self._batch.get(key)
        return value if isinstance(value, Tensor) and value.dim() == 2 else None

    def sources(self) -> Iterator[tuple[Tensor, Side]]:
        """Yield the tensors of the mini-batch with their sides, if they matter."""
        if not self._masks:
            return
        named = [(k, v) for k, v in self._batch.items() if isinstance(v, Tensor)]
        # Last the inputs, which may be the labels at the same time.
        for key, value in named:
            if key == "labels" or key.startswith("decoder_"):
                yield value, "decoder"
        for key, value in named:
            if key != "labels" and not key.startswith("decoder_"):
                yield value, "encoder"

    def drop(
        self, linear: LinearMap, side: Side | None, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        """Drop the padding from inputs and outputs of a linear map.

        Args:
            linear: the map.
            side: of the inputs; None if unknown, as for a network of one side.
            tensors: of shape ``[n, t, ...]``, ``[t, n, ...]`` or ``[n·t, d]``.

        Returns:
            The tensors with their tokens ``[m, ...]``; as they are if no mask fits.
        """
        mask = self._masks.get(side or "encoder")
        if mask is None or linear.is_convolution:
            return tensors
        shape = tensors[0].shape
        if len(shape) == 2 and len(tensors[0]) == mask.numel():
            mask = mask.flatten()
        elif len(shape) > 2 and shape[:2] == mask.mT.shape != mask.shape:
            mask = mask.mT
        elif len(shape) < 3 or shape[:2] != mask.shape:
            return tensors
        kept = mask.to(tensors[0].device)
        return tuple(x[kept] for x in tensors)


def _find_mapping(batch: Any) -> Mapping[str, Any]:
    """Return the mapping in a mini-batch that has masks or labels."""
    if isinstance(batch, Mapping):
        if not {"attention_mask", "decoder_attention_mask", "labels"}.isdisjoint(batch):
            return batch
        batch = list(batch.values())
    if isinstance(batch, list | tuple):
        for each in batch:
            if isinstance(each, Mapping | list | tuple) and (
                found := _find_mapping(each)
            ):
                return found
    return {}
