"""A pruning step on given shapes, with random gradients in place of a network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from step_options import in_step
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_woodfisher import FisherConfig
from lightning_woodfisher.data.losses import FunctionLoss
from lightning_woodfisher.distributed.communicator import Communicator
from lightning_woodfisher.pruning.config import PruningConfig
from lightning_woodfisher.pruning.pruner import Pruner
from lightning_woodfisher.weights.masks import Masks


class _RandomGradients(torch.autograd.Function):
    """A loss whose gradient is random noise; it stores nothing."""

    @staticmethod
    def forward(ctx: Any, *parameters: Tensor) -> Tensor:
        ctx.like = [(p.shape, p.dtype, p.device) for p in parameters]
        return parameters[0].new_ones(())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        # Small compared with λ, so that the precision "auto" stays float32.
        return tuple(
            torch.randn(s, dtype=t, device=d).mul_(1e-3) for s, t, d in ctx.like
        )


class Weights(nn.Module):
    """Parameters of given shapes."""

    def __init__(self, shapes: Mapping[str, Sequence[int]], device: str) -> None:
        super().__init__()
        for name, shape in shapes.items():
            weight = nn.Parameter(torch.randn(*shape, device=device))
            self.register_parameter(name.replace(".", "_"), weight)

    def loss(self) -> Tensor:
        return _RandomGradients.apply(*self.parameters())


def make_step(
    shapes: Mapping[str, Sequence[int]],
    fisher: FisherConfig,
    target: float = 0.5,
    sparsity: float = 0.0,
    device: str = "cpu",
    **options: Any,
) -> tuple[Any, Pruner]:
    """Return a function that runs one pruning step, and its pruner."""
    torch.manual_seed(0)
    model = Weights(shapes, device)
    for parameter in model.parameters():
        flat = parameter.data.view(-1)
        flat[: flat.numel() - round(flat.numel() * (1 - sparsity))] = 0.0
    masks = Masks(dict(model.named_parameters()))
    masks.prune_zeros()
    options = {"measure_loss": False, **options}
    config = PruningConfig(fisher=fisher, **in_step(**options))
    pruner = Pruner(masks, config, Communicator(device))
    data: Any = [torch.zeros(())] * fisher.num_gradients
    if fisher.first_order_samples:
        # The first-order sample needs a dataset.
        used = fisher.num_gradients * fisher.gradient_batch_size
        data = TensorDataset(torch.zeros(max(used, fisher.first_order_samples)))
    source = FunctionLoss(model, data, lambda m, batch: m.loss())
    return lambda: pruner.step(source, target), pruner
