"""Float32 arithmetic without TF32 and bfloat16.

They keep 8 to 11 bits of a factor. Gradients of the same samples in two batch sizes then
differ by more than the tolerance of the collection, and factorizations become inaccurate.
"""

from __future__ import annotations

__all__ = ["at_least_float32", "full_float32"]

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

# PyTorch 2.9 added the setting ``fp32_precision`` of each operation of a backend.
_OPERATIONS = (
    (torch.backends.cuda, "matmul"),
    (torch.backends.cudnn, "conv"),
    (torch.backends.cudnn, "rnn"),
    (torch.backends.mkldnn, "matmul"),
    (torch.backends.mkldnn, "conv"),
    (torch.backends.mkldnn, "rnn"),
)
_FULL = frozenset({"ieee", "none"})


def at_least_float32(values: Tensor) -> Tensor:
    """Convert 16-bit numbers to float32, because their sums would have 16 bits as well.

    Args:
        values: a tensor of floating-point numbers.

    Returns:
        The tensor itself if it is float32 or float64.
    """
    return values if values.dtype == torch.float64 else values.float()


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    """Compute float32 products and convolutions in float32; restore the user's settings.

    The settings belong to the process, not to a thread.

    Yields:
        Nothing.
    """
    operations = _operations()
    before = [operation.fp32_precision for operation in operations]
    products, convolutions = _older_settings()
    try:
        # The older settings first, where they can be read: if both kinds disagree, PyTorch
        # raises an error when code of the user reads the older ones.
        _set_older("highest" if products else None, False if convolutions else None)
        for operation in operations:
            if operation.fp32_precision not in _FULL:
                operation.fp32_precision = "ieee"
        yield
    finally:
        _set_older(products, convolutions)
        for operation, value in zip(operations, before, strict=True):
            if operation.fp32_precision != value:
                # One that inherits the setting of its backend still does afterwards.
                operation.fp32_precision = "none"
            if operation.fp32_precision != value:
                operation.fp32_precision = value


def _operations() -> list[Any]:
    found = [getattr(backend, name, None) for backend, name in _OPERATIONS]
    return [operation for operation in found if hasattr(operation, "fp32_precision")]


def _older_settings() -> tuple[str | None, bool | None]:
    """Return the older settings of products and convolutions that allow other formats.

    Returns:
        The precision of products and whether cuDNN may use TF32; None for one that allows
        no other format, or cannot be read because a newer setting contradicts it.
    """
    products: str | None = None
    convolutions: bool | None = None
    with contextlib.suppress(RuntimeError):
        products = torch.get_float32_matmul_precision()
    with contextlib.suppress(RuntimeError):
        convolutions = torch.backends.cudnn.allow_tf32
    return None if products == "highest" else products, convolutions or None


def _set_older(products: str | None, convolutions: bool | None) -> None:
    # Some versions of PyTorch advise to use the newer settings.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if products is not None:
            torch.set_float32_matmul_precision(products)
        if convolutions is not None:
            torch.backends.cudnn.allow_tf32 = convolutions
