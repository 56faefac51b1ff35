"""Dense linear algebra of the engines, in the shapes that run fast.

Large matrices are cut into strips of rows, so that only the lower half of a symmetric
product is computed and a triangular solve becomes matrix products. Many small matrices, and
matrices on a GPU, use batched products.

Products of float32 gradients may be float32 if that keeps F⁻¹ within 1e-5. An engine that
drops the rows decides from the size of the gradients relative to λ
(:func:`float32_is_enough`). An engine that keeps the rows decides from the Cholesky factor,
which is less pessimistic (:func:`is_well_scaled`).
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
]

import math
from collections.abc import Iterator

import torch
from torch import Tensor

# Rows in a strip. Products of thinner strips are slow.
_STRIP = 96
# Measured: the error of diag(F⁻¹) is at most 2·2⁻²⁴ times the spread, for gradients with
# normal, log-normal, shared and widely scaled entries.
_LARGEST_SPREAD = 32.0
# The same for the reciprocal of the smallest pivot relative to its diagonal entry.
_SMALLEST_SHARE = 1.0 / 8.0


def float32_is_enough(
    largest_sum: float, size: int, num_gradients: int, damping: float
) -> bool:
    """Return whether float32 products of gradients keep F⁻¹ within 1e-5.

    Args:
        largest_sum: largest entry of the diagonal of GᵀG of a block.
        size: B.
        num_gradients: N.
        damping: λ.

    Returns:
        True if the spread √B · largest_sum / (Nλ) is small.
    """
    spread = math.sqrt(size) * largest_sum / (num_gradients * damping)
    return spread <= _LARGEST_SPREAD


def is_well_scaled(factor: Tensor) -> bool:
    """Return whether the inverse of a matrix of float32 products is accurate enough.

    The rounding error of entry ij of RRᵀ is relative to |r_i||r_j|, so the length of rows does
    not matter. Accuracy is lost if the other rows almost span a row.

    Args:
        factor: lower Cholesky factors, ``[K, n, n]``.

    Returns:
        True if no pivot is small relative to the diagonal entry that it is computed from.
    """
    pivots = factor.diagonal(dim1=-2, dim2=-1).square()
    return bool((pivots > _SMALLEST_SHARE * factor.square().sum(dim=-1)).all())


def half_product(rows: Tensor) -> Tensor:
    """Multiply matrices by their own transposes.

    Args:
        rows: ``[K, n, b]``, any strides.

    Returns:
        R Rᵀ, ``[K, n, n]``; only the lower half is defined.
    """
    if not _in_strips(rows, rows.shape[-2]):
        return rows @ rows.mT
    product = rows.new_zeros(*rows.shape[:-1], rows.shape[-2])
    add_half_product(product, rows)
    return product


def add_half_product(total: Tensor, rows: Tensor) -> None:
    """Add the result of :func:`half_product`, in place.

    Args:
        total: ``[K, n, n]``; the upper half may be undefined.
        rows: ``[K, n, b]`` of the same dtype, any strides.
    """
    if not _in_strips(rows, rows.shape[-2]):
        total.baddbmm_(rows, rows.mT)
        return
    for block, target in zip(rows, total, strict=True):
        for low, high in _strips(len(block)):
            target[low:high, :high].addmm_(block[low:high], block[:high].mT)


def mirror(product: Tensor) -> Tensor:
    """Copy the lower half of symmetric matrices into the upper half.

    Args:
        product: ``[K, n, n]``, from :func:`half_product`.

    Returns:
        ``[K, n, n]``; the same tensor if both halves are defined already.
    """
    if not _in_strips(product, product.shape[-1]):
        return product
    return product.tril().add_(product.tril(-1).mT)


def cholesky(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Factorize symmetric matrices, reading the lower half only.

    Args:
        matrix: ``[K, n, n]``, float64.

    Returns:
        The lower factors ``[K, n, n]``, and True for each matrix without one, bool ``[K]``.
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
    """Return whether strips are faster; a GPU needs batches to be busy."""
    return tensor.device.type == "cpu" and size >= 2 * _STRIP


def _strips(size: int) -> Iterator[tuple[int, int]]:
    number = max(1, size // _STRIP)
    ends = [round(size * i / number) for i in range(number + 1)]
    return zip(ends, ends[1:], strict=False)
