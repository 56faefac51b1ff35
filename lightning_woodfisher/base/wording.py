"""Words for numbers in messages."""

from __future__ import annotations

__all__ = ["count_of"]


def count_of(number: int, noun: str) -> str:
    """Write a number with its noun in the right form.

    Args:
        number: how many.
        noun: in the singular; its plural ends in s.

    Returns:
        Both, such as ``"1 group"`` or ``"1,024 samples"``.
    """
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
