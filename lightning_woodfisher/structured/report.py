"""The report of one structured pruning step, frozen."""

from __future__ import annotations

__all__ = ["MEASURES", "GroupReport", "StructureReport", "format_structure_steps"]

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lightning_woodfisher.base.plain_data import PlainData
from lightning_woodfisher.base.text_table import format_number, format_table

#: What a target is a share of, in words, by ``StructureConfig.measure``.
MEASURES = {"macs": "MACs", "parameters": "parameters", "structures": "channels"}


@dataclass(frozen=True)
class GroupReport:
    """Result of a step for one group of coupled channels.

    Attributes:
        name: name of the group, that of its first layer.
        layers: names of the layers that produce the channels.
        size: number of structures.
        removed_before: number of structures that were removed before the step.
        removed: indices of the structures that are removed after the step, ascending.
        implanted: indices of the structures with 1×1 filters after the step, ascending.
    """

    name: str
    layers: tuple[str, ...]
    size: int
    removed_before: int
    removed: tuple[int, ...]
    implanted: tuple[int, ...] = ()

    @property
    def kept(self) -> int:
        """Number of structures that are left, including implants."""
        return self.size - len(self.removed)


@dataclass(frozen=True)
class StructureReport(PlainData):
    """Result of a step that removes channels.

    Attributes:
        method: how structures were scored.
        structure: which entries make up a structure: ``"conv"``, ``"bn"``, ``"conv+bn"``.
        measure: what the target is a share of.
        target: share of the measure to remove.
        groups: one report for each group.
        parameters_dense: parameters of the dense network.
        parameters: parameters of the network without the removed structures.
        macs_dense: multiply-accumulates of the dense network for one sample.
        macs: multiply-accumulates without the removed structures.
        loss_before: mean loss before the step, in evaluation mode; None if not measured.
        loss_after: mean loss after the step on the same samples, with the new BatchNorm
            statistics if they were re-estimated.
        notes: numbers of the method, such as the number of probes.
        seconds: wall-clock seconds by phase.
        world_size: number of ranks.
        epoch: epoch at whose start the step happened; None without a Trainer.
        step: optimizer steps done before it; None without a Trainer.
        latency_dense: median seconds of a forward pass of the dense network on one sample;
            None if not measured.
        latency: the same for the smaller network, timed alternately with the dense one.
        latency_runs: number of timed passes of each network.
        batchnorm_layers: number of layers whose running statistics were re-estimated.
        logged_before: latest values that the LightningModule had logged before the step, by
            name, on rank 0.
        logged_after: latest values that it had logged before the next step, or the end of
            training.
    """

    method: str
    structure: str
    measure: str
    target: float
    groups: tuple[GroupReport, ...]
    parameters_dense: int
    parameters: int
    macs_dense: int
    macs: int
    loss_before: float | None
    loss_after: float | None
    notes: Mapping[str, float] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    world_size: int = 1
    epoch: int | None = None
    step: int | None = None
    latency_dense: float | None = None
    latency: float | None = None
    latency_runs: int = 0
    batchnorm_layers: int = 0
    logged_before: Mapping[str, float] = field(default_factory=dict)
    logged_after: Mapping[str, float] = field(default_factory=dict)

    @property
    def removed_share(self) -> float:
        """Share of the measure that is removed after the step."""
        left = {"macs": self.macs_left, "parameters": self.parameters_left}
        return 1 - left.get(self.measure, self.kept / max(1, self.structures))

    @property
    def structures(self) -> int:
        """Number of structures of the dense network."""
        return sum(group.size for group in self.groups)

    @property
    def kept(self) -> int:
        """Number of structures that are left, including implants."""
        return sum(group.kept for group in self.groups)

    @property
    def macs_left(self) -> float:
        """Share of the dense network's multiply-accumulates that is left."""
        return self.macs / max(1, self.macs_dense)

    @property
    def parameters_left(self) -> float:
        """Share of the dense network's parameters that is left."""
        return self.parameters / max(1, self.parameters_dense)

    @property
    def latency_left(self) -> float | None:
        """Forward time as a share of the dense network's; None if not measured."""
        if self.latency is None or self.latency_dense is None:
            return None
        return self.latency / self.latency_dense if self.latency_dense else None

    @property
    def removed(self) -> dict[str, tuple[int, ...]]:
        """The removed structures, by group."""
        return {group.name: group.removed for group in self.groups if group.removed}

    @property
    def implanted(self) -> dict[str, tuple[int, ...]]:
        """The structures with 1×1 filters, by group."""
        return {g.name: g.implanted for g in self.groups if g.implanted}

    def metrics(self) -> dict[str, float]:
        """Return the scalars for loggers.

        Returns:
            Values by metric name, all under ``pruning/``.
        """
        found: dict[str, float | None] = {
            "structures_removed": (self.structures - self.kept)
            / max(1, self.structures)
        }
        if self.implanted:
            number = sum(map(len, self.implanted.values()))
            found["structures_implanted"] = number / max(1, self.structures)
        for size in ("parameters", "macs", "latency"):
            for name in (size, f"{size}_dense", f"{size}_left"):
                found[name] = getattr(self, name)
        for group in self.groups:
            found[f"channels/{group.name}"] = group.kept
        found |= {"loss_before": self.loss_before, "loss_after": self.loss_after}
        return {f"pruning/{n}": v for n, v in found.items() if v is not None}

    def to_table(self) -> str:
        """Format a table of the groups.

        Returns:
            Lines of text.
        """
        rows = [
            (
                group.name if len(group.layers) == 1 else f"{group.name} (tied)",
                str(len(group.layers)),
                str(group.size),
                str(group.kept),
                f"{group.kept / max(1, group.size):.0%}",
            )
            for group in self.groups
        ]
        share = f"{self.kept / max(1, self.structures):.0%}"
        total = ("all", "", str(self.structures), str(self.kept), share)
        head = ("channels of", "layers", "dense", "left", "")
        table = format_table(head, rows, total)
        number = sum(map(len, self.implanted.values()))
        implants = f"; {number} of them with 1x1 filters" if number else ""
        lines = [
            f"{table}{implants}",
            f"parameters {self.parameters_dense:,} → {self.parameters:,} "
            f"({self.parameters_left:.1%}), MACs {self.macs_dense:,} → "
            f"{self.macs:,} ({self.macs_left:.1%})",
        ]
        if self.latency is not None and self.latency_dense is not None:
            lines.append(
                f"forward pass of one sample {1e3 * self.latency_dense:.3g} ms → "
                f"{1e3 * self.latency:.3g} ms ({self.latency_left:.0%}; medians of "
                f"{self.latency_runs})"
            )
        return "\n".join(lines)


def format_structure_steps(reports: Sequence[StructureReport]) -> str:
    """Format the steps of a run that removed channels as a text table.

    Args:
        reports: reports of the steps, in order.

    Returns:
        Lines of equal width, one for each step below the head.
    """
    rows = [
        (
            f"{number}",
            format_number(report.epoch, ""),
            format_number(report.step, ","),
            f"{report.target:.1%} of {MEASURES.get(report.measure, report.measure)}",
            f"{report.kept:,}",
            f"{report.macs_left:.1%}",
            f"{report.parameters_left:.1%}",
            format_number(report.latency_left, ".0%"),
            format_number(report.loss_before),
            format_number(report.loss_after),
            f"{sum(report.seconds.values()):.1f}",
        )
        for number, report in enumerate(reports, start=1)
    ]
    head = ("", "epoch", "step", "to remove", "channels left", "MACs", "parameters")
    return format_table((*head, "time", "loss before", "after", "seconds"), rows)
