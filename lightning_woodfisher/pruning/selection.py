"""Exactly the k weights of smallest saliency, over all ranks, without gathering them.

A float64 that is not negative sorts like its bit pattern read as an integer. The k-th
smallest pattern is found digit by digit from the top: every rank counts its candidates by
digit, the counts are added over ranks, and the candidates shrink to those that share the
digit in which the k-th lies. Ties at the threshold go to the lowest global index.
"""

from __future__ import annotations

__all__ = [
    "SelectionConfig",
    "removal_counts",
    "removal_counts_until",
    "select_smallest",
]

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_woodfisher.base.errors import (
    ConfigurationError,
    PruningError,
    require_number,
)
from lightning_woodfisher.distributed.communicator import Communicator
from lightning_woodfisher.pruning.stages import Spacing, removed_fraction
from lightning_woodfisher.weights.patterns import parse_pattern

Scope = Literal["global", "layer"]

_DIGIT_BITS = 8


@dataclass(frozen=True)
class SelectionConfig:
    """Which weights may go, and what they compete for.

    Args:
        scope: ``"global"``: one threshold over all layers (the paper's joint
            sparsification); ``"layer"``: every layer reaches the sparsity by itself.
        include: patterns of what to prune (:func:`~.layers.prunable_parameters`); empty
            for Linear and convolution weights.
        exclude: patterns of what to leave dense.
        pattern: what goes together: ``"unstructured"`` single weights; ``"2:4"`` and the
            like, N kept of M consecutive inputs; ``"block4"`` and the like, consecutive
            inputs; ``"rows"``, all weights of an output.
        layer_targets: sparsity by regular expression on the name, for layers that do not
            compete with the others; these share what is left of the whole.
        max_layer_sparsity: no layer gets sparser than this; the others make up for it.
        flops_power: saliencies are divided by the FLOPs per weight of their layer to this
            power, so that expensive weights go first; 0 ignores FLOPs.
    """

    scope: Scope = "global"
    include: list[str] = field(default_factory=list)
    exclude: list[str] = field(default_factory=list)
    pattern: str = "unstructured"
    layer_targets: dict[str, float] = field(default_factory=dict)
    max_layer_sparsity: float | None = None
    flops_power: float = 0.0

    def __post_init__(self) -> None:
        if self.scope not in get_args(Scope):
            raise ConfigurationError(
                f"selection.scope={self.scope!r} is unknown; use 'global' or 'layer'."
            )
        for name in ("include", "exclude"):
            patterns = getattr(self, name)
            if isinstance(patterns, str):
                raise ConfigurationError(
                    f"selection.{name}={patterns!r} is a single text; give a list of "
                    f"patterns: {name}=[{patterns!r}]."
                )
            if not isinstance(patterns, Sequence) or not all(
                isinstance(pattern, str) for pattern in patterns
            ):
                raise ConfigurationError(
                    f"selection.{name}={patterns!r} is not a list of patterns (texts)."
                )
        self._check_limits()
        if self.layer_targets and parse_pattern(self.pattern).sparsity is not None:
            raise ConfigurationError(
                f"selection.layer_targets cannot go with pattern={self.pattern!r}, which "
                "gives every layer the same sparsity; leave one of them out."
            )
        if self.flops_power and self.scope == "layer":
            raise ConfigurationError(
                f"selection.flops_power={self.flops_power} has no effect with "
                "scope='layer', where layers do not compete; use scope='global'."
            )

    def _check_limits(self) -> None:
        parse_pattern(self.pattern)
        if not isinstance(self.layer_targets, Mapping):
            raise ConfigurationError(
                f"selection.layer_targets={self.layer_targets!r} is not a mapping from "
                "patterns to sparsities."
            )
        for pattern, target in self.layer_targets.items():
            name = f"selection.layer_targets[{pattern!r}]"
            require_number(name, target)
            if not 0.0 <= target < 1.0:
                raise ConfigurationError(f"{name}={target} is outside [0, 1).")
            try:
                re.compile(pattern)
            except (re.error, TypeError) as error:
                raise ConfigurationError(
                    f"The pattern {pattern!r} of selection.layer_targets is not a regular "
                    f"expression: {error}."
                ) from error
        most = self.max_layer_sparsity
        if most is not None:
            require_number("selection.max_layer_sparsity", most)
            if not 0.0 < most <= 1.0:
                raise ConfigurationError(
                    f"selection.max_layer_sparsity={most} is outside (0, 1]."
                )
        require_number("selection.flops_power", self.flops_power)
        if not 0.0 <= self.flops_power < math.inf:
            raise ConfigurationError(
                f"selection.flops_power={self.flops_power} must be finite and not negative."
            )


def removal_counts(
    scope: Scope, target_sparsity: float, weights: Sequence[int], zeros: Sequence[int]
) -> list[int]:
    """Count how many weights each group of competitors must give up.

    Args:
        scope: all layers form one group (``"global"``), or each its own (``"layer"``).
        target_sparsity: share of weights that is zero afterwards.
        weights: weights of each layer.
        zeros: those that are pruned already.

    Returns:
        For each group round(target · weights) − zeros, at least 0. One number, or one for
        each layer.
    """
    groups = [(sum(weights), sum(zeros))]
    if scope == "layer":
        groups = list(zip(weights, zeros, strict=True))
    return [max(0, round(target_sparsity * total) - gone) for total, gone in groups]


