"""Suggestions in error messages, checks of settings, and how errors are caught."""

from __future__ import annotations

import math

import pytest

from lightning_woodfisher.base.errors import (
    ConfigurationError,
    PruningError,
    name_first,
    nearest,
    require_choice,
    require_count,
    require_integer,
    require_number,
)


@pytest.mark.parametrize(
    ("name", "known", "suggestion"),
    [
        ("magnitud", ["woodfisher", "magnitude"], " Did you mean 'magnitude'?"),
        ("xyz", ["woodfisher", "magnitude"], ""),
        ("joint", [], ""),
    ],
)
def test_nearest(name: str, known: list[str], suggestion: str) -> None:
    assert nearest(name, known) == suggestion


def test_nearest_takes_the_best_of_several() -> None:
    assert nearest("layer2.weigth", ["layer1.weight", "layer2.weight"]) == (
        " Did you mean 'layer2.weight'?"
    )


def test_the_first_of_many_names() -> None:
    assert name_first(["a", "b"], 2) == "a, b"
    assert name_first(["a", "b", "c"], 2, "; ") == "a; b and 1 more"


def test_errors_are_caught_as_what_python_users_expect() -> None:
    assert issubclass(ConfigurationError, ValueError)
    assert issubclass(PruningError, RuntimeError)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (True, "n=True is not a whole number."),
        (1.5, "n=1.5 is not a whole number."),
        (0, "n=0 must be at least 1; or so."),
        (4, "n=4 must be at most 3; or so."),
    ],
)
def test_integers_in_a_range(value: object, message: str) -> None:
    require_integer("n", 1, 1, 3)
    require_integer("n", 3, 1, 3)
    with pytest.raises(ConfigurationError) as caught:
        require_integer("n", value, 1, 3, "or so")
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("value", "interval", "is_inside"),
    [
        (0, "[0, 1)", True),
        (1, "[0, 1)", False),
        (0.0, "(0, 1]", False),
        (1.0, "(0, 1]", True),
        (-0.1, "[0, 1]", False),
        (math.nan, "[0, 1]", False),
        (math.inf, "(0, inf)", False),
        (10**400, "(0, inf)", True),
        (1e-101, "[1e-100, 1e+100]", False),
    ],
)
def test_numbers_in_an_interval(value: float, interval: str, is_inside: bool) -> None:
    if is_inside:
        require_number("x", value, interval)
        return
    with pytest.raises(ConfigurationError) as caught:
        require_number("x", value, interval)
    assert str(caught.value) == f"x={value} is outside {interval}."


@pytest.mark.parametrize("value", [True, "0.5", None])
def test_not_a_number(value: object) -> None:
    with pytest.raises(ConfigurationError, match=f"x={value!r} is not a number"):
        require_number("x", value)


@pytest.mark.parametrize("value", ["lef", None, ["left"]])
def test_unknown_choices(value: object) -> None:
    require_choice("side", "left", ("left", "right"))
    with pytest.raises(ConfigurationError) as caught:
        require_choice("side", value, {"left": 1, "right": 2})
    assert str(caught.value).startswith(
        f"side={value!r} is unknown; use one of left, right."
    )
    assert ("Did you mean 'left'?" in str(caught.value)) == (value == "lef")


def test_counts_end() -> None:
    require_count("n", 10_000_000)
    with pytest.raises(ConfigurationError, match="at most 10000000"):
        require_count("n", 10_000_001)
