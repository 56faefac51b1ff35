"""The errors that the package raises, and checks of settings."""

from __future__ import annotations

__all__ = [
    "ConfigurationError",
    "MissingPackageError",
    "PruningError",
    "first_line",
    "name_first",
    "nearest",
    "require_choice",
    "require_count",
    "require_flag",
    "require_integer",
    "require_number",
    "require_patterns",
    "require_text",
]

import difflib
import os
from collections.abc import Iterable, Sequence
from numbers import Integral, Real
from typing import cast

from lightning_woodfisher.base.printable import printable

# More items than this take hours, at a millisecond each.
_LARGEST_COUNT = 10_000_000


class ConfigurationError(ValueError):
    """Invalid setting. The message names the value, the reason and the remedy."""

    def __str__(self) -> str:
        """Return the message, which is safe to print."""
        return printable(super().__str__())


class MissingPackageError(ConfigurationError):
    """An optional package that a setting needs is not installed."""


class PruningError(RuntimeError):
    """Failed pruning step. The model and the masks are as they were before the step."""

    def __str__(self) -> str:
        """Return the message, which is safe to print."""
        return printable(super().__str__())


def first_line(error: BaseException) -> str:
    """Shorten the message of an error.

    Args:
        error: error of another package, whose message may be long.

    Returns:
        The first line of its message, or the name of its class if it has no message.
    """
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def nearest(name: object, known: Iterable[str]) -> str:
    """Suggest the known name that is spelled most like ``name``.

    Args:
        name: the name to correct.
        known: the valid names.

    Returns:
        ``" Did you mean 'x'?"`` with a leading blank, or an empty string if ``name`` is
        not a string or resembles none of them.
    """
    if not isinstance(name, str):
        return ""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def name_first(names: Sequence[str], most: int, separator: str = ", ") -> str:
    """Join the first of many names for a message.

    Args:
        names: all names.
        most: number of names that are shown.
        separator: between two names.

    Returns:
        For example ``"a, b and 3 more"``.
    """
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return separator.join(names[:most]) + more


def require_choice(name: str, value: object, choices: Iterable[str]) -> None:
    """Check that a setting is one of several names.

    Args:
        name: name of the setting.
        value: its value.
        choices: the valid values.

    Raises:
        ConfigurationError: for any other value.
    """
    # A list, because a value that cannot be hashed is not a valid key of a mapping.
    choices = list(choices)
    if value not in choices:
        raise ConfigurationError(
            f"{name}={value!r} is unknown; use one of {', '.join(choices)}."
            f"{nearest(value, choices)}"
        )


def require_count(name: str, value: object, least: int | None = None) -> None:
    """Check that a setting is a number of items that can be computed one by one.

    Args:
        name: name of the setting.
        value: its value.
        least: smallest valid value, if any.
    """
    require_integer(name, value, least, _LARGEST_COUNT)


def require_flag(name: str, value: object) -> None:
    """Check that a setting is True or False.

    Args:
        name: name of the setting.
        value: its value.

    Raises:
        ConfigurationError: for any other value.
    """
    if not isinstance(value, bool):
        raise ConfigurationError(f"{name}={value!r} must be True or False.")


def require_integer(
    name: str,
    value: object,
    least: int | None = None,
    most: int | None = None,
    hint: str = "",
) -> None:
    """Check that a setting is a whole number and not a bool.

    Args:
        name: name of the setting.
        value: its value.
        least: smallest valid value, if any.
        most: largest valid value, if any.
        hint: meaning of the setting or remedy, for the error.

    Raises:
        ConfigurationError: for any other value.

    Examples:
        >>> require_integer("steps", 0, least=1, hint="1 is the usual value")
        Traceback (most recent call last):
        lightning_woodfisher.base.errors.ConfigurationError: steps=0 must be at least 1; ...
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise ConfigurationError(f"{name}={value!r} is not a whole number.")
    number = int(value)
    if least is not None and number < least:
        raise ConfigurationError(
            f"{name}={value} must be at least {least}{_ending(hint)}"
        )
    if most is not None and number > most:
        raise ConfigurationError(
            f"{name}={value} must be at most {most}{_ending(hint)}"
        )


def require_number(
    name: str, value: object, interval: str | None = None, hint: str = ""
) -> None:
    """Check that a setting is a number and not a bool.

    Args:
        name: name of the setting.
        value: its value.
        interval: the valid values, such as ``"[0, 1)"``: brackets include an end,
            parentheses do not. ``"(0, inf)"`` means positive and finite. NaN is in none.
        hint: meaning of the setting or remedy, for the error.

    Raises:
        ConfigurationError: for any other value.

    Examples:
        >>> require_number("share", 90.0, "[0, 1)", "90 % is 0.9")
        Traceback (most recent call last):
        lightning_woodfisher.base.errors.ConfigurationError: share=90.0 is outside [0, 1); ...
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ConfigurationError(f"{name}={value!r} is not a number.")
    if interval is None:
        return
    low, high = (float(end) for end in interval[1:-1].split(","))
    number = cast("float", value)
    is_above = low <= number if interval[0] == "[" else low < number
    is_below = number <= high if interval[-1] == "]" else number < high
    if not (is_above and is_below):
        raise ConfigurationError(f"{name}={value} is outside {interval}{_ending(hint)}")


def require_patterns(name: str, value: object) -> None:
    """Check that a setting is a list of patterns.

    Args:
        name: of the setting.
        value: what the user gave.

    Raises:
        ConfigurationError: for any other value, such as a single pattern.
    """
    if isinstance(value, str):
        raise ConfigurationError(
            f"{name}={value!r} is a single string; give a list of patterns: "
            f"{name.rpartition('.')[2]}=[{value!r}]."
        )
    if not isinstance(value, Sequence) or not all(isinstance(p, str) for p in value):
        raise ConfigurationError(
            f"{name}={value!r} is not a list of patterns (strings)."
        )


def require_text(name: str, value: object) -> None:
    """Check that an optional setting is a string or a path.

    Args:
        name: name of the setting.
        value: its value, or None.

    Raises:
        ConfigurationError: for any other value.
    """
    if value is not None and not isinstance(value, str | os.PathLike):
        raise ConfigurationError(f"{name}={value!r} is neither a string nor a path.")


def _ending(hint: str) -> str:
    return f"; {hint}." if hint else "."
