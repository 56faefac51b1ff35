"""Products of split matrices against float64, and the arithmetics of devices."""

from __future__ import annotations

import types

import pytest
import torch
from torch import Tensor

from lightning_woodfisher.fisher.linalg import (
    cholesky,
    choose_arithmetics,
    invert_lower,
    multiply,
    solve_lower,
    split_product,
)


def matrix(rows: int, columns: int, kind: str, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(2, rows, columns, generator=generator, dtype=torch.float64)
    if kind == "constant":
        # All roundings go into the same direction.
        values = torch.full_like(values, 1.0 + 2.0**-11 + 2.0**-20)
    elif kind == "scaled":
        values *= 10.0 ** (30 * torch.rand(2, rows, 1, generator=generator) - 15)
        values[:, 0] = 0.0
    return values


def scales(rows: Tensor) -> Tensor:
    """The power of two above the largest entry of each row."""
    if not rows.shape[-1]:
        return torch.ones(*rows.shape[:-1], 1, dtype=rows.dtype)
    return torch.exp2(rows.abs().amax(dim=-1, keepdim=True).log2().floor() + 1)


@pytest.mark.parametrize("kind", ["normal", "constant", "scaled"])
@pytest.mark.parametrize("length", [0, 1, 40, 256])
@pytest.mark.parametrize("symmetric", [True, False])
def test_split_products_keep_their_bound(
    kind: str, length: int, symmetric: bool
) -> None:
    left = matrix(30, length, kind)
    other = left if symmetric else matrix(20, length, kind, seed=1)
    found = split_product(left, None if symmetric else other.mT)
    exact = left @ other.mT
    bound = 1.01 * length**2 * 2.0**-32 * scales(left) * scales(other).mT
    assert bool(((found - exact).abs() <= bound).all())


@pytest.mark.parametrize("length", [256, 1000])
def test_split_products_have_eight_bits_more_than_float32(length: int) -> None:
    left = matrix(60, length, "normal")
    exact = left @ left.mT

    def error(product: Tensor) -> float:
        return float((product.double() - exact).abs().max())

    single = left.float()
    assert error(split_product(left)) < error(single @ single.mT) / 100


def test_split_rows_that_cancel() -> None:
    """The difference of two products, of which float32 keeps no digit."""
    left = torch.ones(1, 2, 200, dtype=torch.float64)
    left[0, 1] += 2.0**-14
    gram = split_product(left)[0]
    gap = float(gram[1, 1] - gram[0, 1])
    assert gap == pytest.approx(200 * (2.0**-14 + 2.0**-28), rel=1e-4)


@pytest.mark.parametrize(
    ("capability", "expected"),
    [
        ((9, 0), ("float32", "float64")),
        ((8, 0), ("float32", "float64")),
        ((8, 6), ("float32", "split", "float64")),
        ((7, 5), ("float32", "split", "float64")),
        ((12, 0), ("float32", "split", "float64")),
    ],
)
def test_products_are_split_where_float64_is_slow(
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    expected: tuple[str, ...],
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch, "version", types.SimpleNamespace(hip=None))
    assert choose_arithmetics("auto", torch.device("cuda")) == expected
    assert choose_arithmetics("auto", torch.device("cpu")) == ("float32", "float64")
    assert choose_arithmetics("float64", torch.device("cuda")) == ("float64",)
    assert choose_arithmetics("split", torch.device("cpu")) == ("split", "float64")


# Those that LAPACK inverts, odd halves, and strips of rows.
@pytest.mark.parametrize("size", [1, 16, 17, 50, 67, 200])
def test_triangular_matrices_are_inverted_and_solved(size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    factor = torch.randn(3, size, size, generator=generator, dtype=torch.float64).tril()
    factor.diagonal(dim1=-2, dim2=-1).abs_().add_(size)
    inverse = invert_lower(factor)
    identity = torch.eye(size, dtype=torch.float64).expand(3, size, size)
    torch.testing.assert_close(factor @ inverse, identity)
    assert not inverse.triu(1).any()
    # Rows as a Fisher stores them: the blocks are not contiguous.
    stored = torch.randn(size, 3 * 5, generator=generator, dtype=torch.float64)
    rows = stored.view(size, 3, 5).transpose(0, 1)
    before = rows.clone()
    torch.testing.assert_close(factor @ solve_lower(factor, rows), before)
    assert torch.equal(rows, before)
    vectors = torch.randn(3, 5, 2, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(multiply(rows, vectors), rows @ vectors)


@pytest.mark.parametrize(("number", "size"), [(256, 3), (2, 256), (3, 255)])
def test_lower_factors_have_the_shape_of_their_matrices(number: int, size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(number, size, size, generator=generator, dtype=torch.float64)
    matrices = rows @ rows.mT + torch.eye(size, dtype=torch.float64)
    matrices[1] = -matrices[1]
    factors, failed = cholesky(matrices)
    assert failed.nonzero().flatten().tolist() == [1]
    good = torch.arange(number) != 1
    lower = factors[good].tril()
    torch.testing.assert_close(lower @ lower.mT, matrices[good], rtol=1e-12, atol=1e-9)
