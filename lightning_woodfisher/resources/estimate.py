"""What a pruning step will cost each rank, before it is run.

Bytes, traffic and floating-point operations follow from the shapes, the settings and the
number of ranks; nothing is allocated. The formulas are in :mod:`.costs`.
"""

from __future__ import annotations

__all__ = ["ResourceEstimate", "estimate", "estimate_counts"]

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from lightning_woodfisher.base.byte_sizes import format_bytes, format_count, parse_bytes
from lightning_woodfisher.base.errors import ConfigurationError
from lightning_woodfisher.criteria.obs import Update
from lightning_woodfisher.fisher.config import FisherConfig
from lightning_woodfisher.pruning.config import (
    SelectionConfig,
)
from lightning_woodfisher.pruning.report import format_table
from lightning_woodfisher.resources.costs import (
    Memory,
    host_bytes,
    rank_flops,
    rank_memory,
    rank_traffic,
)
from lightning_woodfisher.resources.workload import Work
from lightning_woodfisher.weights.layers import prunable_parameters
from lightning_woodfisher.weights.patterns import parse_pattern

# More ranks than this are not proposed.
_MOST_RANKS = 2**16


@dataclass(frozen=True)
class ResourceEstimate:
    """What one part of a pruning step costs; per rank, the one with the most of it.

    The activations of the network, its gradients in training and the optimizer are not
    part of it. With ``recompute_steps`` the step has that many parts, none of which costs
    more.

    Attributes:
        weights: selected weights.
        active: those of them that are not pruned yet, D.
        engine: ``"primal"``, ``"dual"``, ``"full"``; ``"diagonal"``, ``"factors"`` (K-FAC), or
            ``"none"`` for magnitude.
        fisher: the settings.
        world_size: number of ranks, R.
        blocks: blocks of the Fisher.
        idle_ranks: ranks that own no block.
        rank: the one with the highest peak.
        phases: its bytes by phase of the step.
        host_bytes: bytes of rows that it keeps in host memory.
        smallest_peak_bytes: peak of the rank with the lowest one.
        bytes_sent: bytes that a rank sends: ``"exchange"`` of gradient rows, ``"gather"``
            of new weights, ``"search"`` of weights on trial, ``"reduce"`` (full Fisher).
        total_bytes_sent: all but ``"reduce"`` of all ranks together, as in
            :attr:`PruningReport.bytes_exchanged`.
        flops: floating-point operations by phase, without those of the gradients.
        gradient_passes: gradients of mini-batches that a rank computes.
        first_order_passes: the same of the mini-batches of ``first_order_samples``, which
            have up to 256 samples.
        loss_passes: losses of mini-batches that a rank computes without a gradient: trials
            of the search, before and after, and points of the local model.
        trials: fewest and most losses that the search measures; the other numbers are
            for a usual search.
        seconds: estimated seconds by phase, of those phases whose rate was given.
        memory: bytes that a rank may use, None when not said.
        largest_block_size: largest B that fits, the rest unchanged; None when there is
            none, or nothing needed to be changed.
        largest_num_gradients: the same for N.
        world_size_needed: the same for the smallest number of ranks.
    """

    weights: int
    active: int
    engine: str
    fisher: FisherConfig
    world_size: int
    blocks: int
    idle_ranks: int
    rank: int
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

    @property
    def state_bytes(self) -> int:
        """Bytes of Fisher state on the device."""
        return max(phase.state for phase in self.phases.values())

    @property
    def rows_bytes(self) -> int:
        """Most bytes of gradient rows on their way."""
        return max(phase.rows for phase in self.phases.values())

    @property
    def workspace_bytes(self) -> int:
        """Most bytes of matrices in work."""
        return max(phase.workspace for phase in self.phases.values())

    @property
    def copies_bytes(self) -> int:
        """Most bytes of whole vectors."""
        return max(phase.copies for phase in self.phases.values())

    @property
    def peak_bytes(self) -> int:
        """Most bytes at one time; less than the sum of the parts' own maxima."""
        return max(phase.total for phase in self.phases.values())

    @property
    def fits(self) -> bool | None:
        """Whether the peak is within ``memory``; None when that was not given."""
        return None if self.memory is None else self.peak_bytes <= self.memory

    @property
    def verdict(self) -> str:
        """Whether it fits, and else what would; one sentence."""
        need = f"{format_bytes(self.peak_bytes)} on each rank"
        if self.memory is None:
            return f"needs {need}"
        given = format_bytes(self.memory)
        if self.fits:
            return f"fits: {need} of {given}"
        found = {
            "block_size": self.largest_block_size,
            "num_gradients": self.largest_num_gradients,
        }
        remedies = [f"{k}={v}" for k, v in found.items() if v is not None]
        if self.world_size_needed is not None:
            remedies.append(f"{self.world_size_needed} devices")
        if not remedies:
            least = "no block size, number of gradients or number of devices would"
            return f"does not fit: {need}, but there is {given}; {least}"
        return (
            f"does not fit: {need}, but there is {given}; what would: "
            f"{' or '.join(remedies)}"
        )

    def summary(self) -> str:
        """Say in a few sentences what matters before training.

        Returns:
            One line.
        """
        text = (
            f"A step takes up to {format_bytes(self.peak_bytes)} on a rank "
            f"({format_bytes(self.state_bytes)} of it the Fisher), beside the network's "
            "activations."
        )
        if self.host_bytes:
            text += f" Rows lie in host memory: {format_bytes(self.host_bytes)}."
        if self.idle_ranks:
            text += (
                f" {self.idle_ranks} of {self.world_size} ranks own no block: there are "
                "too few blocks for more ranks."
            )
        return text

    def to_dict(self) -> dict[str, Any]:
        """Convert to plain types, for JSON.

        Returns:
            Nested dicts, numbers, strings and None, with the derived numbers.
        """
        plain = dataclasses.asdict(self)
        for name in ("state", "rows", "workspace", "copies", "peak"):
            plain[f"{name}_bytes"] = getattr(self, f"{name}_bytes")
        for name, phase in self.phases.items():
            plain["phases"][name]["total"] = phase.total
        return {**plain, "fits": self.fits, "verdict": self.verdict}

    def to_table(self) -> str:
        """Draw the estimate as text.

        Returns:
            Lines: the settings, bytes by phase, traffic and work, the verdict.
        """
        share = 1 - self.active / self.weights if self.weights else 0.0
        block = self.fisher.block_size or "all"
        count, size = self.fisher.num_gradients, self.fisher.gradient_batch_size
        title = (
            f"{self.weights:,} weights, {share:.2%} pruned, N={count} m={size} B={block}, "
            f"{self.engine}, {self.world_size} rank(s), {self.blocks:,} blocks"
        )
        head = ("bytes on a rank", "state", "rows", "workspace", "copies", "together")
        rows = [
            (
                name,
                *map(format_bytes, (p.state, p.rows, p.workspace, p.copies, p.total)),
            )
            for name, p in self.phases.items()
        ]
        most = tuple(
            format_bytes(getattr(self, f"{name}_bytes"))
            for name in ("state", "rows", "workspace", "copies", "peak")
        )
        parts = [title, "", format_table(head, rows, ("peak", *most)), ""]
        if self.host_bytes:
            parts.append(f"in host memory    {format_bytes(self.host_bytes)}")
        if self.idle_ranks:
            parts.append(f"without a block   {self.idle_ranks} rank(s)")
        parts += [
            f"gradients         {self.gradient_passes:,} of mini-batches of "
            f"{self.fisher.gradient_batch_size}"
            + (
                f", {self.first_order_passes:,} of the first order"
                * bool(self.first_order_passes)
            ),
            f"losses            {self.loss_passes:,} of mini-batches of {size}"
            + (f", search {_range_of(self.trials)} times" * bool(self.trials[1])),
            f"sent              {_list_of(self.bytes_sent, format_bytes)}",
            f"operations        {_list_of(self.flops, format_count)}",
        ]
        if self.seconds:
            parts.append(f"seconds           {_list_of(self.seconds, '{:.3g}'.format)}")
        return "\n".join([*parts, f"memory            {self.verdict}"])


