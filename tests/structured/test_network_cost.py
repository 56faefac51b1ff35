"""Parameters and multiply-accumulates against the smaller network itself."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from examples.cifar10.model import resnet20
from lightning_woodfisher import FisherConfig, prune, prune_structures
from lightning_woodfisher.data.losses import FunctionLoss
from lightning_woodfisher.distributed.communicator import Communicator
from lightning_woodfisher.structured.config import StructureConfig
from lightning_woodfisher.structured.network_cost import NetworkSize, measure_latency
from lightning_woodfisher.structured.shrink.removal import shrink
from lightning_woodfisher.structured.tracing import trace_groups
from tests.support.macs import count_macs

CLASSES = 4


class Frames(nn.Module):
    """A convolution for each of the frames, folded into the batch, then an LSTM."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.more = nn.Conv2d(8, 12, 3, stride=2, padding=1)
        self.lstm = nn.LSTM(12, 6, batch_first=True)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, video: Tensor) -> Tensor:  # [n, 3, 8, 8], each row a frame.
        frames = video.flatten(0, 1)[:, None, :, :].expand(-1, 3, -1, -1)
        hidden = F.relu(self.more(F.relu(self.conv(frames)))).mean((2, 3))
        return self.head(self.lstm(hidden.view(len(video), -1, 12))[0][:, -1])


class Tokens(nn.Module):
    """Three Linear layers of tokens that are folded into the batch, time first."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 4)
        )

    def forward(self, images: Tensor) -> Tensor:
        tokens = images.flatten(1).view(len(images), -1, 8).transpose(0, 1)
        return self.layers(tokens.reshape(-1, 8)).view(*tokens.shape[:2], -1).mean(0)


class UNet(nn.Module):
    """One level down and up, with a concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 6, 3, 1, 1), nn.BatchNorm2d(6))
        self.down = nn.Sequential(nn.Conv2d(6, 10, 3, 2, 1), nn.BatchNorm2d(10))
        self.up = nn.ConvTranspose2d(10, 6, 2, 2)
        self.last = nn.Conv2d(12, CLASSES, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        first = F.relu(self.first(images))
        up = F.relu(self.up(F.relu(self.down(first))))
        return self.last(torch.cat([first, up], 1)).mean((2, 3))


def torchvision(build: Callable[[Any], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: build(pytest.importorskip("torchvision.models"))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "frames": (Frames, 8),
    "tokens": (Tokens, 8),
    "unet": (UNet, 8),
    "resnet": (lambda: resnet20(width=4), 16),
    "mobilenet_v2": (
        torchvision(lambda m: m.mobilenet_v2(width_mult=0.25, num_classes=CLASSES)),
        32,
    ),
    "mobilenet_v3": (
        torchvision(
            lambda m: m.mobilenet_v3_small(width_mult=0.5, num_classes=CLASSES)
        ),
        32,
    ),
    "shufflenet_v2": (
        torchvision(
            lambda m: m.ShuffleNetV2(
                [1, 2, 1], [8, 16, 32, 32, 32], num_classes=CLASSES
            )
        ),
        32,
    ),
    "densenet": (
        torchvision(lambda m: m.DenseNet(4, (2, 2), 8, num_classes=CLASSES)),
        32,
    ),
    "vit": (
        torchvision(
            lambda m: m.VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=CLASSES)
        ),
        32,
    ),
    "swin": (
        torchvision(
            lambda m: m.SwinTransformer(
                [4, 4], 8, [1, 1], [2, 4], [2, 2], num_classes=CLASSES
            )
        ),
        32,
    ),
}


def data(size: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(16, 3, size, size, generator=generator)
    return TensorDataset(pixels, torch.arange(16) % CLASSES)


def loss_fn(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def count(model: nn.Module, images: Tensor) -> float:
    found = copy.deepcopy(model).eval()
    return count_macs(lambda: found(images))


@pytest.mark.parametrize("name", NETWORKS)
def test_costs_are_those_of_the_smaller_network(name: str) -> None:
    make, size = NETWORKS[name]
    torch.manual_seed(0)
    model, samples = make(), data(size)
    image = samples.tensors[0][:1]
    groups = trace_groups(model, image).groups
    cost = NetworkSize(FunctionLoss(model, samples, loss_fn), groups, Communicator())
    assert cost.dense_macs == count(model, image) > 0
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        removed = {
            group.name: torch.randperm(group.size, generator=generator)[
                : 1 + (group.size - 2) * seed
            ]
            for group in groups
        }
        smaller = copy.deepcopy(model)
        shrink(smaller, groups, removed)
        assert cost.macs(removed) == count(smaller, image)
        assert cost.parameters(removed) == sum(p.numel() for p in smaller.parameters())


def test_both_ways_to_prune_count_alike() -> None:
    torch.manual_seed(0)
    model, samples = Frames(), data(8)
    channels, _ = prune_structures(
        copy.deepcopy(model),
        samples,
        loss_fn,
        target=0.5,
        config=StructureConfig(method="magnitude", num_samples=4),
        example_inputs=samples.tensors[0][:1],
    )
    assert channels.macs <= 0.5 * channels.macs_dense
    weights = prune(
        model,
        samples,
        loss_fn,
        flops_target=0.5,
        criterion="magnitude",
        fisher=FisherConfig(num_gradients=4, gradient_batch_size=1),
    )
    assert weights.flops_dense == 2 * channels.macs_dense


def test_a_stream_of_batches_is_counted_by_sample() -> None:
    model, samples = UNet(), data(8)
    image = samples.tensors[0][:1]
    groups = trace_groups(model, image).groups
    batches = [tuple(t[:6] for t in samples.tensors)]
    cost = NetworkSize(FunctionLoss(model, batches, loss_fn), groups, Communicator())
    assert cost.dense_macs == count(model, image)


def test_latencies_are_medians_after_three_passes_to_warm_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [0.0]

    class Slow(nn.Linear):
        """Each pass takes the next of these seconds, on a clock of its own."""

        def __init__(self, *seconds: float) -> None:
            super().__init__(3, 2)
            self.seconds = iter(seconds)

        def forward(self, inputs: Tensor) -> Tensor:
            now[0] += next(self.seconds)
            return super().forward(inputs)

    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    dense = Slow(90, 80, 70, 4, 16, 2, 8, 32)
    shrunk = Slow(9, 8, 7, 0.25, 0.5, 4, 1, 2)
    assert measure_latency(dense, shrunk, torch.ones(1, 3), 5) == (8.0, 1.0)
    assert next(dense.seconds, None) is next(shrunk.seconds, None) is None
