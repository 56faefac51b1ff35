"""A tensor as one bit for each element, and the elements whose bits are not all zero.

What counts is the pattern of bits, not the number: -0.0 and NaN are kept as they are.
"""

from __future__ import annotations

__all__ = ["count_zeros", "pack", "packed_bytes", "unpack"]

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def count_zeros(tensor: Tensor) -> int:
    """Count the elements whose bits are all zero.

    Args:
        tensor: of at most eight bytes an element.

    Returns:
        Their number; -0.0 is none of them.
    """
    return tensor.numel() - int(torch.count_nonzero(_integers(tensor)))


def packed_bytes(numel: int, zeros: int, itemsize: int) -> int:
    """Count the bytes of a packed tensor.

    Args:
        numel: elements.
        zeros: elements that are not stored.
        itemsize: bytes of an element.

    Returns:
        Bytes of the bits and the values.
    """
    return math.ceil(numel / 8) + (numel - zeros) * itemsize


def pack(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Split a tensor into bits and values.

    Args:
        tensor: on the CPU, of any shape.

    Returns:
        uint8 ``[⌈numel / 8⌉]``, element i in bit i mod 8 of byte i // 8 (row-major order,
        last bits zero); and the elements whose bit is set, in order, of the same dtype.
    """
    integers = _integers(tensor)
    stored = integers != 0
    bits = np.packbits(stored.numpy(), bitorder="little")
    return torch.from_numpy(bits), integers[stored].view(tensor.dtype)


def unpack(bits: Tensor, values: Tensor, shape: Sequence[int]) -> Tensor:
    """Put a tensor together again.

    Args:
        bits: first part of what :func:`pack` gave.
        values: second part.
        shape: of the tensor.

    Returns:
        The tensor, bit for bit.

    Raises:
        ValueError: when bits, values and shape do not fit one another.
    """
    numel = math.prod(shape)
    fitting = bits.dtype == torch.uint8 and bits.shape == (math.ceil(numel / 8),)
    if not fitting or values.dim() != 1 or any(size < 0 for size in shape):
        raise ValueError(
            f"{tuple(bits.shape)} bits do not fit the shape {tuple(shape)}"
        )
    unpacked = np.unpackbits(bits.numpy(), bitorder="little")
    if np.count_nonzero(unpacked) != len(values) or unpacked[numel:].any():
        raise ValueError(f"{len(values)} values do not fit the bits")
    flat = np.zeros(numel, dtype=f"i{values.itemsize}")
    flat[unpacked[:numel].view(np.bool_)] = _integers(values).numpy()
    return torch.from_numpy(flat).view(values.dtype).view(tuple(shape))


def _integers(tensor: Tensor) -> Tensor:
    """View the bits of a tensor as integers, ``[numel]``."""
    return tensor.reshape(-1).view(_INTEGERS[tensor.itemsize])
