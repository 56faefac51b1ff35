"""Estimate the cost of a pruning step on each rank before it is run.

Bytes, traffic and floating-point operations follow from the shapes, the settings and the
number of ranks; nothing is allocated. The formulas are in :mod:`.costs`.
"""

from __future__ import annotations

__all__ = ["ResourceEstimate", "estimate", "estimate_workload"]

import bisect
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from lightning_woodfisher.base.byte_sizes import format_bytes, format_count, parse_bytes
from lightning_woodfisher.base.errors import require_integer, require_number
from lightning_woodfisher.base.keywords import explain_keywords
from lightning_woodfisher.base.text_table import format_table
from lightning_woodfisher.base.wording import count_of
from lightning_woodfisher.fisher.config import FisherConfig
from lightning_woodfisher.layerwise.config import LayerwiseConfig
from lightning_woodfisher.pruning.config import (
    PruningConfig,
    SelectionConfig,
    StepConfig,
)
from lightning_woodfisher.resources.costs import (
    Memory,
    count_flops,
    count_host_bytes,
    count_memory,
    count_traffic,
)
from lightning_woodfisher.resources.workload import Workload
from lightning_woodfisher.weights.layers import (
    find_inputs_first,
    prunable_parameters,
)
from lightning_woodfisher.weights.masks import Masks

# Most ranks that are proposed.
_MOST_RANKS = 2**16
_COLUMNS = ("state", "rows", "workspace", "copies")


