"""When to prune and how far: sparsity as a pure function of the position in training.

A schedule has no tensors and no state: :meth:`PruningSchedule.plan` lists all pruning steps
of a training run. To resume a run, only the steps already done have to be known.
"""

from __future__ import annotations

__all__ = [
    "ConstantSchedule",
    "Horizon",
    "OneShotSchedule",
    "PlannedStep",
    "PolynomialSchedule",
    "PruningSchedule",
    "continue_plan",
    "keeps_zeros",
]

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from lightning_woodfisher.base.errors import (
    ConfigurationError,
    require_integer,
    require_number,
)
from lightning_woodfisher.base.keywords import explain_keywords

Unit = Literal["epoch", "step"]

# Without a start, pruning begins when the network has learned something; without an end,
# the last quarter of training is left to recover accuracy.
_SHARE_BEFORE_PRUNING = 0.1
_SHARE_OF_TRAINING_THAT_PRUNES = 0.75
_MOST_STEPS = 1_000_000


@dataclass(frozen=True)
class Horizon:
    """How long training runs.

    Attributes:
        max_epochs: number of epochs, or None when training is not limited by epochs.
        max_steps: number of optimizer steps, or None when it is not known.
        why_unknown: why ``max_steps`` is not known, for an error message.
    """

    max_epochs: int | None = None
    max_steps: int | None = None
    why_unknown: str = ""

    def length(self, unit: Unit) -> int | None:
        """Return the length of training in ``unit``.

        Args:
            unit: ``"epoch"`` or ``"step"``.

        Returns:
            The number of epochs or steps, None when unknown.
        """
        return self.max_epochs if unit == "epoch" else self.max_steps


@dataclass(frozen=True)
class PlannedStep:
    """A planned pruning step.

    Attributes:
        unit: whether ``position`` counts epochs or optimizer steps.
        position: the step happens at the start of this epoch, or before the batch that
            follows this many optimizer steps.
        sparsity: share of the selected weights that is zero after it, in [0, 1).
    """

    unit: Unit
    position: int
    sparsity: float


class PruningSchedule(ABC):
    """Base class of the schedules; subclass it to write your own."""

    @abstractmethod
    def plan(self, target_sparsity: float, horizon: Horizon) -> tuple[PlannedStep, ...]:
        """List every pruning step of a training run.

        Args:
            target_sparsity: sparsity after the last step, in [0, 1).
            horizon: how long training runs.

        Returns:
            The steps in order of position, with sparsities that never fall.
        """


class ConstantSchedule(PruningSchedule):
    """Prune nothing and keep the zeros that the selected weights have when fit starts.

    This is the schedule for fine-tuning a network that was pruned before. When a
    checkpoint with masks is resumed, its masks are kept instead.
    """

    def plan(self, target_sparsity: float, horizon: Horizon) -> tuple[PlannedStep, ...]:
        """Return no steps.

        Args:
            target_sparsity: not used.
            horizon: not used.

        Returns:
            An empty tuple.
        """
        return ()

    def __repr__(self) -> str:
        return "ConstantSchedule()"


