"""The two errors that the package raises on purpose."""

from __future__ import annotations

__all__ = [
    "ConfigurationError",
    "PruningError",
    "first_line",
    "nearest",
    "require_count",
    "require_flag",
    "require_integer",
    "require_number",
    "require_text",
]

import difflib
import os
from collections.abc import Iterable
from numbers import Integral, Real

# Work in so many pieces takes hours at a millisecond each.
_LARGEST_COUNT = 10_000_000


class ConfigurationError(ValueError):
    """A setting that cannot work; the message names the value, the reason and the remedy."""


class PruningError(RuntimeError):
    """A pruning step failed; the model and the masks are as they were before the step."""


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
        name: what the user wrote; what is no text resembles nothing.
        known: the valid names.

    Returns:
        ``" Did you mean 'x'?"`` with a leading blank, or an empty string.
    """
    if not isinstance(name, str):
        return ""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def require_count(name: str, value: object) -> None:
    """Check that a setting is a whole number that can be counted to.

    Args:
        name: of the setting.
        value: what the user gave.

    Raises:
        ConfigurationError: for anything else.
    """
    require_integer(name, value)
    if int(value) > _LARGEST_COUNT:  # type: ignore[call-overload]
        raise ConfigurationError(
            f"{name}={value} would never end; {_LARGEST_COUNT} is the most."
        )


def require_flag(name: str, value: object) -> None:
    """Check that a setting is True or False.

    Args:
        name: of the setting.
        value: what the user gave.

    Raises:
        ConfigurationError: for anything else.
    """
    if not isinstance(value, bool):
        raise ConfigurationError(f"{name}={value!r} is neither true nor false.")


def require_integer(name: str, value: object) -> None:
    """Check that a setting is a whole number; True is none.

    Args:
        name: of the setting.
        value: what the user gave.

    Raises:
        ConfigurationError: for anything else.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise ConfigurationError(f"{name}={value!r} is not a whole number.")


def require_number(name: str, value: object) -> None:
    """Check that a setting is a number; True is none.

    Args:
        name: of the setting.
        value: what the user gave.

    Raises:
        ConfigurationError: for anything else.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ConfigurationError(f"{name}={value!r} is not a number.")


def require_text(name: str, value: object) -> None:
    """Check that an optional setting is a name or a path.

    Args:
        name: of the setting.
        value: what the user gave; None is no value.

    Raises:
        ConfigurationError: for anything else.
    """
    if value is not None and not isinstance(value, str | os.PathLike):
        raise ConfigurationError(f"{name}={value!r} is not a text.")
