"""Checksums differ if any bit differs."""

from __future__ import annotations

import pytest
import torch

from lightning_woodfisher.distributed.checksum import checksum

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.uint8)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_bit_of_every_element_counts(dtype: torch.dtype) -> None:
    values = torch.arange(1, 5).to(dtype)
    found = {int(checksum(values))}
    for element in range(4):
        for bit in range(8 * dtype.itemsize):
            changed = values.clone()
            octets = changed.view(torch.uint8)
            octets[element * dtype.itemsize + bit // 8] ^= 1 << bit % 8
            found.add(int(checksum(changed)))
    assert len(found) == 1 + 4 * 8 * dtype.itemsize


def test_the_order_of_the_elements_counts_and_the_shape_does_not() -> None:
    values = torch.randn(6, generator=torch.Generator().manual_seed(0))
    assert checksum(values) == checksum(values.view(2, 3))
    assert checksum(values) != checksum(values.flip(0))


def test_long_tensors_are_mixed_in_pieces() -> None:
    values = torch.zeros(2**20 + 1, dtype=torch.bool)
    before = checksum(values)
    values[-1] = True
    assert checksum(values) != before
