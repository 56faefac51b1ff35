"""The suggestion in error messages, and what the errors are caught as."""

from __future__ import annotations

import pytest

from lightning_woodfisher.base.errors import ConfigurationError, PruningError, nearest


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


def test_errors_are_caught_as_what_python_users_expect() -> None:
    assert issubclass(ConfigurationError, ValueError)
    assert issubclass(PruningError, RuntimeError)