def estimate(
    model_or_shapes: nn.Module | Mapping[str, Sequence[int]],
    *,
    fisher: FisherConfig | None = None,
    selection: SelectionConfig | None = None,
    criterion: str = "woodfisher",
    update: Update = "joint",
    line_search: bool = True,
    measure_loss: bool = True,
    local_model_points: int = 0,
    sparsity: float = 0.0,
    world_size: int = 1,
    memory: str | int | None = None,
    flops_per_second: float | None = None,
    bytes_per_second: float | None = None,
    seconds_per_gradient: float | None = None,
    threads: int = 1,
    sharded: bool = False,
) -> ResourceEstimate:
    """Estimate what a pruning step costs, without running anything.

    Args:
        model_or_shapes: the network, which may be on the meta device, or shapes of the
            weights to prune by name (float32).
        fisher: how the Fisher is estimated.
        selection: which weights of a network are pruned, and their pattern; shapes are
            taken as they are.
        criterion: name of the criterion.
        update: how the kept weights make up for the removed ones.
        line_search: the length of the update is measured.
        measure_loss: so is the loss after the step.
        local_model_points: points at which it is measured on the way.
        sparsity: share of the weights that is pruned before the step, assumed the same in
            every tensor.
        world_size: number of ranks.
        memory: of a device, for the step: bytes, ``"80GB"`` or ``"24GiB"``.
        flops_per_second: of a rank in matrix products, for seconds.
        bytes_per_second: that a rank can send, for seconds.
        seconds_per_gradient: of one mini-batch, forward and backward, for seconds.
        threads: of torch on each rank; on a CPU each works on blocks of its own. 1 for a
            GPU.
        sharded: the parameters are sharded over the ranks (FSDP2).

    Returns:
        The estimate for the rank that needs most.

    Raises:
        ConfigurationError: for a value that cannot be.

    Examples:
        >>> cost = estimate({"fc": (1000, 512)}, memory="1GB")
        >>> cost.fits
        True
    """
    if not 0.0 <= sparsity < 1.0:
        raise ConfigurationError(f"sparsity={sparsity} is outside [0, 1).")
    if world_size < 1:
        raise ConfigurationError(f"world_size={world_size} must be at least 1.")
    weight_bytes = 4
    if isinstance(model_or_shapes, nn.Module):
        chosen = selection or SelectionConfig()
        parameters = prunable_parameters(
            model_or_shapes, chosen.include, chosen.exclude
        )
        shapes = [tuple(parameter.shape) for parameter in parameters.values()]
        weight_bytes = max(p.element_size() for p in parameters.values())
    else:
        shapes = [tuple(shape) for shape in model_or_shapes.values()]
    weights = [math.prod(shape) for shape in shapes]
    work = Work(
        weights,
        [round(count * (1 - sparsity)) for count in weights],
        fisher or FisherConfig(),
        world_size,
        criterion,
        update,
        weight_bytes,
        threads,
        sharded,
        shapes,
        line_search,
        measure_loss,
        local_model_points,
        parse_pattern((selection or SelectionConfig()).pattern),
    )
    return estimate_counts(
        work, memory, flops_per_second, bytes_per_second, seconds_per_gradient
    )


