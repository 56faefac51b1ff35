"""Choose which structures to remove: a number of them, or as few as meet a size target.

Scores of structures add up, so the best j structures of a group to remove are those with the
j lowest scores. What is left to choose is the number for each group: the choice with the
smallest sum of scores within the limits of the groups. Ties are broken by the order of groups
and structures.
"""

from __future__ import annotations

__all__ = [
    "additive_scores",
    "select_count",
    "select_for_size",
]

import bisect
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lightning_woodfisher.base.errors import ConfigurationError
from lightning_woodfisher.structured.config import StructureConfig
from lightning_woodfisher.structured.graph.groups import Group, StructureIndices
from lightning_woodfisher.structured.network_cost import IndexTensors, NetworkSize
from lightning_woodfisher.structured.scores.methods import StructureScores


def additive_scores(
    scores: StructureScores,
    groups: Sequence[Group],
    config: StructureConfig,
    size: NetworkSize | None = None,
    count: int | None = None,
) -> tuple[Tensor, ...]:
    """Turn scores of pairs into scores of structures that add up, and divide by costs.

    Args:
        scores: from any method.
        groups: the groups of structures.
        config: search, measure and limits. ``search="greedy"`` and ``"signed"`` score a
            structure by what it adds to those removed before, ``"rowsum"`` by its row of A.
            With ``per_cost``, scores are divided by what a structure costs in the dense
            network: the greedy solution of a knapsack problem.
        size: counts the costs; None for equal costs.
        count: largest number of structures that will be removed, if it is known.

    Returns:
        float64 ``[group.size]`` for each group; infinite for structures that the greedy
        search has not removed.
    """
    costs = [1] * len(groups)
    if config.is_per_cost and size is not None:
        count_left = size.parameters if config.measure == "parameters" else size.macs
        left = [count_left({group.name: torch.tensor([0])}) for group in groups]
        costs = [max(1, count_left({}) - number) for number in left]
    if scores.pairs is None or config.search == "rowsum":
        return tuple(v / cost for v, cost in zip(scores.values, costs, strict=True))
    sizes = [group.size for group in groups]
    # With round_to the choice may need more structures than the first ones.
    steps = count if config.round_to == 1 else None
    most = [config.max_removable(size) for size in sizes]
    is_signed = config.search == "signed"
    added = scores.pairs.greedy(sizes, most, costs, steps, signed=is_signed)
    return torch.split(added, sizes)


def select_count(
    groups: Sequence[Group],
    scores: Sequence[Tensor],
    count: int,
    config: StructureConfig = StructureConfig(),
    removed_before: StructureIndices | None = None,
) -> dict[str, Tensor]:
    """Choose a number of structures.

    Args:
        groups: the groups of structures.
        scores: ``[group.size]`` for each group; the lowest are removed.
        count: number of structures. If ``round_to`` or ``removed_before`` does not allow
            it, the nearest number that they allow is taken, the larger one of two.
        config: limits on what a group may lose.
        removed_before: structures that are already removed; they stay removed, and count.

    Returns:
        int64 indices of the removed structures of every group, ascending, by group name.

    Raises:
        ConfigurationError: if the limits do not allow this number.
    """
    choices = _Choices(groups, scores, config, removed_before or {})
    most = choices.counts[-1]
    if count > most:
        raise ConfigurationError(
            f"the target asks for {count} of {sum(group.size for group in groups)} "
            f"structures to be removed, but the limits of the groups allow {most}; "
            f"{_remedy(config)}"
        )
    return choices.removed(min(choices.counts, key=lambda k: (abs(k - count), -k)))


