"""Packages that only export needs, imported when they are."""

from __future__ import annotations

__all__ = ["import_optional"]

import importlib
from typing import Any

from lightning_woodfisher.base.errors import ConfigurationError


def import_optional(module: str) -> Any:
    """Import a module of the optional extra ``export``.

    Args:
        module: its path, such as ``"safetensors.torch"``.

    Returns:
        The module.

    Raises:
        ConfigurationError: when the package is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        raise ConfigurationError(
            f"{package} is needed for this file and is not installed; "
            "pip install 'lightning-woodfisher[export]'."
        ) from error
