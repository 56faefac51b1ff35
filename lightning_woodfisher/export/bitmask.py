"""Pack a tensor into a bitmask and its nonzero elements.

An element counts as zero if all its bits are zero, so that -0.0 and NaN are kept.
"""

from __future__ import annotations

__all__ = ["count_packed_bytes", "count_zeros", "pack", "unpack"]

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def count_zeros(tensor: Tensor) -> int:
    """Count the elements whose bits are all zero.

    Args:
        tensor: tensor of any shape, with at most eight bytes per element.

    Returns:
        Number of zeros, not counting -0.0.
    """
    return tensor.numel() - int(torch.count_nonzero(_as_integers(tensor)))


def count_packed_bytes(tensor: Tensor) -> int:
    """Count the bytes that a tensor needs when it is packed.

    Args:
        tensor: tensor of any shape, with at most eight bytes per element.

    Returns:
        Bytes of the bitmask and the values.
    """
    nonzero = tensor.numel() - count_zeros(tensor)
    return math.ceil(tensor.numel() / 8) + nonzero * tensor.itemsize


def pack(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Split a tensor into a bitmask and values.

    Args:
        tensor: tensor on the CPU, of any shape.

    Returns:
        The bitmask, uint8 ``[⌈numel / 8⌉]``, with element i in bit i mod 8 of byte i // 8
        (row-major order, unused bits zero); and the elements whose bit is set, in order,
        with the dtype of the tensor.
    """
    integers = _as_integers(tensor)
    stored = integers != 0
    bits = np.packbits(stored.numpy(), bitorder="little")
    return torch.from_numpy(bits), integers[stored].view(tensor.dtype)


def unpack(bits: Tensor, values: Tensor, shape: Sequence[int]) -> Tensor:
    """Rebuild a tensor from its bitmask and values.

    Args:
        bits: bitmask from :func:`pack`, uint8 ``[⌈numel / 8⌉]``.
        values: values from :func:`pack`, ``[nonzero]``.
        shape: shape of the tensor.

    Returns:
        The tensor, bit for bit.

    Raises:
        ValueError: if bits, values and shape do not match.
    """
    numel = math.prod(shape)
    matches = bits.dtype == torch.uint8 and bits.shape == (math.ceil(numel / 8),)
    if not matches or values.dim() != 1 or any(size < 0 for size in shape):
        raise ValueError(
            f"a bitmask of shape {tuple(bits.shape)} does not match a tensor of shape "
            f"{tuple(shape)}"
        )
    stored = np.unpackbits(bits.numpy(), bitorder="little")
    if np.count_nonzero(stored) != len(values) or stored[numel:].any():
        raise ValueError(f"{len(values)} values do not fit the bits")
    flat = np.zeros(numel, dtype=f"i{values.itemsize}")
    flat[stored[:numel].view(np.bool_)] = _as_integers(values).numpy()
    return torch.from_numpy(flat).view(values.dtype).view(tuple(shape))


def _as_integers(tensor: Tensor) -> Tensor:
    """View the bits of a tensor as integers ``[numel]``."""
    return tensor.reshape(-1).view(_INTEGERS[tensor.itemsize])
