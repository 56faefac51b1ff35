"""Small networks with every way in which channels are tied to each other."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_woodfisher.structured.graph.groups import Group, Member


def conv_norm(inputs: int, outputs: int, kernel: int = 3, **options: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False, **options),
        nn.BatchNorm2d(outputs),
    )


class Basic(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = conv_norm(inputs, outputs, stride=stride)
        self.second = conv_norm(outputs, outputs)
        self.shortcut: nn.Module = nn.Identity()
        if inputs != outputs:
            self.shortcut = conv_norm(inputs, outputs, 1, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.second(F.relu(self.first(x))) + self.shortcut(x))


class PreAct(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.norm1(x))
        shortcut = x if self.shortcut is None else self.shortcut(hidden)
        return self.conv2(F.relu(self.norm2(self.conv1(hidden)))) + shortcut


class Inverted(nn.Module):
    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.expand = conv_norm(channels, hidden, 1)
        self.depthwise = conv_norm(hidden, hidden, groups=hidden)
        self.project = conv_norm(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.project(F.relu6(self.depthwise(F.relu6(self.expand(x)))))


class DenseLayer(nn.Module):
    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(inputs)
        self.conv = nn.Conv2d(inputs, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.conv(F.relu(self.norm(x)))], 1)


class Twice(nn.Module):
    """One module that is used twice, its outputs tied to its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.again = nn.Conv2d(6, 6, 3, padding=1)
        self.head = nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.again(F.relu(self.stem(x))))
        return self.head(F.relu(self.again(x))).mean((2, 3))


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(3, 6, 3)
        self.other = nn.Conv2d(3, 6, 3)
        self.other.weight = self.one.weight
        self.head1, self.head2 = nn.Conv2d(6, 4, 1), nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.head1(F.relu(self.one(x))) + self.head2(F.relu(self.other(-x)))
        return maps.mean((2, 3))


class SumOfConcatenation(nn.Module):
    """Six channels beside four, added to ten of another layer; read twice over."""

    def __init__(self) -> None:
        super().__init__()
        self.six = conv_norm(3, 6)
        self.four = conv_norm(3, 4)
        self.ten = conv_norm(3, 10)
        self.head = nn.Conv2d(20, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        both = torch.cat([self.six(x), self.four(x)], 1) + self.ten(x)
        return self.head(torch.cat([both, both.relu()], 1)).mean((2, 3))


class Gated(nn.Module):
    """Squeeze and excitation: the gate is 1/2 for a zero channel, times zero."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_norm(3, 8)
        self.squeeze, self.excite = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.head = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        gate = self.excite(F.relu(self.squeeze(x.mean((2, 3), keepdim=True))))
        return self.head(x * torch.sigmoid(gate)).mean((2, 3))


class TokenMLP(nn.Module):
    """The MLP of a transformer block."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(64, 8)
        self.norm = nn.LayerNorm(8)
        self.fc1, self.fc2 = nn.Linear(8, 12), nn.Linear(12, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, images: Tensor) -> Tensor:
        x = self.embed(images.flatten(2))
        x = x + self.fc2(F.gelu(self.fc1(self.norm(x))))
        return self.head(x.mean(1))


def pooled(channels: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 4)]


def vgg(norm: bool) -> nn.Module:
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 6), (6, 8)):
        layers.append(nn.Conv2d(inputs, outputs, 3, padding=1))
        layers += [nn.BatchNorm2d(outputs)] if norm else []
        layers += [nn.ReLU(), nn.MaxPool2d(2)]
    tail = [
        nn.Flatten(),
        nn.Linear(8 * 4, 10),
        nn.ReLU(),
        nn.Dropout(),
        nn.Linear(10, 4),
    ]
    return nn.Sequential(*layers, *tail)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet": lambda: nn.Sequential(
        conv_norm(3, 6), nn.ReLU(), Basic(6, 6, 1), Basic(6, 8, 2), Basic(8, 8, 1), *pooled(8)
    ),
    "preact": lambda: nn.Sequential(
        nn.Conv2d(3, 6, 3), PreAct(6, 8), PreAct(8, 8), nn.BatchNorm2d(8), nn.ReLU(),
        *pooled(8),
    ),
    "vgg": lambda: vgg(norm=False),
    "vgg_bn": lambda: vgg(norm=True),
    "mobilenet": lambda: nn.Sequential(
        conv_norm(3, 6), nn.ReLU6(), Inverted(6, 12), Inverted(6, 12), *pooled(6)
    ),
    "densenet": lambda: nn.Sequential(
        nn.Conv2d(3, 6, 3), DenseLayer(6, 4), DenseLayer(10, 4), DenseLayer(14, 4),
        nn.BatchNorm2d(18), nn.Conv2d(18, 8, 1), nn.ReLU(), *pooled(8),
    ),
    "token_mlp": TokenMLP,
    "twice": Twice,
    "tied": Tied,
    "sum_of_concatenation": SumOfConcatenation,
    "gated": Gated,
    "grouped": lambda: nn.Sequential(
        conv_norm(3, 12), nn.ReLU(), conv_norm(12, 6, groups=3), nn.ReLU(), *pooled(6)
    ),
    "depth_multiplier": lambda: nn.Sequential(
        conv_norm(3, 4), nn.ReLU(), conv_norm(4, 12, groups=4), nn.ReLU(), *pooled(12)
    ),
    "transposed": lambda: nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.ReLU(), nn.ConvTranspose2d(6, 8, 2, stride=2), nn.ReLU(),
        *pooled(8),
    ),
    "prelu_instance_norm": lambda: nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.InstanceNorm2d(6, affine=True), nn.PReLU(6),
        nn.Conv2d(6, 8, 3), nn.PReLU(), *pooled(8),
    ),
}  # fmt: skip


def build(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """Build a network whose norms have statistics, weights and biases of their own."""
    torch.manual_seed(0)
    model = NETWORKS[name]().to(dtype)
    scramble(model)
    return model.eval()


@torch.no_grad()
def scramble(model: nn.Module) -> None:
    for name, tensor in model.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 1.5)
        elif tensor.dim() == 1 and tensor.is_floating_point():
            tensor.add_(torch.rand_like(tensor) - 0.5)


def images(dtype: torch.dtype = torch.float64, size: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(4, 3, size, size, generator=generator, dtype=torch.float64).to(
        dtype
    )


def chain() -> nn.Sequential:
    """Return two convolutions, the first with a norm, and a Linear layer."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 5, 3),
        nn.BatchNorm2d(5),
        nn.ReLU(),
        nn.Conv2d(5, 4, 3),
        nn.Flatten(),
        nn.Linear(64, 2),
    ).double()
    scramble(model)
    return model.eval()


def chain_groups() -> tuple[Group, Group]:
    """Return the groups of its convolutions, made by hand."""
    five, four = torch.arange(5), torch.arange(4)
    first = Group(
        "0",
        5,
        (
            Member("0", "weight", 0, "producer", five),
            Member("0", "bias", 0, "bias", five),
            Member("1", "weight", 0, "norm", five),
            Member("1", "bias", 0, "norm", five),
            Member("1", "running_mean", 0, "statistics", five),
            Member("1", "running_var", 0, "statistics", five),
            Member("3", "weight", 1, "consumer", five),
        ),
    )
    second = Group(
        "3",
        4,
        (
            Member("3", "weight", 0, "producer", four),
            Member("3", "bias", 0, "bias", four),
            Member("5", "weight", 1, "consumer", four.repeat_interleave(16)),
        ),
    )
    return first, second
