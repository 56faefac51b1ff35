"""What all unit tests share: one rank, and examples that are the same in every run."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import settings

from lightning_woodfisher.criteria import CRITERIA
from lightning_woodfisher.distributed.communicator import Communicator

settings.register_profile(
    "reproducible", derandomize=True, database=None, deadline=None, max_examples=60
)
settings.load_profile("reproducible")


@pytest.fixture(scope="session")
def comm() -> Communicator:
    """The only rank of a job of one."""
    return Communicator()


@pytest.fixture
def own_criteria() -> Iterator[None]:
    """Forget the criteria that a test registers."""
    before = dict(CRITERIA)
    yield
    CRITERIA.clear()
    CRITERIA.update(before)
