"""Say in words how a pruned run went, and what to change if it went badly."""

from __future__ import annotations

__all__ = ["describe_result", "main_metrics"]

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias

from lightning_woodfisher.pruning.report import PruningReport
from lightning_woodfisher.structured.report import StructureReport

if TYPE_CHECKING:
    from lightning_woodfisher.reporting.contents import Reports

_Report: TypeAlias = PruningReport | StructureReport

# Most metrics in tables and key numbers.
_MOST_METRICS = 3
# A loss has risen much if it is this many times, and this much, larger.
_LARGE_RATIO, _LARGE_RISE = 1.5, 0.1
_MEASURES = {"macs": "multiply-accumulates", "structures": "channels"}


def describe_result(reports: Reports, steps_left: int = 0) -> list[str]:
    """Describe a run in a few sentences.

    Args:
        reports: reports of the steps of one callback, in order; at least one.
        steps_left: number of planned steps that have not happened.

    Returns:
        Sentences about the target, the loss, a logged metric and layers without weights.
    """
    sentences = [_describe_target(reports[-1], steps_left), *_describe_losses(reports)]
    for name in main_metrics(reports)[:1]:
        before = reports[0].logged_before.get(name)
        after = reports[-1].logged_after.get(name)
        if before is not None and after is not None:
            sentences.append(
                f"{name} was {before:.4g} before pruning and is {after:.4g} now."
            )
    last = reports[-1]
    if isinstance(last, PruningReport) and last.empty_layers:
        sentences.append(
            f"No weight is left in {', '.join(last.empty_layers)}: set "
            "selection.max_layer_sparsity, or lower the target."
        )
    return sentences


def main_metrics(reports: Reports) -> list[str]:
    """Choose the logged values to show: of validation, and first those that are no losses.

    Args:
        reports: reports of the steps.

    Returns:
        Up to three names.
    """
    names = {name for report in reports for name in report.logged_after}
    chosen = {name for name in names if "train" not in name} or names
    return sorted(chosen, key=lambda name: ("loss" in name, name))[:_MOST_METRICS]


def _loss_after(report: _Report) -> float | None:
    """Return the loss after a step, with the new BatchNorm statistics if there are any."""
    found = report.loss_after
    if isinstance(report, PruningReport) and report.loss_recalibrated is not None:
        found = report.loss_recalibrated
    return found


def _describe_target(last: _Report, steps_left: int) -> str:
    if isinstance(last, PruningReport):
        reached = f"{last.sparsity:.1%} of the selected weights are zero"
        if last.model_sparsity is not None:
            reached += f", {last.model_sparsity:.1%} of the whole model"
        target, missed = f"{last.target_sparsity:.1%}", last.missing > 0
        missing = f"{last.missing:,} weights are missing from the target of {target}"
        if last.left_dense:
            missing += f", because {', '.join(last.left_dense)} stayed dense"
    else:
        measure = _MEASURES.get(last.measure, last.measure)
        reached = f"{last.removed_share:.1%} of the {measure} are removed"
        target, missed = f"{last.target:.1%}", last.removed_share < last.target - 1e-3
        missing = f"the target was {target}"
    if steps_left:
        steps = "step was" if steps_left == 1 else "steps were"
        return (
            f"{reached}, but {steps_left} planned {steps} not done: train longer, or end "
            "the schedule earlier."
        )
    return f"{reached}; {missing if missed else f'the target of {target} is reached'}."


def _describe_losses(reports: Sequence[_Report]) -> list[str]:
    measured = [
        (number, report.loss_before, after)
        for number, report in enumerate(reports, start=1)
        if report.loss_before is not None and (after := _loss_after(report)) is not None
    ]
    if not measured:
        return []
    number, before, after = max(measured, key=lambda step: step[2] - step[1])
    which = "The last step" if number == len(reports) else f"Step {number}"
    if after <= before:
        return ["No step raised the loss."]
    rise = f"{which} raised the loss from {before:.3g} to {after:.3g}"
    step = reports[number - 1]
    if isinstance(step, PruningReport) and step.loss_recalibrated is not None:
        rise += " (with new BatchNorm statistics)"
    if not _is_large(before, after):
        return [
            f"{rise}, more than any other step." if len(measured) > 1 else f"{rise}."
        ]
    sentences = [f"{rise}: use more steps."]
    first, last = measured[0][1], measured[-1][1]
    if _is_large(first, last):
        sentences.append(
            f"Training did not repair the steps: the loss was {first:.3g} before the first "
            f"one and {last:.3g} before the last one. Train longer between the steps, or "
            "with a higher learning rate."
        )
    return sentences


def _is_large(before: float, after: float) -> bool:
    return after - before > _LARGE_RISE and after > _LARGE_RATIO * before
