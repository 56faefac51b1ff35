"""How tables, figures and settings of any kind of step get into the loggers."""

from __future__ import annotations

__all__ = [
    "Rows",
    "Table",
    "mask_artifact",
    "plain",
    "settings_of_schedule",
    "write_end",
    "write_settings",
    "write_step",
]

import csv
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import fsspec
import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from torch import Tensor

from lightning_woodfisher.base.lightning_names import either_name
from lightning_woodfisher.pruning.schedule import PruningSchedule
from lightning_woodfisher.reporting import figures

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Table:
    """A table as W&B and TensorBoard show it.

    Attributes:
        name: below ``pruning/``.
        rows: at least one, all with the same columns.
        text: of TensorBoard, which gets none if it is None.
        bars: a bar chart of W&B: its name below ``pruning/``, the columns of labels and
            values, the title.
    """

    name: str
    rows: Rows
    text: str | None = None
    bars: tuple[str, str, str, str] | None = None


def write_settings(
    trainer: pl.Trainer, settings: Mapping[str, Any], section: str, title: str
) -> None:
    """Write settings into the run: W&B's config, a text in TensorBoard.

    Args:
        trainer: with the loggers; called on rank 0.
        settings: plain values.
        section: of W&B's config.
        title: of the text, below ``pruning/``.
    """
    for logger in trainer.loggers:
        if isinstance(logger, either_name(WandbLogger)):
            # A run that is resumed may have other settings than it began with.
            logger.experiment.config.update({section: settings}, allow_val_change=True)
        elif isinstance(logger, either_name(TensorBoardLogger)):
            _add_text(logger, title, json.dumps(settings, indent=1), trainer)


def write_step(
    trainer: pl.Trainer,
    tables: Sequence[Table],
    draw: Callable[[], Mapping[str, Figure]],
    sheets: Mapping[str, Rows],
) -> None:
    """Write what a step has to show.

    Args:
        trainer: with the loggers; called on rank 0.
        tables: for W&B and TensorBoard.
        draw: draws figures, by name below ``pruning/``; called where something shows them.
        sheets: rows of the CSV files, which are written anew, by name after ``pruning_``.
    """
    pictures: dict[str, Any] = {}
    visual = either_name(WandbLogger, TensorBoardLogger)
    if figures.has_matplotlib() and any(isinstance(x, visual) for x in trainer.loggers):
        pictures = {name: figures.to_pixels(f) for name, f in draw().items()}
    for logger in trainer.loggers:
        if isinstance(logger, either_name(WandbLogger)):
            _to_wandb(logger, tables, pictures, trainer.global_step)
        elif isinstance(logger, either_name(TensorBoardLogger)):
            for name, pixels in pictures.items():
                logger.experiment.add_image(
                    f"pruning/{name}", pixels, trainer.global_step, dataformats="HWC"
                )
            _add_tables(logger, tables, trainer)
        elif isinstance(logger, either_name(CSVLogger)):
            _write_csv(logger, sheets)


def write_end(trainer: pl.Trainer, table: Table) -> None:
    """Write the table of all steps.

    Args:
        trainer: with the loggers; called on rank 0.
        table: a row for each step.
    """
    for logger in trainer.loggers:
        if isinstance(logger, either_name(WandbLogger)):
            _to_wandb(logger, [table], {}, trainer.global_step)
        elif isinstance(logger, either_name(TensorBoardLogger)):
            _add_tables(logger, [table], trainer)


def mask_artifact(logger: WandbLogger, kept: Mapping[str, Tensor]) -> None:
    """Give a run of W&B its masks.

    Args:
        logger: of the run.
        kept: bool tensors by parameter name, True where kept.
    """
    import wandb

    run = logger.experiment
    artifact = wandb.Artifact(f"pruning-masks-{run.id}", type="masks")
    with artifact.new_file("masks.pt", mode="wb") as file:
        torch.save(dict(kept), file)
    run.log_artifact(artifact)


def settings_of_schedule(schedule: PruningSchedule) -> dict[str, Any]:
    """Give the settings of a schedule.

    Args:
        schedule: any.

    Returns:
        The name of its class, and what it was made with.
    """
    values = {name.lstrip("_"): value for name, value in sorted(vars(schedule).items())}
    return {"class": type(schedule).__name__, **values}


def plain(value: Any) -> Any:
    """Turn settings into what JSON knows.

    Args:
        value: nested mappings, sequences and sets of anything.

    Returns:
        Dicts and lists of plain values; of anything else its ``repr``.
    """
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [plain(item) for item in value]
    if value is None or isinstance(value, str | int | float | bool):
        return value
    return repr(value)


def _to_wandb(
    logger: WandbLogger,
    tables: Sequence[Table],
    pictures: Mapping[str, Any],
    step: int,
) -> None:
    import wandb

    entry: dict[str, Any] = {"trainer/global_step": step}
    for table in tables:
        data = [list(row.values()) for row in table.rows]
        shown = wandb.Table(columns=list(table.rows[0]), data=data)
        entry[f"pruning/{table.name}"] = shown
        if table.bars is not None:
            name, label, value, title = table.bars
            entry[f"pruning/{name}"] = wandb.plot.bar(shown, label, value, title=title)
    for name, pixels in pictures.items():
        entry[f"pruning/{name}"] = wandb.Image(pixels)
    # With step= W&B would drop whatever comes later for an earlier step.
    logger.experiment.log(entry)


def _write_csv(logger: CSVLogger, sheets: Mapping[str, Rows]) -> None:
    """Write the tables anew, beside metrics.csv."""
    for name, rows in sheets.items():
        # Like the logger's own files, which may be far away.
        path = f"{logger.log_dir}/pruning_{name}.csv"
        with fsspec.open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


def _add_tables(
    logger: TensorBoardLogger, tables: Sequence[Table], trainer: pl.Trainer
) -> None:
    for table in tables:
        if table.text is not None:
            _add_text(logger, table.name, table.text, trainer)


def _add_text(
    logger: TensorBoardLogger, name: str, text: str, trainer: pl.Trainer
) -> None:
    # Indented text is shown as it is, in a fixed width.
    shown = "\n".join(f"    {line}" for line in text.splitlines())
    logger.experiment.add_text(f"pruning/{name}", shown, trainer.global_step)
