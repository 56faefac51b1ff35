"""Dense linear algebra of the engines, in the shapes that run fast.

Large matrices are cut into strips of rows, so that only the lower half of a symmetric
product is computed and a triangular solve becomes matrix products. Many small matrices, and
matrices on a GPU, use batched products.

Products and factorizations of float32 gradients may be float32 if that keeps F⁻¹ within
1e-3. An engine that drops the rows decides about products from the size of the gradients
relative to λ (:func:`spread_of`). Everything else is decided from the Cholesky
factor, which is less pessimistic (:func:`smallest_share`).

Where float64 is slow, products that need more digits than float32 has are split: a factor
is the sum of a multiple of 2⁻⁸ of its scale and a rest. Products of the former are exact in
float32 (:func:`split_product`).
"""

from __future__ import annotations

__all__ = [
    "ARITHMETICS",
    "LARGEST_SPREAD",
    "Arithmetic",
    "add_half_product",
    "cholesky",
    "choose_arithmetics",
    "half_product",
    "invert_lower",
    "mirror",
    "multiply",
    "smallest_share",
    "solve_lower",
    "split_product",
    "spread_of",
]

import math
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from lightning_woodfisher.fisher.config import Precision

Arithmetic = Literal["float32", "split", "float64"]
# By the number of digits.
ARITHMETICS: tuple[Arithmetic, ...] = ("float32", "split", "float64")

# Rows in a strip. Products of thinner strips are slow.
_STRIP = 96
# Triangular matrices up to this size are inverted by LAPACK.
_SMALL = 16
# LAPACK is slow if the size of matrices is a multiple of this one.
_ALIASING, _PADDING = 128, 8
# Measured: the error of diag(F⁻¹) is at most 2·2⁻²⁴ times the spread, for gradients with
# normal, log-normal, shared and widely scaled entries. This leaves half of 1e-3. Split
# products have 8 bits more.
LARGEST_SPREAD: dict[Arithmetic, float] = {"float32": 2.0**12, "split": 2.0**20}
# With so many columns, sums of products of integers up to 2⁸ are exact in float32.
_EXACT_BITS, _EXACT_LENGTH = 8, 2**8
# Compute capabilities of GPUs whose float64 is half as fast as float32; others need 32 to 64
# times as long.
_FAST_FLOAT64 = {(6, 0), (7, 0), (8, 0), (9, 0), (10, 0)}


def choose_arithmetics(
    precision: Precision, device: torch.device
) -> tuple[Arithmetic, ...]:
    """List the arithmetics for products of float32 gradients, the fastest first.

    Args:
        precision: the setting.
        device: device of the tensors.

    Returns:
        The first is used where it has enough digits, and so on; the last one always.
    """
    if precision == "float32" or precision == "float64":
        return (precision,)
    if precision == "split":
        return "split", "float64"
    slow = _has_slow_float64(device)
    return ARITHMETICS if slow else ("float32", "float64")


