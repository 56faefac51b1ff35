from __future__ import annotations

import pytest
import torch

from lightning_woodfisher.base.types import common_dtype


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([], torch.float32),
        ([torch.bfloat16, torch.float16], torch.float32),
        ([torch.bfloat16, torch.float32], torch.float32),
        ([torch.float32, torch.float64, torch.float16], torch.float64),
    ],
)
def test_one_float64_parameter_is_enough_and_no_dtype_is_below_float32(
    given: list[torch.dtype], expected: torch.dtype
) -> None:
    assert common_dtype(torch.zeros(1, dtype=dtype) for dtype in given) == expected