@dataclass(frozen=True)
class ResourceEstimate:
    """Cost of one stage of a pruning step, for the rank with the highest cost.

    The activations of the network, its gradients in training and the optimizer are not
    included. With ``recompute_steps`` a step has that many stages, none of which costs
    more.

    Attributes:
        weights: number of selected weights.
        active: number of selected weights that are not pruned yet, D.
        engine: ``"primal"``, ``"dual"``, ``"full"``; ``"diagonal"``, ``"factors"`` (K-FAC),
            ``"layers"`` (layer-wise), or ``"none"`` for magnitude.
        fisher: settings of the Fisher.
        world_size: number of ranks, R.
        blocks: number of blocks of the Fisher.
        idle_ranks: number of ranks that own no block.
        phases: memory by phase of the step, on the rank with the highest peak.
        host_bytes: bytes of rows in host memory.
        smallest_peak_bytes: peak of the rank with the lowest peak.
        bytes_sent: bytes that a rank sends: ``"exchange"`` of gradient rows, ``"gather"``
            of new weights, ``"search"`` of trial weights, ``"reduce"`` (full Fisher).
        total_bytes_sent: sum over all ranks, without ``"reduce"``, as in
            :attr:`PruningReport.bytes_exchanged`.
        flops: floating-point operations by phase, without those of the gradients.
        gradient_passes: number of mini-batches whose gradients a rank computes.
        first_order_passes: the same for the mini-batches of ``first_order_samples``, of up
            to 256 samples each.
        loss_passes: number of mini-batches whose losses a rank computes without gradients:
            in the line search, before and after the step, and at points of the local model.
        trials: fewest and most losses that the line search measures; all other numbers
            assume a usual search.
        seconds: estimated seconds of the phases whose rate was given.
        memory: bytes available on a rank, None if not given.
        largest_block_size: largest B that fits with all other settings unchanged; None if
            no B fits, or the step fits.
        largest_num_gradients: the same for N.
        world_size_needed: the same for the smallest number of ranks.
        training_steps: number of forward and backward passes of one mini-batch of the
            gradients that take as long as all gradients and losses of a rank.
    """

    weights: int
    active: int
    engine: str
    fisher: FisherConfig
    world_size: int
    blocks: int
    idle_ranks: int
    phases: Mapping[str, Memory]
    host_bytes: int
    smallest_peak_bytes: int
    bytes_sent: Mapping[str, int]
    total_bytes_sent: int
    flops: Mapping[str, int]
    gradient_passes: int
    first_order_passes: int
    loss_passes: int
    trials: tuple[int, int]
    seconds: Mapping[str, float]
    memory: int | None = None
    largest_block_size: int | None = None
    largest_num_gradients: int | None = None
    world_size_needed: int | None = None
    training_steps: float = 0.0

    @property
    def state_bytes(self) -> int:
        """Bytes of Fisher state on the device."""
        return self._largest("state")

    @property
    def peak_bytes(self) -> int:
        """Most bytes at one time; at most the sum of the maxima of the columns."""
        return self._largest("total")

    def _largest(self, column: str) -> int:
        return max(int(getattr(phase, column)) for phase in self.phases.values())

    @property
    def fits(self) -> bool | None:
        """Whether the peak is within ``memory``; None if that was not given."""
        return None if self.memory is None else self.peak_bytes <= self.memory

    @property
    def verdict(self) -> str:
        """Sentence on whether the step fits into memory; if not, with changes that would."""
        need = f"{format_bytes(self.peak_bytes)} per rank"
        if self.memory is None:
            return f"needs {need}"
        available = format_bytes(self.memory)
        if self.fits:
            return f"fits: needs {need}, {available} available"
        remedies = {
            f"block_size={self.largest_block_size}": self.largest_block_size,
            f"num_gradients={self.largest_num_gradients}": self.largest_num_gradients,
            f"{self.world_size_needed} devices": self.world_size_needed,
        }
        found = " or ".join(text for text, value in remedies.items() if value)
        found = found or "no block size, number of gradients or number of devices"
        return f"does not fit: needs {need}, {available} available; {found} would fit"

    def summary(self) -> str:
        """Summarize the memory of a step in a few sentences.

        Returns:
            One line.
        """
        text = (
            f"A step needs up to {format_bytes(self.peak_bytes)} per rank "
            f"({format_bytes(self.state_bytes)} of it for the Fisher), in addition to the "
            "activations of the network."
        )
        if self.host_bytes:
            text += f" Rows in host memory: {format_bytes(self.host_bytes)}."
        if self.idle_ranks:
            text += (
                f" {self.idle_ranks} of {self.world_size} ranks own no block, because "
                "there are too few blocks."
            )
        return text

    def to_dict(self) -> dict[str, Any]:
        """Convert to plain types for JSON.

        Returns:
            Nested dicts, numbers, strings and None, with the derived numbers.
        """
        plain = dataclasses.asdict(self)
        for column in _COLUMNS:
            plain[f"{column}_bytes"] = self._largest(column)
        for name, phase in self.phases.items():
            plain["phases"][name]["total"] = phase.total
        derived = {"peak_bytes": self.peak_bytes, "fits": self.fits}
        return {**plain, **derived, "verdict": self.verdict}

    def to_table(self) -> str:
        """Format the estimate as text.

        Returns:
            Lines of settings, bytes by phase, traffic, operations and the verdict.
        """
        share = 1 - self.active / self.weights if self.weights else 0.0
        block = self.fisher.block_size or "all"
        count, size = self.fisher.num_gradients, self.fisher.gradient_batch_size
        title = (
            f"{self.weights:,} weights, {share:.2%} pruned, N={count} m={size} B={block}, "
            f"{self.engine}, {count_of(self.world_size, 'rank')}, "
            f"{count_of(self.blocks, 'block')}"
        )
        columns = (*_COLUMNS, "total")
        rows = [
            (name, *(format_bytes(getattr(phase, column)) for column in columns))
            for name, phase in self.phases.items()
        ]
        peak = ("peak", *(format_bytes(self._largest(column)) for column in columns))
        lines = [title, "", format_table(("bytes on a rank", *columns), rows, peak), ""]
        gradients = f"{self.gradient_passes:,} of mini-batches of {size}"
        if self.first_order_passes:
            gradients += f", {self.first_order_passes:,} for the first order"
        losses = f"{self.loss_passes:,} of mini-batches of {size}"
        fewest, most = self.trials
        if most:
            trials = str(most) if fewest == most else f"{fewest} to {most}"
            losses += f", search {trials} times"
        facts = {
            "in host memory": self.host_bytes and format_bytes(self.host_bytes),
            "without a block": self.idle_ranks and count_of(self.idle_ranks, "rank"),
            "gradients": gradients,
            "losses": losses,
            "both together": f"as long as {self.training_steps:,.0f} training steps on "
            f"mini-batches of {size}",
            "sent": _format_counts(self.bytes_sent, format_bytes),
            "operations": _format_counts(self.flops, format_count),
            "seconds": self.seconds and self._format_seconds(),
            "memory": self.verdict,
        }
        lines += [f"{name:<17} {fact}" for name, fact in facts.items() if fact]
        return "\n".join(lines)

    def _format_seconds(self) -> str:
        counted = _format_counts(self.seconds, "{:.3g}".format)
        if "gradients" in self.seconds:
            return f"{counted}, together {sum(self.seconds.values()):.3g}"
        return f"{counted}, without gradients and losses (--seconds_per_gradient)"


