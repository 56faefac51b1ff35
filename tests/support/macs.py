"""Multiply-accumulates that torch counts."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def count_macs(run: Callable[[], object]) -> float:
    """Count the multiply-accumulates of a forward pass."""
    # The counter knows neither fused attention nor fused recurrent layers.
    torch._C._set_mkldnn_enabled(False)
    try:
        with (
            sdpa_kernel(SDPBackend.MATH),
            FlopCounterMode(display=False) as counter,
        ):
            run()
    finally:
        torch._C._set_mkldnn_enabled(True)
    return counter.get_total_flops() / 2
