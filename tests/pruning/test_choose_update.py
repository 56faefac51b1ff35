"""The update and the line search that the settings leave open."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_woodfisher import StepConfig, WoodFisherPruningCallback
from lightning_woodfisher.pruning.config import PruningConfig


@pytest.mark.parametrize(
    ("criterion", "step", "alone", "in_training"),
    [
        ("woodfisher", {}, ("joint", True), ("independent", False)),
        ("kfac", {}, ("joint", True), ("independent", False)),
        # Without the search its first-order step diverges.
        ("woodtaylor", {}, ("joint", True), ("joint", True)),
        ("layerwise", {}, ("joint", True), ("joint", True)),
        ("woodfisher", {"update": "joint"}, ("joint", True), ("joint", True)),
        ("woodfisher", {"line_search": True}, ("joint", True), ("joint", True)),
        (
            "woodfisher",
            {"line_search": False},
            ("joint", False),
            ("independent", False),
        ),
        (
            "woodfisher",
            {"update": "independent"},
            ("independent", True),
            ("independent", True),
        ),
        ("woodfisher", {"update": "none"}, ("none", True), ("none", True)),
    ],
)
def test_what_is_set_stays_and_the_rest_depends_on_training(
    criterion: Any, step: dict[str, Any], alone: Any, in_training: Any
) -> None:
    config = PruningConfig(criterion, step=StepConfig(**step))
    callback = WoodFisherPruningCallback(
        0.5, criterion=criterion, step=StepConfig(**step)
    )
    for found, expected in ((config, alone), (callback.config, in_training)):
        assert (found.update, found.step.line_search) == expected
    assert callback.config.searches == (
        in_training[1] and in_training[0] != "none" and criterion != "layerwise"
    )
