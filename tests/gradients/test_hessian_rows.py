"""Second derivatives of what PyTorch differentiates once only."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_woodfisher.base.errors import PruningError
from lightning_woodfisher.gradients.hessian_rows import (
    second_derivatives,
    twice_differentiable,
)


@pytest.mark.parametrize("in_place", [False, True])
def test_hardsigmoid(in_place: bool) -> None:
    layer = nn.Hardsigmoid(inplace=in_place)
    values = torch.linspace(-5.0, 5.0, 12, dtype=torch.float64, requires_grad=True)

    def differentiate() -> torch.Tensor:
        loss = layer(values * 1.0).square().sum()
        (slope,) = torch.autograd.grad(loss, values, create_graph=True)
        return torch.autograd.grad(slope.sum(), values)[0]

    with twice_differentiable():
        found, outputs = differentiate(), layer(values * 1.0)
    # The square of x/6 + 1/2 between -3 and 3, and constants elsewhere.
    expected = torch.where(values.abs() < 3.0, 2.0 / 36.0, 0.0)
    torch.testing.assert_close(found, expected.double())
    torch.testing.assert_close(outputs, layer(values * 1.0))
    with pytest.raises(RuntimeError, match="hardsigmoid_backward"):
        differentiate()


def test_only_errors_of_autograd_are_explained() -> None:
    own = PruningError("no labels")
    with pytest.raises(PruningError) as caught, second_derivatives("a", "b needs"):
        raise own
    assert caught.value is own
    explained = pytest.raises(PruningError, match="twice, which b needs: no derivative")
    with explained, second_derivatives("a", "b needs"):
        raise RuntimeError("no derivative")
