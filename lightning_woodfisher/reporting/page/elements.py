"""The pieces of the page: cards, figures, tables."""

from __future__ import annotations

__all__ = ["Drawing", "cards", "count", "figure_grid", "number", "table", "text"]

import html
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

from lightning_woodfisher.reporting import figures

#: What draws a figure, its name within the section, and what stands below it.
Drawing: TypeAlias = tuple[Callable[[], Any], str, str]


def cards(shown: Mapping[str, str]) -> str:
    """Show a few values, each with its label."""
    inside = "".join(
        f"<div><b>{text(value)}</b>{text(label)}</div>"
        for label, value in shown.items()
    )
    return f'<div class="cards">{inside}</div>\n'


def figure_grid(name: str, drawn: Iterable[Drawing]) -> str:
    """Show figures side by side; ``name`` is that of the section on the page."""
    inside = "".join(
        f"<figure>{figures.to_svg(draw, f'{name}-{kind}', caption)}"
        f"<figcaption>{text(caption)}</figcaption></figure>\n"
        for draw, kind, caption in drawn
    )
    return f'<div class="figures">{inside}</div>\n'


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Lay out cells below a head; a wide table scrolls."""
    top = "".join(f"<th>{text(cell)}</th>" for cell in head)
    body = "".join(
        "<tr>" + "".join(f"<td>{text(cell)}</td>" for cell in row) + "</tr>\n"
        for row in rows
    )
    return f'<div class="scroll"><table><tr>{top}</tr>\n{body}</table></div>\n'


def text(plain: str) -> str:
    """Make a text safe to stand in HTML."""
    return html.escape(plain, quote=True)


def number(value: float | None) -> str:
    """Show a value in three digits, or that it is not known."""
    return "–" if value is None else f"{value:.3g}"


def count(value: int | None) -> str:
    """Show a whole number, or that it is not known."""
    return "–" if value is None else f"{value:,}"
