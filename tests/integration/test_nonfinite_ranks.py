"""Gradients that are left out: the same ones, with the same result, on 1, 2 and 3 ranks."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rank_pool import RankPool
from step_options import in_step
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_woodfisher import FisherConfig, PruningError, prune

SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "primal": ({"block_size": 8}, {}),
    "dual": ({"block_size": 40, "engine": "dual"}, {}),
    "full": ({"block_size": None}, {}),
    "one by one, centred": ({"collection": "loop", "centered": True}, {}),
    "diagonal": ({}, {"criterion": "diagonal_fisher"}),
    "woodtaylor, parts": ({}, {"criterion": "woodtaylor", "recompute_steps": 2}),
}
BAD = {0: math.nan, 7: math.inf, 8: math.nan, 36: -math.inf}


def make(bad: dict[int, float]) -> tuple[nn.Module, TensorDataset]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 3))
    inputs = torch.randn(37, 6)
    labels = inputs[:, :3].argmax(dim=1)
    for index, value in bad.items():
        inputs[index, 1] = value
    return model, TensorDataset(inputs, labels)


def cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def prune_all() -> dict[str, Any]:
    """Job: every setting; weights and report."""
    found = {}
    for name, (fisher, options) in SETTINGS.items():
        model, data = make(BAD)
        report = prune(
            model,
            data,
            cross_entropy,
            target_sparsity=0.6,
            fisher=FisherConfig(37, 1, **{"max_nonfinite": 4, **fisher}),
            **in_step(**options),
        )
        plain = report.to_dict()
        for varies in ("seconds", "bytes_exchanged", "fisher_bytes", "world_size"):
            del plain[varies]
        found[name] = {k: v.clone() for k, v in model.state_dict().items()}, plain
    return found


def one_too_many() -> tuple[str, bool]:
    """Job: what is raised, and whether the weights are as before."""
    model, data = make(BAD)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    fisher = FisherConfig(37, 1, max_nonfinite=3)
    with pytest.raises(PruningError) as caught:
        prune(model, data, cross_entropy, target_sparsity=0.6, fisher=fisher)
    same = all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    return str(caught.value), same


def test_the_ranks_leave_out_the_same(ranks: RankPool) -> None:
    results = {size: ranks.run(size, prune_all) for size in (1, 2, 3)}
    expected = results[1][0]
    for size, name in itertools.product((2, 3), SETTINGS):
        for result in results[size]:
            state, report = result[name]
            assert report == expected[name][1]
            for key, value in state.items():
                assert torch.equal(value, expected[name][0][key]), (name, key)
    for name, (_, options) in SETTINGS.items():
        report = expected[name][1]
        assert report["nonfinite_gradients"] == 4 * options.get("recompute_steps", 1)
        assert sum(layer["zeros_after"] for layer in report["layers"]) == 38


def test_one_too_many_fails_on_every_rank_and_names_the_sample(
    ranks: RankPool,
) -> None:
    (alone, _), *_ = ranks.run(1, one_too_many)
    for message, same in ranks.run(3, one_too_many):
        assert message.endswith(alone)
        assert "one more than fisher.max_nonfinite=3" in message
        assert same
