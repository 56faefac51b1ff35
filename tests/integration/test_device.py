"""Pruning on the device of ``WOODFISHER_TEST_DEVICE`` agrees with pruning on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from devices import DEVICE
from fits import CLASSES, images
from structured_fits import ResidualNet
from structured_fits import config as structure_config
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lightning_woodfisher import FisherConfig, SelectionConfig, StepConfig, prune
from lightning_woodfisher.criteria import CRITERIA
from lightning_woodfisher.structured.pruner import prune_structures

pytestmark = pytest.mark.skipif(
    DEVICE.type == "cpu", reason="WOODFISHER_TEST_DEVICE is the CPU"
)


def loss(model: nn.Module, batch: Any) -> Tensor:
    return cross_entropy(model(batch[0]), batch[1])


def network() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.Tanh(), nn.Flatten(), nn.Linear(288, CLASSES)
    )


def fisher(**options: Any) -> FisherConfig:
    settings = {"num_gradients": 16, "gradient_batch_size": 2, "block_size": 32}
    return FisherConfig(**{**settings, **options})


CASES: dict[str, dict[str, Any]] = {
    **{name: {"criterion": name} for name in CRITERIA},
    "independent": {"step": StepConfig(update="independent")},
    "two stages": {"step": StepConfig(recompute_steps=2)},
    "primal": {"fisher": fisher(engine="primal")},
    "dual": {"fisher": fisher(engine="dual")},
    "full": {"fisher": fisher(block_size=None)},
    "centered": {"fisher": fisher(centered=True)},
    "loop": {"fisher": fisher(collection="loop")},
    "offloaded": {"fisher": fisher(offload_rows=True)},
    "bfloat16 rows": {"fisher": fisher(row_dtype="bfloat16")},
    "2:4": {"selection": SelectionConfig(pattern="2:4", exclude=["0.weight"])},
    "blocks": {"selection": SelectionConfig(pattern="block4", only=["^3.weight$"])},
    "layers": {"selection": SelectionConfig(scope="layer")},
}


@pytest.mark.parametrize("name", CASES)
def test_masks_and_weights_are_those_of_the_cpu(name: str) -> None:
    options = {"fisher": fisher(), "target_sparsity": 0.5, **CASES[name]}
    states, reports = [], []
    for device in (torch.device("cpu"), DEVICE):
        model = network().to(device)
        reports.append(prune(model, images(), loss, **options))
        assert {p.device.type for p in model.parameters()} == {device.type}
        states.append({n: p.detach().cpu() for n, p in model.named_parameters()})
    assert reports[0].collection == reports[1].collection
    for parameter, expected in states[0].items():
        found = states[1][parameter]
        torch.testing.assert_close(found == 0, expected == 0)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("method", ["sosp_i", "sosp_h", "hap", "magnitude"])
@pytest.mark.parametrize("structure", ["conv", "bn", "conv+bn"])
def test_channels_are_those_of_the_cpu(method: str, structure: str) -> None:
    reports = []
    for device in (torch.device("cpu"), DEVICE):
        torch.manual_seed(4)
        report, _ = prune_structures(
            ResidualNet().to(device),
            images(),
            loss,
            target=0.4,
            config=structure_config(method=method, structure=structure),
            # On the CPU in both cases.
            example_inputs=images(1).tensors[0],
        )
        reports.append(report)
    assert reports[0].removed == reports[1].removed
    assert reports[1].loss_after == pytest.approx(reports[0].loss_after, rel=1e-4)
