"""Dense products of the Fisher engines, in the shapes in which they are fast.

Large matrices are cut into strips of rows, so that only the lower half of a symmetric
product is computed and a triangular solve becomes plain products; many small matrices, and
matrices on a GPU, go through batched products.

Products of float32 gradients may be float32 as long as that keeps F⁻¹ within 1e-5.
Before rows are gone, the size of the gradients beside λ tells (:func:`spread`); while they
are at hand, the Cholesky factor tells less pessimistically (:func:`is_well_scaled`).
"""

from __future__ import annotations

__all__ = [
    "add_half_product",
    "cholesky",
    "float32_is_enough",
    "half_product",
    "invert_lower",
    "is_well_scaled",
    "mirror",
    "solve_lower",
    "spread",
]

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from lightning_woodfisher.fisher.config import Precision

# Rows in a strip: below, products are too thin to be fast.
_STRIP = 96
# The measured error of diag(F⁻¹) is at most 2·2⁻²⁴ times the spread, over gradients with
# normal, log-normal, shared and widely scaled entries.
_LARGEST_SPREAD = 32.0
# The same of the reciprocal of the smallest pivot beside its diagonal entry.
_SMALLEST_SHARE = 1.0 / 8.0


def spread(largest_sum: float, size: int, num_gradients: int, damping: float) -> float:
    """Compare the gradients of a block with λ.

    Args:
        largest_sum: largest entry of the diagonal of GᵀG (then ``size`` is B) or of GGᵀ
            (then ``size`` is 1).
        size: number of columns that add up in the spectral norm of the rounding error.
        num_gradients: N.
        damping: λ.

    Returns:
        √size · largest_sum / (Nλ).
    """
    return math.sqrt(size) * largest_sum / (num_gradients * damping)


def float32_is_enough(value: float, precision: Precision) -> bool:
    """Decide whether float32 products keep F⁻¹ within 1e-5.

    Args:
        value: what :func:`spread` gave.
        precision: ``"auto"`` decides by the spread, the others have decided already.

    Returns:
        True for float32.
    """
    if precision == "auto":
        return value <= _LARGEST_SPREAD
    return precision == "float32"


def is_well_scaled(factor: Tensor) -> bool:
    """Decide whether a matrix made of float32 products has an inverse that can be trusted.

    The rounding error of entry ij of RRᵀ is relative to |r_i||r_j|, so rows of any length do
    no harm; what does is a row that the others almost span.

    Args:
        factor: lower Cholesky factors, ``[K, n, n]``.

    Returns:
        True if no pivot is small beside the entry of the diagonal that it is left over from.
    """
    pivots = factor.diagonal(dim1=-2, dim2=-1).square()
    return bool((pivots > _SMALLEST_SHARE * factor.square().sum(dim=-1)).all())


def half_product(rows: Tensor) -> Tensor:
    """Multiply by the own transpose.

    Args:
        rows: ``[K, n, b]``, any strides.

    Returns:
        R Rᵀ, ``[K, n, n]``; only the lower half is meant to be read.
    """
    if not _in_strips(rows, rows.shape[-2]):
        return rows @ rows.mT
    product = rows.new_zeros(*rows.shape[:-1], rows.shape[-2])
    add_half_product(product, rows)
    return product


def add_half_product(total: Tensor, rows: Tensor) -> None:
    """Add what :func:`half_product` gives, in place.

    Args:
        total: ``[K, n, n]``; the upper half need not be filled.
        rows: ``[K, n, b]`` of the same dtype, any strides.
    """
    if not _in_strips(rows, rows.shape[-2]):
        total.baddbmm_(rows, rows.mT)
        return
    for block, target in zip(rows, total, strict=True):
        for low, high in _strips(len(block)):
            target[low:high, :high].addmm_(block[low:high], block[:high].mT)


def mirror(product: Tensor) -> Tensor:
    """Copy the lower half of symmetric matrices into the upper one.

    Args:
        product: ``[K, n, n]``, made by :func:`half_product`.

    Returns:
        ``[K, n, n]``; the same tensor where both halves are there already.
    """
    if not _in_strips(product, product.shape[-1]):
        return product
    return product.tril().add_(product.tril(-1).mT)


def cholesky(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Factorise symmetric matrices; reads the lower half.

    Args:
        matrix: ``[K, n, n]``, float64.

    Returns:
        The lower factors ``[K, n, n]``, and which of the K have none, bool ``[K]``.
    """
    factor, info = torch.linalg.cholesky_ex(matrix)
    finite = factor.diagonal(dim1=-2, dim2=-1).isfinite().all(dim=-1)
    return factor, (info != 0) | ~finite


def solve_lower(factor: Tensor, rows: Tensor) -> Tensor:
    """Solve L Z = R by forward substitution.

    Args:
        factor: L, float64 ``[K, n, n]``, lower triangular.
        rows: R, ``[K, n, b]``, float32 or float64; overwritten.

    Returns:
        Z, ``[K, n, b]`` in the dtype of R.
    """
    if not _in_strips(rows, rows.shape[-2]):
        return invert_lower(factor).to(rows.dtype) @ rows
    for lower, solved in zip(factor, rows, strict=True):
        rounded = lower.to(rows.dtype)
        for low, high in _strips(len(lower)):
            strip = solved[low:high]
            if low:
                strip.addmm_(rounded[low:high, :low], solved[:low], alpha=-1.0)
            corner = _invert_small(lower[low:high, low:high]).to(rows.dtype)
            strip.copy_(corner @ strip)
    return rows


def invert_lower(factor: Tensor) -> Tensor:
    """Invert lower triangular matrices.

    Args:
        factor: L, ``[K, n, n]``.

    Returns:
        L⁻¹, ``[K, n, n]``.
    """
    if not _in_strips(factor, factor.shape[-1]):
        return _invert_small(factor)
    inverse = torch.zeros_like(factor)
    for lower, target in zip(factor, inverse, strict=True):
        for low, high in _strips(len(lower)):
            corner = _invert_small(lower[low:high, low:high])
            target[low:high, low:high] = corner
            if low:
                pull = lower[low:high, :low] @ target[:low, :low]
                target[low:high, :low] = (corner @ pull).neg_()
    return inverse


def _invert_small(factor: Tensor) -> Tensor:
    identity = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
    inverse: Tensor = torch.linalg.solve_triangular(
        factor, identity.expand_as(factor), upper=False
    )
    return inverse


def _in_strips(tensor: Tensor, size: int) -> bool:
    """Tell whether strips pay: on a GPU the batch is what makes products large."""
    return tensor.device.type == "cpu" and size >= 2 * _STRIP


def _strips(size: int) -> Iterator[tuple[int, int]]:
    number = max(1, size // _STRIP)
    ends = [round(size * i / number) for i in range(number + 1)]
    return zip(ends, ends[1:], strict=False)
