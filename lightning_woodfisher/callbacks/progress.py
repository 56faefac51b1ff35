"""Messages and progress bars of pruning steps, for any Trainer."""

from __future__ import annotations

__all__ = ["announce", "describe_step", "progress_bar", "terminal_bar"]

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


def describe_step(report: PruningReport) -> str:
    """Format the result of a pruning step.

    Args:
        report: report of the step.

    Returns:
        A line, and a second one if damping was raised.
    """
    loss = report.describe_loss() or "loss not measured"
    whole = report.model_sparsity
    model = "" if whole is None else f" ({whole:.2%} of the whole model)"
    text = (
        f"Pruned to {report.sparsity:.2%}{model} by {report.criterion} in "
        f"{sum(report.seconds.values()):.1f} s; {loss}"
    )
    if report.left_dense:
        text += (
            f"\nNot pruned in this step: {', '.join(report.left_dense)}; "
            f"{report.missing:,} weights are missing from the target"
        )
    if report.empty_layers:
        text += (
            f"\nNo weight is left in {', '.join(report.empty_layers)}: set "
            "selection.max_layer_sparsity, such as 0.98, or lower the target"
        )
    if report.raised_damping:
        raised = dict(report.raised_damping)
        text += f"\nDamping was raised to keep blocks positive definite: {raised}"
    return text


def announce(trainer: pl.Trainer, text: str) -> None:
    """Print a message once for all ranks, without damaging the progress bar.

    Args:
        trainer: the Trainer; its Rich display is used when it has one.
        text: plain text of one or more lines.
    """
    bar = trainer.progress_bar_callback
    display = bar.progress if isinstance(bar, either_name(RichProgressBar)) else None
    if display is not None and trainer.is_global_zero:
        display.console.print(text, markup=False, highlight=False, soft_wrap=True)
    else:
        rank_zero_info(text)


def progress_bar(trainer: pl.Trainer) -> Progress | None:
    """Return a progress bar that can be shown beside the Trainer's own.

    Args:
        trainer: the Trainer.

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


# Field that marks our row in the display of the Trainer, so that it can be reused.
_OUR_ROW = "pruning"


@contextlib.contextmanager
def _show_rich(
    bar: RichProgressBar, title: str, total: int
) -> Iterator[Callable[[int], object]]:
    # Two live displays on one terminal overwrite each other, so this is a row in theirs.
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
        # Hidden, not removed: Lightning 2.5 uses the ids of its tasks as list indices.
        display.update(task, visible=False)


@contextlib.contextmanager
def terminal_bar(title: str, total: int) -> Iterator[Callable[[int], object]]:
    """Show a tqdm bar if the output is a terminal.

    Args:
        title: text before the bar.
        total: number of items.

    Yields:
        A function to call with the number of items done.
    """
    # disable=None: silent if the output is not a terminal.
    with tqdm(desc=title, total=total, leave=False, disable=None) as bar:
        yield bar.update