@explain_keywords()
def estimate(
    model_or_shapes: nn.Module | Mapping[str, Sequence[int]],
    *,
    fisher: FisherConfig = FisherConfig(),
    selection: SelectionConfig = SelectionConfig(),
    criterion: str = "woodfisher",
    step: StepConfig = StepConfig(),
    layerwise: LayerwiseConfig = LayerwiseConfig(),
    sparsity: float = 0.0,
    world_size: int = 1,
    memory: str | int | None = None,
    flops_per_second: float | None = None,
    bytes_per_second: float | None = None,
    seconds_per_gradient: float | None = None,
    threads: int = 1,
    sharded: bool = False,
    positions: int = 0,
) -> ResourceEstimate:
    """Estimate the cost of a pruning step without running it.

    Args:
        model_or_shapes: the network, which may be on the meta device, or shapes of the
            weights to prune by name (float32).
        fisher: settings of the Fisher.
        selection: weights of a network to prune, and their pattern; shapes are not
            filtered.
        criterion: name of the criterion.
        step: weight update, line search and measurements of the step.
        layerwise: settings of ``criterion="layerwise"``.
        sparsity: share of the weights that are pruned before the step, assumed to be the
            same in every tensor.
        world_size: number of ranks.
        memory: memory of a device for the step: bytes, ``"80GB"`` or ``"24GiB"``.
        flops_per_second: rate of a rank in matrix products. Without this rate or one of
            the next two, ``seconds`` has no entry for the phases that depend on it.
        bytes_per_second: rate at which a rank sends.
        seconds_per_gradient: seconds of one mini-batch, forward and backward.
        threads: torch threads of each rank. On a CPU each thread processes its own blocks;
            use 1 for a GPU.
        sharded: whether the parameters are sharded over the ranks (FSDP2).
        positions: tokens in a sample, to count the activations of linear layers with
            ``criterion="layerwise"``; 0 leaves them out.

    Returns:
        The estimate for the rank with the highest cost.

    Examples:
        >>> cost = estimate({"fc": (1000, 512)}, memory="2GB")
        >>> cost.fits
        True
    """
    require_number("sparsity", sparsity, "[0, 1)")
    require_integer("world_size", world_size, least=1)
    require_integer("positions", positions, least=0)
    config = PruningConfig(criterion, fisher, selection, step, layerwise=layerwise)
    weight_bytes = 4
    if isinstance(model_or_shapes, nn.Module):
        chosen = config.selection
        found = prunable_parameters(
            model_or_shapes, chosen.include, chosen.exclude, chosen.only
        )
        masks = Masks(found, find_inputs_first(model_or_shapes, list(found)))
        shapes = [
            tuple(masks.outputs_first(name, p).shape) for name, p in found.items()
        ]
        weight_bytes = max(parameter.element_size() for parameter in found.values())
    else:
        shapes = [tuple(shape) for shape in model_or_shapes.values()]
    active = [round(math.prod(shape) * (1 - sparsity)) for shape in shapes]
    workload = Workload(
        config, shapes, active, world_size, weight_bytes, threads, sharded, positions
    )
    result = estimate_workload(workload, memory)
    seconds: dict[str, float] = {}
    # A Hessian product takes about as long as two gradients.
    gradients: float = result.gradient_passes * (2 if workload.uses_hessian else 1)
    ratio = workload.first_order_batches[1] / config.fisher.gradient_batch_size
    gradients += result.first_order_passes * ratio
    # The backward pass takes twice as long as the forward pass.
    losses = result.loss_passes / 3
    if seconds_per_gradient is not None:
        seconds["gradients"] = gradients * seconds_per_gradient
        seconds["losses"] = losses * seconds_per_gradient
    if bytes_per_second is not None:
        seconds["send"] = sum(result.bytes_sent.values()) / bytes_per_second
    if flops_per_second is not None:
        seconds |= {name: n / flops_per_second for name, n in result.flops.items()}
    return dataclasses.replace(
        result, seconds=seconds, training_steps=gradients + losses
    )


