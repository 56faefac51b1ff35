"""Large networks: peak memory against the estimate, and work in proportion to layers."""

from __future__ import annotations

import cProfile
import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_woodfisher import FisherConfig, estimate, prune

# A process of its own, whose peak nothing else has raised.
_PROGRAM = """
import ctypes, gc, json, sys, time
import torch
from torch import nn
from torch.utils.data import TensorDataset
from lightning_woodfisher import FisherConfig, estimate, prune


class Language(nn.Module):
    def __init__(self, tokens, width, layers, heads):
        super().__init__()
        self.tokens = nn.Embedding(tokens, width)
        layer = nn.TransformerEncoderLayer(
            width, heads, 4 * width, 0.0, batch_first=True, norm_first=True
        )
        self.body = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, tokens)

    def forward(self, inputs):
        mask = nn.Transformer.generate_square_subsequent_mask(inputs.shape[1])
        return self.head(self.body(self.tokens(inputs), mask=mask, is_causal=True))


def vision():
    from torchvision.models import vit_b_16

    model = vit_b_16(image_size=32, num_classes=10)
    nn.init.normal_(model.heads.head.weight, 0, 0.02)
    return model


def resident(field):
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith(field))
    return 1024 * int(line.split()[1])


def loss(model, batch):
    return nn.functional.cross_entropy(model(batch[0]).flatten(0, -2), batch[1].flatten())


name, fisher = json.loads(sys.argv[1])
torch.manual_seed(0)
torch.set_num_threads(1)
fisher = FisherConfig(**fisher)
samples = fisher.num_gradients * fisher.gradient_batch_size
if name == "vision":
    model, inputs, labels = vision(), torch.randn(samples, 3, 32, 32), (samples,)
else:
    tokens, *sizes = {"10M": (128, 384, 6, 6), "125M": (2048, 768, 17, 12)}[name]
    model = Language(tokens, *sizes)
    inputs, labels = torch.randint(tokens, (samples, 16)), (samples, 16)
data = TensorDataset(inputs, torch.randint(10, labels))
for _ in range(2):
    loss(model, data[: fisher.gradient_batch_size]).backward()
model.zero_grad(set_to_none=True)
cost = estimate(model, fisher=fisher)
gc.collect()
ctypes.CDLL(None).malloc_trim(0)
before = resident("VmRSS")
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")
begun = time.perf_counter()
report = prune(model, data, loss, target_sparsity=0.5, fisher=fisher)
print(json.dumps({
    "weights": cost.weights,
    "estimate": cost.peak_bytes,
    "peak": resident("VmHWM") - before,
    "seconds": time.perf_counter() - begun,
    "sparsity": report.sparsity,
}))
"""


@pytest.mark.soak
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("network", "fisher"),
    [
        ("10M", {"num_gradients": 128, "gradient_batch_size": 4, "block_size": 128}),
        ("vision", {"num_gradients": 16, "gradient_batch_size": 4, "block_size": 256}),
        ("125M", {"num_gradients": 4, "gradient_batch_size": 4, "block_size": 50}),
        ("125M", {"num_gradients": 8, "gradient_batch_size": 2, "block_size": 4}),
    ],
)
@pytest.mark.timeout(1800)
def test_a_large_network_takes_the_memory_that_was_estimated(
    network: str, fisher: dict[str, Any]
) -> None:
    arguments = [sys.executable, "-W", "ignore", "-c", _PROGRAM]
    done = subprocess.run(
        [*arguments, json.dumps([network, fisher])], stdout=subprocess.PIPE, check=True
    )
    found = json.loads(done.stdout)
    print(network, fisher, found)
    assert found["sparsity"] == pytest.approx(0.5, abs=1e-6)
    assert found["peak"] <= 1.15 * found["estimate"]


class _Deep(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(depth))

    def forward(self, inputs: Tensor) -> Tensor:
        for layer in self.layers:
            inputs = inputs + torch.tanh(layer(inputs))
        return inputs


def test_work_grows_in_proportion_to_the_number_of_layers() -> None:
    fisher = FisherConfig(num_gradients=8, gradient_batch_size=4)
    data = TensorDataset(torch.randn(32, 8), torch.randint(8, (32,)))

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    def count(model: nn.Module) -> list[int]:
        """Count calls, which do not depend on the machine as seconds do."""
        return [
            _count_calls(lambda: estimate(model, fisher=fisher)),
            _count_calls(
                lambda: prune(model, data, loss, target_sparsity=0.5, fisher=fisher)
            ),
        ]

    count(_Deep(2))
    few, many = count(_Deep(60)), count(_Deep(120))
    assert all(b / a < 2.05 for a, b in zip(few, many, strict=True))


def _count_calls(action: Callable[[], object]) -> int:
    profile = cProfile.Profile()
    profile.runcall(action)
    return sum(entry.callcount for entry in profile.getstats())
