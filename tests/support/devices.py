"""The device that tests run on: the CPU, or that of ``WOODFISHER_TEST_DEVICE``.

Tests compare on the CPU, against results that were computed there.
"""

from __future__ import annotations

import os

import torch

DEVICE = torch.device(os.environ.get("WOODFISHER_TEST_DEVICE", "cpu"))
#: For the Trainer.
ACCELERATOR = DEVICE.type