def select_for_size(
    groups: Sequence[Group],
    scores: Sequence[Tensor],
    size: NetworkSize,
    target: float,
    config: StructureConfig = StructureConfig(),
    removed_before: StructureIndices | None = None,
    divide: Callable[[IndexTensors], tuple[IndexTensors, IndexTensors]] | None = None,
) -> dict[str, Tensor]:
    """Choose the fewest structures whose removal makes the network small enough.

    Args:
        groups: the groups of structures.
        scores: ``[group.size]`` for each group; the lowest are removed.
        size: counts what is left of the network.
        target: share of the parameters or multiply-accumulates (``config.measure``) to
            remove, in [0, 1).
        config: measure and limits.
        removed_before: structures that are already removed; they stay removed.
        divide: divides the chosen structures into removed and implanted ones; None without
            implants.

    Returns:
        int64 indices of the removed structures of every group, ascending, by group name.

    Raises:
        ConfigurationError: if the limits do not allow the target.
    """
    count_left = size.parameters if config.measure == "parameters" else size.macs
    dense = count_left({})
    choices = _Choices(groups, scores, config, removed_before or {})
    counts = choices.counts

    def share_left(count: int) -> float:
        chosen = choices.removed(count)
        removed, implanted = divide(chosen) if divide else (chosen, {})
        return count_left(removed, implanted) / max(1, dense)

    def is_reached(count: int) -> bool:
        return share_left(count) <= 1.0 - target

    if not is_reached(counts[-1]):
        raise ConfigurationError(
            f"target={target} of the {config.measure} cannot be reached: with all "
            f"{counts[-1]} structures removed that the limits of the groups allow, "
            f"{share_left(counts[-1]):.4g} of them are left; {_remedy(config)}"
        )
    if choices.is_nested:
        last = len(counts) - 1
        index = bisect.bisect_left(counts, True, hi=last, key=is_reached)
        return choices.removed(counts[index])
    return choices.removed(next(count for count in counts if is_reached(count)))


def _remedy(config: StructureConfig) -> str:
    rounding = "round_to, " if config.round_to > 1 else ""
    return (
        f"lower the target, {rounding}min_kept or min_kept_share, or raise max_ratio."
    )


class _Choices:
    """The choice with the smallest sum of scores, for every number of structures.

    Attributes:
        is_nested: whether the choice of more structures contains that of fewer.
        counts: numbers of structures that can be removed, ascending.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        scores: Sequence[Tensor],
        config: StructureConfig,
        removed_before: StructureIndices,
    ) -> None:
        self._names = [group.name for group in groups]
        self._values: list[Tensor] = []
        self._order: list[Tensor] = []
        self._allowed: list[list[int]] = []
        for group, score in zip(groups, scores, strict=True):
            gone = list(removed_before.get(group.name, ()))
            score = score.cpu().clone()
            score[gone] = -math.inf
            values, order = torch.sort(score, stable=True)
            self._values.append(values)
            self._order.append(order)
            # Tighter limits than in an earlier step do not restore structures.
            more = [
                n for n in config.removable(group.size, group.width) if n > len(gone)
            ]
            self._allowed.append([len(gone), *more])
        self.is_nested = config.round_to == 1
        if self.is_nested:
            # The group of each structure that may be removed, lowest score first.
            most = [allowed[-1] for allowed in self._allowed]
            places = torch.arange(len(most)).repeat_interleave(torch.tensor(most))
            lowest = [v[:number] for v, number in zip(self._values, most, strict=True)]
            self._sequence = places[torch.cat(lowest).sort(stable=True).indices]
            fewest = sum(allowed[0] for allowed in self._allowed)
            self.counts = list(range(fewest, len(places) + 1))
        else:
            self._taken, self.counts = self._solve_knapsack()

    def removed(self, count: int) -> dict[str, Tensor]:
        """Return the removed structures by group, for one of ``counts``."""
        taken = [0] * len(self._names)
        if self.is_nested:
            first = self._sequence[:count]
            taken = torch.bincount(first, minlength=len(taken)).tolist()
        else:
            for place in reversed(range(len(taken))):
                taken[place] = int(self._taken[place][count])
                count -= taken[place]
        return {
            name: order[:number].sort().values
            for name, order, number in zip(self._names, self._order, taken, strict=True)
        }

    def _solve_knapsack(self) -> tuple[list[Tensor], list[int]]:
        """Return how many each group loses for every total, and the possible totals."""
        finite = [v for values in self._values for v in values[values.isfinite()]]
        # Structures that the greedy search has not removed are a last resort.
        ceiling = 1 + sum(abs(float(v)) for v in finite)
        total = sum(allowed[-1] for allowed in self._allowed)
        best = torch.full((total + 1,), math.inf, dtype=torch.float64)
        best[0] = 0.0
        taken = []
        for values, allowed in zip(self._values, self._allowed, strict=True):
            values = values.double().clamp(max=ceiling)
            # What is already removed costs nothing.
            costs = torch.where(values.isfinite(), values, 0.0).cumsum(0)
            new = torch.full_like(best, math.inf)
            choice = torch.zeros(total + 1, dtype=torch.int64)
            for number in allowed:
                cost = float(costs[number - 1]) if number else 0.0
                tried = torch.full_like(best, math.inf)
                tried[number:] = best[: total + 1 - number] + cost
                better = tried < new
                new[better], choice[better] = tried[better], number
            best = new
            taken.append(choice)
        return taken, best.isfinite().nonzero().flatten().tolist()
