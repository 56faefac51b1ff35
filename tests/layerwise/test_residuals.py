"""Which layers write into a residual sum, found in networks that are written in many ways."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
import torchvision
from torch import Tensor, nn

from lightning_woodfisher.layerwise.interception import Interception
from lightning_woodfisher.layerwise.maps import LinearCall, WeightTable
from lightning_woodfisher.layerwise.residuals import Trail
from lightning_woodfisher.weights.layers import prunable_parameters


def follow(model: nn.Module, *inputs: Tensor) -> dict[str, Trail]:
    """Return the trail of each weight, and check that the outputs stay what they were."""
    model.eval()
    parameters = prunable_parameters(model)
    trails: dict[str, Trail] = {}

    def visit(call: LinearCall) -> Tensor:
        output = call.run(call.map.rows_of(parameters[call.map.name]), call.bias)
        trails.setdefault(call.map.name, Trail(output))
        interception.trail = trails[call.map.name]
        return output

    with torch.no_grad(), Interception(WeightTable(parameters), visit) as interception:
        found = model(*inputs)
    with torch.no_grad():
        expected = model(*inputs)
    torch.testing.assert_close(found, expected)
    assert trails.keys() == parameters.keys()
    return trails


def with_skips(trails: dict[str, Trail]) -> set[str]:
    return {name for name, trail in trails.items() if trail.skips}


def encoder(norm_first: bool) -> nn.Module:
    layer = nn.TransformerEncoderLayer(
        16, 2, 32, dropout=0.1, batch_first=True, norm_first=norm_first
    )
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


@pytest.mark.parametrize("norm_first", [True, False])
def test_transformer(norm_first: bool) -> None:
    found = with_skips(follow(encoder(norm_first), torch.randn(2, 5, 16)))
    # The input of the network is the same in the dense and in the pruned one.
    assert found == {
        "layers.0.linear2.weight",
        "layers.1.self_attn.out_proj.weight",
        "layers.1.linear2.weight",
    }


def test_resnet() -> None:
    trails = follow(torchvision.models.resnet18(), torch.randn(2, 3, 32, 32))
    ends = {f"layer{i}.{b}.conv2.weight" for i in range(1, 5) for b in range(2)}
    # The shortcut is computed after conv2, so it is the shortcut that makes up for conv2.
    ends -= {f"layer{i}.0.conv2.weight" for i in range(2, 5)}
    ends |= {f"layer{i}.0.downsample.0.weight" for i in range(2, 5)}
    assert with_skips(trails) == ends
    means = {name for name, trail in trails.items() if trail.batchnorm is not None}
    assert means == trails.keys() - {"fc.weight"}


MODELS: dict[str, tuple[Callable[[], nn.Module], int, str]] = {
    "vit": (
        lambda: torchvision.models.VisionTransformer(32, 16, 2, 2, 16, 32),
        32,
        r"out_proj|mlp\.3",
    ),
    "swin": (
        lambda: torchvision.models.SwinTransformer([4, 4], 16, [2], [2], [3, 3]),
        36,
        r"attn\.proj|mlp\.3",
    ),
    "convnext": (
        lambda: torchvision.models.ConvNeXt(
            [torchvision.models.convnext.CNBlockConfig(16, None, 2)]
        ),
        32,
        r"block\.5",
    ),
    "mobilenet": (lambda: torchvision.models.mobilenet_v2(width_mult=0.1), 32, ""),
}


@pytest.mark.parametrize("name", MODELS)
def test_torchvision(name: str) -> None:
    make, pixels, ends = MODELS[name]
    model = make()
    trails = follow(model, torch.randn(2, 3, pixels, pixels))
    found = with_skips(trails)
    if name == "mobilenet":
        added = [getattr(m, "use_res_connect", False) for m in model.modules()]
        assert len(found) == sum(added) >= 10
    else:
        assert found == {n for n in trails if re.search(ends, n)}


@pytest.mark.parametrize("backwards", [True, False])
def test_difference_makes_up_for_the_skip(backwards: bool) -> None:
    torch.manual_seed(0)
    first, layer = nn.Linear(6, 6), nn.Linear(6, 6)
    gain = nn.Parameter(torch.rand(6, 1) + 0.5)

    def add(skip: Tensor, output: Tensor) -> Tensor:
        branch = output.transpose(1, 2).roll(1, 2) * gain
        branch = nn.functional.dropout(branch, 0.5, training=False)
        if backwards:
            return branch.add_(skip)
        skip += branch
        return skip

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.layer = first, layer

        def forward(self, inputs: Tensor) -> Tensor:
            hidden = self.first(inputs)
            return add(hidden.transpose(1, 2).contiguous(), self.layer(hidden.sin()))

    trail = follow(Network(), torch.randn(2, 6, 6))["layer.weight"]
    (skip,) = trail.skips
    output, pruned = torch.randn(2, 6, 6), torch.randn(2, 6, 6)
    with torch.no_grad():
        wanted = add(skip.dense.clone(), output.clone())
        change = skip.difference(pruned, output.shape)
        torch.testing.assert_close(add(pruned.clone(), output + change), wanted)


def test_a_gate_ends_the_trail() -> None:
    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.layer = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, inputs: Tensor) -> Tensor:
            hidden = self.first(inputs)
            return hidden + self.layer(hidden) * hidden.sigmoid()

    assert not with_skips(follow(Gate(), torch.randn(3, 4)))
