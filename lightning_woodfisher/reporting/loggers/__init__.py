"""Tables, figures, settings and masks for W&B, TensorBoard and CSV files.

Every function is called on all ranks; rank 0 alone writes.
"""

from __future__ import annotations

__all__ = [
    "track_channel_end",
    "track_channel_settings",
    "track_channel_step",
    "track_end",
    "track_settings",
    "track_step",
]

from lightning_woodfisher.reporting.loggers.channels import (
    track_channel_end,
    track_channel_settings,
    track_channel_step,
)
from lightning_woodfisher.reporting.loggers.weights import (
    track_end,
    track_settings,
    track_step,
)
