"""Settings of the Fisher that fit themselves to the data."""

from __future__ import annotations

import pytest

from lightning_woodfisher import FisherConfig
from lightning_woodfisher.fisher.config import fit_samples

DEFAULT = FisherConfig()


@pytest.mark.parametrize(
    ("fisher", "available", "by_sample", "keep_set", "expected"),
    [
        (DEFAULT, 5000, True, True, (256, 16)),
        (DEFAULT, 4096, True, True, (256, 16)),
        (DEFAULT, 4095, True, True, (256, 15)),
        (DEFAULT, 1200, True, True, (256, 4)),
        (DEFAULT, 200, True, True, (200, 1)),
        (DEFAULT, 200, False, True, (200, 16)),
        # What was set stays, even if it does not fit.
        (FisherConfig(1000), 1200, True, True, (1000, 1)),
        (FisherConfig(2000), 1200, True, True, (2000, 1)),
        (FisherConfig(gradient_batch_size=50), 1200, True, True, (24, 50)),
        (FisherConfig(1000, 50), 1200, True, True, (1000, 50)),
        (FisherConfig(1000, 50), 1200, True, False, (1000, 1)),
        (FisherConfig(1000, 50), 960, True, False, (960, 1)),
        (FisherConfig(repeat_samples=True), 100, True, True, (256, 16)),
        (FisherConfig(model_mode="train"), 1200, True, True, (75, 16)),
    ],
)
def test_defaults_fit_themselves_to_the_data(
    fisher: FisherConfig,
    available: int,
    by_sample: bool,
    keep_set: bool,
    expected: tuple[int, int],
) -> None:
    found = fit_samples(fisher, available, by_sample=by_sample, keep_set=keep_set)
    assert (found.num_gradients, found.gradient_batch_size) == expected
