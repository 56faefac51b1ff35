"""A hash of the bits of a tensor, to compare tensors between ranks."""

from __future__ import annotations

__all__ = ["checksum"]

import torch
from torch import Tensor

_PIECE = 2**20
# Every factor index * _STEP + _OFFSET is odd, so that no bit that differs is lost.
_STEP, _OFFSET = 2 * 2654435761, 97


@torch.no_grad()
def checksum(tensor: Tensor) -> Tensor:
    """Mix the bits of a tensor into one integer, which wraps around.

    Args:
        tensor: tensor of any dtype and shape.

    Returns:
        int64 scalar on the device of the tensor.
    """
    # At most 32 bits at a time: products of the highest of 64 bits would cancel in pairs.
    kind = {1: torch.uint8, 2: torch.int16}.get(tensor.element_size(), torch.int32)
    flat = tensor.contiguous().view(-1).view(kind)
    first, total = 1, torch.zeros((), dtype=torch.int64, device=tensor.device)
    # In pieces, because int64 copies of the whole need many times the memory of a model.
    for piece in torch.split(flat, _PIECE):
        index = torch.arange(first, first + len(piece), device=piece.device)
        total += ((piece.to(torch.int64) + 1) * (index * _STEP + _OFFSET)).sum()
        first += len(piece)
    return total