def _has_slow_float64(device: torch.device) -> bool:
    """Return whether float64 products take many times as long as float32 ones."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) not in _FAST_FLOAT64


def spread_of(
    largest_sum: Tensor, size: int, num_gradients: int, damping: float
) -> Tensor:
    """Compare gradients with λ; products in a small precision need a small spread.

    Args:
        largest_sum: largest entry of the diagonal of GᵀG of a block, scalar.
        size: B.
        num_gradients: N.
        damping: λ.

    Returns:
        √B · largest_sum / (Nλ), scalar; see :data:`LARGEST_SPREAD`.
    """
    return largest_sum * (math.sqrt(size) / (num_gradients * damping))


def smallest_share(factor: Tensor) -> Tensor:
    """Compare the pivots of Cholesky factors with the diagonal that they come from.

    The rounding error of entry ij of RRᵀ is relative to |r_i||r_j|, so the length of rows does
    not matter. Accuracy is lost if the other rows almost span a row.

    Args:
        factor: lower Cholesky factors, ``[K, n, n]``.

    Returns:
        The smallest ratio in each matrix, ``[K]``.
    """
    pivots = factor.diagonal(dim1=-2, dim2=-1).square()
    return (pivots / factor.square().sum(dim=-1)).amin(dim=-1)


def half_product(rows: Tensor, split: bool = False) -> Tensor:
    """Multiply matrices by their own transposes.

    Args:
        rows: ``[K, n, b]``, any strides.
        split: compute a float64 result by :func:`split_product`.

    Returns:
        R Rᵀ, ``[K, n, n]``; only the lower half is defined.
    """
    if split:
        return split_product(rows)
    if not _in_strips(rows, rows.shape[-2]):
        return rows @ rows.mT
    product = rows.new_zeros(*rows.shape[:-1], rows.shape[-2])
    add_half_product(product, rows)
    return product


def add_half_product(total: Tensor, rows: Tensor, split: bool = False) -> None:
    """Add the result of :func:`half_product`, in place.

    Args:
        total: ``[K, n, n]``; the upper half may be undefined.
        rows: ``[K, n, b]`` of the same dtype, any strides.
        split: compute a float64 result by :func:`split_product`.
    """
    if split:
        total += split_product(rows)
        return
    if not _in_strips(rows, rows.shape[-2]):
        total.baddbmm_(rows, rows.mT)
        return
    for block, target in zip(rows, total, strict=True):
        for low, high in _strips(len(block)):
            target[low:high, :high].addmm_(block[low:high], block[:high].mT)


def split_product(left: Tensor, right: Tensor | None = None) -> Tensor:
    """Multiply matrices in float32, with about 32 bits.

    With s the power of two above the largest entry of a row of X in a piece of 256 columns,
    X = s(H/2⁸ + L/2⁸) with integers H and |L| ≤ ½. The products of the H are exact, and the
    others have errors of float32 relative to 2⁻⁸. For pieces of n ≤ 256 columns, entry ij is
    off by at most 1.01 · n² · 2⁻³² · s_i · s_j, one 2⁻⁸ of the bound of float32
    (cf. Ozaki et al. 2012, "Error-free transformations of matrix multiplication").

    Args:
        left: X, float64 ``[K, m, n]``.
        right: Y, float64 ``[K, n, p]``; None for Xᵀ, which takes three products instead of
            four.

    Returns:
        XY, float64 ``[K, m, p]``.
    """
    own = left.mT if right is None else right
    total = left.new_zeros(*left.shape[:-1], own.shape[-1])
    if not left.shape[-1]:
        return total
    pieces = torch.split(left, _EXACT_LENGTH, dim=-1)
    others = torch.split(own, _EXACT_LENGTH, dim=-2)
    for piece, other in zip(pieces, others, strict=True):
        scale, high, low = _split(piece)
        if right is None:
            mixed = (high @ low.mT).double()
            found = mixed + mixed.mT
            found += (high @ high.mT).double()
            found += (low @ low.mT).double()
            scale_other = scale
        else:
            scale_other, high_other, low_other = _split(other.mT)
            found = (high @ high_other.mT).double()
            found += (high @ low_other.mT).double()
            found += (low @ high_other.mT).double()
            found += (low @ low_other.mT).double()
        total += found.mul_(scale).mul_(scale_other.mT)
    return total


def _split(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Split rows into integers up to 2⁸ and a rest, float32, times a scale ``[K, n, 1]``."""
    largest = rows.abs().amax(dim=-1, keepdim=True)
    # The power of two above a float64 has the next exponent in its bits.
    exponent = (largest.view(torch.int64) >> 52) + 1 - _EXACT_BITS
    scale = (exponent.clamp_(min=1) << 52).view(torch.float64)
    scaled = rows / scale
    high = scaled.round()
    return scale, high.float(), (scaled - high).float()


def mirror(product: Tensor) -> Tensor:
    """Copy the lower half of symmetric matrices into the upper half, in place.

    Args:
        product: ``[K, n, n]``, from :func:`half_product`.

    Returns:
        The same tensor.
    """
    if _in_strips(product, product.shape[-1]):
        # A strip is complete up to its end.
        for low, high in _strips(product.shape[-1]):
            product[:, :low, low:high] = product[:, low:high, :low].mT
    return product


