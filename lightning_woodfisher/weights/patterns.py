"""Weights that may only go together: N:M, blocks of consecutive weights, whole rows.

Groups of N:M and of blocks lie along the inputs of a layer: consecutive columns of a
Linear weight ``[out, in]``, and consecutive input channels at one place of the kernel of
a convolution ``[out, in, h, w]``. That is the order in which sparse matrix products read
a convolution (channels last), and the one in which 2:4 is accelerated.

What a group costs is its joint saliency ½ w_Sᵀ([F⁻¹]_SS)⁻¹w_S: the rise of the quadratic
model when S goes and all other weights of the block are re-optimised.
"""

from __future__ import annotations

__all__ = [
    "SMALL_GROUP",
    "UNSTRUCTURED",
    "GroupRun",
    "Pattern",
    "cheapest_in_groups",
    "group_costs",
    "numbers_in_work",
    "parse_pattern",
    "require_pattern_fits",
]

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from lightning_woodfisher.base.errors import ConfigurationError

_LARGEST_GROUP = 8
_LARGEST_BLOCK = 64
# Only rows are larger; they may consist of several blocks of the Fisher.
SMALL_GROUP = _LARGEST_BLOCK
# Numbers in the matrices of all supports of the groups that are compared at once.
_NUMBERS_AT_ONCE = 2**22


@dataclass(frozen=True)
class Pattern:
    """What goes together.

    Attributes:
        kind: of group.
        size: weights of a group (M of N:M, Q of blocks); 0 for rows, whose size is that
            of the tensor.
        kept: weights that a group keeps (N of N:M).
    """

    kind: Literal["unstructured", "N:M", "block", "rows"] = "unstructured"
    size: int = 1
    kept: int = 0

    @property
    def sparsity(self) -> float | None:
        """Share of zeros of a network of this pattern; None where it is free."""
        return 1.0 - self.kept / self.size if self.kind == "N:M" else None

    @property
    def is_grouped(self) -> bool:
        """Whether weights go in groups."""
        return self.kind != "unstructured"

    def group_size(self, shape: Sequence[int]) -> int:
        """Count the weights of a group.

        Args:
            shape: of the tensor.

        Returns:
            Their number.
        """
        return math.prod(shape[1:]) if self.kind == "rows" else self.size

    def leaving(self, shape: Sequence[int]) -> int:
        """Count the weights that a group gives up.

        Args:
            shape: of the tensor.

        Returns:
            Their number.
        """
        return self.group_size(shape) - self.kept

    def grouped(self, tensor: Tensor) -> Tensor:
        """View a tensor group by group.

        Args:
            tensor: of the shape of a weight, or of consecutive rows of it.

        Returns:
            ``[groups, group_size]``.
        """
        along = tensor if self.kind == "rows" else tensor.movedim(1, -1)
        return along.reshape(-1, self.group_size(tensor.shape))

    def complete(self, zero: Tensor) -> Tensor:
        """Find groups that have given up already what they must.

        Args:
            zero: bool, of the shape of a weight.

        Returns:
            bool, of the same shape: in each group with enough zeros as many as a group
            gives up, the first ones; no others.
        """
        groups = self.grouped(zero)
        wanted = self.leaving(zero.shape)
        enough = groups.sum(dim=1, keepdim=True) >= wanted
        taken = groups & enough & (groups.cumsum(dim=1) <= wanted)
        places = torch.arange(zero.numel(), device=zero.device).view(zero.shape)
        result = torch.zeros_like(zero).flatten()
        result[self.grouped(places)[taken]] = True
        return result.view(zero.shape)


UNSTRUCTURED = Pattern()


@dataclass(frozen=True)
class GroupRun:
    """Consecutive groups of equal size inside one unit of this rank.

    Attributes:
        unit: number of the unit among those of the rank.
        layer: number of the tensor.
        start: first weight, counted in the shard.
        size: weights of a group.
        count: groups.
    """

    unit: int
    layer: int
    start: int
    size: int
    count: int

    @property
    def local(self) -> slice:
        """Where the weights are in the shard."""
        return slice(self.start, self.start + self.size * self.count)


def parse_pattern(text: str) -> Pattern:
    """Read ``selection.pattern``.

    Args:
        text: ``"unstructured"``, ``"2:4"``, ``"block4"``, ``"rows"`` and the like.

    Returns:
        The pattern.

    Raises:
        ConfigurationError: for anything else.

    Examples:
        >>> parse_pattern("2:4").sparsity
        0.5
        >>> parse_pattern("block16").size
        16
    """
    if isinstance(text, str):
        if text in {"unstructured", "rows"}:
            return Pattern(text, 0 if text == "rows" else 1)  # type: ignore[arg-type]
        if match := re.fullmatch(r"(\d{1,3}):(\d{1,3})", text):
            kept, size = int(match[1]), int(match[2])
            if 1 <= kept < size <= _LARGEST_GROUP:
                return Pattern("N:M", size, kept)
        if match := re.fullmatch(r"block(\d{1,3})", text):
            size = int(match[1])
            if 2 <= size <= _LARGEST_BLOCK:
                return Pattern("block", size)
    raise ConfigurationError(
        f"selection.pattern={text!r} is unknown; use 'unstructured', 'rows', N:M with "
        f"1 <= N < M <= {_LARGEST_GROUP} such as '2:4' (in YAML in quotes: 2:4 alone is a "
        f"number there), or blocks of 2 to {_LARGEST_BLOCK} weights such as 'block4'."
    )