@explain_keywords("schedule")
class OneShotSchedule(PruningSchedule):
    """Prune to the target in a single step.

    Args:
        epoch: the step happens at the start of this epoch (the first epoch is 0).
        step: give this instead of ``epoch`` to prune after that many optimizer steps.
        share: give this instead of ``epoch`` to prune at the start of the first epoch after
            this share of training, in [0, 1); at epoch 1 if training has no known length.

    Raises:
        ConfigurationError: for a negative position, or when more than one is given.
    """

    def __init__(
        self,
        epoch: int | None = None,
        step: int | None = None,
        share: float | None = None,
    ) -> None:
        if sum(value is not None for value in (epoch, step, share)) > 1:
            raise ConfigurationError(
                f"OneShotSchedule got epoch={epoch} and step={step} and share={share}; give "
                "only one of them."
            )
        if share is not None:
            require_number("OneShotSchedule: share", share, "[0, 1)")
        self.share = share
        self.unit: Unit = "epoch" if step is None else "step"
        self.position = (0 if epoch is None else epoch) if step is None else step
        require_integer(f"OneShotSchedule: {self.unit}", self.position, least=0)

    def plan(self, target_sparsity: float, horizon: Horizon) -> tuple[PlannedStep, ...]:
        """Return the one step.

        Args:
            target_sparsity: sparsity after the step, in [0, 1).
            horizon: how long training runs.

        Returns:
            A tuple of one step.
        """
        position = self.position
        if self.share is not None:
            length = horizon.max_epochs
            position = 1 if length is None else _after(self.share, length)
        _require_within(self, position, self.unit, horizon)
        return (PlannedStep(self.unit, position, target_sparsity),)

    def __repr__(self) -> str:
        if self.share is not None:
            return f"OneShotSchedule(share={self.share})"
        return f"OneShotSchedule({self.unit}={self.position})"


@explain_keywords("schedule")
class PolynomialSchedule(PruningSchedule):
    """Raise the sparsity along a polynomial (degree 3: Zhu & Gupta 2017, the cubic ramp).

    ``s(t) = s_f + (s_0 - s_f) * (1 - (t - t_0) / (t_1 - t_0)) ** degree`` where ``t_1`` is
    the last pruning step and ``t_0`` lies one interval before the first, so that the
    first step prunes and the last lands on the target exactly.

    Args:
        start_epoch: epoch at whose start the first step happens; None begins after a tenth
            of training.
        end_epoch: epoch of the last step; None leaves the last quarter of training
            free of pruning.
        every_n_epochs: distance between two steps; None for every epoch.
        degree: exponent; 1 is linear, 3 prunes most in the beginning.
        initial_sparsity: sparsity of the selected weights before the first step.
        start_step: like ``start_epoch``, in optimizer steps; give either epochs or steps.
        end_step: like ``end_epoch``, in optimizer steps.
        every_n_steps: like ``every_n_epochs``, in optimizer steps; None for every step.

    Raises:
        ConfigurationError: when the schedule ends before it starts, or a value is out
            of its range, or epochs and steps are mixed.
    """

    def __init__(
        self,
        start_epoch: int | None = None,
        end_epoch: int | None = None,
        every_n_epochs: int | None = None,
        degree: float = 3.0,
        initial_sparsity: float = 0.0,
        start_step: int | None = None,
        end_step: int | None = None,
        every_n_steps: int | None = None,
    ) -> None:
        epochs = (start_epoch, end_epoch, every_n_epochs)
        steps = (start_step, end_step, every_n_steps)
        counts_steps = any(value is not None for value in steps)
        if counts_steps and any(value is not None for value in epochs):
            raise ConfigurationError(
                "PolynomialSchedule counts either epochs or optimizer steps, but both "
                f"*_epoch(s)={epochs} and *_step(s)={steps} were given; drop one set."
            )
        self.unit: Unit = "step" if counts_steps else "epoch"
        start, end, every = steps if counts_steps else epochs
        self.start = start
        self.end = end
        self.every = 1 if every is None else every
        self.degree = degree
        self.initial_sparsity = initial_sparsity
        name = "PolynomialSchedule: "
        if start is not None:
            require_integer(f"{name}start_{self.unit}", start, least=0)
        require_integer(f"{name}every_n_{self.unit}s", self.every, least=1)
        require_number(f"{name}degree", degree, "(0, inf)", "3 is usual")
        require_number(
            f"{name}initial_sparsity", initial_sparsity, "[0, 1)", "90 % is 0.9"
        )
        if end is not None:
            require_integer(f"{name}end_{self.unit}", end, least=0)
        if end is not None and start is not None and end < start:
            raise ConfigurationError(
                f"PolynomialSchedule ends before it starts: end_{self.unit}={end} < "
                f"start_{self.unit}={start}; raise the end or lower the start."
            )

    def plan(self, target_sparsity: float, horizon: Horizon) -> tuple[PlannedStep, ...]:
        """List the steps of the ramp.

        Args:
            target_sparsity: sparsity after the last step, in [0, 1).
            horizon: how long training runs.

        Returns:
            The steps in order.

        Raises:
            ConfigurationError: when the ramp does not fit into training, has far too
                many steps, or would have to lower the sparsity.
        """
        if target_sparsity < self.initial_sparsity:
            raise ConfigurationError(
                f"target_sparsity={target_sparsity} is below initial_sparsity="
                f"{self.initial_sparsity}; pruning can only add zeros."
            )
        start, end = self._ends(horizon)
        _require_within(self, end, self.unit, horizon)
        number = (end - start) // self.every + 1
        if number > _MOST_STEPS:
            raise ConfigurationError(
                f"{self} plans {number} pruning steps; raise every_n_{self.unit}s."
            )
        positions = [*range(start, end, self.every), end]
        span = end - start + self.every
        return tuple(
            PlannedStep(
                self.unit,
                position,
                target_sparsity
                + (self.initial_sparsity - target_sparsity)
                * (1 - (position - start + self.every) / span) ** self.degree,
            )
            for position in positions
        )

    def _ends(self, horizon: Horizon) -> tuple[int, int]:
        """Return the positions of the first and of the last step."""
        length, start, end = horizon.length(self.unit), self.start, self.end
        if start is None:
            # Training without a known length has the end of the ramp.
            known = length if length is not None else end
            start = 0 if known is None else _after(_SHARE_BEFORE_PRUNING, known)
        if end is not None:
            return min(start, end), end
        if length is None:
            why = f" ({horizon.why_unknown})" if horizon.why_unknown else ""
            raise ConfigurationError(
                f"PolynomialSchedule has no end_{self.unit} and training has no known "
                f"number of {self.unit}s{why}; set end_{self.unit} or limit the training."
            )
        end = math.ceil(_SHARE_OF_TRAINING_THAT_PRUNES * length) - 1
        return start, max(start, end)

    def __repr__(self) -> str:
        return (
            f"PolynomialSchedule(start_{self.unit}={self.start}, "
            f"end_{self.unit}={self.end}, every_n_{self.unit}s={self.every}, "
            f"degree={self.degree}, initial_sparsity={self.initial_sparsity})"
        )


