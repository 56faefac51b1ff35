"""What the steps that remove whole channels give the loggers."""

from __future__ import annotations

__all__ = ["track_channel_end", "track_channel_settings", "track_channel_step"]

from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl

from lightning_woodfisher.pruning.schedule import PruningSchedule
from lightning_woodfisher.reporting import figures
from lightning_woodfisher.reporting.loggers.writers import (
    Table,
    plain,
    settings_of_schedule,
    write_end,
    write_settings,
    write_step,
)
from lightning_woodfisher.structured.report import (
    StructureReport,
    format_structure_steps,
)

_STEP_COLUMNS = [
    "epoch",
    "step",
    "method",
    "measure",
    "target",
    "structures",
    "kept",
    "macs_dense",
    "macs",
    "parameters_dense",
    "parameters",
    "latency_dense",
    "latency",
    "loss_before",
    "loss_after",
]


def track_channel_settings(
    trainer: pl.Trainer, settings: Mapping[str, Any], schedule: PruningSchedule
) -> None:
    """Write the settings into the run, beside those of the pruning of single weights.

    Args:
        trainer: with the loggers.
        settings: of the callback.
        schedule: of the steps.
    """
    if trainer.is_global_zero:
        whole = plain({**settings, "schedule": settings_of_schedule(schedule)})
        write_settings(trainer, whole, "channel_pruning", "channel_settings")


def track_channel_step(trainer: pl.Trainer, reports: Sequence[StructureReport]) -> None:
    """Write the tables and figures of the last step.

    Args:
        trainer: with the loggers.
        reports: of all steps so far.
    """
    if not trainer.is_global_zero:
        return
    last = reports[-1]
    bars = ("channels_per_group", "group", "kept_share", "Share of channels kept")
    table = Table("channels", _group_rows(last), last.to_table(), bars)
    groups = [
        {"epoch": report.epoch, "step": report.step, **row}
        for report in reports
        for row in _group_rows(report)
    ]
    write_step(
        trainer,
        [table],
        lambda: {
            "figures/channels": figures.draw_channels(last),
            "figures/size": figures.draw_size(reports),
        },
        {"channels": groups, "channel_steps": _step_rows(reports)},
    )


def track_channel_end(trainer: pl.Trainer, reports: Sequence[StructureReport]) -> None:
    """Write the table of all steps.

    Args:
        trainer: with the loggers.
        reports: of all steps.
    """
    if trainer.is_global_zero and reports:
        text = format_structure_steps(reports)
        write_end(trainer, Table("channel_steps", _step_rows(reports), text))


def _group_rows(report: StructureReport) -> list[dict[str, Any]]:
    return [
        {
            "group": group.name,
            "layers": ", ".join(group.layers),
            "size": group.size,
            "kept": group.kept,
            "implanted": len(group.implanted),
            "kept_share": group.kept / group.size,
        }
        for group in report.groups
    ]


def _step_rows(reports: Sequence[StructureReport]) -> list[dict[str, Any]]:
    return [
        {
            **{name: getattr(report, name) for name in _STEP_COLUMNS},
            "seconds": sum(report.seconds.values()),
        }
        for report in reports
    ]
