"""A keyword in the wrong place is answered with the right one."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable
from typing import Any

import pytest

import lightning_woodfisher
from lightning_woodfisher import (
    FisherConfig,
    HAPPruningCallback,
    PolynomialSchedule,
    SOSPPruningCallback,
    StepConfig,
    WoodFisherPruningCallback,
    estimate,
    prune,
    prune_structures,
    sweep,
)


@pytest.mark.parametrize(
    ("called", "keyword", "answer"),
    [
        (
            WoodFisherPruningCallback,
            {"num_gradients": 8},
            ": it is a setting of FisherConfig. Give fisher=FisherConfig(num_gradients=8).",
        ),
        (
            WoodFisherPruningCallback,
            {"start_epoch": 2},
            ": it is a setting of PolynomialSchedule. "
            "Give schedule=PolynomialSchedule(start_epoch=2).",
        ),
        (
            prune,
            {"pattern": "2:4"},
            ": it is a setting of SelectionConfig. "
            "Give selection=SelectionConfig(pattern='2:4').",
        ),
        (
            estimate,
            {"layer_targets": {"a": 0.5}},
            ": it is a setting of SelectionConfig. "
            "Give selection=SelectionConfig(layer_targets={'a': 0.5}).",
        ),
        (
            HAPPruningCallback,
            {"exclude": ["fc"]},
            ": it is a setting of StructureConfig. "
            "Give config=StructureConfig(exclude=['fc']).",
        ),
        (SOSPPruningCallback, {"target_sparsity": 0.5}, ". Did you mean 'target'?"),
        (prune_structures, {"sparsity": 0.5}, ". Did you mean 'target'?"),
        (sweep, {"sparsity": 0.5}, ". Did you mean 'target_sparsity'?"),
        (
            prune,
            {"batch_size": 3},
            ". Did you mean fisher=FisherConfig(gradient_batch_size=3)?",
        ),
        (StepConfig, {"damping": 1.0}, ": it is an argument of FisherConfig."),
        (FisherConfig, {"dampening": 1.0}, ". Did you mean 'damping'?"),
        (PolynomialSchedule, {"share": 0.1}, ": it is an argument of OneShotSchedule."),
        (WoodFisherPruningCallback, {"xyz": 1}, "."),
    ],
)
def test_a_misplaced_keyword(
    called: Callable[..., Any], keyword: dict[str, Any], answer: str
) -> None:
    with pytest.raises(TypeError) as raised:
        called(**keyword)
    start, _, end = str(raised.value).partition(f" has no argument {[*keyword][0]!r}")
    assert start.removesuffix("()") == called.__name__
    assert end == answer


def test_all_public_names_with_settings_answer() -> None:
    """Reports and errors are not made by the user."""
    made_here = {"Report", "Estimate", "Error"}
    silent = {"PruningSchedule", "ConstantSchedule", "load_shrunk", "preset"}
    for name in {*lightning_woodfisher.__all__} - silent:
        public = getattr(lightning_woodfisher, name)
        if not any(word in name for word in made_here):
            with pytest.raises(TypeError, match=r"^\w+(\(\))? has no argument 'xyz'"):
                public(xyz=1)


def test_signatures_copies_and_other_errors_stay() -> None:
    assert [*inspect.signature(StepConfig).parameters][:2] == ["update", "update_scale"]
    assert [*inspect.signature(prune).parameters][:2] == ["model", "data"]
    assert pickle.loads(pickle.dumps(FisherConfig(damping=1.0))).damping == 1.0
    assert copy.deepcopy(PolynomialSchedule(1, 2)).end == 2
    assert pickle.loads(pickle.dumps(prune)) is prune
    with pytest.raises(TypeError, match="missing 1 required positional"):
        prune(None, None)  # type: ignore[call-arg, arg-type]
