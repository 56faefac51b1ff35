"""Networks that still have the weights of their initialization."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from lightning_woodfisher import OneShotSchedule
from lightning_woodfisher.weights.untrained import looks_untrained
from tests.support.fits import Classifier, loader, pruning, seed_all, trainer
from tests.support.small_task import batchnorm_network

SAID = "the network seems to be untrained"


def perceptron() -> nn.Sequential:
    return nn.Sequential(nn.Linear(12, 30), nn.ReLU(), nn.Linear(30, 12))


def convolutions() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 9, 3), nn.ReLU(), nn.Conv2d(9, 4, 3))


@pytest.mark.parametrize("build", [perceptron, convolutions, batchnorm_network])
def test_an_initialized_network_is_recognized(
    build: Callable[[], nn.Sequential],
) -> None:
    for seed in range(5):
        torch.manual_seed(seed)
        assert looks_untrained(build())


def test_a_network_that_was_trained_is_not() -> None:
    for build in (perceptron, batchnorm_network):
        torch.manual_seed(0)
        model = build().train()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        inputs = torch.randn(64, model[0].in_features)
        for _ in range(20):
            optimizer.zero_grad()
            (model(inputs) - 1.0).square().mean().backward()
            optimizer.step()
        assert not looks_untrained(model)


def test_other_initializations_and_converted_networks_are_not_accused() -> None:
    normal = perceptron()
    nn.init.normal_(normal[0].weight, std=0.02)
    converted = batchnorm_network()
    converted[1].running_mean.fill_(0.5)
    assert not any(map(looks_untrained, (normal, converted, nn.Sequential())))


@pytest.mark.parametrize(
    ("epoch", "is_trained", "is_said"),
    [(0, False, True), (1, False, False), (0, True, False)],
)
def test_pruning_before_any_training_is_said_before_training(
    epoch: int, is_trained: bool, is_said: bool, caplog: pytest.LogCaptureFixture
) -> None:
    seed_all(1)
    module = Classifier()
    if is_trained:
        trainer(max_epochs=1).fit(module, loader())
    caplog.clear()
    with caplog.at_level("INFO"):
        trainer(pruning(schedule=OneShotSchedule(epoch))).fit(module, loader())
    assert (SAID in caplog.text) == is_said
