"""Small networks with their groups of coupled channels, made by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_woodfisher.data.losses import FunctionLoss
from lightning_woodfisher.distributed.communicator import Communicator
from lightning_woodfisher.structured.graph.groups import Group, Member, Role
from lightning_woodfisher.structured.network_cost import NetworkSize
from lightning_woodfisher.structured.scores.sosp import PairScores


class Residual(nn.Module):
    """Stem, one block whose output is added to that of the stem, and a classifier."""

    def __init__(self, outer: int = 4, inner: int = 5, in_place: bool = False) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, outer, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(outer)
        self.conv1 = nn.Conv2d(outer, inner, 3, stride=2, padding=1)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, outer, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outer)
        self.pool = nn.AvgPool2d(2)
        self.fc = nn.Linear(outer, 3)
        # In place, as in most networks, it overwrites the outputs of the layers. Of zero it
        # is zero, and it is not homogeneous, which would hide a mistake.
        self.act = nn.SiLU(inplace=in_place)

    def forward(self, images: Tensor) -> Tensor:
        stem = self.act(self.bn(self.stem(images)))
        hidden = self.bn2(self.conv2(self.act(self.bn1(self.conv1(stem)))))
        return self.fc(self.act(hidden + self.pool(stem)).mean((2, 3)))


class Plain(nn.Module):
    """Convolutions without norms, a flatten, and a hidden Linear layer."""

    def __init__(self, first: int = 3, second: int = 4, hidden: int = 6) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, first, 3)
        self.conv2 = nn.Conv2d(first, second, 3, stride=2)
        self.hidden = nn.Linear(4 * second, hidden)
        self.fc = nn.Linear(hidden, 3)

    def forward(self, images: Tensor) -> Tensor:
        features = torch.tanh(self.conv2(torch.tanh(self.conv1(images))))
        return self.fc(torch.tanh(self.hidden(features.flatten(1))))


def member(module: str, tensor: str, axis: int, role: Role, size: int) -> Member:
    return Member(module, tensor, axis, role, torch.arange(size))


def layer(module: str, size: int, bias: bool) -> list[Member]:
    found = [member(module, "weight", 0, "producer", size)]
    return found + [member(module, "bias", 0, "bias", size)] * bias


def norm(module: str, size: int) -> list[Member]:
    found = [member(module, name, 0, "norm", size) for name in ("weight", "bias")]
    names = ("running_mean", "running_var")
    return found + [member(module, name, 0, "statistics", size) for name in names]


def residual_groups(outer: int = 4, inner: int = 5) -> list[Group]:
    first = [*layer("stem", outer, False), *norm("bn", outer)]
    first += [*layer("conv2", outer, False), *norm("bn2", outer)]
    first += [
        member("conv1", "weight", 1, "consumer", outer),
        member("fc", "weight", 1, "consumer", outer),
    ]
    second = [*layer("conv1", inner, True), *norm("bn1", inner)]
    second += [member("conv2", "weight", 1, "consumer", inner)]
    return [Group("stem", outer, tuple(first)), Group("conv1", inner, tuple(second))]


def plain_groups(first: int = 3, second: int = 4, hidden: int = 6) -> list[Group]:
    flat = torch.arange(second).repeat_interleave(4)
    after = Member("hidden", "weight", 1, "consumer", flat)
    return [
        Group(
            "conv1",
            first,
            (
                *layer("conv1", first, True),
                member("conv2", "weight", 1, "consumer", first),
            ),
        ),
        Group("conv2", second, (*layer("conv2", second, True), after)),
        Group(
            "hidden",
            hidden,
            (
                *layer("hidden", hidden, True),
                member("fc", "weight", 1, "consumer", hidden),
            ),
        ),
    ]


def trained(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give a network float64 weights and statistics that are not those of the start."""
    generator = torch.Generator().manual_seed(seed)
    model.double()
    with torch.no_grad():
        for tensor in model.parameters():
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            tensor.copy_((tensor.dim() == 1) * 0.5 + 0.4 * noise)
        for name, buffer in model.named_buffers():
            if "running" in name:
                buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.3)
    return model.train()


def images(count: int = 24, dtype: torch.dtype = torch.float64) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(count, 2, 8, 8, generator=generator, dtype=dtype)
    return TensorDataset(pixels, torch.randint(0, 3, (count,), generator=generator))


def cross_entropy(model: Any, batch: Sequence[Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def make_residual(in_place: bool = False) -> nn.Module:
    torch.manual_seed(0)
    return trained(Residual(in_place=in_place))


def make_plain() -> nn.Module:
    torch.manual_seed(0)
    return trained(Plain())


def network_size(
    model: nn.Module,
    groups: Sequence[Group],
    forward: Callable[[], Tensor],
    samples: int = 1,
) -> NetworkSize:
    """Measure a network by one forward pass of some samples."""
    batch = torch.zeros(samples)
    source = FunctionLoss(model, [batch], lambda _, batch: forward().sum())
    return NetworkSize(source, groups, Communicator())


def dense_matrix(pairs: PairScores) -> Tensor:
    """The matrix A of SOSP-I."""
    matrix = 0.5 * (pairs.rows.T @ pairs.rows / pairs.samples).abs()
    return matrix + torch.diag(pairs.first_order)


def objective(pairs: PairScores, chosen: Sequence[int] | Tensor) -> float:
    """Cost of a set of structures, πᵀAπ."""
    members = torch.as_tensor(chosen)
    return float(dense_matrix(pairs)[members][:, members].sum())
