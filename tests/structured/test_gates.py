"""Derivatives of convolutions with frozen weights, and what they cost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_woodfisher.structured.scores import gates
from lightning_woodfisher.structured.scores.gates import FrozenConvolutions

LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "plain": (nn.Conv2d(4, 6, 3), (3, 4, 9, 9)),
    "strided": (nn.Conv2d(4, 6, 3, 2, 1, bias=False), (3, 4, 8, 9)),
    "groups": (nn.Conv2d(4, 8, 3, groups=4, dilation=2), (3, 4, 9, 9)),
    "reflecting": (nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (3, 4, 6, 6)),
    "line": (nn.Conv1d(4, 6, 3, stride=2), (3, 4, 11)),
    "volume": (nn.Conv3d(2, 3, 2), (2, 2, 4, 5, 4)),
    "same": (nn.Conv2d(4, 6, 3, padding="same"), (3, 4, 6, 6)),
    "one sample": (nn.Conv2d(4, 6, 3), (4, 9, 9)),
    "trained": (nn.Conv2d(4, 6, 3), (3, 4, 9, 9)),
}


def derivatives(layer: Callable[[Tensor], Tensor], inputs: Tensor) -> list[Tensor]:
    """The output, and two derivatives of a function of it."""
    inputs = inputs.detach().requires_grad_(True)
    output = layer(inputs)
    (first,) = torch.autograd.grad(output.sin().sum(), inputs, create_graph=True)
    second = torch.autograd.grad((first * first.detach().cos()).sum(), inputs)
    return [output.detach(), first.detach(), *second]


@pytest.mark.parametrize("name", LAYERS)
def test_derivatives_are_those_of_torch(name: str) -> None:
    torch.manual_seed(0)
    layer, shape = LAYERS[name]
    layer.double().requires_grad_(name == "trained")
    inputs = torch.randn(shape, dtype=torch.float64)
    expected = derivatives(layer, inputs)
    with FrozenConvolutions():
        found = derivatives(layer, inputs)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_nothing_is_computed_for_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(4, 4, 3, 3)
    inputs = torch.randn(2, 4, 8, 8)

    def layer(inputs: Tensor) -> Tensor:
        return nn.functional.conv2d(inputs, weight, None, 1, 1, 1, 1)

    def count(function: Any) -> int:
        with FlopCounterMode(display=False) as counter:
            function()
        return counter.get_total_flops()

    forward = count(lambda: layer(inputs))
    assert count(lambda: derivatives(layer, inputs)) == 5 * forward
    with FrozenConvolutions():
        # Forward, gradient of the inputs, and both of them once more.
        assert count(lambda: derivatives(layer, inputs)) == 4 * forward
    monkeypatch.setattr(gates, "_CONVOLUTIONS", {})
    with FrozenConvolutions():
        assert count(lambda: derivatives(layer, inputs)) == 5 * forward
