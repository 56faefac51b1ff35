"""Figures of reports. matplotlib is imported only when one is drawn, pyplot never."""

from __future__ import annotations

__all__ = [
    "draw_channels",
    "draw_course",
    "draw_increase",
    "draw_layers",
    "draw_local_model",
    "draw_masks",
    "draw_saliencies",
    "draw_schedule",
    "draw_size",
    "draw_sweep",
    "has_matplotlib",
    "small_layers",
    "to_pixels",
    "to_svg",
]

from lightning_woodfisher.reporting.figures.canvas import (
    has_matplotlib,
    to_pixels,
    to_svg,
)
from lightning_woodfisher.reporting.figures.channels import draw_channels, draw_size
from lightning_woodfisher.reporting.figures.sweep import draw_sweep
from lightning_woodfisher.reporting.figures.weights import (
    draw_course,
    draw_increase,
    draw_layers,
    draw_local_model,
    draw_masks,
    draw_saliencies,
    draw_schedule,
    small_layers,
)
