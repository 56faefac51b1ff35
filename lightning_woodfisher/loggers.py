"""Reports to every logger of the Trainer, and the progress bar."""

from __future__ import annotations

__all__ = ["announce", "log_report", "progress_bar", "terminal_bar"]

import contextlib
import functools
from collections.abc import Callable, Iterator

import lightning.pytorch as pl
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from tqdm.auto import tqdm

from lightning_woodfisher.clock import Progress
from lightning_woodfisher.figures import draw_local_model, has_matplotlib
from lightning_woodfisher.report import PruningReport


def log_report(trainer: pl.Trainer, report: PruningReport) -> None:
    """Send the numbers of a pruning step to every logger.

    Scalars go to all loggers under ``pruning/…``, at the Trainer's global step. W&B also
    gets a table of the layers and a bar chart of their sparsity, and the local model where
    the report has one: its points, and a figure if matplotlib is installed.

    Args:
        trainer: its loggers are used; nothing is written on ranks other than 0.
        report: of the step.
    """
    increase = _pair(report.predicted_increase, report.measured_increase)
    announce(
        trainer,
        f"Pruned to {report.sparsity:.2%} by {report.criterion} in "
        f"{sum(report.seconds.values()):.1f} s; loss rise {increase}",
    )
    if report.raised_damping:
        announce(
            trainer,
            f"Damping was raised to keep blocks definite: {dict(report.raised_damping)}",
        )
    if not trainer.is_global_zero:
        return
    for logger in trainer.loggers:
        logger.log_metrics(report.metrics(), step=trainer.global_step)
        if isinstance(logger, WandbLogger):
            _log_to_wandb(logger, report, trainer.global_step)


def announce(trainer: pl.Trainer, text: str) -> None:
    """Tell the user something, once for all ranks, without tearing the progress bar.

    Args:
        trainer: its Rich display is used when it has one.
        text: plain text of one or more lines.
    """
    bar = trainer.progress_bar_callback
    display = bar.progress if isinstance(bar, RichProgressBar) else None
    if display is not None and trainer.is_global_zero:
        display.console.print(text, markup=False, highlight=False, soft_wrap=True)
    else:
        rank_zero_info(text)


def progress_bar(trainer: pl.Trainer) -> Progress | None:
    """Make progress bars that go with the one of the Trainer.

    Args:
        trainer: asked for its progress bar.

    Returns:
        A row in the Trainer's own Rich display, or a tqdm bar on a terminal; None when
        the Trainer shows none, or on ranks other than 0.
    """
    bar = trainer.progress_bar_callback
    if bar is None or not trainer.is_global_zero:
        return None
    if isinstance(bar, RichProgressBar):
        return functools.partial(_show_rich, bar)
    return terminal_bar


@contextlib.contextmanager
def _show_rich(
    bar: RichProgressBar, title: str, total: int
) -> Iterator[Callable[[int], object]]:
    # Two live displays on one terminal destroy each other: ours is a row in theirs.
    display = bar.progress
    if display is None:
        yield lambda done: None
        return
    task = display.add_task(title, total=total)
    try:
        yield lambda done: display.update(task, advance=done, refresh=True)
    finally:
        display.remove_task(task)


@contextlib.contextmanager
def terminal_bar(title: str, total: int) -> Iterator[Callable[[int], object]]:
    """Show a tqdm bar where the output is a terminal.

    Args:
        title: before the bar.
        total: up to which number.

    Yields:
        What is called with the number that has been done.
    """
    # disable=None: silent where the output is not a terminal.
    with tqdm(desc=title, total=total, leave=False, disable=None) as bar:
        yield bar.update


def _log_to_wandb(logger: WandbLogger, report: PruningReport, step: int) -> None:
    import wandb

    columns: list[str | int] = [
        "layer",
        "shape",
        "weights",
        "zeros",
        "sparsity",
        "threshold",
        "predicted_increase",
    ]
    table = wandb.Table(
        columns=columns,
        data=[
            [
                layer.name,
                "x".join(map(str, layer.shape)),
                layer.weights,
                layer.zeros_after,
                layer.sparsity,
                layer.threshold,
                layer.predicted_increase,
            ]
            for layer in report.layers
        ],
    )
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
        if has_matplotlib():
            entry["pruning/local_model"] = wandb.Image(draw_local_model(report))
    # With step= W&B would drop whatever comes later for an earlier step.
    logger.experiment.log(entry)


def _pair(predicted: float | None, measured: float | None) -> str:
    parts = [
        f"{name} {value:.3g}"
        for name, value in (("predicted", predicted), ("measured", measured))
        if value is not None
    ]
    return ", ".join(parts) or "not measured"
