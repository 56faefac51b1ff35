"""Import packages that only some features need."""

from __future__ import annotations

__all__ = ["import_optional"]

import importlib
from typing import Any

from lightning_woodfisher.base.errors import MissingPackageError

# The optional extra of pyproject.toml that installs each package.
_EXTRAS = {
    "matplotlib": "figures",
    "onnx": "export",
    "onnxruntime": "export",
    "onnxscript": "export",
    "safetensors": "export",
    "shtab": "completion",
    "torch_pruning": "structured",
    "torchvision": "examples",
}


def import_optional(module: str, needed_for: str) -> Any:
    """Import a module of an optional dependency.

    Args:
        module: dotted path of the module, such as ``"safetensors.torch"``.
        needed_for: feature that needs it, as the subject of the error message.

    Returns:
        The module.

    Raises:
        MissingPackageError: if the package cannot be imported; names the extra to install.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise MissingPackageError(
            f"{needed_for} needs {package}, which cannot be imported ({error}). Install it "
            f"with pip install 'lightning-woodfisher[{_EXTRAS[package]}]'."
        ) from error
