"""Reports to every logger of the Trainer, and the progress bar."""

from __future__ import annotations

__all__ = ["announce", "log_report", "progress_bar", "terminal_bar"]

import contextlib
import functools
from collections.abc import Callable, Iterator

import lightning.pytorch as pl
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from tqdm.auto import tqdm

from lightning_woodfisher.base.clock import Progress
from lightning_woodfisher.base.lightning_names import either_name
from lightning_woodfisher.pruning.report import PruningReport


def log_report(trainer: pl.Trainer, report: PruningReport) -> None:
    """Send the numbers of a pruning step to every logger.

    Scalars go to all loggers under ``pruning/…``, at the Trainer's global step. Tables and
    figures are :mod:`.tracking`'s.

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


def announce(trainer: pl.Trainer, text: str) -> None:
    """Tell the user something, once for all ranks, without tearing the progress bar.

    Args:
        trainer: its Rich display is used when it has one.
        text: plain text of one or more lines.
    """
    bar = trainer.progress_bar_callback
    display = bar.progress if isinstance(bar, either_name(RichProgressBar)) else None
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
    if isinstance(bar, either_name(RichProgressBar)):
        return functools.partial(_show_rich, bar)
    return terminal_bar


# Marks our row in the display of the Trainer, to be used again.
_OUR_ROW = "pruning"


@contextlib.contextmanager
def _show_rich(
    bar: RichProgressBar, title: str, total: int
) -> Iterator[Callable[[int], object]]:
    # Two live displays on one terminal destroy each other: ours is a row in theirs.
    display = bar.progress
    if display is None:
        yield lambda done: None
        return
    hidden = [t.id for t in display.tasks if _OUR_ROW in t.fields and not t.visible]
    if hidden:
        task = hidden[0]
        display.reset(task, total=total, description=title, visible=True)
    else:
        task = display.add_task(title, total=total, **{_OUR_ROW: True})
    try:
        yield lambda done: display.update(task, advance=done, refresh=True)
    finally:
        # Not removed: Lightning 2.5 takes the ids of its tasks for their places in a list.
        display.update(task, visible=False)


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


def _pair(predicted: float | None, measured: float | None) -> str:
    parts = [
        f"{name} {value:.3g}"
        for name, value in (("predicted", predicted), ("measured", measured))
        if value is not None
    ]
    return ", ".join(parts) or "not measured"
