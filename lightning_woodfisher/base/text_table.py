"""Format tables as text."""

from __future__ import annotations

__all__ = ["format_number", "format_table"]

from collections.abc import Sequence

from lightning_woodfisher.base.printable import printable


def format_number(value: float | None, spec: str = ".3g") -> str:
    """Format a number for a table.

    Args:
        value: the number, or None if it is not known.
        spec: as for ``format``.

    Returns:
        The number, or a dash.
    """
    return "–" if value is None else format(value, spec)


def format_table(
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    *totals: Sequence[str],
) -> str:
    """Format a text table, first column left-aligned, the others right-aligned.

    Args:
        head: column titles.
        rows: cells of each row, made printable.
        totals: cells of last rows, below a rule.

    Returns:
        Lines of equal width.
    """
    every = [[*map(_cell, row)] for row in (head, *rows, *totals)]
    widths = [max(map(len, column)) for column in zip(*every, strict=True)]

    def line(row: Sequence[str]) -> str:
        return "  ".join(
            [row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]
        )

    first, *lines = map(line, every)
    rule = "─" * len(first)
    last = [rule, *lines[len(rows) :]] if totals else []
    return "\n".join([first, rule, *lines[: len(rows)], *last])


def _cell(text: str) -> str:
    return " ".join(printable(text).split("\n"))
