"""Groups of weights that are pruned together: N:M, consecutive weights, whole rows.

Groups of N:M and of blocks run along the inputs of a layer: consecutive columns of a Linear
weight ``[out, in]``, and consecutive input channels at one position of the kernel of a
convolution ``[out, in, h, w]``. Weights that have their inputs first (transposed convolutions,
``Conv1D``) are viewed with their outputs first. Sparse matrix products read a convolution in
this order (channels last), and hardware accelerates 2:4 in this order.

The cost of a group is its joint saliency ½ w_Sᵀ([F⁻¹]_SS)⁻¹w_S: the increase of the quadratic
model if S is removed and all other weights of the block are re-optimized.
"""

from __future__ import annotations

__all__ = [
    "SMALL_GROUP",
    "UNSTRUCTURED",
    "GroupRun",
    "Pattern",
    "cheapest_in_groups",
    "group_costs",
    "numbers_at_once",
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

from lightning_woodfisher.base.errors import ConfigurationError
from lightning_woodfisher.distributed.dtensor import is_sharded
from lightning_woodfisher.weights.layers import find_inputs_first

_LARGEST_GROUP = 8
_LARGEST_BLOCK = 64
# Only rows can be larger; they may consist of several blocks of the Fisher.
SMALL_GROUP = _LARGEST_BLOCK
# Elements of the matrices of all supports of the groups that are compared at once.
_NUMBERS_AT_ONCE = 2**22


@dataclass(frozen=True)
class Pattern:
    """Which weights form a group, and how many of them are kept.

    Attributes:
        kind: kind of the groups.
        size: weights of a group (M of N:M, Q of blocks); 0 for rows, whose size depends
            on the tensor.
        kept: weights that a group keeps (N of N:M).
    """

    kind: Literal["unstructured", "N:M", "block", "rows"] = "unstructured"
    size: int = 1
    kept: int = 0

    @property
    def sparsity(self) -> float | None:
        """Share of zeros that the pattern determines; None if it does not."""
        return 1.0 - self.kept / self.size if self.kind == "N:M" else None

    @property
    def is_grouped(self) -> bool:
        """Whether weights are pruned in groups."""
        return self.kind != "unstructured"

    def group_size(self, shape: Sequence[int]) -> int:
        """Count the weights of a group.

        Args:
            shape: shape of the tensor, outputs first.

        Returns:
            Their number.
        """
        return math.prod(shape[1:]) if self.kind == "rows" else self.size

    def removed_per_group(self, shape: Sequence[int]) -> int:
        """Count the weights that are removed from a group.

        Args:
            shape: shape of the tensor, outputs first.

        Returns:
            Their number.
        """
        return self.group_size(shape) - self.kept

    def grouped(self, tensor: Tensor) -> Tensor:
        """View a tensor group by group.

        Args:
            tensor: tensor of the shape of a weight, outputs first, or of consecutive rows
                of it.

        Returns:
            ``[groups, group_size]``.
        """
        along = tensor if self.kind == "rows" else tensor.movedim(1, -1)
        return along.reshape(-1, self.group_size(tensor.shape))

    def complete_groups(self, zero: Tensor) -> Tensor:
        """Mark the zeros of groups that have enough of them.

        Args:
            zero: bool, of the shape of a weight with its outputs first.

        Returns:
            bool, of the same shape: in each group with enough zeros the first ones, up to
            the number that is removed from a group.
        """
        groups = self.grouped(zero)
        wanted = self.removed_per_group(zero.shape)
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
        """Range of the weights in the shard."""
        return slice(self.start, self.start + self.size * self.count)


def parse_pattern(text: str) -> Pattern:
    """Parse ``selection.pattern``.

    Args:
        text: for example ``"unstructured"``, ``"2:4"``, ``"block4"`` or ``"rows"``.

    Returns:
        The pattern.

    Raises:
        ConfigurationError: for any other text.

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
        f"1 <= N < M <= {_LARGEST_GROUP} such as '2:4' (quote it in YAML, which reads 2:4 as "
        f"a number), or blocks of 2 to {_LARGEST_BLOCK} weights such as 'block4'."
    )


def require_pattern_fits(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], text: str
) -> None:
    """Check that all tensors can be cut into groups.

    Args:
        model: the network.
        parameters: those to prune, by name.
        text: ``selection.pattern``.

    Raises:
        ConfigurationError: naming the tensors that cannot.
    """
    pattern = parse_pattern(text)
    if not pattern.is_grouped:
        return
    bad: dict[str, str] = {}
    inputs_first = find_inputs_first(model, list(parameters))
    for name, parameter in parameters.items():
        owner = model.get_submodule(name.rpartition(".")[0])
        inputs = parameter.shape[0 if name in inputs_first else 1]
        if name in inputs_first and getattr(owner, "groups", 1) > 1:
            bad[name] = "a transposed convolution with groups"
        elif name in inputs_first and is_sharded(parameter):
            bad[name] = "its inputs are sharded over the ranks"
        elif pattern.kind != "rows" and inputs % pattern.size:
            bad[name] = f"{inputs} inputs"
    if bad:
        needs = "" if pattern.kind == "rows" else f" needs a multiple of {pattern.size}"
        listed = ", ".join(f"{name} ({why})" for name, why in bad.items())
        names = [f"^{re.escape(name)}$" for name in bad]
        raise ConfigurationError(
            f"selection.pattern={text!r}{needs} inputs and does not fit {listed}; "
            f"leave them dense with selection.exclude={names}."
        )


def group_costs(
    inverse: Tensor, weights: Tensor, pattern: Pattern
) -> tuple[Tensor, Tensor]:
    """Find the weights that can be removed from each group at least cost.

    Args:
        inverse: [F⁻¹] of each group, float64 ``[G, q, q]``.
        weights: float64 ``[G, q]``.
        pattern: for N:M all supports are compared; otherwise the whole group is removed.

    Returns:
        The cost ½ w_Sᵀ([F⁻¹]_SS)⁻¹w_S, ``[G]``, and S, bool ``[G, q]``. For equal costs the
        first S in lexicographic order.
    """
    size = weights.shape[1]
    if pattern.kind != "N:M":
        # Does not raise for a matrix that has no factor; that one is computed again.
        factor, _ = torch.linalg.cholesky_ex(inverse)
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


def numbers_at_once(groups: int, size: int, pattern: Pattern) -> int:
    """Count the elements of the submatrices that :func:`group_costs` compares at once.

    Args:
        groups: number of groups.
        size: weights of a group.
        pattern: N:M.

    Returns:
        Elements in memory at once.
    """
    leaving = size - pattern.kept
    each = math.comb(size, leaving) * leaving**2
    return each * min(groups, max(1, _NUMBERS_AT_ONCE // each))


def _support_costs(inverse: Tensor, weights: Tensor, supports: Tensor) -> Tensor:
    """Compute the joint cost of every support of every group, ``[g, C]``."""
    matrices = inverse[:, supports.unsqueeze(2), supports.unsqueeze(1)]
    values = weights[:, supports]
    total = torch.zeros_like(values[..., 0])
    # Eliminate over the whole batch, because LAPACK is called once per tiny matrix.
    for _ in range(supports.shape[1]):
        pivot, head = matrices[..., 0, 0], values[..., 0]
        total += head.square() / pivot
        column = matrices[..., 1:, 0] / pivot.unsqueeze(-1)
        values = values[..., 1:] - column * head.unsqueeze(-1)
        row = matrices[..., 0, 1:].unsqueeze(-2)
        matrices = matrices[..., 1:, 1:] - column.unsqueeze(-1) * row
    return 0.5 * total


def cheapest_in_groups(
    scores: Tensor, runs: Sequence[GroupRun], pattern: Pattern
) -> tuple[Tensor, Tensor]:
    """Choose the weights to remove from each group if their scores simply add up.

    Args:
        scores: score of each weight, float64 ``[D_r]``.
        runs: the groups.
        pattern: defines how many weights of a group are kept.

    Returns:
        The cost of each group, float64 ``[G_r]``, and bool ``[D_r]``, True for weights
        that are removed.
    """
    leaving = torch.zeros_like(scores, dtype=torch.bool)
    costs = [scores.new_zeros(0)]
    for run in runs:
        each = scores[run.local].view(run.count, run.size)
        order = each.sort(dim=1, stable=True).indices[:, : run.size - pattern.kept]
        costs.append(each.gather(1, order).sum(dim=1))
        leaving[run.local].view(run.count, run.size).scatter_(1, order, True)
    return torch.cat(costs), leaving
