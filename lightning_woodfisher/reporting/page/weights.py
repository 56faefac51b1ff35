"""The part of the page about steps that prune single weights."""

from __future__ import annotations

__all__ = ["weight_section"]

from collections.abc import Mapping, Sequence

from torch import Tensor

from lightning_woodfisher.pruning.report import SALIENCY_SHARES, PruningReport
from lightning_woodfisher.reporting import figures
from lightning_woodfisher.reporting.page.elements import (
    Drawing,
    cards,
    count,
    figure_grid,
    number,
    table,
    text,
)


def weight_section(
    name: str, reports: Sequence[PruningReport], masks: Mapping[str, Tensor]
) -> str:
    """Show the steps of a callback that pruned single weights.

    Args:
        name: of the section, unlike that of any other one on the page.
        reports: of the steps, in order.
        masks: bool tensors by parameter name, True where kept.

    Returns:
        HTML.
    """
    last = reports[-1]
    raised = "".join(
        f"<li>{text(block)}: λ = {damping:.3g}</li>"
        for block, damping in last.raised_damping.items()
    )
    if raised:
        raised = f"<h2>Blocks with raised damping</h2>\n<ul>{raised}</ul>\n"
    return (
        f"{_cards(reports)}<h2>Figures</h2>\n"
        f"{figure_grid(name, _figures(reports, masks))}"
        f"<h2>Steps</h2>\n{_steps(reports)}"
        f"<h2>Layers after the last step</h2>\n{_layers(last)}{raised}"
    )


def _cards(reports: Sequence[PruningReport]) -> str:
    last = reports[-1]
    shown = {
        "zeros": f"{last.sparsity:.2%}",
        "weights pruned": f"{last.zeros:,} of {last.weights:,}",
        "criterion": last.criterion,
        "pruning steps": f"{len(reports)}",
        "ranks": f"{last.world_size}",
    }
    if last.loss_before is not None and last.loss_after is not None:
        shown["loss in the last step"] = (
            f"{last.loss_before:.3g} → {last.loss_after:.3g}"
        )
    if last.flops_share is not None:
        shown["FLOPs left"] = f"{last.flops_share:.1%}"
    if last.damping is not None:
        shown["damping λ"] = f"{last.damping:.3g}"
    return cards(shown)


def _figures(
    reports: Sequence[PruningReport], masks: Mapping[str, Tensor]
) -> list[Drawing]:
    last = reports[-1]
    small = {
        n: masks[n]
        for n in figures.small_layers({n: m.shape for n, m in masks.items()})
    }
    drawn: list[Drawing] = [
        (
            lambda: figures.draw_course(reports),
            "course",
            "Zeros after each step, and the mean loss just before and after it.",
        ),
        (
            lambda: figures.draw_increase(reports),
            "increase",
            "The quadratic model predicts a rise of the loss for each step; was it right? "
            "Below zero the step has lowered the loss.",
        ),
        (
            lambda: figures.draw_layers(last),
            "layers",
            "Layers that the loss can spare get sparser than others.",
        ),
        (
            lambda: figures.draw_schedule(reports),
            "schedule",
            "Zeros of each layer after each step, in per cent.",
        ),
        (
            lambda: figures.draw_saliencies(last),
            "saliencies",
            "Where the saliencies of each layer lay, and the largest that was removed.",
        ),
    ]
    if last.local_model:
        drawn.append(
            (
                lambda: figures.draw_local_model(last),
                "local",
                "Loss along the way from the weights before the step to those after it.",
            )
        )
    if small:
        drawn.append(
            (
                lambda: figures.draw_masks(small),
                "masks",
                "Kept weights are black; a white row is an output without any weight, a white "
                "column an unused input.",
            )
        )
    return drawn


def _steps(reports: Sequence[PruningReport]) -> str:
    head = ["step", "epoch", "optimizer steps", "target", "zeros", "predicted rise"]
    head += ["measured rise", "loss before", "loss after", "parts", "seconds"]
    rows = [
        [
            f"{index}",
            count(report.epoch),
            count(report.step),
            f"{report.target_sparsity:.2%}",
            f"{report.sparsity:.2%}",
            number(report.predicted_increase),
            number(report.measured_increase),
            number(report.loss_before),
            number(report.loss_after),
            f"{report.stages}",
            f"{sum(report.seconds.values()):.1f}",
        ]
        for index, report in enumerate(reports, start=1)
    ]
    return table(head, rows)


def _layers(report: PruningReport) -> str:
    head = ["layer", "shape", "weights", "zeros", "share", "largest saliency gone"]
    head += ["λ", "predicted rise", *(f"saliency {q:.0%}" for q in SALIENCY_SHARES)]
    rows = [
        [
            layer.name,
            "×".join(map(str, layer.shape)),
            f"{layer.weights:,}",
            f"{layer.zeros_after:,}",
            f"{layer.sparsity:.2%}",
            number(layer.threshold),
            number(report.damping_of(layer)),
            number(layer.predicted_increase),
            *(
                map(number, layer.saliency_quantiles)
                if layer.saliency_quantiles
                else ["–"] * len(SALIENCY_SHARES)
            ),
        ]
        for layer in report.layers
    ]
    return table(head, rows)
