"""Matrices and patches of linear maps against the functions of torch."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from conv1d import Conv1D
from torch import Tensor, nn

from lightning_woodfisher.layerwise.interception import Interception
from lightning_woodfisher.layerwise.maps import LinearCall, WeightTable


def intercept(
    model: nn.Module, parameters: dict[str, nn.Parameter], *inputs: Any
) -> tuple[Any, list[tuple[LinearCall, Tensor]]]:
    calls: list[tuple[LinearCall, Tensor]] = []

    def visit(call: LinearCall) -> Tensor:
        weight = call.map.rows_of(parameters[call.map.name].detach())
        output = call.run(weight, call.bias)
        calls.append((call, output))
        return output

    with torch.no_grad(), Interception(WeightTable(parameters), visit):
        result = model(*inputs)
    return result, calls


def require_exact(layer: nn.Module, inputs: Tensor) -> None:
    layer = layer.double()
    result, calls = intercept(layer, {"weight": layer.weight}, inputs.double())
    ((call, output),) = calls
    torch.testing.assert_close(result, layer(inputs.double()).detach())
    linear = call.map
    matrix = linear.to_matrix(layer.weight.detach())
    assert matrix.shape == linear.sides
    assert torch.equal(linear.from_matrix(matrix), layer.weight)
    for x, y in linear.pieces(call.inputs, output):
        bias = 0.0 if call.bias is None else call.bias.view(linear.groups, 1, -1)
        torch.testing.assert_close(x @ matrix.mT + bias, y)


CONV = list(itertools.product((1, 2), (1, 2), (0, 2), (1, 2)))


@pytest.mark.parametrize(("groups", "stride", "padding", "dilation"), CONV)
def test_convolutions(groups: int, stride: int, padding: int, dilation: int) -> None:
    options: dict[str, Any] = {"groups": groups, "dilation": dilation}
    image = torch.randn(3, 4, 9, 8)
    require_exact(nn.Conv2d(4, 6, (3, 2), stride, padding, **options), image)
    require_exact(nn.Conv1d(4, 6, 3, stride, padding, **options), image[..., 0])
    require_exact(
        nn.ConvTranspose2d(4, 6, (3, 2), stride, padding, stride - 1, **options), image
    )
    require_exact(
        nn.ConvTranspose1d(4, 6, 3, stride, padding, **options), image[..., 0]
    )


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv2d(4, 4, 3, padding="same", dilation=2, groups=4), (2, 4, 7, 7)),
        (nn.Conv2d(4, 6, 3, padding="valid", padding_mode="zeros"), (2, 4, 7, 7)),
        (nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), (2, 4, 7, 7)),
        (nn.Conv2d(4, 6, 3, bias=False), (4, 7, 7)),
        (nn.Conv3d(4, 6, (3, 2, 1), 2, 1), (2, 4, 5, 5, 5)),
        (nn.Linear(5, 3), (2, 7, 5)),
        (nn.Linear(5, 3, bias=False), (5,)),
        (Conv1D(3, 5), (2, 7, 5)),
    ],
)
def test_other_layers(layer: nn.Module, shape: tuple[int, ...]) -> None:
    require_exact(layer, torch.randn(shape))


class Product(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 5))

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs @ self.weight.t()


def test_product_with_a_weight() -> None:
    require_exact(Product(), torch.randn(4, 5))


@pytest.mark.parametrize("same", [True, False])
def test_packed_attention(same: bool) -> None:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    query = torch.randn(2, 5, 8)
    memory = query if same else torch.randn(2, 3, 8)
    parameters = {
        "in": attention.in_proj_weight,
        "out": attention.out_proj.weight,
    }
    result, calls = intercept(attention, parameters, query, memory, memory)
    expected = attention(query, memory, memory, need_weights=True)
    torch.testing.assert_close(result, expected)
    found = [(c.map.name, c.map.first, c.map.shape) for c, _ in calls]
    packed = [("in", 0, (24, 8))]
    if not same:
        packed = [("in", 0, (8, 8)), ("in", 8, (16, 8))]
    assert found == [*packed, ("out", 0, (8, 8))]
    for call, output in calls:
        matrix = call.map.to_matrix(call.map.rows_of(parameters[call.map.name]))
        ((x, y),) = call.map.pieces(call.inputs, output)
        torch.testing.assert_close(x @ matrix.mT + call.bias, y)
