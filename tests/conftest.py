"""Fixtures of all tests, reproducible examples, and the order on several workers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from lightning_woodfisher.distributed.communicator import Communicator

# Importing torch and Lightning takes seconds. The process that only distributes tests to
# the workers of pytest-xdist does without: nothing here imports them at the top.

settings.register_profile(
    "reproducible", derandomize=True, database=None, deadline=None, max_examples=60
)
settings.load_profile("reproducible")


def pytest_configure(config: pytest.Config) -> None:
    """Ignore Lightning's advice about toy data, whose class pytest must import.

    Args:
        config: of this process.
    """
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", None):
        advice = "lightning.fabric.utilities.warnings.PossibleUserWarning"
        config.addinivalue_line("filterwarnings", f"ignore::{advice}")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> None:
    """Mark the tests that use ranks, and let one xdist worker run them.

    Args:
        config: of this process; workers of pytest-xdist have a ``workerinput``.
        items: the collected tests, reordered in place.
    """
    for item in items:
        if _uses_ranks(item):
            item.add_marker("spawns")
    if hasattr(config, "workerinput"):
        # ``--dist worksteal`` gives each worker a contiguous part of the list: with the
        # ranks at its head, a single worker starts their processes.
        items.sort(key=lambda item: not _uses_ranks(item))


def _uses_ranks(item: pytest.Item) -> bool:
    """Return whether a test runs jobs on the processes of the fixture ``ranks``."""
    return "ranks" in getattr(item, "fixturenames", ())


@pytest.fixture(scope="session")
def comm() -> Communicator:
    """The only rank of a job of one."""
    from lightning_woodfisher.distributed.communicator import Communicator

    return Communicator()


@pytest.fixture
def own_criteria() -> Iterator[None]:
    """Forget the criteria that a test registers."""
    from lightning_woodfisher.criteria import CRITERIA

    before = dict(CRITERIA)
    yield
    CRITERIA.clear()
    CRITERIA.update(before)
