"""Write reports to W&B, TensorBoard and CSV files.

Call every function on all ranks; only rank 0 writes.
"""

from __future__ import annotations

__all__ = ["log_end", "log_figures", "log_settings", "log_step"]

import csv
import json
from collections.abc import Mapping, Sequence
from typing import Any

import fsspec
import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from torch import Tensor

from lightning_woodfisher.base.lightning_names import either_name
from lightning_woodfisher.pruning.schedule import PruningSchedule
from lightning_woodfisher.reporting import figures
from lightning_woodfisher.reporting.contents import (
    Reports,
    Rows,
    Table,
    collect_contents,
)
from lightning_woodfisher.weights.masks import Masks


def log_settings(
    trainer: pl.Trainer,
    settings: Mapping[str, Any],
    schedule: PruningSchedule,
    prefix: str = "",
) -> None:
    """Write settings to the config of W&B and to a text in TensorBoard.

    Args:
        trainer: Trainer with the loggers.
        settings: settings of the callback.
        schedule: schedule of the steps; its class and attributes are added.
        prefix: prefix of the section name ``pruning`` in W&B's config and of the name
            ``settings`` in TensorBoard.
    """
    if not trainer.is_global_zero:
        return
    values = {name.lstrip("_"): value for name, value in sorted(vars(schedule).items())}
    described = {"class": type(schedule).__name__, **values}
    text = json.dumps({**settings, "schedule": described}, indent=1, default=repr)
    for logger in trainer.loggers:
        if isinstance(logger, either_name(WandbLogger)):
            # A resumed run may change its settings.
            config = {f"{prefix}pruning": json.loads(text)}
            logger.experiment.config.update(config, allow_val_change=True)
        elif isinstance(logger, either_name(TensorBoardLogger)):
            _add_text(logger, f"{prefix}settings", text, trainer.global_step)


def log_step(trainer: pl.Trainer, reports: Reports) -> None:
    """Write the tables of the last pruning step.

    Args:
        trainer: Trainer with the loggers.
        reports: reports of all steps so far.
    """
    if not trainer.is_global_zero:
        return
    contents = collect_contents(reports, {})
    points = contents.local_model_points
    for logger in trainer.loggers:
        if isinstance(logger, either_name(WandbLogger)):
            tables = [contents.layers, *([points] if points else [])]
            _log_to_wandb(logger, tables, {}, trainer.global_step)
        elif isinstance(logger, either_name(TensorBoardLogger)):
            _add_text(
                logger, contents.layers.name, contents.layers.text, trainer.global_step
            )
        elif isinstance(logger, either_name(CSVLogger)):
            _write_csv(logger, contents.layers.name, contents.layer_history)
            _write_csv(logger, contents.steps.name, contents.steps.rows)


def log_figures(
    trainer: pl.Trainer, reports: Reports, masks: Masks | None = None
) -> None:
    """Draw the figures of a run and write them to W&B and TensorBoard.

    Args:
        trainer: Trainer with the loggers.
        reports: reports of all steps so far; at least one.
        masks: masks after the last step; None for steps that remove channels.
    """
    visual = either_name(WandbLogger, TensorBoardLogger)
    if not figures.has_matplotlib() or not any(
        isinstance(logger, visual) for logger in trainer.loggers
    ):
        return
    small: dict[str, Tensor] = {}
    if masks is not None:
        shapes = {name: tuple(p.shape) for name, p in masks.parameters.items()}
        # Collective, because each rank may hold only a part of a mask.
        small = {name: masks.whole(name) for name in figures.small_layers(shapes)}
    if not trainer.is_global_zero:
        return
    images = {
        f"pruning/figures/{name}": figures.to_pixels(draw())
        for name, draw in collect_contents(reports, small).figures.items()
    }
    for logger in trainer.loggers:
        if isinstance(logger, either_name(WandbLogger)):
            _log_to_wandb(logger, [], images, trainer.global_step)
        elif isinstance(logger, either_name(TensorBoardLogger)):
            for name, pixels in images.items():
                logger.experiment.add_image(
                    name, pixels, trainer.global_step, dataformats="HWC"
                )


def log_end(trainer: pl.Trainer, reports: Reports, masks: Masks | None = None) -> None:
    """Write the table of all steps and, if given, the masks.

    Args:
        trainer: Trainer with the loggers.
        reports: reports of all steps.
        masks: masks at the end of training, uploaded to W&B as an artifact.
    """
    # Collective, because each rank may hold only a part of a mask.
    kept = masks.state_dict() if masks is not None else None
    if not trainer.is_global_zero or not reports:
        return
    steps = collect_contents(reports, {}).steps
    for logger in trainer.loggers:
        if isinstance(logger, either_name(WandbLogger)):
            _log_to_wandb(logger, [steps], {}, trainer.global_step)
            if kept is not None:
                _log_mask_artifact(logger, kept)
        elif isinstance(logger, either_name(TensorBoardLogger)):
            _add_text(logger, steps.name, steps.text, trainer.global_step)
        elif isinstance(logger, either_name(CSVLogger)):
            _write_csv(logger, steps.name, steps.rows)


def _log_to_wandb(
    logger: WandbLogger,
    tables: Sequence[Table],
    images: Mapping[str, Any],
    step: int,
) -> None:
    import wandb

    entry: dict[str, Any] = {"trainer/global_step": step}
    for table in tables:
        data = [list(row.values()) for row in table.rows]
        shown = wandb.Table(columns=list(table.rows[0]), data=data)
        entry[f"pruning/{table.name}"] = shown
        if table.bar_chart is not None:
            name, label, value, title = table.bar_chart
            entry[f"pruning/{name}"] = wandb.plot.bar(shown, label, value, title=title)
    entry |= {name: wandb.Image(pixels) for name, pixels in images.items()}
    # With step=, W&B would drop entries for steps before the latest one.
    logger.experiment.log(entry)


def _log_mask_artifact(logger: WandbLogger, kept: Mapping[str, Tensor]) -> None:
    import wandb

    run = logger.experiment
    artifact = wandb.Artifact(f"pruning-masks-{run.id}", type="masks")
    with artifact.new_file("masks.pt", mode="wb") as file:
        torch.save(dict(kept), file)
    run.log_artifact(artifact)


def _write_csv(logger: CSVLogger, name: str, rows: Rows) -> None:
    """Write rows to a file beside metrics.csv, replacing an older one."""
    # fsspec, as in the logger itself, because the folder may be remote.
    path = f"{logger.log_dir}/pruning_{name}.csv"
    with fsspec.open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _add_text(logger: TensorBoardLogger, name: str, text: str, step: int) -> None:
    # Markdown shows indented text unchanged, in a fixed-width font.
    shown = "\n".join(f"    {line}" for line in text.splitlines())
    logger.experiment.add_text(f"pruning/{name}", shown, step)
