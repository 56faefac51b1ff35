"""Which gradients are left out, and which error names the first one too many."""

from __future__ import annotations

import pytest

from lightning_woodfisher.distributed.communicator import Communicator
from lightning_woodfisher.gradients.nonfinite import NonFiniteError, SkippedGradients


@pytest.mark.parametrize("bad", [set(), {4}, {3, 5}, {2, 3, 4, 5}])
def test_the_others_are_kept(comm: Communicator, bad: set[int]) -> None:
    skipped = SkippedGradients(limit=4, communicator=comm)
    for index in range(9):
        skipped.record(index, NonFiniteError("bad") if index in bad else None)
    kept = skipped.find_kept(first=2, count=4)
    places = range(4) if kept is None else kept.tolist()
    assert [2 + place for place in places] == [i for i in range(2, 6) if i not in bad]
    assert (kept is None) == (not bad)
    assert skipped.indices == sorted(bad)
    assert skipped.failure is None


def test_an_error_may_be_taken_back(comm: Communicator) -> None:
    skipped = SkippedGradients(limit=1, communicator=comm)
    skipped.record(0, NonFiniteError("overflow"))
    skipped.record(0, None)
    assert skipped.find_kept(first=0, count=2) is None
    assert skipped.indices == []


def test_the_first_one_beyond_the_limit_is_the_failure(comm: Communicator) -> None:
    skipped = SkippedGradients(limit=2, communicator=comm)
    for index in (0, 3, 4, 6):
        skipped.record(index, NonFiniteError(f"gradient {index} is NaN"))
    skipped.find_kept(first=0, count=4)
    assert skipped.failure is None
    skipped.find_kept(first=4, count=2)
    skipped.find_kept(first=6, count=2)
    assert skipped.indices == [0, 3, 4, 6]
    assert str(skipped.failure) == (
        "gradient 4 is NaN; that is one more than fisher.max_nonfinite=2 allows to be "
        "left out"
    )


def test_none_may_be_left_out_by_default(comm: Communicator) -> None:
    skipped = SkippedGradients(limit=0, communicator=comm)
    skipped.record(0, NonFiniteError("bad"))
    assert not skipped.allowed
    assert skipped.find_kept(first=0, count=1) is None
    assert SkippedGradients(limit=1, communicator=comm).allowed
