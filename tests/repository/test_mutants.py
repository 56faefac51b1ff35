"""Mutants of the package: those that are listed as equal are still those of the code."""

from __future__ import annotations

from pathlib import Path

import pytest
from equal_mutants import EQUAL, Equal

PACKAGE = Path(__file__).parents[2] / "lightning_woodfisher"


@pytest.mark.parametrize("mutant", EQUAL, ids=lambda mutant: mutant.file)
def test_equal_mutants_are_of_lines_that_exist(mutant: Equal) -> None:
    code = " ".join((PACKAGE / mutant.file).read_text().split())
    assert " ".join(mutant.old.split()) in code
    assert mutant.old != mutant.new
    assert mutant.reason.endswith(".")
