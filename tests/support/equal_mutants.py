"""Mutants of ``sampled_mutants.py`` that no test can kill, each with the reason."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Equal:
    """A change that leaves what the package does as it is.

    Attributes:
        file: path in the package.
        old: the lines before the change, each with single spaces.
        new: the lines after it.
        reason: why no result, error or message differs.
    """

    file: str
    old: str
    new: str
    reason: str


EQUAL: tuple[Equal, ...] = ()