def removal_counts_until(
    scope: Scope,
    target_sparsity: float,
    weights: Sequence[int],
    zeros: Sequence[int],
    fraction: float,
    spacing: Spacing = "geometric",
) -> list[int]:
    """Count how many of :func:`removal_counts` go in the first part of a step.

    In every group the kept share falls from that which is there to that of the target.

    Args:
        scope: as there.
        target_sparsity: as there.
        weights: as there, at the start of the step.
        zeros: as there, at the start of the step.
        fraction: of the step that is done, in [0, 1]; 1 gives :func:`removal_counts`.
        spacing: how the kept share falls; see :func:`.removed_fraction`.

    Returns:
        A number for each group; it never falls as the fraction grows.
    """
    totals = [sum(weights)] if scope == "global" else weights
    gone = [sum(zeros)] if scope == "global" else zeros
    last = removal_counts(scope, target_sparsity, weights, zeros)
    if fraction >= 1.0:
        return last
    counts = []
    for total, before, count in zip(totals, gone, last, strict=True):
        kept = total - before
        ratio = min(1.0, (1.0 - target_sparsity) * total / kept) if kept else 1.0
        share = removed_fraction(ratio, fraction, spacing)
        counts.append(min(count, round(kept * share)))
    return counts


def select_smallest(
    scores: Tensor,
    groups: Tensor | None,
    counts: Sequence[int],
    comm: Communicator,
    sizes: Tensor | None = None,
) -> Tensor:
    """Mark the exactly ``counts[g]`` smallest scores of every group g, over all ranks.

    Args:
        scores: float64 ``[D_r]``, not negative; ranks hold consecutive runs of the global
            order.
        groups: int64 ``[D_r]`` group of each score, or None for a single group.
        counts: how many to mark in each group.
        comm: the ranks.
        sizes: int64 ``[D_r]``, how much each score counts for, at least 1. The smallest
            scores are marked as long as their sizes add up to no more than the count.

    Returns:
        bool ``[D_r]``, True where marked. Ties go to the lowest global index.

    Raises:
        PruningError: when a score is not a number or negative, or without sizes, when a
            group has fewer members than wanted.
    """
    wanted = torch.tensor(list(counts), dtype=torch.int64, device=scores.device)
    member = torch.zeros_like(scores, dtype=torch.int64) if groups is None else groups
    invalid = comm.sum_integers((~(scores >= 0)).sum().reshape(1))
    if int(invalid):
        raise PruningError(f"{int(invalid)} saliencies are NaN or negative")
    keys = (scores.double() + 0.0).view(torch.int64)
    totals = comm.sum_integers(_count(member, len(wanted), sizes))
    if sizes is None and bool((totals < wanted).any()):
        raise PruningError(
            f"cannot remove {wanted.tolist()} of {totals.tolist()} remaining weights"
        )
    # What is left of the count below the first score that does not go any more. A group
    # that loses all has no such score; it finds some value and is marked below.
    everything = totals <= wanted
    left = wanted.clone()
    threshold = torch.zeros_like(wanted)
    candidates = torch.arange(len(keys), device=keys.device)
    for shift in range(64 - _DIGIT_BITS, -1, -_DIGIT_BITS):
        digit = (keys[candidates] >> shift) & (2**_DIGIT_BITS - 1)
        group = member[candidates]
        histogram = comm.sum_integers(
            _count(
                group * 2**_DIGIT_BITS + digit,
                len(wanted) * 2**_DIGIT_BITS,
                None if sizes is None else sizes[candidates],
            )
        ).view(len(wanted), -1)
        ends = histogram.cumsum(dim=1)
        # First digit whose cumulative size exceeds what is left.
        chosen = (ends <= left.unsqueeze(1)).sum(dim=1).clamp(max=ends.shape[1] - 1)
        below = (ends - histogram).gather(1, chosen.unsqueeze(1)).squeeze(1)
        left = left - below
        threshold |= chosen << shift
        candidates = candidates[digit == chosen[group]]
    marked = (keys < threshold[member]) | everything[member]
    _mark_ties(marked, keys, member, threshold, left, comm, sizes)
    return marked


def _count(bins: Tensor, number: int, sizes: Tensor | None) -> Tensor:
    """Add sizes, or ones, up by bin; int64 ``[number]``."""
    if sizes is None:
        return torch.bincount(bins, minlength=number)
    return bins.new_zeros(number).scatter_add_(0, bins, sizes)


def _mark_ties(
    marked: Tensor,
    keys: Tensor,
    member: Tensor,
    threshold: Tensor,
    left: Tensor,
    comm: Communicator,
    sizes: Tensor | None,
) -> None:
    """Mark of the keys that equal the threshold the first that ``left[g]`` has room for."""
    ties = torch.nonzero((keys == threshold[member]) & ~marked).squeeze(1)
    tied_group = member[ties]
    weight = torch.ones_like(ties) if sizes is None else sizes[ties]
    mine = _count(tied_group, len(left), weight)
    # As integers: sizes may add up to more than float64 counts exactly.
    everyone = mine.new_zeros(comm.world_size, len(left))
    everyone[comm.rank] = mine
    everyone = comm.sum_integers(everyone)
    before = everyone[: comm.rank].sum(dim=0).tolist()
    for group, room in enumerate(left.tolist()):
        here = tied_group == group
        ends = weight[here].cumsum(dim=0) + before[group]
        marked[ties[here][ends <= room]] = True
