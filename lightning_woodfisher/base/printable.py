"""Make text from files safe to print."""

from __future__ import annotations

__all__ = ["printable"]

import unicodedata


def printable(text: str) -> str:
    r"""Escape what could control a terminal or cannot be encoded.

    Args:
        text: any text, such as a name from a file.

    Returns:
        The text with escapes in place of control characters (except line breaks and tabs),
        of characters that change the direction of writing, and of lone surrogates.

    Examples:
        >>> print(printable("net.\x1b[2Jweight"))
        net.\x1b[2Jweight
    """
    if text.isprintable():
        return text
    return "".join(
        c
        if c in "\n\t" or unicodedata.category(c) not in _UNSAFE
        else c.encode("unicode_escape").decode()
        for c in text
    )


_UNSAFE = {"Cc", "Cf", "Co", "Cn", "Cs", "Zl", "Zp"}
