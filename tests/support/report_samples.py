"""Sample reports of steps that prune single weights, and a parser of pages."""

from __future__ import annotations

import dataclasses
import html.parser
from typing import Any

import torch

from lightning_woodfisher.pruning.report import (
    LayerReport,
    LocalModelPoint,
    PruningReport,
)

KEY = "WoodFisherPruningCallback{'include': [], 'exclude': []}"
EVIL = "net.<script>alert('$1 & $2')</script>.weight"
_QUANTILES = (0.0, 1e-9, 1e-7, 1e-6, 1e-4)


def step(epoch: int, **changes: Any) -> PruningReport:
    """Make the report of a step that prunes 100 weights of one layer and 10 of another."""
    layers = (
        LayerReport(
            EVIL, (8, 4, 3, 3), 288, 50, 100 + 10 * epoch, 1e-6, 2e-3, _QUANTILES
        ),
        LayerReport("fc.weight", (10, 30), 300, 0, 10 + epoch, None, None),
    )
    report = PruningReport(
        criterion="woodfisher",
        layers=layers,
        target_sparsity=0.2,
        threshold=1e-6,
        damping=1e-4,
        raised_damping={"fc.weight from weight 0": 1e-2},
        predicted_increase=2e-3,
        measured_increase=(-1) ** epoch * 3e-5,
        loss_before=0.2,
        loss_after=0.25,
        stages=1,
        num_gradients=16,
        seconds={"collect": 1.0, "factorize": 0.5},
        bytes_exchanged=0,
        fisher_bytes=(10,),
        world_size=1,
        epoch=epoch,
        step=12 * epoch,
        local_model=(
            (LocalModelPoint(0.5, 1e-3, 2e-3), LocalModelPoint(1, 4e-3, 5e-3)),
        ),
    )
    return dataclasses.replace(report, **changes)


REPORTS = [step(3), step(4), step(7)]
MASKS = {EVIL: torch.arange(288).view(8, 4, 3, 3) % 3 > 0}


class Reader(html.parser.HTMLParser):
    """Parser that keeps tags, texts and everything that an attribute may load."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name in {"href", "xlink:href", "src", "srcset", "data", "action"}:
                self.links.append(value or "")

    def handle_data(self, data: str) -> None:
        self.texts.append(data)
