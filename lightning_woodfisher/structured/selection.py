"""Which structures go: an exact number of them, or as few as make the network small enough.

Scores of structures add up, so the best choice of j structures of a group are its j lowest.
What remains is how many of each group: within the limits of every group, as many in all as
wanted, at the least sum of scores. Equal scores go in order of groups and structures.
"""

from __future__ import annotations

__all__ = ["Before", "additive_scores", "select_count", "select_for_size"]

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from lightning_woodfisher.base.errors import ConfigurationError, PruningError
from lightning_woodfisher.structured.config import Search, StructureLimits
from lightning_woodfisher.structured.graph.groups import Group
from lightning_woodfisher.structured.network_cost import NetworkSize, Removed
from lightning_woodfisher.structured.scores.methods import StructureScores

#: Numbers of structures that are gone already, by the name of their group.
Before = Mapping[str, Sequence[int]]


def additive_scores(
    scores: StructureScores,
    groups: Sequence[Group],
    limits: StructureLimits,
    search: Search = "greedy",
    count: int | None = None,
) -> tuple[Tensor, ...]:
    """Turn scores of pairs into scores of structures that add up.

    Args:
        scores: of any method; those without pairs are returned as they are.
        groups: the structures.
        limits: within which the greedy search moves.
        search: ``"greedy"`` scores a structure by what it adds to those that went before;
            ``"rowsum"`` by its row of A.
        count: how many structures will be removed at most, if that is known.

    Returns:
        float64 ``[group.size]`` for each group; infinite for what the greedy search has
        not removed.
    """
    if scores.pairs is None or search == "rowsum":
        return scores.values
    sizes = [group.size for group in groups]
    # To keep a multiple the choice may need others than the first ones.
    steps = count if limits.round_to == 1 else None
    return tuple(torch.split(scores.pairs.greedy(sizes, limits, steps), sizes))


def select_count(
    groups: Sequence[Group],
    scores: Sequence[Tensor],
    count: int,
    limits: StructureLimits | None = None,
    *,
    before: Before | None = None,
    nearest_reachable: bool = False,
) -> dict[str, Tensor]:
    """Choose exactly so many structures.

    Args:
        groups: the structures.
        scores: ``[group.size]`` for each group; the lowest go.
        count: K.
        limits: how many may go from a group; the defaults of :class:`.StructureLimits` if
            None.
        before: structures that are gone already, by group; they stay gone, and count.
        nearest_reachable: where ``round_to`` does not allow K, take the nearest number
            that it allows, of two the larger; and of fewer than are gone already, those.

    Returns:
        int64 numbers of the removed structures of every group, ascending, by its name.

    Raises:
        ConfigurationError: when the limits do not allow K.
    """
    plan = _Plan(groups, scores, limits or StructureLimits(), before)
    if nearest_reachable and count <= plan.reachable[-1]:
        count = min(plan.reachable, key=lambda k: (abs(k - count), -k))
    problem = plan.why_not(count)
    if problem:
        raise ConfigurationError(problem)
    return plan.removed(count)


def select_for_size(
    groups: Sequence[Group],
    scores: Sequence[Tensor],
    size: NetworkSize,
    limits: StructureLimits | None = None,
    *,
    parameters_left: float | None = None,
    macs_left: float | None = None,
    before: Before | None = None,
    split: Callable[[Removed], tuple[Removed, Removed]] | None = None,
    per_cost: bool = False,
) -> dict[str, Tensor]:
    """Choose as few structures as make the network small enough.

    Args:
        groups: the structures.
        scores: ``[group.size]`` for each group; the lowest go.
        size: counts what is left.
        limits: how many may go from a group; the defaults if None.
        parameters_left: largest share of the parameters that may be left.
        macs_left: largest share of the multiply-accumulates that may be left; with both,
            both hold.
        before: structures that are gone already, by group; they stay gone.
        split: divides the chosen ones into removed and implanted ones; None for no
            implants.
        per_cost: choose by the score for each multiply-accumulate that goes (without
            ``macs_left``, for each parameter), the greedy solution of a knapsack.

    Returns:
        As :func:`select_count`.

    Raises:
        ConfigurationError: when the limits do not allow it.
    """
    shares = {"parameters_left": parameters_left, "macs_left": macs_left}
    for name, share in shares.items():
        if share is not None and not 0.0 < share <= 1.0:
            raise ConfigurationError(f"{name}={share} is outside (0, 1].")
    if parameters_left is None and macs_left is None:
        raise ConfigurationError("give parameters_left or macs_left.")
    if per_cost:
        scores = [
            score.double()
            / size.of_one(group, "parameters" if macs_left is None else "macs")
            for group, score in zip(groups, scores, strict=True)
        ]
    plan = _Plan(groups, scores, limits or StructureLimits(), before)

    def left(count: int) -> tuple[float, float]:
        removed = plan.removed(count)
        parts = split(removed) if split else (removed, {})
        return (
            size.parameters(*parts) / size.dense_parameters,
            size.macs(*parts) / max(1, size.dense_macs),
        )

    def reached(count: int) -> bool:
        parameters, macs = left(count)
        return parameters <= (parameters_left or 1.0) and macs <= (macs_left or 1.0)

    counts = plan.reachable
    if not reached(counts[-1]):
        parameters, macs = left(counts[-1])
        wanted = ", ".join(f"{n}={s}" for n, s in shares.items() if s is not None)
        raise ConfigurationError(
            f"targets below the floors: {wanted}, but with all {counts[-1]} structures "
            f"removed that the limits allow {parameters:.4g} of the parameters and "
            f"{macs:.4g} of the multiply-accumulates are left; lower min_kept or "
            "min_kept_share, or raise max_ratio."
        )
    if not plan.nested:
        return plan.removed(next(count for count in counts if reached(count)))
    low, high = 0, len(counts) - 1
    while low < high:
        middle = (low + high) // 2
        if reached(counts[middle]):
            high = middle
        else:
            low = middle + 1
    return plan.removed(counts[low])


