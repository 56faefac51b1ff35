"""Watch how often layer-wise reconstruction factorizes the covariance of inputs."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_woodfisher.layerwise import step


def record_curvatures(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Return a list that gains the arguments of each ``Curvature`` of a step."""
    made: list[tuple[Any, ...]] = []

    class Recorded(step.Curvature):
        def __init__(self, *arguments: Any) -> None:
            made.append(arguments)
            super().__init__(*arguments)

    monkeypatch.setattr(step, "Curvature", Recorded)
    return made
