from __future__ import annotations

import pytest

from lightning_woodfisher.base.text_table import format_table


def test_the_first_column_is_left_aligned_and_the_others_right_aligned() -> None:
    assert format_table(("name", "n"), [("a", "1,000"), ("long name", "2")]) == (
        "name           n\n────────────────\na          1,000\nlong name      2"
    )


def test_the_total_stands_below_a_rule() -> None:
    assert format_table(("a",), [], ("sum",)).splitlines() == [
        "a  ",
        "───",
        "───",
        "sum",
    ]


def test_rows_of_different_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        format_table(("name", "n"), [("a",)])