def require_pattern_fits(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], text: str
) -> None:
    """Refuse tensors that cannot be cut into groups.

    Args:
        model: owns them.
        parameters: the selected ones, by name.
        text: ``selection.pattern``.

    Raises:
        ConfigurationError: naming all of them.
    """
    pattern = parse_pattern(text)
    if not pattern.is_grouped:
        return
    bad: dict[str, str] = {}
    for name, parameter in parameters.items():
        owner = model.get_submodule(name.rpartition(".")[0])
        if isinstance(owner, _ConvTransposeNd):
            bad[name] = "a transposed convolution has its inputs first"
        elif pattern.kind != "rows" and parameter.shape[1] % pattern.size:
            bad[name] = f"{parameter.shape[1]} inputs"
    if bad:
        needs = (
            "" if pattern.kind == "rows" else f" needs a multiple of {pattern.size} "
        )
        listed = ", ".join(f"{name} ({why})" for name, why in bad.items())
        names = [f"^{re.escape(name)}$" for name in bad]
        raise ConfigurationError(
            f"selection.pattern={text!r}{needs or ' '}inputs and does not fit {listed}; "
            f"leave them dense with selection.exclude={names}."
        )


def group_costs(
    inverse: Tensor, weights: Tensor, pattern: Pattern
) -> tuple[Tensor, Tensor]:
    """Find what each group gives up at least cost, and the cost.

    Args:
        inverse: [F⁻¹] of each group, float64 ``[G, q, q]``.
        weights: float64 ``[G, q]``.
        pattern: of N:M all supports are compared; otherwise the whole group goes.

    Returns:
        ½ w_Sᵀ([F⁻¹]_SS)⁻¹w_S, ``[G]``, and S, bool ``[G, q]``. Of equal costs the first S
        in lexicographic order.
    """
    size = weights.shape[1]
    if pattern.kind != "N:M":
        factor = torch.linalg.cholesky(inverse)
        solved = torch.linalg.solve_triangular(
            factor, weights.unsqueeze(-1), upper=False
        )
        cost = 0.5 * solved.squeeze(-1).square().sum(dim=-1)
        return cost, torch.ones_like(weights, dtype=torch.bool)
    supports = torch.tensor(
        list(itertools.combinations(range(size), size - pattern.kept)),
        device=weights.device,
    )
    at_once = max(1, _NUMBERS_AT_ONCE // (supports.numel() * supports.shape[1]))
    pieces = [
        _support_costs(matrices, values, supports)
        for matrices, values in zip(
            torch.split(inverse, at_once), torch.split(weights, at_once), strict=True
        )
    ]
    costs = torch.cat(pieces)
    cost = costs.amin(dim=1)
    order = torch.arange(len(supports), device=costs.device)
    first = torch.where(costs == cost.unsqueeze(1), order, len(supports)).amin(dim=1)
    leaving = torch.zeros_like(weights, dtype=torch.bool)
    leaving.scatter_(1, supports[first.clamp(max=len(supports) - 1)], True)
    return cost, leaving


def numbers_in_work(groups: int, size: int, pattern: Pattern) -> int:
    """Count the numbers of the sub-matrices of supports that are compared at once.

    Args:
        groups: how many there are.
        size: weights of a group.
        pattern: N:M.

    Returns:
        What :func:`group_costs` holds of them.
    """
    leaving = size - pattern.kept
    each = math.comb(size, leaving) * leaving**2
    return each * min(groups, max(1, _NUMBERS_AT_ONCE // each))


def _support_costs(inverse: Tensor, weights: Tensor, supports: Tensor) -> Tensor:
    """Joint cost of every support of every group, ``[g, C]``."""
    matrices = inverse[:, supports.unsqueeze(2), supports.unsqueeze(1)]
    values = weights[:, supports]
    total = torch.zeros_like(values[..., 0])
    # Elimination over the whole batch: LAPACK is called once for each tiny matrix.
    for _ in range(supports.shape[1]):
        pivot, head = matrices[..., 0, 0], values[..., 0]
        total += head.square() / pivot
        column = matrices[..., 1:, 0] / pivot.unsqueeze(-1)
        values = values[..., 1:] - column * head.unsqueeze(-1)
        row = matrices[..., 0, 1:].unsqueeze(-2)
        matrices = matrices[..., 1:, 1:] - column.unsqueeze(-1) * row
    return 0.5 * total


def cheapest_in_groups(
    worth: Tensor, runs: Sequence[GroupRun], pattern: Pattern
) -> tuple[Tensor, Tensor]:
    """Choose what leaves each group when weights do not depend on each other.

    Args:
        worth: of each weight, float64 ``[D_r]``.
        runs: the groups.
        pattern: how many of a group stay.

    Returns:
        What leaves costs, float64 ``[G_r]``, and bool ``[D_r]``: what leaves.
    """
    leaving = torch.zeros_like(worth, dtype=torch.bool)
    costs = [worth.new_zeros(0)]
    for run in runs:
        each = worth[run.local].view(run.count, run.size)
        order = each.sort(dim=1, stable=True).indices[:, : run.size - pattern.kept]
        costs.append(each.gather(1, order).sum(dim=1))
        leaving[run.local].view(run.count, run.size).scatter_(1, order, True)
    return torch.cat(costs), leaving
