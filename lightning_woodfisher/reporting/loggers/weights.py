"""What the steps that prune single weights give the loggers."""

from __future__ import annotations

__all__ = ["track_end", "track_settings", "track_step"]

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import WandbLogger
from torch import Tensor

from lightning_woodfisher.base.lightning_names import either_name
from lightning_woodfisher.pruning.config import PruningConfig
from lightning_woodfisher.pruning.report import (
    SALIENCY_SHARES,
    PruningReport,
    format_steps,
)
from lightning_woodfisher.pruning.schedule import PruningSchedule
from lightning_woodfisher.reporting import figures
from lightning_woodfisher.reporting.loggers.writers import (
    Table,
    mask_artifact,
    plain,
    settings_of_schedule,
    write_end,
    write_settings,
    write_step,
)
from lightning_woodfisher.weights.masks import Masks

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LAYER_COLUMNS = [
    "layer",
    "shape",
    "weights",
    "zeros",
    "sparsity",
    "threshold",
    "damping",
    "predicted_increase",
    *(f"saliency_{100 * share:.0f}%" for share in SALIENCY_SHARES),
]
_STEP_COLUMNS = [
    "epoch",
    "step",
    "target_sparsity",
    "sparsity",
    "predicted_increase",
    "measured_increase",
    "loss_before",
    "loss_after",
    "threshold",
    "damping",
    "flops_share",
]


def track_settings(
    trainer: pl.Trainer,
    config: PruningConfig,
    target_sparsity: float,
    schedule: PruningSchedule,
) -> None:
    """Write the settings into the run: W&B's config, a text in TensorBoard.

    Args:
        trainer: with the loggers.
        config: of the steps.
        target_sparsity: of the last one.
        schedule: of the steps.
    """
    if not trainer.is_global_zero:
        return
    settings = {
        "target_sparsity": target_sparsity,
        "schedule": settings_of_schedule(schedule),
        **dataclasses.asdict(config),
    }
    write_settings(trainer, plain(settings), "pruning", "settings")


def track_step(
    trainer: pl.Trainer, reports: Sequence[PruningReport], masks: Masks
) -> None:
    """Write the tables and figures of the last pruning step.

    Args:
        trainer: with the loggers.
        reports: of all steps so far.
        masks: after the last one.
    """
    # Asked of every rank: each may hold a part.
    small = _small_masks(masks)
    if not trainer.is_global_zero:
        return
    last = reports[-1]
    bars = ("sparsity_per_layer", "layer", "sparsity", "Sparsity per layer")
    tables = [Table("layers", _layer_rows(last), last.to_table(), bars)]
    if last.local_model:
        tables.append(Table("local_model_points", _point_rows(last)))
    layers = [
        {"epoch": report.epoch, "step": report.step, **row}
        for report in reports
        for row in _layer_rows(report)
    ]
    sheets = {"layers": layers, "steps": _step_rows(reports)}
    write_step(trainer, tables, lambda: _draw(reports, small), sheets)


def track_end(
    trainer: pl.Trainer,
    reports: Sequence[PruningReport],
    masks: Masks,
    with_masks: bool = False,
) -> None:
    """Write the table of all steps, and the masks where asked for.

    Args:
        trainer: with the loggers.
        reports: of all steps.
        masks: at the end of training.
        with_masks: give W&B the masks as an artifact.
    """
    # Asked of every rank: each may hold a part.
    kept = masks.state_dict() if with_masks else {}
    if not trainer.is_global_zero or not reports:
        return
    write_end(trainer, Table("steps", _step_rows(reports), format_steps(reports)))
    if with_masks:
        for logger in trainer.loggers:
            if isinstance(logger, either_name(WandbLogger)):
                mask_artifact(logger, kept)


def _layer_rows(report: PruningReport) -> list[dict[str, Any]]:
    """List what a step did to each layer; None for what is not known."""
    rows = []
    for layer in report.layers:
        missing = (None,) * len(SALIENCY_SHARES)
        values = [
            layer.name,
            "x".join(map(str, layer.shape)),
            layer.weights,
            layer.zeros_after,
            layer.sparsity,
            layer.threshold,
            report.damping_of(layer),
            layer.predicted_increase,
            *(layer.saliency_quantiles or missing),
        ]
        rows.append(dict(zip(_LAYER_COLUMNS, values, strict=True)))
    return rows


def _step_rows(reports: Sequence[PruningReport]) -> list[dict[str, Any]]:
    return [
        {
            **{name: getattr(report, name) for name in _STEP_COLUMNS},
            "seconds": sum(report.seconds.values()),
        }
        for report in reports
    ]


def _point_rows(report: PruningReport) -> list[dict[str, Any]]:
    return [
        {
            "part": number,
            "fraction": point.fraction,
            "predicted": point.predicted,
            "measured": point.measured,
        }
        for number, part in enumerate(report.local_model)
        for point in part
    ]


def _small_masks(masks: Masks) -> dict[str, Tensor]:
    shapes = {name: tuple(p.shape) for name, p in masks.parameters.items()}
    return {name: masks.whole(name) for name in figures.small_layers(shapes)}


def _draw(
    reports: Sequence[PruningReport], small: Mapping[str, Tensor]
) -> dict[str, Figure]:
    """Draw every figure that the reports have something for."""
    last = reports[-1]
    drawn = {
        "figures/layers": figures.draw_layers(last),
        "figures/schedule": figures.draw_schedule(reports),
        "figures/increase": figures.draw_increase(reports),
        "figures/course": figures.draw_course(reports),
        "figures/saliencies": figures.draw_saliencies(last),
    }
    if small:
        drawn["figures/masks"] = figures.draw_masks(small)
    if last.local_model:
        drawn["local_model"] = figures.draw_local_model(last)
    return drawn
