"""Reports: plain types and back, metric names, the table."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest

from lightning_woodfisher.pruning.report import (
    LayerReport,
    PruningReport,
    Reconstruction,
    format_steps,
)

PLAIN_TYPES = (str, int, float, bool, type(None))


def report(**changes: object) -> PruningReport:
    return dataclasses.replace(
        PruningReport(
            criterion="woodfisher",
            layers=(
                LayerReport("conv.weight", (16, 1, 3, 3), 144, 10, 36, 2e-5, 1e-3),
                LayerReport("fc.weight", (10, 64), 640, 0, 600, None, -2.5e-4),
            ),
            target_sparsity=0.81,
            threshold=2e-5,
            damping=1e-4,
            raised_damping={"fc.weight from weight 144": 1e-3},
            predicted_increase=7.5e-4,
            measured_increase=8e-4,
            loss_before=0.1,
            loss_after=0.1008,
            stages=2,
            num_gradients=256,
            seconds={"collect": 0.25, "factorize": 0.5},
            bytes_exchanged=123_456,
            fisher_bytes=(1000, 1001),
            world_size=2,
            epoch=3,
            step=40,
            model_parameters=800,
            model_zeros=640,
        ),
        **changes,
    )


BARE = report(
    layers=(LayerReport("w", (2, 2), 4, 0, 2, None, None),),
    threshold=None,
    damping=None,
    raised_damping={},
    predicted_increase=None,
    measured_increase=None,
    loss_before=None,
    loss_after=None,
    epoch=None,
    step=None,
    model_parameters=None,
    model_zeros=None,
)


def leaves(value: object) -> list[object]:
    if isinstance(value, dict):
        return [
            leaf for item in value.items() for part in item for leaf in leaves(part)
        ]
    if isinstance(value, list):
        return [leaf for item in value for leaf in leaves(item)]
    return [value]


@pytest.mark.parametrize("one", [report(), BARE], ids=["full", "bare"])
def test_plain_types_and_back(one: PruningReport) -> None:
    plain = one.to_dict()
    assert all(type(leaf) in PLAIN_TYPES for leaf in leaves(plain))
    assert PruningReport.from_dict(plain) == one
    assert PruningReport.from_dict(json.loads(json.dumps(plain))) == one
    assert list(plain) == [field.name for field in dataclasses.fields(PruningReport)]


def test_plain_types_are_copies() -> None:
    one = report()
    plain = one.to_dict()
    plain["seconds"]["collect"] = 99.0
    plain["raised_damping"].clear()
    plain["layers"][0]["name"] = "other"
    assert one == report()


def test_reports_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        report().criterion = "magnitude"  # type: ignore[misc]


def test_totals() -> None:
    one = report()
    assert (one.weights, one.zeros) == (784, 636)
    assert one.sparsity == 636 / 784
    assert [layer.sparsity for layer in one.layers] == [0.25, 0.9375]


def test_a_model_without_parameters_has_no_sparsity() -> None:
    assert report(model_parameters=0, model_zeros=0).model_sparsity == 0.0
    assert report(model_parameters=1, model_zeros=1).model_sparsity == 1.0


def test_metrics_name_the_layers_whose_outputs_were_reconstructed() -> None:
    told = Reconstruction(0.5, 0.125, 7, 1e-3, "outputs")
    layer = dataclasses.replace(report().layers[0], reconstruction=told)
    metrics = report(layers=(layer, report().layers[1])).metrics()
    found = {
        k: v for k, v in metrics.items() if k.startswith("pruning/reconstruction/")
    }
    assert found == {
        "pruning/reconstruction/error_masked/conv.weight": 0.5,
        "pruning/reconstruction/error/conv.weight": 0.125,
        "pruning/reconstruction/iterations/conv.weight": 7.0,
        "pruning/reconstruction/damping/conv.weight": 1e-3,
    }
    assert type(found["pruning/reconstruction/iterations/conv.weight"]) is float


def test_metrics() -> None:
    assert report().metrics() == {
        "pruning/sparsity": 636 / 784,
        "pruning/model_sparsity": 0.8,
        "pruning/target_sparsity": 0.81,
        "pruning/threshold": 2e-5,
        "pruning/damping": 1e-4,
        "pruning/blocks_with_raised_damping": 1.0,
        "pruning/nonfinite_gradients": 0.0,
        "pruning/predicted_loss_increase": 7.5e-4,
        "pruning/measured_loss_increase": 8e-4,
        "pruning/bytes_exchanged": 123_456.0,
        "pruning/seconds/collect": 0.25,
        "pruning/seconds/factorize": 0.5,
        "pruning/sparsity/conv.weight": 0.25,
        "pruning/sparsity/fc.weight": 0.9375,
    }


def test_metrics_are_floats_and_what_is_unknown_is_left_out() -> None:
    metrics = BARE.metrics()
    assert all(type(value) is float for value in metrics.values())
    assert not any(math.isnan(value) for value in metrics.values())
    assert "pruning/threshold" not in metrics
    assert "pruning/predicted_loss_increase" not in metrics
    assert metrics["pruning/blocks_with_raised_damping"] == 0.0


def test_table() -> None:
    *lines, loss = report().to_table().splitlines()
    assert loss == "loss 0.1 before, 0.101 after"
    assert len({len(line) for line in lines}) == 1
    assert lines[0].split() == [
        "layer", "shape", "weights", "zeros", "sparsity", "predicted", "rise"
    ]  # fmt: skip
    assert lines[2].split() == [
        "conv.weight",
        "16×1×3×3",
        "144",
        "36",
        "25.00%",
        "0.001",
    ]
    assert lines[3].split() == [
        "fc.weight",
        "10×64",
        "640",
        "600",
        "93.75%",
        "-0.00025",
    ]
    assert lines[-2].split() == ["selected", "784", "636", "81.12%", "0.00075"]
    assert lines[-1].split() == ["whole", "model", "800", "640", "80.00%"]
    assert set(lines[1]) == set(lines[-3]) == {"─"}


def test_the_line_of_losses_says_that_the_search_kept_no_update() -> None:
    unchanged = dataclasses.replace(report(), update_scales=(0.0,), updates=("none",))
    assert unchanged.describe_loss().endswith("raised it, so they stayed")
    partly = dataclasses.replace(report(), update_scales=(0.0, 0.5))
    assert partly.describe_loss() == report().describe_loss()
    assert BARE.describe_loss() == ""


def test_table_without_a_model_of_the_loss() -> None:
    assert BARE.to_table().splitlines()[-1].split() == [
        "selected",
        "4",
        "2",
        "50.00%",
        "–",
    ]


def test_scales_are_logged_and_survive_json_and_may_be_missing() -> None:
    scaled = dataclasses.replace(
        BARE, update_scales=(1.0, 0.5), first_order_scales=(0.01, 0.03)
    )
    metrics = scaled.metrics()
    assert metrics["pruning/update_scale"] == 0.5
    assert metrics["pruning/first_order_scale"] == 0.03
    plain = json.loads(json.dumps(scaled.to_dict()))
    assert PruningReport.from_dict(plain) == scaled
    # What an older version has written.
    del plain["update_scales"], plain["first_order_scales"], plain["updates"]
    assert PruningReport.from_dict(plain) == BARE


def test_quantiles_survive_json_and_may_be_missing() -> None:
    layers = tuple(
        dataclasses.replace(layer, saliency_quantiles=(0.0, 1e-9, 2e-9, 3e-8, 5.0))
        for layer in report().layers
    )
    one = report(layers=layers)
    plain = json.loads(json.dumps(one.to_dict()))
    assert PruningReport.from_dict(plain) == one
    # What an older version has written.
    for layer in plain["layers"]:
        del layer["saliency_quantiles"]
    assert PruningReport.from_dict(plain) == report()


def test_damping_of_a_layer_is_its_largest() -> None:
    raised = {
        "conv.weight from weight 0": 1e-3,
        "conv.weight from weight 64": 1e-2,
        "conv.weight_v from weight 0": 1.0,
    }
    one = report(raised_damping=raised)
    assert [one.damping_of(layer) for layer in one.layers] == [1e-2, 1e-4]
    assert BARE.damping_of(BARE.layers[0]) is None


def test_table_of_steps() -> None:
    lines = format_steps([report(), BARE]).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[2].split() == [
        *("1", "3", "40", "81.00%", "81.12%"),
        *("0.00075", "0.0008", "0.1", "0.101", "0.8"),
    ]
    assert lines[3].split()[:5] == ["2", "–", "–", "81.00%", "50.00%"]
    assert lines[3].split()[5:9] == ["–"] * 4
    new = dataclasses.replace(report(), loss_recalibrated=0.102)
    lines = format_steps([new, BARE]).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[2].split()[-4:] == ["0.1", "0.101", "0.102", "0.8"]
    assert lines[3].split()[-2] == "–"
    assert new.describe_loss() == (
        "loss 0.1 before, 0.101 after with old BatchNorm statistics, 0.102 after with new "
        "ones"
    )
