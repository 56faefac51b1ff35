"""Which trial of the line search becomes the step, on losses that are given."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_woodfisher.pruning.step_length import ChosenStep, StepLength

# The losses of the trials on the first samples, and on the rest.
Losses = dict[float, tuple[float, float]]


def choose(
    losses: Losses, alternative: bool = False, screens: bool = True
) -> tuple[ChosenStep, list[Any]]:
    """Choose a step; a trial is known by its change, 2 for the alternative."""
    asked: list[tuple[float, str]] = []
    written: list[float] = []

    def write(weights: Tensor, removed: Tensor) -> bool:
        written.append(float(weights[0]))
        return True

    def measure(seed: int, part: str) -> list[float]:
        asked.append((written[-1], part))
        return [losses[written[-1]][part == "rest"]]

    evaluator: Any = SimpleNamespace(measure_trial=measure, screens=lambda _: screens)
    criterion: Any = SimpleNamespace(update="joint")
    active: Any = SimpleNamespace(write_trial=write, is_close=torch.equal)
    length = StepLength(
        criterion,
        active,
        evaluator,
        torch.zeros(2, dtype=torch.float64),
        0,
        largest=1.0,
        search=True,
    )
    removed = torch.tensor([False, True])
    direction = torch.tensor([1.0, 0.0], dtype=torch.float64)
    others: Any = {"independent": 2 * direction} if alternative else {}
    return length.choose(removed, [direction], others), asked


def test_the_better_of_the_two_finalists_on_all_samples_is_chosen() -> None:
    step, asked = choose({0.0: (9.0, 0.0), 0.5: (2.0, 1.0), 1.0: (1.0, 5.0)})
    assert (step.scales, step.losses, step.update) == ((0.5,), [2.0, 1.0], "joint")
    assert float(step.change[0]) == 0.5
    first = [(0.0, "first"), (0.5, "first"), (1.0, "first")]
    assert asked == [*first, (1.0, "rest"), (0.5, "rest")]


def test_the_alternative_may_be_a_finalist() -> None:
    losses = {0.0: (9.0, 9.0), 0.5: (3.0, 3.0), 1.0: (2.0, 2.0), 2.0: (2.5, 0.0)}
    step, _ = choose(losses, alternative=True)
    assert (step.update, step.losses, float(step.change[0])) == (
        "independent",
        [2.5, 0.0],
        2.0,
    )


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_trial_that_is_finite_on_few_samples_only_is_passed_over(bad: float) -> None:
    step, _ = choose({0.0: (9.0, 9.0), 0.5: (3.0, bad), 1.0: (2.0, bad)})
    assert (step.scales, step.losses, step.update) == ((0.0,), [9.0, 9.0], "none")


def test_without_any_finite_loss_there_is_no_update() -> None:
    nothing = (1.0, math.inf)
    step, _ = choose({0.0: (math.nan, 1.0), 0.5: nothing, 1.0: nothing})
    assert (step.scales, step.losses, step.update) == ((0.0,), None, "none")
    assert torch.equal(step.change, torch.zeros(2, dtype=torch.float64))


def test_without_more_samples_nothing_is_measured_again() -> None:
    losses = {0.0: (9.0, 0.0), 0.5: (2.0, 0.0), 1.0: (3.0, 0.0)}
    step, asked = choose(losses, screens=False)
    assert (step.scales, step.losses) == ((0.5,), [2.0])
    assert asked == [(0.0, "first"), (0.5, "first"), (1.0, "first")]
