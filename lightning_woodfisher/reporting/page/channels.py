"""The part of the page about steps that remove whole channels."""

from __future__ import annotations

__all__ = ["channel_section"]

from collections.abc import Sequence

from lightning_woodfisher.reporting import figures
from lightning_woodfisher.reporting.page.elements import (
    Drawing,
    cards,
    count,
    figure_grid,
    number,
    table,
)
from lightning_woodfisher.structured.report import StructureReport


def channel_section(name: str, reports: Sequence[StructureReport]) -> str:
    """Show the steps of a callback that removed channels.

    Args:
        name: of the section, unlike that of any other one on the page.
        reports: of the steps, in order.

    Returns:
        HTML.
    """
    last = reports[-1]
    drawn: list[Drawing] = [
        (
            lambda: figures.draw_channels(last),
            "channels",
            "Channels of each group of layers: the outline is the dense network. (+n) means "
            "n more layers that lose the same channels.",
        ),
        (
            lambda: figures.draw_size(reports),
            "size",
            "What is left after each step, and the mean loss just before and after it.",
        ),
    ]
    return (
        f"{_cards(reports)}<h2>Figures</h2>\n{figure_grid(name, drawn)}"
        f"<h2>Steps</h2>\n{_steps(reports)}"
        f"<h2>Channels after the last step</h2>\n{_groups(last)}"
    )


def _cards(reports: Sequence[StructureReport]) -> str:
    last = reports[-1]
    shown = {
        "MACs left": f"{last.macs_left:.1%}",
        "parameters left": f"{last.parameters_left:.1%}",
        "channels left": f"{last.kept:,} of {last.structures:,}",
    }
    implants = sum(map(len, last.implanted.values()))
    if implants:
        shown["of them with 1×1 filters"] = f"{implants:,}"
    shown |= {
        "method": last.method,
        "pruning steps": f"{len(reports)}",
        "ranks": f"{last.world_size}",
    }
    if last.latency is not None and last.latency_dense is not None:
        times = (
            f"{_milliseconds(last.latency_dense)} → {_milliseconds(last.latency)} ms"
        )
        shown["forward pass of one sample"] = times
    if last.loss_before is not None and last.loss_after is not None:
        losses = f"{last.loss_before:.3g} → {last.loss_after:.3g}"
        shown["loss in the last step"] = losses
    return cards(shown)


def _steps(reports: Sequence[StructureReport]) -> str:
    head = ["step", "epoch", "optimizer steps", "to remove", "channels left"]
    head += ["MACs", "share", "parameters", "share", "forward pass (ms)"]
    head += ["dense (ms)", "loss before", "loss after", "seconds"]
    rows = [
        [
            f"{index}",
            count(report.epoch),
            count(report.step),
            f"{report.target:.1%} of {report.measure}",
            f"{report.kept:,}",
            f"{report.macs:,}",
            f"{report.macs_left:.1%}",
            f"{report.parameters:,}",
            f"{report.parameters_left:.1%}",
            _milliseconds(report.latency),
            _milliseconds(report.latency_dense),
            number(report.loss_before),
            number(report.loss_after),
            f"{sum(report.seconds.values()):.1f}",
        ]
        for index, report in enumerate(reports, start=1)
    ]
    return table(head, rows)


def _groups(report: StructureReport) -> str:
    head = ["group", "layers", "dense", "kept", "share", "with 1×1 filters"]
    rows = [
        [
            group.name,
            f"{len(group.layers)}",
            f"{group.size:,}",
            f"{group.kept:,}",
            f"{group.kept / group.size:.1%}",
            f"{len(group.implanted):,}",
        ]
        for group in report.groups
    ]
    return table(head, rows)


def _milliseconds(seconds: float | None) -> str:
    return number(None if seconds is None else 1e3 * seconds)
