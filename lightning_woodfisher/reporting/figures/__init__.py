"""Draw figures of reports.

Inputs are reports, or masks in the shapes of their parameters; outputs are matplotlib
figures. matplotlib is imported only when a figure is drawn, and pyplot is never imported.
This folder imports neither the loggers nor the page.
"""

from __future__ import annotations

__all__ = [
    "draw_channels",
    "draw_layers",
    "draw_local_model",
    "draw_loss_increase",
    "draw_masks",
    "draw_network_size",
    "draw_progress",
    "draw_saliencies",
    "draw_schedule",
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
from lightning_woodfisher.reporting.figures.channels import (
    draw_channels,
    draw_network_size,
)
from lightning_woodfisher.reporting.figures.sweep import draw_sweep
from lightning_woodfisher.reporting.figures.weights import (
    draw_layers,
    draw_local_model,
    draw_loss_increase,
    draw_masks,
    draw_progress,
    draw_saliencies,
    draw_schedule,
    small_layers,
)