class _Plan:
    """The best choice for every number of structures.

    Attributes:
        nested: whether the choice for more structures contains that for fewer.
        reachable: numbers of structures that can be removed, ascending.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        scores: Sequence[Tensor],
        limits: StructureLimits,
        before: Before | None = None,
    ) -> None:
        _require_scores(groups, scores)
        self._names = [group.name for group in groups]
        gone = [list((before or {}).get(name, ())) for name in self._names]
        # Ranks instead of numbers, so that equal scores have an order.
        self._orders = [
            torch.sort(_first(score, those), stable=True)
            for score, those in zip(scores, gone, strict=True)
        ]
        self._allowed = [
            # Limits that are tighter than those of an earlier step bring nothing back.
            [n for n in limits.removable(group.size) if n > len(those)]
            for group, those in zip(groups, gone, strict=True)
        ]
        for allowed, those in zip(self._allowed, gone, strict=True):
            allowed.insert(0, len(those))
        self.nested = limits.round_to == 1
        self._sizes = [group.size for group in groups]
        if self.nested:
            self._sequence = self._sort()
            fewest = sum(allowed[0] for allowed in self._allowed)
            self.reachable = list(range(fewest, len(self._sequence) + 1))
        else:
            self._choices, self.reachable = self._solve()

    def why_not(self, count: int) -> str:
        """Tell why the limits do not allow a number.

        Args:
            count: K.

        Returns:
            The reason and what can be reached; ``""`` when they do.
        """
        if count in self.reachable:
            return ""
        total, most = sum(self._sizes), self.reachable[-1]
        if 0 <= count < self.reachable[0]:
            return (
                f"{count} of {total} structures are fewer than the {self.reachable[0]} "
                "that are gone already, and stay gone."
            )
        if not 0 <= count <= most:
            return (
                f"targets below the floors: {count} of {total} structures cannot be "
                f"removed, at most {most} within the limits of every group; ask for "
                "fewer, lower min_kept or min_kept_share, or raise max_ratio."
            )
        below = max(c for c in self.reachable if c < count)
        above = min(c for c in self.reachable if c > count)
        return (
            f"{count} structures cannot be removed while every group keeps a multiple of "
            f"round_to; {below} and {above} can."
        )

    def removed(self, count: int) -> dict[str, Tensor]:
        """Choose structures.

        Args:
            count: a reachable number.

        Returns:
            Removed structures by group.
        """
        taken = [0] * len(self._names)
        if self.nested:
            for place in self._sequence[:count].tolist():
                taken[place] += 1
        else:
            for place in reversed(range(len(taken))):
                taken[place] = int(self._choices[place][count])
                count -= taken[place]
        return {
            name: order.indices[:number].sort().values
            for name, order, number in zip(
                self._names, self._orders, taken, strict=True
            )
        }

    def _sort(self) -> Tensor:
        """Give the groups of all structures that may go, in the order in which they go."""
        places, values = [], []
        for place, (order, allowed) in enumerate(
            zip(self._orders, self._allowed, strict=True)
        ):
            values.append(order.values[: allowed[-1]])
            places.append(torch.full((allowed[-1],), place))
        return torch.cat(places)[torch.cat(values).sort(stable=True).indices]

    def _solve(self) -> tuple[list[Tensor], list[int]]:
        """Find how many of each group for every total: a knapsack, group by group."""
        finite = [
            v for order in self._orders for v in order.values[order.values.isfinite()]
        ]
        # What the greedy search has left aside is a last resort, but not forbidden.
        ceiling = 1 + sum(abs(float(v)) for v in finite)
        total = sum(allowed[-1] for allowed in self._allowed)
        best = torch.full((total + 1,), math.inf, dtype=torch.float64)
        best[0] = 0.0
        choices = []
        for order, allowed in zip(self._orders, self._allowed, strict=True):
            values = order.values.double().clamp(max=ceiling)
            # What is gone already costs nothing.
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
            choices.append(choice)
        return choices, best.isfinite().nonzero().flatten().tolist()


def _first(score: Tensor, gone: Sequence[int]) -> Tensor:
    """Put what is gone already below any score."""
    score = score.cpu().clone()
    score[list(gone)] = -math.inf
    return score


def _require_scores(groups: Sequence[Group], scores: Sequence[Tensor]) -> None:
    if len({group.name for group in groups}) != len(groups) or not groups:
        raise ConfigurationError("groups must be there, and have names of their own.")
    for group, score in zip(groups, scores, strict=True):
        if tuple(score.shape) != (group.size,):
            raise PruningError(
                f"{tuple(score.shape)} scores for the {group.size} structures of "
                f"{group.name!r}"
            )
        if bool(score.isnan().any()):
            raise PruningError(f"a score of {group.name!r} is not a number")
