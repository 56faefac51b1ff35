"""Format tables as text."""

from __future__ import annotations

__all__ = ["format_table"]

from collections.abc import Sequence


def format_table(
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    *totals: Sequence[str],
) -> str:
    """Format a text table, first column left-aligned, the others right-aligned.

    Args:
        head: column titles.
        rows: cells of each row.
        totals: cells of last rows, below a rule.

    Returns:
        Lines of equal width.
    """
    every = [head, *rows, *totals]
    widths = [max(map(len, column)) for column in zip(*every, strict=True)]

    def line(row: Sequence[str]) -> str:
        return "  ".join(
            [row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]
        )

    rule = "─" * len(line(head))
    lines = [line(head), rule, *map(line, rows)]
    return "\n".join([*lines, *([rule] if totals else []), *map(line, totals)])
