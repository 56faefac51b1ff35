"""The number of samples of a step where the data has few."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from torch.utils.data import DataLoader, IterableDataset

from lightning_woodfisher import (
    ConfigurationError,
    FisherConfig,
    WoodFisherPruningCallback,
    prune,
)
from lightning_woodfisher.benchmark.networks import cross_entropy
from tests.support import fits
from tests.support.small_task import batchnorm_network, samples


@pytest.mark.parametrize("as_batches", [False, True])
def test_prune_says_which_numbers_it_uses(as_batches: bool) -> None:
    data: Any = samples(300)
    used = r"num_gradients=256 and gradient_batch_size=1, not 256 and 16"
    if as_batches:
        data = list(DataLoader(data, 10))
        used = r"30 batches, so a step uses num_gradients=30, not 256$"
    with pytest.warns(UserWarning, match=used):
        report = prune(batchnorm_network(), data, cross_entropy, target_sparsity=0.5)
    assert report.num_gradients == (30 if as_batches else 256)
    assert report.sparsity == 0.5


def test_an_iterator_is_read_from_its_start() -> None:
    batches = iter(DataLoader(samples(160), 10))
    fisher = FisherConfig(16, block_size=64)
    model = batchnorm_network()
    prune(model, batches, cross_entropy, target_sparsity=0.5, fisher=fisher)


def test_magnitude_measures_the_loss_on_what_there_is() -> None:
    with pytest.warns(UserWarning, match="num_gradients=96 and"):
        report = prune(
            batchnorm_network(),
            samples(96),
            cross_entropy,
            target_sparsity=0.5,
            criterion="magnitude",
            fisher=FisherConfig(1000, 50),
        )
    assert report.measured_increase is not None


class Stream(IterableDataset[Any]):
    """Training data that samples cannot be drawn from."""

    def __iter__(self) -> Iterator[Any]:
        return iter(fits.images(16))


def test_a_fit_says_which_numbers_it_uses(capfd: pytest.CaptureFixture[str]) -> None:
    callback = WoodFisherPruningCallback(0.5, fits.OneShotSchedule(epoch=0))
    fits.trainer(callback).fit(fits.Classifier(), fits.loader(48))
    assert callback.reports[0].num_gradients == 48
    assert "the data has 48 samples, so a step uses num_gradients=48" in (
        capfd.readouterr().err
    )


def test_magnitude_needs_no_data_that_can_be_drawn() -> None:
    schedule = fits.OneShotSchedule(epoch=0)
    loader = DataLoader(Stream(), 8)
    magnitude = WoodFisherPruningCallback(0.5, schedule, "magnitude")
    fits.trainer(magnitude).fit(fits.Classifier(), loader)
    assert magnitude.reports[0].sparsity == pytest.approx(0.5, abs=1e-3)
    assert magnitude.reports[0].measured_increase is None
    with pytest.raises(ConfigurationError, match="samples cannot be drawn"):
        fits.trainer(WoodFisherPruningCallback(0.5, schedule)).fit(
            fits.Classifier(), loader
        )
