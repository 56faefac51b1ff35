"""The sentences that say how a run went."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from lightning_woodfisher.pruning.report import LayerReport, PruningReport
from lightning_woodfisher.reporting.verdict import describe_result, main_metrics
from lightning_woodfisher.structured.report import GroupReport, StructureReport


def step(before: float, after: float, zeros: int = 90, **changes: Any) -> PruningReport:
    report = PruningReport(
        criterion="woodfisher",
        layers=(LayerReport("fc", (10, 10), 100, 0, zeros, None, None),),
        target_sparsity=0.9,
        threshold=None,
        damping=None,
        raised_damping={},
        predicted_increase=None,
        measured_increase=None,
        loss_before=before,
        loss_after=after,
        stages=1,
        num_gradients=1,
        seconds={},
        bytes_exchanged=0,
        fisher_bytes=(),
        world_size=1,
        model_parameters=200,
        model_zeros=zeros,
    )
    return dataclasses.replace(report, **changes)


REACHED = (
    "90.0% of the selected weights are zero, 45.0% of the whole model; the target of "
    "90.0% is reached."
)


@pytest.mark.parametrize(
    ("steps", "sentences"),
    [
        (
            [step(0.03, 0.04), step(0.02, 0.9)],
            ["The last step raised the loss from 0.02 to 0.9: use more steps."],
        ),
        (
            [step(0.02, 0.03), step(0.02, 0.05), step(0.02, 0.04)],
            ["Step 2 raised the loss from 0.02 to 0.05, more than any other step."],
        ),
        (
            [step(0.02, 0.5), step(0.4, 0.9)],
            [
                "The last step raised the loss from 0.4 to 0.9: use more steps.",
                "Training did not repair the steps: the loss was 0.02 before the first one "
                "and 0.4 before the last one. Train longer between the steps, or with a "
                "higher learning rate.",
            ],
        ),
        ([step(0.02, 0.01)], ["No step raised the loss."]),
        # The statistics of BatchNorm were the cause.
        (
            [step(0.02, 0.9, loss_recalibrated=0.03)],
            [
                "The last step raised the loss from 0.02 to 0.03 (with new BatchNorm "
                "statistics)."
            ],
        ),
        ([step(0.02, 0.9, loss_before=None)], []),
    ],
    ids=["large", "small", "not repaired", "fell", "batchnorm", "not measured"],
)
def test_losses(steps: list[PruningReport], sentences: list[str]) -> None:
    assert describe_result(steps) == [REACHED, *sentences]


def test_targets() -> None:
    early = step(0.02, 0.01, 40)
    assert describe_result([early], steps_left=3)[0] == (
        "40.0% of the selected weights are zero, 20.0% of the whole model, but 3 planned "
        "steps were not done: train longer, or end the schedule earlier."
    )
    missed = step(0.02, 0.01, 40, left_dense={"head": "it is zero"})
    assert describe_result([missed])[0].endswith(
        "50 weights are missing from the target of 90.0%, because head stayed dense."
    )
    empty = step(0.02, 0.01, 100, target_sparsity=1.0)
    assert "No weight is left in fc" in describe_result([empty])[-1]


def test_channels() -> None:
    group = GroupReport("conv", ("conv",), 8, 0, (0, 1))
    report = StructureReport(
        *("sosp_i", "bn", "macs", 0.4, (group,), 100, 80, 1000, 500, 0.2, 0.3)
    )
    assert describe_result([report]) == [
        "50.0% of the multiply-accumulates are removed; the target of 40.0% is reached.",
        "The last step raised the loss from 0.2 to 0.3.",
    ]
    missed = dataclasses.replace(report, measure="parameters")
    assert describe_result([missed])[0] == (
        "20.0% of the parameters are removed; the target was 40.0%."
    )


def test_metrics_of_validation_come_first() -> None:
    def logged(**values: float) -> list[PruningReport]:
        return [step(0.1, 0.1, logged_before=values, logged_after=values)]

    assert main_metrics(logged(val_loss=1, train_acc=1, val_acc=1, f1=1, b=1)) == [
        *("b", "f1", "val_acc"),
    ]
    assert main_metrics(logged(val_loss=1, train_acc=1)) == ["val_loss"]
    assert main_metrics(logged(train_loss=0.5)) == ["train_loss"]
    assert describe_result(logged(train_loss=0.5))[-1] == (
        "train_loss was 0.5 before pruning and is 0.5 now."
    )
