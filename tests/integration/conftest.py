"""Fixtures of the tests that run whole fits and real processes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from rank_pool import RankPool


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """Three processes that run jobs as ranks; spawned by the first test that asks."""
    pool = RankPool(3)
    yield pool
    pool.close()


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny networks are faster on one thread, and sums have one order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Keep W&B quiet and away from the network, and run in an empty folder."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.chdir(tmp_path)
