"""Bottlenecks found, widened, and pruned back to the size of before."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hand_groups import cross_entropy, images
from torch import Tensor, nn

from lightning_woodfisher import ConfigurationError, StructureConfig, prune_structures
from lightning_woodfisher.structured.expand import find_bottlenecks, target_for_size
from lightning_woodfisher.structured.report import GroupReport, StructureReport


def report_of(*groups: tuple[int, int, tuple[str, ...]]) -> StructureReport:
    """Of groups with (size, removed, layers)."""
    made = tuple(
        GroupReport(layers[0], layers, size, 0, tuple(range(gone)))
        for size, gone, layers in groups
    )
    return StructureReport("sosp_h", "conv", "macs", 0.5, made, 9, 5, 9, 5, None, None)


def test_bottlenecks_are_low_and_far_below_the_rest() -> None:
    groups = [
        (10, 1, ("a", "a.tied")),
        (10, 6, ("b",)),
        (20, 14, ("c",)),
        (10, 5, ("d",)),
    ]
    # 26 of 50 are gone, so less than 0.26; of four groups one is the lowest quarter.
    assert find_bottlenecks(report_of(*groups)) == {"a": 2.0, "a.tied": 2.0}
    assert find_bottlenecks(report_of(*groups), factor=1.5, quantile=0.5) == {
        "a": 1.5,
        "a.tied": 1.5,
    }
    assert find_bottlenecks(report_of(*groups), quantile=0.5, share=1.0) == {
        "a": 2.0,
        "a.tied": 2.0,
        "d": 2.0,
    }
    # The lowest, but not far below: 3 of 10 against 28 of 50.
    assert find_bottlenecks(report_of((10, 3, ("a",)), *groups[1:])) == {}
    # Far below, but not in the lowest quarter: both, because they are equal.
    alike = (10, 1, ("e",))
    assert {*find_bottlenecks(report_of(*groups, alike))} == {"a", "a.tied", "e"}
    for options in ({"quantile": 0.0}, {"share": 1.5}, {"factor": 1.0}):
        with pytest.raises(ConfigurationError, match=next(iter(options))):
            find_bottlenecks(report_of(*groups), **options)


def test_targets_never_leave_one_too_many() -> None:
    for wide in (7, 1000, 272_474, 10**9 + 7):
        for left in {1, wide // 3, wide - 1, wide}:
            target = target_for_size(left, wide)
            assert (1.0 - target) * wide <= left
            assert (1.0 - target) * wide > left - 0.01
    with pytest.raises(ConfigurationError, match="cannot be pruned to 9"):
        target_for_size(9, 8)


class Block(nn.Module):
    def __init__(self, outer: int, inner: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(outer, inner, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, outer, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outer)

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))).relu()


def build(widths: dict[str, float]) -> nn.Module:
    """Three blocks; the inner widths are free, the outer one belongs to the stem."""
    torch.manual_seed(0)
    outer = round(8 * widths.get("stem", 1.0))
    blocks = [
        Block(outer, round(6 * widths.get(f"blocks.{i}.conv1", 1.0))) for i in range(3)
    ]
    model = nn.Module()
    model.stem, model.bn = nn.Conv2d(2, outer, 3, bias=False), nn.BatchNorm2d(outer)
    model.blocks, model.fc = nn.Sequential(*blocks), nn.Linear(outer, 3)

    def forward(x: Tensor) -> Tensor:
        x = model.blocks(model.bn(model.stem(x)).relu())
        return model.fc(x.mean((2, 3)))

    model.forward = forward
    return model.eval()


def test_an_expanded_network_ends_at_the_old_size() -> None:
    pytest.importorskip("torch_pruning")
    config = StructureConfig(
        method="sosp_h", num_samples=16, batch_size=8, measure="parameters"
    )
    data = images(24, torch.float32)

    def prune(model: nn.Module, target: float) -> Any:
        report, _ = prune_structures(
            model,
            data,
            cross_entropy,
            target=target,
            config=config,
            example_inputs=data[:1][0],
        )
        return report

    model = build({})
    first = prune(model, 0.45)
    widths = find_bottlenecks(first)
    # The layers that are added to each other, all of them and no other.
    tied = ["stem", *(f"blocks.{place}.conv2" for place in range(3))]
    assert widths == dict.fromkeys(tied, 2.0)
    wide = build(widths)
    inner = [block.conv1.out_channels for block in wide.blocks]
    assert inner == [6, 6, 6]
    assert wide.stem.out_channels == 16
    dense = sum(p.numel() for p in wide.parameters())
    last = prune(wide, target_for_size(first.parameters, dense))
    assert last.parameters_dense == dense > first.parameters_dense
    assert last.parameters <= first.parameters