def cholesky(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Factorize symmetric matrices, reading the lower half only.

    Args:
        matrix: ``[K, n, n]``, float32 or float64.

    Returns:
        The lower factors ``[K, n, n]``, and True for each matrix without one, bool ``[K]``.
    """
    size = matrix.shape[-1]
    if matrix.device.type == "cpu" and size and size % _ALIASING == 0:
        # Rows at such distances push each other out of the cache: a few more columns make
        # LAPACK up to twice as fast.
        larger = functional.pad(matrix, (0, _PADDING, 0, _PADDING))
        larger.diagonal(dim1=-2, dim2=-1)[:, size:] = 1.0
        factor, info = torch.linalg.cholesky_ex(larger)
        factor = factor[:, :size, :size]
    else:
        factor, info = torch.linalg.cholesky_ex(matrix)
    finite = factor.diagonal(dim1=-2, dim2=-1).isfinite().all(dim=-1)
    return factor, (info != 0) | ~finite


def solve_lower(factor: Tensor, rows: Tensor, split: bool = False) -> Tensor:
    """Solve L Z = R by forward substitution.

    Args:
        factor: L, float32 or float64 ``[K, n, n]``, lower triangular.
        rows: R, ``[K, n, b]``, float32 or float64, any strides.
        split: multiply float64 matrices by :func:`split_product`.

    Returns:
        Z, ``[K, n, b]`` in the dtype of R.
    """
    if split:
        return split_product(invert_lower(factor), rows)
    if not _in_strips(rows, rows.shape[-2]):
        return invert_lower(factor).to(rows.dtype) @ rows
    solution = torch.empty_like(rows, memory_format=torch.contiguous_format)
    for lower, right, solved in zip(factor, rows, solution, strict=True):
        rounded = lower.to(rows.dtype)
        for low, high in _strips(len(lower)):
            strip = right[low:high]
            if low:
                strip = strip - rounded[low:high, :low] @ solved[:low]
            corner = invert_lower(lower[None, low:high, low:high])[0]
            torch.mm(corner.to(rows.dtype), strip, out=solved[low:high])
    return solution


def invert_lower(factor: Tensor) -> Tensor:
    """Invert lower triangular matrices.

    Both halves of all matrices form one batch, and so on:
    [A 0; B C]⁻¹ = [A⁻¹ 0; −C⁻¹BA⁻¹ C⁻¹].

    Args:
        factor: L, ``[K, n, n]``.

    Returns:
        L⁻¹, ``[K, n, n]``.
    """
    size = factor.shape[-1]
    if size <= _SMALL or factor.device.type != "cpu":
        identity = torch.eye(size, dtype=factor.dtype, device=factor.device)
        solved: Tensor = torch.linalg.solve_triangular(
            factor, identity.expand_as(factor), upper=False
        )
        return solved
    half = size // 2
    # Of an odd size, the row and the column between both halves belong to the second.
    first, second = factor[:, :half, :half], factor[:, half:, half:]
    if size % 2:
        upper, lower = invert_lower(first), invert_lower(second)
    else:
        upper, lower = invert_lower(torch.cat([first, second])).chunk(2)
    inverse = torch.zeros_like(factor)
    inverse[:, :half, :half] = upper
    inverse[:, half:, half:] = lower
    inverse[:, half:, :half] = (lower @ (factor[:, half:, :half] @ upper)).neg_()
    return inverse


def multiply(matrices: Tensor, vectors: Tensor) -> Tensor:
    """Multiply matrices by vectors.

    Args:
        matrices: X, ``[K, m, n]``, any strides.
        vectors: V, ``[K, n, v]`` of the same dtype.

    Returns:
        XV, ``[K, m, v]``.
    """
    # Products of rows and matrices are up to ten times faster than those with columns.
    return (vectors.mT @ matrices.mT).mT


def _in_strips(tensor: Tensor, size: int) -> bool:
    """Return whether strips are faster; a GPU needs batches to be busy."""
    return tensor.device.type == "cpu" and size >= 2 * _STRIP


def _strips(size: int) -> Iterator[tuple[int, int]]:
    number = max(1, size // _STRIP)
    ends = [round(size * i / number) for i in range(number + 1)]
    return zip(ends, ends[1:], strict=False)