def keeps_zeros(schedule: PruningSchedule) -> bool:
    """Return whether zeros that a network has when fit starts count as pruned.

    Args:
        schedule: of the fit.

    Returns:
        True for :class:`ConstantSchedule` and for an ``initial_sparsity``.
    """
    if isinstance(schedule, ConstantSchedule):
        return True
    return getattr(schedule, "initial_sparsity", 0.0) > 0.0


def continue_plan(
    done: Sequence[PlannedStep], plan: tuple[PlannedStep, ...]
) -> tuple[PlannedStep, ...]:
    """Plan the rest of a run that is resumed, perhaps with more epochs or another target.

    Args:
        done: the steps that were done, in order.
        plan: the steps of a run from the start.

    Returns:
        ``plan`` if it is empty or has all steps that were done. Otherwise these, and the
        steps of ``plan`` that come later and prune further.
    """
    if not plan or all(step in plan for step in done):
        return plan
    reached = max(step.sparsity for step in done)
    later = tuple(
        step
        for step in plan
        if step.sparsity > reached
        and all(step.unit != s.unit or step.position > s.position for s in done)
    )
    return (*done, *later)


def _after(share: float, length: int) -> int:
    """Return the first position after a share of training, but within it."""
    return max(0, min(math.ceil(share * length), length - 1))


def _require_within(
    schedule: PruningSchedule, last: int, unit: Unit, horizon: Horizon
) -> None:
    length = horizon.length(unit)
    if length is not None and last >= length:
        raise ConfigurationError(
            f"{schedule} prunes for the last time at {unit} {last}, but training has only "
            f"{length} {unit}s (0 to {length - 1}), so the target would not be reached; "
            f"end the schedule earlier or train longer."
        )
