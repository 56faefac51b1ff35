"""The length of a weight update in one stage, with or without line search."""

from __future__ import annotations

__all__ = ["ChosenStep", "StepLength"]

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_woodfisher.criteria import Criterion
from lightning_woodfisher.criteria.obs import Update
from lightning_woodfisher.pruning.evaluator import Evaluator, SearchPart
from lightning_woodfisher.pruning.line_search import (
    FINALISTS,
    search_first_order,
    search_scales,
)
from lightning_woodfisher.weights.active import ActiveWeights


@dataclass(frozen=True)
class ChosenStep:
    """Change of the weights in one stage.

    Attributes:
        change: δ, float64 ``[D_r]``, exactly −w where removed.
        scales: scale of each direction.
        update: name of the update of the kept weights; ``"none"`` if they do not change.
        losses: losses at the new weights on the samples of the gradients; None if they
            were not measured.
    """

    change: Tensor
    scales: tuple[float, ...]
    update: Update
    losses: list[float] | None


@dataclass
class _Trial:
    """An update, and its losses as far as they have been measured."""

    scales: tuple[float, ...]
    directions: Sequence[Tensor]
    update: Update
    losses: list[float] = field(default_factory=list)

    @property
    def loss(self) -> float:
        return _mean(self.losses)


class StepLength:
    """Scale the directions of a criterion.

    Trials write weights into the model. The chosen change overwrites them at the end of the
    stage, and a failed step rolls them back.

    Args:
        criterion: criterion that has observed all rows.
        active: the active weights.
        evaluator: measures the losses.
        weights: present weights, float64 ``[D_r]``.
        seed: seed of the samples.
        largest: largest scale; without search, the scale of every direction.
        search: whether scales are chosen by the measured loss.
    """

    def __init__(
        self,
        criterion: Criterion,
        active: ActiveWeights,
        evaluator: Evaluator,
        weights: Tensor,
        seed: int,
        *,
        largest: float,
        search: bool,
    ) -> None:
        self._criterion = criterion
        self._active = active
        self._evaluator = evaluator
        self._weights = weights
        self._seed = seed
        self._largest = largest
        self._search = search
        self._first_order = 0.0

    def prepare(self, descent: Tensor | None) -> None:
        """Choose the scale of the first-order direction; call before the scores.

        Args:
            descent: first-order direction of the criterion, None without one.
        """
        criterion, weights = self._criterion, self._weights
        if descent is None:
            return
        nothing = torch.zeros_like(weights, dtype=torch.bool)
        self._first_order = search_first_order(
            lambda scale: _mean(self._losses(scale * descent, nothing, "first")),
            criterion.damping or 0.0,
            self._largest,
        )
        criterion.first_order_scale = self._first_order

    def choose(
        self,
        removed: Tensor,
        directions: Sequence[Tensor],
        alternatives: Mapping[Update, Tensor],
    ) -> ChosenStep:
        """Choose the scales and return the change of the weights.

        Args:
            removed: bool ``[D_r]``.
            directions: directions of the kept weights, float64 ``[D_r]`` each, zero where
                removed.
            alternatives: directions that the search tries at full length in place of the
                first one, with the scales found for the others.

        Returns:
            The change.
        """
        zeroing = torch.where(removed, -self._weights, 0.0)

        def change_of(trial: _Trial) -> Tensor:
            pairs = zip(trial.scales, trial.directions, strict=True)
            return sum((s * d for s, d in pairs), zeroing)

        def measure(trial: _Trial, part: SearchPart) -> float:
            trial.losses += self._losses(change_of(trial), removed, part)
            return trial.loss

        best = _Trial(
            (self._largest,) * len(directions), directions, self._criterion.update
        )
        if self._search and directions and self._largest > 0.0:
            best = self._search_trials(directions, alternatives, measure)
        return ChosenStep(
            change_of(best),
            best.scales,
            best.update if any(best.scales) else "none",
            best.losses if math.isfinite(best.loss) else None,
        )

    def _search_trials(
        self,
        directions: Sequence[Tensor],
        alternatives: Mapping[Update, Tensor],
        measure: Callable[[_Trial, SearchPart], float],
    ) -> _Trial:
        """Measure all trials on few samples, and the two best ones on all of them."""
        trials: list[_Trial] = []

        def screen(trial: _Trial) -> float:
            trials.append(trial)
            return measure(trial, "first")

        update = self._criterion.update
        scales = search_scales(
            lambda scales: screen(_Trial(scales, directions, update)),
            len(directions),
            self._largest,
            self._first_order,
        )
        for name, other in alternatives.items():
            if not self._active.is_close(directions[0], other):
                instead = (other, *directions[1:])
                screen(_Trial((self._largest, *scales[1:]), instead, name))
        # Of equal losses the first one, which is the smaller step.
        ranked = sorted(trials, key=lambda trial: trial.loss)
        if not self._evaluator.screens(self._seed):
            return ranked[0]
        finalists: list[_Trial] = []
        for trial in ranked:
            if math.isfinite(measure(trial, "rest")):
                finalists.append(trial)
            if len(finalists) == FINALISTS:
                break
        # The first trial is no update.
        return min(finalists or trials[:1], key=lambda trial: trial.loss)

    def _losses(self, change: Tensor, removed: Tensor, part: SearchPart) -> list[float]:
        """Return the losses at trial weights; none if the weights are not finite."""
        if not self._active.write_trial(self._weights + change, removed):
            return []
        return self._evaluator.measure_trial(self._seed, part)


def _mean(losses: Sequence[float]) -> float:
    """Return the mean; infinity for no losses, or if it is not finite."""
    value = sum(losses) / len(losses) if losses else math.inf
    return value if math.isfinite(value) else math.inf
