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

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from lightning_woodfisher.distributed import Communicator
from lightning_woodfisher.errors import ConfigurationError, PruningError
from lightning_woodfisher.parts import Spacing, removed_share

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
    """

    scope: Scope = "global"
    include: list[str] = field(default_factory=list)
    exclude: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.scope not in {"global", "layer"}:
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
        spacing: how the kept share falls; see :func:`.removed_share`.

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
        share = removed_share(ratio, fraction, spacing)
        counts.append(min(count, round(kept * share)))
    return counts


def select_smallest(
    scores: Tensor, groups: Tensor | None, counts: Sequence[int], comm: Communicator
) -> Tensor:
    """Mark the exactly ``counts[g]`` smallest scores of every group g, over all ranks.

    Args:
        scores: float64 ``[D_r]``, not negative; ranks hold consecutive runs of the global
            order.
        groups: int64 ``[D_r]`` group of each score, or None for a single group.
        counts: how many to mark in each group.
        comm: the ranks.

    Returns:
        bool ``[D_r]``, True where marked. Ties go to the lowest global index.

    Raises:
        PruningError: when a score is not a number or negative, or a group has fewer
            members than wanted.
    """
    wanted = torch.tensor(list(counts), dtype=torch.int64, device=scores.device)
    member = torch.zeros_like(scores, dtype=torch.int64) if groups is None else groups
    invalid = comm.sum_integers((~(scores >= 0)).sum().reshape(1))
    if int(invalid):
        raise PruningError(f"{int(invalid)} saliencies are NaN or negative")
    keys = (scores.double() + 0.0).view(torch.int64)
    sizes = comm.sum_integers(torch.bincount(member, minlength=len(wanted)))
    if bool((sizes < wanted).any()):
        raise PruningError(
            f"cannot remove {wanted.tolist()} of {sizes.tolist()} remaining weights"
        )
    # A group that wants nothing searches for its smallest member and is skipped below.
    rank_left = (wanted - 1).clamp(min=0)
    threshold = torch.zeros_like(wanted)
    candidates = torch.arange(len(keys), device=keys.device)
    for shift in range(64 - _DIGIT_BITS, -1, -_DIGIT_BITS):
        digit = (keys[candidates] >> shift) & (2**_DIGIT_BITS - 1)
        group = member[candidates]
        histogram = comm.sum_integers(
            torch.bincount(
                group * 2**_DIGIT_BITS + digit, minlength=len(wanted) * 2**_DIGIT_BITS
            )
        ).view(len(wanted), -1)
        ends = histogram.cumsum(dim=1)
        # First digit whose cumulative count exceeds the rank we look for.
        chosen = (
            (ends <= rank_left.unsqueeze(1)).sum(dim=1).clamp(max=ends.shape[1] - 1)
        )
        below = (ends - histogram).gather(1, chosen.unsqueeze(1)).squeeze(1)
        rank_left = rank_left - below
        threshold |= chosen << shift
        candidates = candidates[digit == chosen[group]]
    marked = (keys < threshold[member]) & (wanted[member] > 0)
    taken = comm.sum_integers(torch.bincount(member[marked], minlength=len(wanted)))
    _mark_ties(marked, keys, member, threshold, wanted - taken, comm)
    return marked


def _mark_ties(
    marked: Tensor,
    keys: Tensor,
    member: Tensor,
    threshold: Tensor,
    missing: Tensor,
    comm: Communicator,
) -> None:
    """Mark the first ``missing[g]`` keys that equal the threshold, in global order."""
    ties = torch.nonzero(keys == threshold[member]).squeeze(1)
    tied_group = member[ties]
    mine = torch.bincount(tied_group, minlength=len(missing))
    everyone = comm.gather_numbers([float(n) for n in mine.tolist()])
    for group, want in enumerate(missing.tolist()):
        before = int(sum(row[group] for row in everyone[: comm.rank]))
        here = ties[tied_group == group]
        marked[here[: max(0, want - before)]] = True
