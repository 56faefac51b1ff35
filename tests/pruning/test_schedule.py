"""Schedules: closed forms, the landing, and what is refused."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_woodfisher.base.errors import ConfigurationError
from lightning_woodfisher.pruning.schedule import (
    ConstantSchedule,
    Horizon,
    OneShotSchedule,
    PlannedStep,
    PolynomialSchedule,
    PruningSchedule,
    continue_plan,
)

FOREVER = Horizon()


def sparsities(
    schedule: PruningSchedule, target: float, horizon: Horizon
) -> list[float]:
    return [step.sparsity for step in schedule.plan(target, horizon)]


def test_cubic_ramp_is_the_one_of_zhu_and_gupta() -> None:
    schedule = PolynomialSchedule(start_epoch=2, end_epoch=5)
    # t_0 lies one interval before the first step: 1, so that t_1 - t_0 = 4.
    expected = [0.8 * (1 - (1 - done / 4) ** 3) for done in (1, 2, 3, 4)]
    steps = schedule.plan(0.8, Horizon(max_epochs=10))
    assert [step.position for step in steps] == [2, 3, 4, 5]
    assert [step.sparsity for step in steps] == pytest.approx(expected, rel=1e-14)
    assert {step.unit for step in steps} == {"epoch"}


def test_degree_one_is_linear_from_the_initial_sparsity() -> None:
    schedule = PolynomialSchedule(
        start_epoch=0, end_epoch=3, degree=1.0, initial_sparsity=0.5
    )
    assert sparsities(schedule, 0.9, FOREVER) == pytest.approx([0.6, 0.7, 0.8, 0.9])


def test_interval_that_does_not_divide_the_span_still_ends_at_the_end() -> None:
    schedule = PolynomialSchedule(start_epoch=1, end_epoch=8, every_n_epochs=3)
    steps = schedule.plan(0.9, FOREVER)
    assert [step.position for step in steps] == [1, 4, 7, 8]
    assert steps[-1].sparsity == 0.9
    # s(t) is a function of the position: 8 lies one epoch after 7, not one interval.
    assert steps[-2].sparsity == pytest.approx(0.9 * (1 - 0.1**3))


def test_optimizer_steps_count_like_epochs() -> None:
    epochs = PolynomialSchedule(start_epoch=10, end_epoch=50, every_n_epochs=10)
    steps = PolynomialSchedule(start_step=10, end_step=50, every_n_steps=10)
    in_epochs = epochs.plan(0.9, Horizon(max_epochs=60))
    in_steps = steps.plan(0.9, Horizon(max_epochs=1, max_steps=60))
    assert {step.unit for step in in_steps} == {"step"}
    assert [(s.position, s.sparsity) for s in in_steps] == [
        (s.position, s.sparsity) for s in in_epochs
    ]


@pytest.mark.parametrize("unit", ["epoch", "step"])
@pytest.mark.parametrize("argument", ["start", "end", "every_n"])
def test_any_argument_decides_the_unit(unit: str, argument: str) -> None:
    name = f"every_n_{unit}s" if argument == "every_n" else f"{argument}_{unit}"
    schedule = PolynomialSchedule(**{name: 1})
    horizon = Horizon(max_epochs=8, max_steps=8)
    assert {step.unit for step in schedule.plan(0.5, horizon)} == {unit}


@pytest.mark.parametrize(
    ("length", "last"), [(1, 0), (2, 1), (4, 2), (8, 5), (10, 7), (100, 74)]
)
def test_default_end_leaves_a_quarter_of_training_free(length: int, last: int) -> None:
    epochs = PolynomialSchedule().plan(0.9, Horizon(max_epochs=length))
    steps = PolynomialSchedule(start_step=0).plan(0.9, Horizon(max_steps=length))
    assert epochs[-1] == PlannedStep("epoch", last, 0.9)
    assert steps[-1] == PlannedStep("step", last, 0.9)


@pytest.mark.parametrize(
    ("length", "first"), [(1, 0), (2, 1), (4, 1), (10, 1), (11, 2), (30, 3), (100, 10)]
)
def test_default_start_is_after_a_tenth_of_training(length: int, first: int) -> None:
    horizon = Horizon(max_epochs=length, max_steps=length)
    for schedule in (
        PolynomialSchedule(),
        PolynomialSchedule(end_epoch=length - 1),
        PolynomialSchedule(every_n_steps=1),
        OneShotSchedule(share=0.1),
    ):
        assert schedule.plan(0.9, horizon)[0].position == first


def test_default_start_without_a_known_length_or_before_an_early_end() -> None:
    forever = PolynomialSchedule(end_epoch=20).plan(0.9, Horizon())
    assert (forever[0].position, forever[-1].position) == (2, 20)
    early = PolynomialSchedule(end_epoch=1).plan(0.9, Horizon(max_epochs=100))
    assert early == (PlannedStep("epoch", 1, 0.9),)
    assert OneShotSchedule(share=0.5).plan(0.9, Horizon())[0].position == 1


def test_default_end_is_not_before_the_start() -> None:
    steps = PolynomialSchedule(start_epoch=9).plan(0.9, Horizon(max_epochs=10))
    assert steps == (PlannedStep("epoch", 9, 0.9),)


@given(
    start=st.integers(0, 60),
    length=st.integers(0, 200),
    every=st.integers(1, 40),
    degree=st.floats(0.1, 8.0),
    low=st.floats(0.0, 0.999),
    high=st.floats(0.0, 0.999),
    unit=st.sampled_from(["epoch", "step"]),
)
def test_every_ramp_rises_and_lands(
    start: int,
    length: int,
    every: int,
    degree: float,
    low: float,
    high: float,
    unit: str,
) -> None:
    initial, target = sorted((low, high))
    arguments = {f"start_{unit}": start, f"end_{unit}": start + length}
    schedule = PolynomialSchedule(
        degree=degree,
        initial_sparsity=initial,
        **arguments,
        **{f"every_n_{unit}s": every},
    )
    steps = schedule.plan(target, FOREVER)
    positions = [step.position for step in steps]
    values = [step.sparsity for step in steps]
    assert positions[0] == start
    assert positions[-1] == start + length
    assert all(
        0 < b - a <= every for a, b in zip(positions, positions[1:], strict=False)
    )
    assert values == sorted(values)
    assert values[-1] == target
    if target - initial > 1e-3:
        assert values[0] > initial
    assert all(step.unit == unit for step in steps)
    assert schedule.plan(target, FOREVER) == steps


@given(length=st.integers(1, 500), every=st.integers(1, 40))
def test_default_end_is_within_training(length: int, every: int) -> None:
    schedule = PolynomialSchedule(every_n_epochs=every)
    steps = schedule.plan(0.9, Horizon(max_epochs=length))
    assert 0 <= steps[-1].position < length
    assert length - 1 - steps[-1].position >= math.floor(length / 4) - 1


def test_one_shot() -> None:
    horizon = Horizon(max_epochs=3, max_steps=30)
    assert OneShotSchedule().plan(0.9, horizon) == (PlannedStep("epoch", 0, 0.9),)
    assert OneShotSchedule(epoch=2).plan(0.9, horizon) == (
        PlannedStep("epoch", 2, 0.9),
    )
    assert OneShotSchedule(step=0).plan(0.9, horizon) == (PlannedStep("step", 0, 0.9),)
    assert OneShotSchedule(step=29).plan(0.7, horizon) == (
        PlannedStep("step", 29, 0.7),
    )


def test_constant_plans_nothing() -> None:
    assert ConstantSchedule().plan(0.9, Horizon(max_epochs=3)) == ()


def test_horizon_length() -> None:
    horizon = Horizon(max_epochs=3, max_steps=40)
    assert (horizon.length("epoch"), horizon.length("step")) == (3, 40)
    assert Horizon().length("epoch") is None


def test_reprs_show_the_settings() -> None:
    assert repr(OneShotSchedule(step=7)) == "OneShotSchedule(step=7)"
    assert repr(ConstantSchedule()) == "ConstantSchedule()"
    text = repr(PolynomialSchedule(start_step=3, end_step=9, degree=2.0))
    assert "start_step=3" in text
    assert "end_step=9" in text
    assert "degree=2.0" in text


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        ({"start_epoch": -1}, "start_epoch=-1"),
        ({"start_step": -4}, "start_step=-4"),
        ({"start_epoch": 5, "end_epoch": 4}, "end_epoch=4 < start_epoch=5"),
        ({"end_step": -1}, "end_step=-1"),
        ({"every_n_epochs": 0}, "every_n_epochs=0"),
        ({"every_n_steps": -3}, "every_n_steps=-3"),
        ({"degree": 0.0}, "degree=0.0"),
        ({"degree": -1.0}, "degree=-1.0"),
        ({"degree": math.nan}, "degree=nan"),
        ({"initial_sparsity": 1.0}, "initial_sparsity=1.0"),
        ({"initial_sparsity": -0.1}, "initial_sparsity=-0.1"),
        ({"initial_sparsity": math.nan}, "initial_sparsity=nan"),
        ({"start_epoch": 1, "end_step": 2}, r"either epochs or optimizer steps"),
    ],
)
def test_bad_ramps_are_refused(arguments: dict[str, float], shown: str) -> None:
    with pytest.raises(ConfigurationError, match=shown):
        PolynomialSchedule(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        ({"epoch": -1}, "epoch=-1"),
        ({"step": -2}, "step=-2"),
        ({"epoch": 0, "step": 0}, "epoch=0 and step=0"),
    ],
)
def test_bad_one_shots_are_refused(arguments: dict[str, int], shown: str) -> None:
    with pytest.raises(ConfigurationError, match=shown):
        OneShotSchedule(**arguments)


@pytest.mark.parametrize(
    ("schedule", "horizon", "shown"),
    [
        (OneShotSchedule(epoch=3), Horizon(max_epochs=3), r"epoch 3.*only 3 epochs"),
        (OneShotSchedule(step=9), Horizon(max_steps=9), r"step 9.*only 9 steps"),
        (PolynomialSchedule(end_epoch=5), Horizon(max_epochs=5), "epoch 5"),
        (PolynomialSchedule(start_epoch=7), Horizon(max_epochs=5), "epoch 7"),
        (PolynomialSchedule(), FOREVER, "no end_epoch"),
        (PolynomialSchedule(start_step=1), Horizon(max_epochs=5), "no end_step"),
    ],
)
def test_schedules_that_do_not_fit_into_training_are_refused(
    schedule: PruningSchedule, horizon: Horizon, shown: str
) -> None:
    with pytest.raises(ConfigurationError, match=shown):
        schedule.plan(0.9, horizon)


def test_a_target_below_the_initial_sparsity_is_refused() -> None:
    schedule = PolynomialSchedule(start_epoch=0, end_epoch=3, initial_sparsity=0.5)
    with pytest.raises(ConfigurationError, match=r"target_sparsity=0.4.*=0.5"):
        schedule.plan(0.4, FOREVER)
    assert sparsities(schedule, 0.5, FOREVER) == [0.5] * 4


def test_a_schedule_must_say_how_it_plans() -> None:
    with pytest.raises(TypeError, match="plan"):
        PruningSchedule()  # type: ignore[abstract]


def test_the_plan_of_a_resumed_run_goes_on_from_what_was_done() -> None:
    def epochs(**sparsities: float) -> tuple[PlannedStep, ...]:
        return tuple(
            PlannedStep("epoch", int(name[1:]), s) for name, s in sparsities.items()
        )

    done = epochs(e1=0.5, e2=0.7)
    same = epochs(e1=0.5, e2=0.7, e3=0.7, e4=0.8)
    assert continue_plan(done, same) == same
    assert continue_plan((), same) == same
    assert continue_plan(done, ()) == ()
    # Longer: what is below 0.7 or before the steps that were done is left out.
    longer = epochs(e2=0.3, e4=0.6, e6=0.7, e8=0.8)
    assert continue_plan(done, longer) == (*done, *epochs(e8=0.8))
    assert continue_plan(done, epochs(e2=0.9)) == done
    # Epochs and optimizer steps cannot be compared.
    step = PlannedStep("step", 1, 0.8)
    assert continue_plan(done, (step,)) == (*done, step)
