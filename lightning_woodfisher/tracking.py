"""Tables, figures, settings and masks for W&B, TensorBoard and CSV files.

Every function is called on all ranks; rank 0 alone writes.
"""

from __future__ import annotations

__all__ = ["layer_rows", "settings_of", "track_end", "track_settings", "track_step"]

import csv
import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import fsspec
import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from torch import Tensor

from lightning_woodfisher import figures
from lightning_woodfisher.configuration import PruningConfig
from lightning_woodfisher.masks import Masks
from lightning_woodfisher.report import (
    SALIENCY_SHARES,
    PruningReport,
    format_steps,
)
from lightning_woodfisher.schedule import PruningSchedule

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
    settings = settings_of(config, target_sparsity, schedule)
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            # A run that is resumed may have other settings than it began with.
            logger.experiment.config.update(
                {"pruning": settings}, allow_val_change=True
            )
        elif isinstance(logger, TensorBoardLogger):
            _add_text(logger, "settings", json.dumps(settings, indent=1), trainer)


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
    pictures: dict[str, Any] = {}
    visual = (WandbLogger, TensorBoardLogger)
    if figures.has_matplotlib() and any(isinstance(x, visual) for x in trainer.loggers):
        pictures = _draw(reports, small)
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            _step_to_wandb(logger, reports[-1], pictures, trainer.global_step)
        elif isinstance(logger, TensorBoardLogger):
            for name, pixels in pictures.items():
                logger.experiment.add_image(
                    f"pruning/{name}", pixels, trainer.global_step, dataformats="HWC"
                )
            table = reports[-1].to_table()
            _add_text(logger, "layers", table, trainer)
        elif isinstance(logger, CSVLogger):
            _write_csv(logger, reports)


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
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            _end_to_wandb(logger, reports, trainer.global_step)
            if with_masks:
                _masks_to_wandb(logger, kept)
        elif isinstance(logger, TensorBoardLogger):
            _add_text(logger, "steps", format_steps(reports), trainer)


def settings_of(
    config: PruningConfig, target_sparsity: float, schedule: PruningSchedule
) -> dict[str, Any]:
    """Put all settings of a run together.

    Args:
        config: of the steps.
        target_sparsity: of the last one.
        schedule: of the steps.

    Returns:
        Nested dicts and lists of plain values.
    """
    schedule_of = {
        name.lstrip("_"): value for name, value in sorted(vars(schedule).items())
    }
    settings = {
        "target_sparsity": target_sparsity,
        "schedule": {"class": type(schedule).__name__, **schedule_of},
        **dataclasses.asdict(config),
    }
    plain: dict[str, Any] = _plain(settings)
    return plain


def layer_rows(report: PruningReport) -> list[dict[str, Any]]:
    """List what a step did to each layer.

    Args:
        report: of the step.

    Returns:
        A row for each layer, by column; None for what is not known.
    """
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


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, str | int | float | bool):
        return value
    return repr(value)


def _small_masks(masks: Masks) -> dict[str, Tensor]:
    shapes = {name: tuple(p.shape) for name, p in masks.parameters.items()}
    return {name: masks.whole(name) for name in figures.small_layers(shapes)}


def _draw(
    reports: Sequence[PruningReport], small: Mapping[str, Tensor]
) -> dict[str, Any]:
    """Draw every figure that the reports have something for, as pixels by name."""
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
    return {name: figures.to_pixels(figure) for name, figure in drawn.items()}


def _table(rows: Sequence[Mapping[str, Any]]) -> Any:
    import wandb

    data = [list(row.values()) for row in rows]
    return wandb.Table(columns=list(rows[0]), data=data)


def _step_to_wandb(
    logger: WandbLogger, report: PruningReport, pictures: Mapping[str, Any], step: int
) -> None:
    import wandb

    table = _table(layer_rows(report))
    bars = wandb.plot.bar(table, "layer", "sparsity", title="Sparsity per layer")
    entry = {
        "pruning/layers": table,
        "pruning/sparsity_per_layer": bars,
        "trainer/global_step": step,
    }
    if report.local_model:
        entry["pruning/local_model_points"] = wandb.Table(
            columns=["part", "fraction", "predicted", "measured"],
            data=[
                [number, point.fraction, point.predicted, point.measured]
                for number, part in enumerate(report.local_model)
                for point in part
            ],
        )
    for name, pixels in pictures.items():
        entry[f"pruning/{name}"] = wandb.Image(pixels)
    # With step= W&B would drop whatever comes later for an earlier step.
    logger.experiment.log(entry)


def _end_to_wandb(
    logger: WandbLogger, reports: Sequence[PruningReport], step: int
) -> None:
    table = _table(_step_rows(reports))
    logger.experiment.log({"pruning/steps": table, "trainer/global_step": step})


def _masks_to_wandb(logger: WandbLogger, kept: Mapping[str, Tensor]) -> None:
    import wandb

    run = logger.experiment
    artifact = wandb.Artifact(f"pruning-masks-{run.id}", type="masks")
    with artifact.new_file("masks.pt", mode="wb") as file:
        torch.save(dict(kept), file)
    run.log_artifact(artifact)


def _write_csv(logger: CSVLogger, reports: Sequence[PruningReport]) -> None:
    """Write the tables anew, beside metrics.csv."""
    layers = [
        {"epoch": report.epoch, "step": report.step, **row}
        for report in reports
        for row in layer_rows(report)
    ]
    for name, rows in (("layers", layers), ("steps", _step_rows(reports))):
        # Like the logger's own files, which may be far away.
        path = f"{logger.log_dir}/pruning_{name}.csv"
        with fsspec.open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


def _add_text(
    logger: TensorBoardLogger, name: str, text: str, trainer: pl.Trainer
) -> None:
    # Indented text is shown as it is, in a fixed width.
    shown = "\n".join(f"    {line}" for line in text.splitlines())
    logger.experiment.add_text(f"pruning/{name}", shown, trainer.global_step)
