"""Parse the arguments of the subcommands that LightningCLI does not have."""

from __future__ import annotations

__all__ = ["SubcommandParser", "block_size"]

import argparse
import re
import textwrap
from typing import NoReturn

from lightning_woodfisher.base.errors import ConfigurationError, nearest

_WRONG_NAME = re.compile(r"invalid choice: '(.*?)'|unrecognized arguments: (\S+)")


class SubcommandParser(argparse.ArgumentParser):
    """A parser whose errors are one line, with the nearest valid name.

    Args:
        name: name of the subcommand.
        description: what it does.
        epilog: examples, printed as they are.
        usage: the usage line; None for the one of argparse.
    """

    def __init__(
        self, name: str, description: str, epilog: str = "", usage: str | None = None
    ) -> None:
        super().__init__(
            prog=f"lightning-woodfisher {name}",
            description=textwrap.fill(description, 80),
            epilog=epilog,
            usage=usage,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        """Raise a ConfigurationError, which :func:`~.main` prints.

        Args:
            message: what is wrong.

        Raises:
            ConfigurationError: always.
        """
        known = list(self._option_string_actions)
        known += [name for action in self._actions for name in action.choices or ()]
        wrong = _WRONG_NAME.search(message)
        hint = nearest(wrong[1] or wrong[2], known) if wrong else ""
        raise ConfigurationError(f"{message}.{hint}")


def block_size(text: str) -> int | None:
    """Parse the value of ``--block_size``.

    Args:
        text: a number, or ``none``, ``null`` or ``full``.

    Returns:
        B, or None for one block.
    """
    return None if text.lower() in {"none", "null", "full"} else int(text)