def estimate_workload(
    workload: Workload, memory: str | int | None = None
) -> ResourceEstimate:
    """Estimate the cost of a workload; see :func:`estimate`.

    Args:
        workload: one stage of a pruning step.
        memory: memory of a device for the step.

    Returns:
        The estimate, without seconds.
    """
    ranks = range(workload.exchange_ranks)
    memories = [count_memory(workload, rank) for rank in ranks]
    peaks = [max(phase.total for phase in phases.values()) for phases in memories]
    sent = [count_traffic(workload, rank) for rank in ranks]
    owned = [workload.partition.owned(rank) for rank in ranks]
    result = ResourceEstimate(
        weights=sum(map(math.prod, workload.shapes)),
        active=sum(workload.active),
        engine=workload.engine,
        fisher=workload.fisher,
        world_size=workload.world_size,
        blocks=_count_blocks(workload),
        idle_ranks=sum(not units for units in owned),
        phases=memories[peaks.index(max(peaks))],
        host_bytes=max(count_host_bytes(workload, units) for units in owned),
        smallest_peak_bytes=min(peaks),
        bytes_sent=_take_largest(sent),
        total_bytes_sent=sum(s["exchange"] + s["gather"] + s["search"] for s in sent),
        flops=_take_largest([count_flops(workload, rank) for rank in ranks]),
        gradient_passes=workload.gradient_passes,
        first_order_passes=workload.first_order_passes,
        loss_passes=workload.loss_passes,
        trials=workload.trials,
        seconds={},
        memory=None if memory is None else parse_bytes(memory),
    )
    if result.memory is None or result.fits:
        return result
    return dataclasses.replace(result, **_find_remedies(workload, result.memory))


def _find_remedies(workload: Workload, memory: int) -> dict[str, Any]:
    """Find the largest B and N and the smallest number of ranks that fit."""

    def fits(world_size: int = workload.world_size, **changes: Any) -> bool:
        # max_nonfinite costs nothing, but must be less than N.
        fisher = dataclasses.replace(workload.fisher, max_nonfinite=0, **changes)
        config = dataclasses.replace(workload.config, fisher=fisher)
        changed = dataclasses.replace(workload, config=config, world_size=world_size)
        return all(
            phase.total <= memory
            for rank in range(changed.exchange_ranks)
            for phase in count_memory(changed, rank).values()
        )

    # More ranks than units do not help, because a unit has one owner.
    fewest = workload.world_size
    most = min(_MOST_RANKS, max(fewest, len(workload.partition.units)))
    found = {
        "world_size_needed": _find_first("world_size", range(fewest, most + 1), fits)
    }
    count = workload.fisher.num_gradients
    if workload.positions:
        values = range(count, 0, -1)
        found["largest_num_gradients"] = _find_first("num_gradients", values, fits)
    if workload.has_blocks:
        # A block lies in one tensor; without a block size the largest tensor is the limit.
        size = workload.fisher.block_size or max(workload.active, default=1)
        for name, largest in (("num_gradients", count), ("block_size", max(1, size))):
            found[f"largest_{name}"] = _find_first(name, range(largest, 0, -1), fits)
    return found


def _find_first(name: str, values: range, fits: Callable[..., bool]) -> int | None:
    """Find the first value of a setting that fits by bisection, None if there is none."""
    index = bisect.bisect_left(values, True, key=lambda value: fits(**{name: value}))
    return values[index] if index < len(values) else None


def _count_blocks(workload: Workload) -> int:
    if workload.engine in {"full", "none", "diagonal", "layers"}:
        return int(workload.engine == "full")
    shards = workload.world_size // workload.exchange_ranks
    return shards * sum(unit.count for unit in workload.partition.units)


def _take_largest(every: Sequence[Mapping[str, int]]) -> dict[str, int]:
    return {key: max(one[key] for one in every) for key in every[0]}


def _format_counts(numbers: Mapping[str, Any], write: Callable[[Any], str]) -> str:
    texts = [f"{name} {write(n).strip()}" for name, n in numbers.items() if n]
    return ", ".join(texts) or "nothing"
