"""What does not fit is refused before the first batch, on every rank."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from devices import DEVICE
from fits import Classifier, Counting, loader, pruning, trainer
from rank_pool import RankPool
from torch.utils.data import TensorDataset

from lightning_woodfisher import ConfigurationError, FisherConfig, StepConfig, prune
from lightning_woodfisher.callbacks import woodfisher as callback_module
from lightning_woodfisher.resources.estimate import estimate


def fisher(**options: Any) -> FisherConfig:
    base = {"num_gradients": 6, "gradient_batch_size": 2, "block_size": 16}
    return FisherConfig(**{**base, **options})


@pytest.mark.skipif(DEVICE.type != "cpu", reason="a GPU offloads the rows and fits")
def test_the_budget_is_checked_before_the_first_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: list[str] = []
    monkeypatch.setattr(callback_module, "announce", lambda _, text: told.append(text))
    need = estimate(Classifier().net, fisher=fisher()).peak_bytes
    roomy = pruning(fisher=fisher(memory_budget=need))
    trainer(roomy).fit(Classifier(), loader())
    assert any("A step needs up to" in text for text in told)
    model = Counting()
    with pytest.raises(ConfigurationError) as caught:
        trainer(pruning(fisher=fisher(memory_budget=need - 1))).fit(model, loader())
    assert model.steps == 0
    assert f"memory_budget={need - 1} is too small" in str(caught.value)
    assert "num_gradients=5" in str(caught.value)


def test_weights_on_the_meta_device_are_refused() -> None:
    model = Counting()
    callback = pruning()
    model.net[5].to("meta")
    with pytest.raises(ConfigurationError, match=r"net\.5\.weight is on the meta"):
        callback.on_fit_start(trainer(), model)


def _prune(
    budget: int | None,
    width: int,
    together: bool = False,
    criterion: str = "woodfisher",
) -> tuple[int, int, list[float]]:
    torch.manual_seed(0)
    model = torch.nn.Linear(16, width, bias=False)
    samples = torch.randn(40, 16)
    # Samples of a dataset can be computed together, batches of a list cannot.
    data: Any = TensorDataset(samples) if together else list(samples.split(2))
    report = prune(
        model,
        data,
        lambda m, batch: m(batch[0] if together else batch).square().mean(),
        target_sparsity=0.5,
        fisher=fisher(num_gradients=20, memory_budget=budget),
        criterion=criterion,
        step=StepConfig(measure_loss=False),
    )
    return report.bytes_exchanged, report.world_size, model.weight.view(-1).tolist()


def test_traffic_is_as_estimated_on_real_ranks(ranks: RankPool) -> None:
    settings = fisher(num_gradients=20)
    for world_size in (2, 3):
        for together, collection in ((False, "loop"), (True, "auto")):
            results = ranks.run(world_size, _prune, None, 7, together)
            chosen = dataclasses.replace(settings, collection=collection)
            cost = estimate({"w": (7, 16)}, fisher=chosen, world_size=world_size)
            sent = [sent for sent, _, _ in results]
            assert sent == [cost.total_bytes_sent] * world_size


@pytest.mark.parametrize("criterion", ["kfac", "diagonal_fisher", "hessian_diagonal"])
def test_traffic_of_the_baselines_is_as_estimated(
    ranks: RankPool, criterion: str
) -> None:
    for world_size in (2, 3):
        results = ranks.run(world_size, _prune, None, 7, True, criterion)
        cost = estimate(
            {"w": (7, 16)},
            fisher=fisher(num_gradients=20),
            criterion=criterion,
            world_size=world_size,
        )
        assert {sent for sent, _, _ in results} == {cost.total_bytes_sent}


def test_more_ranks_than_blocks_work_and_change_nothing(ranks: RankPool) -> None:
    # Two blocks on three ranks.
    assert estimate({"w": (2, 16)}, fisher=fisher(), world_size=3).idle_ranks == 1
    alone = _prune(None, 2)[2]
    assert [weights for _, _, weights in ranks.run(3, _prune, None, 2)] == [alone] * 3


def test_every_rank_refuses(ranks: RankPool) -> None:
    with pytest.raises(RuntimeError) as caught:
        ranks.run(2, _prune, 1000, 7)
    assert str(caught.value).count("ConfigurationError: fisher.memory_budget=1000") == 2
