"""The numbers of one structured pruning step, frozen."""

from __future__ import annotations

__all__ = ["GroupReport", "StructureReport", "format_structure_steps"]

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from lightning_woodfisher.pruning.report import format_table


@dataclass(frozen=True)
class GroupReport:
    """What a step did to one group of coupled channels.

    Attributes:
        name: of the group, after its first layer.
        layers: producing layers.
        size: number of structures.
        removed_before: structures that were gone before the step.
        removed: numbers of the structures that are gone after it, ascending.
        implanted: numbers of those that have 1×1 filters after it, ascending.
    """

    name: str
    layers: tuple[str, ...]
    size: int
    removed_before: int
    removed: tuple[int, ...]
    implanted: tuple[int, ...] = ()

    @property
    def kept(self) -> int:
        """Structures that are left, implants among them."""
        return self.size - len(self.removed)


@dataclass(frozen=True)
class StructureReport:
    """What one structured pruning step did.

    Attributes:
        method: how structures were scored.
        structure: which entries make up a structure: ``"conv"``, ``"bn"``, ``"conv+bn"``.
        measure: what the target counts.
        target: share of the measure that was to be gone after the step.
        groups: one report for each group.
        parameters_dense: of the whole network.
        parameters: of the network without what is removed.
        macs_dense: multiply-accumulates of the dense network for one sample.
        macs: of the network without what is removed.
        loss_before: mean loss before, in evaluation mode; None when not measured.
        loss_after: mean loss after, on the same samples; with the new statistics, where
            those of BatchNorm were estimated anew.
        notes: figures of the method, such as the number of probes.
        seconds: wall-clock seconds by phase.
        world_size: number of ranks.
        epoch: epoch at whose start it happened, None outside a Trainer.
        step: optimizer steps done before it, None outside a Trainer.
        latency_dense: median seconds of a forward pass of the dense network on one sample;
            None when not measured.
        latency: that of the smaller network, measured in turns with it.
        latency_runs: passes of each that were timed.
        batchnorm_layers: layers whose running statistics were estimated anew.
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

    @property
    def structures(self) -> int:
        """Number of structures of the dense network."""
        return sum(group.size for group in self.groups)

    @property
    def kept(self) -> int:
        """Number of structures that are left, implants among them."""
        return sum(group.kept for group in self.groups)

    @property
    def macs_left(self) -> float:
        """Share of the dense network's multiply-accumulates that is left."""
        return self.macs / max(1, self.macs_dense)

    @property
    def parameters_left(self) -> float:
        """Share of the dense network's parameters that is left."""
        return self.parameters / self.parameters_dense

    @property
    def latency_left(self) -> float | None:
        """Time of a forward pass as a share of the dense network's, if measured."""
        if self.latency is None or self.latency_dense is None:
            return None
        return self.latency / self.latency_dense

    @property
    def removed(self) -> dict[str, tuple[int, ...]]:
        """The removed structures, by group."""
        return {group.name: group.removed for group in self.groups if group.removed}

    @property
    def implanted(self) -> dict[str, tuple[int, ...]]:
        """The structures with 1×1 filters, by group."""
        return {g.name: g.implanted for g in self.groups if g.implanted}

    def metrics(self) -> dict[str, float]:
        """Give scalars for loggers.

        Returns:
            Values by metric name, all under ``pruning/``.
        """
        gone = self.structures - self.kept
        found: dict[str, float] = {
            "pruning/structures_removed": gone / self.structures,
            "pruning/parameters": self.parameters,
            "pruning/parameters_dense": self.parameters_dense,
            "pruning/parameters_left": self.parameters_left,
            "pruning/macs": self.macs,
            "pruning/macs_dense": self.macs_dense,
            "pruning/macs_left": self.macs_left,
        }
        if self.implanted:
            number = sum(map(len, self.implanted.values()))
            found["pruning/structures_implanted"] = number / self.structures
        for group in self.groups:
            found[f"pruning/channels/{group.name}"] = group.kept
        for name, value in (
            ("loss_before", self.loss_before),
            ("loss_after", self.loss_after),
            ("latency_dense", self.latency_dense),
            ("latency", self.latency),
            ("latency_left", self.latency_left),
        ):
            if value is not None:
                found[f"pruning/{name}"] = value
        return found

    def to_dict(self) -> dict[str, Any]:
        """Give all numbers as plain types.

        Returns:
            What :meth:`from_dict` reads.
        """
        return asdict(self)

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> StructureReport:
        """Read what :meth:`to_dict` gave, perhaps through JSON.

        Args:
            plain: the numbers.

        Returns:
            The report.
        """
        groups = tuple(
            GroupReport(
                **{
                    **group,
                    "layers": tuple(group["layers"]),
                    "removed": tuple(group["removed"]),
                    "implanted": tuple(group.get("implanted", ())),
                }
            )
            for group in plain["groups"]
        )
        return cls(**{**plain, "groups": groups})

    def to_table(self) -> str:
        """Lay out a table of the groups.

        Returns:
            Lines of text.
        """
        rows = [
            (
                group.name if len(group.layers) == 1 else f"{group.name} (tied)",
                str(len(group.layers)),
                str(group.size),
                str(group.kept),
                f"{group.kept / group.size:.0%}",
            )
            for group in self.groups
        ]
        share = f"{self.kept / self.structures:.0%}"
        total = ("all", "", str(self.structures), str(self.kept), share)
        table = format_table(
            ("channels of", "layers", "dense", "left", ""), rows, total
        )
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
    """Draw the steps of a run that removed channels as a text table.

    Args:
        reports: in order.

    Returns:
        Lines of equal width, one for each step below the head.
    """
    rows = [
        (
            f"{number}",
            "–" if report.epoch is None else f"{report.epoch}",
            "–" if report.step is None else f"{report.step:,}",
            f"{report.target:.1%} of {report.measure}",
            f"{report.kept:,}",
            f"{report.macs_left:.1%}",
            f"{report.parameters_left:.1%}",
            "–" if report.latency_left is None else f"{report.latency_left:.0%}",
            "–" if report.loss_before is None else f"{report.loss_before:.3g}",
            "–" if report.loss_after is None else f"{report.loss_after:.3g}",
            f"{sum(report.seconds.values()):.1f}",
        )
        for number, report in enumerate(reports, start=1)
    ]
    head = ("", "epoch", "step", "to remove", "channels left", "MACs", "parameters")
    return format_table((*head, "time", "loss before", "after", "seconds"), rows)
