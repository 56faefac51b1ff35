"""Parse and format numbers of bytes, such as ``"24GiB"``."""

from __future__ import annotations

__all__ = ["format_bytes", "format_count", "parse_bytes"]

import re

from lightning_woodfisher.base.errors import ConfigurationError

_UNITS = {
    "B": 1,
    **{f"{prefix}B": 1000**i for i, prefix in enumerate("KMGT", start=1)},
    **{f"{prefix}iB": 1024**i for i, prefix in enumerate("KMGT", start=1)},
}
_BY_NAME = {name.lower(): factor for name, factor in _UNITS.items()}
_PATTERN = re.compile(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*([a-zA-Z]*)\s*")


def parse_bytes(value: str | int, name: str = "memory") -> int:
    """Parse an amount of memory.

    Args:
        value: a number of bytes, or a number with a unit: ``"80GB"`` (10⁹ bytes each),
            ``"24GiB"`` (2³⁰ bytes each).
        name: name of the setting, for the error.

    Returns:
        Bytes.

    Raises:
        ConfigurationError: for anything else, or if it is not positive.

    Examples:
        >>> parse_bytes("24 GiB")
        25769803776
        >>> parse_bytes("1.5MB")
        1500000
    """
    match = _PATTERN.fullmatch(value) if isinstance(value, str) else None
    if match is not None and (match[2].lower() or "b") in _BY_NAME:
        size = int(float(match[1]) * _BY_NAME[match[2].lower() or "b"])
    elif isinstance(value, int) and not isinstance(value, bool):
        size = value
    else:
        raise ConfigurationError(
            f"{name}={value!r} is not an amount of memory; write for example 80GB, 24GiB "
            f"or a number of bytes. Units: {', '.join(_UNITS)}."
        )
    if size <= 0:
        raise ConfigurationError(f"{name}={value!r} must be positive.")
    return size


def format_bytes(size: float) -> str:
    """Format an amount of memory with three or four digits.

    Args:
        size: bytes.

    Returns:
        For example ``"5.12 GB"``.

    Examples:
        >>> format_bytes(5_120_000_000)
        '5.12 GB'
        >>> format_bytes(999)
        '999 B'
    """
    return f"{size:.0f} B" if size < 999.5 else f"{format_count(size)}B"


def format_count(number: float) -> str:
    """Format a large number with a decimal prefix.

    Args:
        number: not negative.

    Returns:
        For example ``"1.20 T"``; a unit may follow it directly.

    Examples:
        >>> format_count(1.2e12)
        '1.20 T'
        >>> format_count(25.5e6)
        '25.5 M'
    """
    prefixes = ("", "k", "M", "G", "T", "P", "E")
    power = 0
    while number >= 999.5 and power < len(prefixes) - 1:
        number, power = number / 1000, power + 1
    digits = 0 if number >= 99.5 or not power else 1 if number >= 9.95 else 2
    return f"{number:.{digits}f} {prefixes[power]}"
