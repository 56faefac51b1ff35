"""Bytes of a layer-wise step: estimates against counted bytes, and budgets."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from allocations import AllocationMeter
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_woodfisher import (
    ConfigurationError,
    FisherConfig,
    LayerwiseConfig,
    SelectionConfig,
    StepConfig,
    estimate,
    prune,
)
from lightning_woodfisher.base.byte_sizes import parse_bytes
from lightning_woodfisher.layerwise import step as step_module
from lightning_woodfisher.layerwise.streams import NetworkRun

TOKENS = 64


def squared(model: nn.Module, batch: Any) -> Tensor:
    result: Tensor = model(batch[0]).square().mean()
    return result


def tokens(samples: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randint(0, 50, (samples, TOKENS), generator=generator))


def transformer(width: int, depth: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(50, width), *[Block(width) for _ in range(depth)])


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.expand = nn.Linear(width, 4 * width)
        self.contract = nn.Linear(4 * width, width)

    def forward(self, stream: Tensor) -> Tensor:
        return stream + self.contract(F.gelu(self.expand(self.norm(stream))))


def settings(samples: int, **options: Any) -> dict[str, Any]:
    fisher = {"num_gradients": samples, "gradient_batch_size": 1}
    return {
        "criterion": "layerwise",
        "fisher": FisherConfig(**fisher, **options),
        "step": StepConfig(measure_loss=False),
        # A backward pass needs the memory of a training step on one mini-batch.
        "layerwise": LayerwiseConfig(output_weights=False),
    }


def measure(run: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> int:
    """Count the bytes of all threads."""
    meter = AllocationMeter()

    class Metered(NetworkRun):
        def __init__(self, work: Any, *arguments: Any) -> None:
            def metered(pause: Any) -> None:
                with meter:
                    work(pause)

            super().__init__(metered, *arguments)

    monkeypatch.setattr(step_module, "NetworkRun", Metered)
    with meter:
        run()
    return meter.peak_bytes


@pytest.mark.parametrize(
    ("sides", "scope", "pattern"),
    [
        ((64, 512), "layer", "unstructured"),
        ((512, 64), "layer", "unstructured"),
        ((256, 256), "global", "unstructured"),
        ((256, 256), "layer", "2:4"),
    ],
)
def test_matrices_take_the_bytes_that_were_estimated(
    sides: tuple[int, int],
    scope: Any,
    pattern: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    o, d = sides
    model = nn.Sequential(nn.Linear(d, o), *[nn.Linear(o, d)] * (scope == "global"))
    options = settings(4)
    options["selection"] = SelectionConfig(scope=scope, pattern=pattern)
    cost = estimate(model, **options)
    data = TensorDataset(torch.randn(4, d))
    peak = measure(
        lambda: prune(model, data, squared, target_sparsity=0.5, **options), monkeypatch
    )
    assert peak == pytest.approx(cost.peak_bytes, rel=0.15)


def test_activations_take_the_bytes_that_were_estimated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = transformer(32, 3)
    options = settings(256)
    cost = estimate(model, positions=TOKENS, **options)
    # Two halves of the network hold the tokens of all samples.
    assert cost.phases["collect"].rows > 2 * 4 * 256 * TOKENS * 32
    peak = measure(
        lambda: prune(model, tokens(256), squared, target_sparsity=0.5, **options),
        monkeypatch,
    )
    assert peak == pytest.approx(cost.peak_bytes, rel=0.15)


def test_a_budget_that_is_too_small_is_refused_with_what_fits() -> None:
    model = transformer(16, 2)
    before = [p.detach().clone() for p in model.parameters()]
    need = estimate(model, positions=TOKENS, **settings(256)).peak_bytes
    data = tokens(256)

    def run(samples: int, budget: int) -> float:
        options = settings(samples, memory_budget=budget)
        return prune(model, data, squared, target_sparsity=0.5, **options).sparsity

    with pytest.raises(
        ConfigurationError, match=r"activations of all samples"
    ) as error:
        run(256, need // 2)
    for old, new in zip(before, model.parameters(), strict=True):
        assert torch.equal(old, new)
    found = re.search(
        r"needs (\S+ \S+) per rank.*num_gradients=(\d+)", str(error.value)
    )
    assert found is not None
    assert parse_bytes(found[1].replace(" ", "")) == pytest.approx(need, rel=0.05)
    assert 64 <= int(found[2]) < 256
    assert run(int(found[2]), need // 2) == 0.5


def test_more_ranks_need_less_memory_each() -> None:
    shapes = {f"layer{i}": (512, 512) for i in range(4)}
    one, two = (
        estimate(shapes, positions=1024, world_size=ranks, **settings(256))
        for ranks in (1, 2)
    )
    assert two.phases["update"].rows == one.phases["update"].rows // 2
    assert two.phases["update"].workspace < one.phases["update"].workspace
    assert two.flops["update"] == one.flops["update"] // 2
    assert two.loss_passes == one.loss_passes // 2
    # Half of the scores in 30 iterations, of the weights and of two errors of a row.
    assert two.bytes_sent["gather"] == 4 * 256 * (512 * (30 * 4 + 8) + 16)
    assert one.bytes_sent["gather"] == 0