def estimate_counts(
    work: Work,
    memory: str | int | None = None,
    flops_per_second: float | None = None,
    bytes_per_second: float | None = None,
    seconds_per_gradient: float | None = None,
) -> ResourceEstimate:
    """Estimate from counts of weights; see :func:`estimate`.

    Args:
        work: the part of the step.
        memory: of a device, for the step.
        flops_per_second: of a rank.
        bytes_per_second: that a rank can send.
        seconds_per_gradient: of one mini-batch.

    Returns:
        The estimate.
    """
    ranks = range(work.exchanging)
    memories = [rank_memory(work, rank) for rank in ranks]
    peaks = [max(phase.total for phase in phases.values()) for phases in memories]
    worst = max(ranks, key=peaks.__getitem__)
    sent = [rank_traffic(work, rank) for rank in ranks]
    flops = _largest_of([rank_flops(work, rank) for rank in ranks])
    bytes_sent = _largest_of(sent)
    size = work.fisher.gradient_batch_size
    passes, more = work.gradient_passes, work.first_order_passes
    losses = -(-work.loss_samples // size)
    seconds: dict[str, float] = {}
    if seconds_per_gradient is not None:
        # A Hessian product takes about as long as two gradients.
        each = seconds_per_gradient * (2 if work.twice else 1)
        share = work.first_order_batches[1] / size
        seconds["gradients"] = passes * each + more * share * seconds_per_gradient
        # Without the backward pass, which takes twice as long.
        seconds["losses"] = losses * seconds_per_gradient / 3
    if bytes_per_second is not None:
        seconds["send"] = sum(bytes_sent.values()) / bytes_per_second
    if flops_per_second is not None:
        seconds |= {phase: n / flops_per_second for phase, n in flops.items()}
    partition = work.partition
    result = ResourceEstimate(
        weights=sum(work.weights),
        active=sum(work.active),
        engine=work.engine,
        fisher=work.fisher,
        world_size=work.world_size,
        blocks=_count_blocks(work),
        idle_ranks=sum(not partition.owned(rank) for rank in ranks),
        rank=worst,
        phases=memories[worst],
        host_bytes=max(host_bytes(work, partition.owned(rank)) for rank in ranks),
        smallest_peak_bytes=min(peaks),
        bytes_sent=bytes_sent,
        total_bytes_sent=sum(s["exchange"] + s["gather"] + s["search"] for s in sent),
        flops=flops,
        gradient_passes=passes,
        first_order_passes=more,
        loss_passes=losses,
        trials=work.trials,
        seconds=seconds,
        memory=None if memory is None else parse_bytes(memory),
    )
    if result.memory is None or result.fits:
        return result
    return dataclasses.replace(result, **_remedies(work, result.memory))


def _remedies(work: Work, memory: int) -> dict[str, Any]:
    """Search the largest settings and the smallest number of ranks that fit."""

    def fits(changed: Work) -> bool:
        return all(
            phase.total <= memory
            for rank in range(changed.exchanging)
            for phase in rank_memory(changed, rank).values()
        )

    def with_fisher(**changes: Any) -> Work:
        return dataclasses.replace(
            work, fisher=dataclasses.replace(work.fisher, **changes)
        )

    def with_ranks(world_size: int) -> Work:
        return dataclasses.replace(work, world_size=world_size)

    block, count = work.fisher.block_size, work.fisher.num_gradients
    # Ranks beyond the number of units own nothing and cannot help.
    most = min(_MOST_RANKS, max(work.world_size, len(work.partition.units)))
    fewer_ranks = _largest_where(
        lambda n: not fits(with_ranks(n)), work.world_size, most
    )
    gradients = block_size = None
    if work.engine in {"primal", "dual", "full"}:
        gradients = _largest_where(
            lambda n: fits(with_fisher(num_gradients=n)), 1, count
        )
        # Without blocks all weights are one; the widest tensor bounds a block.
        widest = block or max(work.active, default=1)
        block_size = _largest_where(
            lambda b: fits(with_fisher(block_size=b)), 1, max(1, widest)
        )
    needed = None if fewer_ranks is None or fewer_ranks >= most else fewer_ranks + 1
    return {
        "largest_block_size": block_size,
        "largest_num_gradients": gradients,
        "world_size_needed": needed,
    }


def _largest_where(holds: Callable[[int], bool], low: int, high: int) -> int | None:
    """Bisect for the largest number in low .. high at which ``holds``.

    Args:
        holds: true up to some number and false beyond; where it is not quite so, the
            result still holds.
        low: smallest candidate.
        high: largest candidate.

    Returns:
        The number, None when there is none.
    """
    if not holds(low):
        return None
    if holds(high):
        return high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def _count_blocks(work: Work) -> int:
    if work.engine in {"full", "none", "diagonal"}:
        return int(work.engine == "full")
    shards = work.world_size // work.exchanging
    return shards * sum(unit.count for unit in work.partition.units)


def _largest_of(every: Sequence[Mapping[str, int]]) -> dict[str, int]:
    return {key: max(one[key] for one in every) for key in every[0]}


def _range_of(numbers: tuple[int, int]) -> str:
    fewest, most = numbers
    return str(most) if fewest == most else f"{fewest} to {most}"


def _list_of(numbers: Mapping[str, Any], write: Callable[[Any], str]) -> str:
    return (
        ", ".join(f"{name} {write(n).strip()}" for name, n in numbers.items() if n)
        or "nothing"
    )
