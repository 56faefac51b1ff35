"""The damped empirical Fisher in blocks, and its inverse in closed form.

With rows ``g_i`` (gradients of the mean loss of the i-th mini-batch) and a block's columns
``G`` of shape ``[N, B]``::

    F = λ I + (1/N) Σ_i g_i g_iᵀ = λ I + GᵀG / N          (WoodFisher, section 3)

The literature inverts F with N rank-one Woodbury updates. Here the same inverse comes from
one factorisation, in one of two exact forms:

* **primal** (B <= N): ``A = GᵀG`` is accumulated while gradients arrive, rows are not kept;
  F is factorised by Cholesky.
* **dual** (N < B, and the full Fisher): rows are kept, ``NλI + GGᵀ = LLᵀ``, ``Z = L⁻¹G``,
  ``F⁻¹ = (I − ZᵀZ) / λ`` (Woodbury identity).

Rows may be float32; products are accumulated and factorised in float64.
Shapes: D_r active weights of this rank, N gradients, B block size, K blocks of a unit.
"""

from __future__ import annotations

__all__ = [
    "Collection",
    "DualInverseFisher",
    "Engine",
    "FisherConfig",
    "FullInverseFisher",
    "InverseFisher",
    "PrimalInverseFisher",
    "RowDtype",
    "block_cost",
    "choose_engine",
    "full_column_chunk",
    "make_inverse_fisher",
]

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_woodfisher.distributed import Communicator
from lightning_woodfisher.errors import ConfigurationError, PruningError
from lightning_woodfisher.isolation import ModelMode
from lightning_woodfisher.partition import Partition, Unit

Engine = Literal["auto", "primal", "dual"]
Collection = Literal["auto", "loop"]
RowDtype = Literal["float32", "bfloat16"]

# λ·[F⁻¹]_jj = 1 − Σ Z² is a difference of numbers near one: below this float64 has too few
# digits left for it, and damping is raised.
_SMALLEST_COMPLEMENT = 1e-12
# The same for a pivot, beside the entry of the diagonal that it is left over from: Cholesky
# may succeed by luck on a block that is singular in float64.
_SMALLEST_PIVOT = 1e-12
_MOST_RAISES = 60


@dataclass(frozen=True)
class FisherConfig:
    """How the empirical Fisher is estimated.

    Args:
        num_gradients: N, the number of gradients.
        gradient_batch_size: m, samples in the mini-batch of one gradient. 1 is the
            empirical Fisher proper; larger m is the paper's heuristic for large data.
        block_size: B, most weights in a block; None for one block over all weights (best
            where N gradients fit into memory).
        damping: λ, added to the diagonal.
        model_mode: ``"eval"`` takes gradients with running BatchNorm statistics and no
            dropout, ``"train"`` with those of training.
        engine: ``"primal"``, ``"dual"``, or ``"auto"`` for the cheaper one; they are the
            same matrix.
        collection: ``"auto"`` computes many gradients in one pass where that gives the
            same numbers, ``"loop"`` each of them on its own.
        row_dtype: of gradients that are exchanged and kept; bfloat16 halves both.
    """

    num_gradients: int = 256
    gradient_batch_size: int = 16
    block_size: int | None = 256
    damping: float = 1e-4
    model_mode: ModelMode = "eval"
    engine: Engine = "auto"
    collection: Collection = "auto"
    row_dtype: RowDtype = "float32"

    def __post_init__(self) -> None:
        for name in ("num_gradients", "gradient_batch_size", "block_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                hint = "; None means one block over all weights" * (
                    name == "block_size"
                )
                raise ConfigurationError(
                    f"fisher.{name}={value} must be at least 1{hint}."
                )
        if not (self.damping > 0 and math.isfinite(self.damping)):
            raise ConfigurationError(
                f"fisher.damping={self.damping} must be positive and finite; without it "
                "the Fisher of fewer gradients than weights has no inverse."
            )
        for name, known in (
            ("model_mode", ModelMode),
            ("engine", Engine),
            ("collection", Collection),
            ("row_dtype", RowDtype),
        ):
            if getattr(self, name) not in get_args(known):
                raise ConfigurationError(
                    f"fisher.{name}={getattr(self, name)!r} is unknown; use one of "
                    f"{', '.join(get_args(known))}."
                )


def choose_engine(engine: Engine, num_gradients: int, block_size: int) -> Engine:
    """Resolve ``"auto"``.

    Args:
        engine: what the user asked for.
        num_gradients: N.
        block_size: B.

    Returns:
        ``"primal"`` when N >= B and ``"dual"`` otherwise, unless one was asked for.
    """
    if engine != "auto":
        return engine
    return "primal" if num_gradients >= block_size else "dual"


class InverseFisher(ABC):
    """This rank's blocks of the inverse Fisher.

    Feed all N gradients with :meth:`observe`, call :meth:`factorize` once, then ask.
    Vectors are float64 tensors of shape ``[D_r]``.

    Args:
        partition: all blocks and their owners.
        num_gradients: N, the number of rows that will be observed.
        damping: λ.
        communicator: the ranks.
    """

    def __init__(
        self,
        partition: Partition,
        num_gradients: int,
        damping: float,
        communicator: Communicator,
    ) -> None:
        self.units = partition.owned(communicator.rank)
        self.num_gradients = num_gradients
        self._comm = communicator
        self._device = communicator.device
        shard = partition.shard(communicator.rank)
        self._offset = shard.start
        self.size = shard.stop - shard.start
        self._observed = 0
        self._total_units = len(partition.units)
        self._initial_damping = damping
        self._diagonal = torch.zeros(
            self.size, dtype=torch.float64, device=self._device
        )
        self._dampings = [self._full(unit.count, damping) for unit in self.units]

    @property
    def damping(self) -> Tensor:
        """λ of each block of this rank, float64 ``[blocks]``; raised where needed."""
        return torch.cat([self._full(0, 0.0), *self._dampings])

    def raised(self) -> dict[int, float]:
        """List the blocks whose damping had to be raised.

        Returns:
            λ by index of the block's first active weight (global number).
        """
        return {
            unit.start + block * unit.size: value
            for unit, damping in zip(self.units, self._dampings, strict=True)
            for block, value in enumerate(damping.tolist())
            if value != self._initial_damping
        }

    @property
    @abstractmethod
    def state_bytes(self) -> int:
        """Bytes of the state that this rank keeps for its blocks."""

    def observe(self, rows: Tensor) -> None:
        """Take in the next gradients.

        Args:
            rows: tensor of shape ``[n, D_r]``, any floating dtype.

        Raises:
            ValueError: for more rows than announced or a wrong width.
        """
        if (
            rows.shape[1] != self.size
            or self._observed + len(rows) > self.num_gradients
        ):
            raise ValueError(
                f"got rows of shape {tuple(rows.shape)} after {self._observed} of "
                f"{self.num_gradients}; their width must be {self.size}"
            )
        self._add(rows)
        self._observed += len(rows)

    def factorize(self) -> None:
        """Invert; call it after the last gradient.

        Raises:
            ValueError: when fewer gradients than announced were observed.
        """
        if self._observed != self.num_gradients:
            raise ValueError(
                f"observed {self._observed} gradients of {self.num_gradients}"
            )
        self._factorize()

    def diagonal(self) -> Tensor:
        """Give the diagonal of F⁻¹.

        Returns:
            float64 tensor ``[D_r]``.
        """
        return self._diagonal

    @abstractmethod
    def matvec(self, vector: Tensor) -> Tensor:
        """Multiply by the inverse.

        Args:
            vector: float64 tensor ``[D_r]``.

        Returns:
            F⁻¹v, float64 tensor ``[D_r]``.
        """

    @abstractmethod
    def fisher_matvec(self, vector: Tensor) -> Tensor:
        """Multiply by the Fisher itself.

        Args:
            vector: float64 tensor ``[D_r]``.

        Returns:
            Fv, float64 tensor ``[D_r]``.
        """

    @abstractmethod
    def constrained_solve(self, weights: Tensor, removed: Tensor) -> Tensor:
        """Minimise ½δᵀFδ under ``weights + δ = 0`` where ``removed`` holds.

        Args:
            weights: float64 tensor ``[D_r]``.
            removed: bool tensor ``[D_r]``.

        Returns:
            δ, float64 tensor ``[D_r]``: F_RR⁻¹F_RS w_S on the kept weights R and −w_S on
            the removed weights S.
        """

    def to_dense(self) -> Tensor:
        """Build this rank's part of F⁻¹ as one matrix; for small problems and tests.

        Returns:
            float64 tensor ``[D_r, D_r]``, zero outside the blocks.
        """
        identity = torch.eye(self.size, dtype=torch.float64, device=self._device)
        return torch.stack([self.matvec(column) for column in identity], dim=1)

    @abstractmethod
    def _add(self, rows: Tensor) -> None: ...

    @abstractmethod
    def _factorize(self) -> None: ...

    def _full(self, size: int, value: float) -> Tensor:
        return torch.full((size,), value, dtype=torch.float64, device=self._device)

    def _local(self, unit: Unit) -> slice:
        return slice(unit.start - self._offset, unit.stop - self._offset)

    def _blocks(self, vector: Tensor, unit: Unit) -> Tensor:
        """View the weights of a unit as ``[K, B]``."""
        return vector[self._local(unit)].view(unit.count, unit.size)


class PrimalInverseFisher(InverseFisher):
    """Blocks by Cholesky of F itself; state is one B×B matrix for each block."""

    def __init__(
        self,
        partition: Partition,
        num_gradients: int,
        damping: float,
        communicator: Communicator,
    ) -> None:
        super().__init__(partition, num_gradients, damping, communicator)
        # GᵀG while gradients arrive, GᵀG/N after.
        self._gram = [
            torch.zeros(
                u.count, u.size, u.size, dtype=torch.float64, device=self._device
            )
            for u in self.units
        ]

    @property
    def state_bytes(self) -> int:
        """Bytes of the state that this rank keeps for its blocks."""
        return sum(gram.numel() * gram.element_size() for gram in self._gram)

    def _add(self, rows: Tensor) -> None:
        for unit, gram in zip(self.units, self._gram, strict=True):
            blocks = _columns(rows, self._local(unit), unit)
            gram.baddbmm_(blocks.mT, blocks)

    def _factorize(self) -> None:
        for index, unit in enumerate(self.units):
            self._gram[index] /= self.num_gradients
            factor = self._factor(index, lambda damped: damped)
            identity = torch.eye(unit.size, dtype=torch.float64, device=self._device)
            inverse_factor = torch.linalg.solve_triangular(
                factor, identity.expand_as(factor), upper=False
            )
            self._blocks(self._diagonal, unit).copy_(
                inverse_factor.square().sum(dim=-2)
            )

    def matvec(self, vector: Tensor) -> Tensor:
        """See :meth:`InverseFisher.matvec`.

        Args:
            vector: float64 tensor ``[D_r]``.

        Returns:
            F⁻¹v.
        """
        result = torch.empty_like(vector)
        for index, unit in enumerate(self.units):
            factor = self._factor(index, lambda damped: damped)
            solved = torch.cholesky_solve(
                self._blocks(vector, unit).unsqueeze(-1), factor
            )
            self._blocks(result, unit).copy_(solved.squeeze(-1))
        return result

    def fisher_matvec(self, vector: Tensor) -> Tensor:
        """See :meth:`InverseFisher.fisher_matvec`.

        Args:
            vector: float64 tensor ``[D_r]``.

        Returns:
            Fv.
        """
        result = torch.empty_like(vector)
        for unit, gram, damping in zip(
            self.units, self._gram, self._dampings, strict=True
        ):
            blocks = self._blocks(vector, unit)
            product = (gram @ blocks.unsqueeze(-1)).squeeze(-1)
            self._blocks(result, unit).copy_(product + damping.unsqueeze(-1) * blocks)
        return result

    def constrained_solve(self, weights: Tensor, removed: Tensor) -> Tensor:
        """See :meth:`InverseFisher.constrained_solve`.

        Args:
            weights: float64 tensor ``[D_r]``.
            removed: bool tensor ``[D_r]``.

        Returns:
            δ.
        """
        change = torch.where(removed, -weights, 0.0)
        for index, unit in enumerate(self.units):
            gone = self._blocks(removed, unit)
            kept = (~gone).double()

            def keep_rows(damped: Tensor, kept: Tensor = kept) -> Tensor:
                # Rows and columns of removed weights become those of the identity.
                masked = damped * kept.unsqueeze(-1) * kept.unsqueeze(-2)
                return masked + torch.diag_embed(1.0 - kept)

            # −F δ_S on the kept rows; λI does not couple R with S.
            pull = -(self._gram[index] @ self._blocks(change, unit).unsqueeze(-1))
            factor = self._factor(index, keep_rows)
            solved = torch.cholesky_solve(pull * kept.unsqueeze(-1), factor)
            self._blocks(change, unit).add_(solved.squeeze(-1) * kept)
        return change

    def _factor(self, index: int, transform: Callable[[Tensor], Tensor]) -> Tensor:
        """Cholesky factor of a transformed F of one unit; raises damping where needed."""
        gram = self._gram[index]

        def attempt(damping: Tensor) -> tuple[Tensor, Tensor]:
            damped = gram + torch.diag_embed(
                damping.unsqueeze(-1).expand(-1, gram.shape[-1])
            )
            matrix = transform(damped)
            factor, bad = _cholesky(matrix)
            pivots = factor.diagonal(dim1=-2, dim2=-1).square()
            diagonal = matrix.diagonal(dim1=-2, dim2=-1)
            return factor, bad | ~(pivots > _SMALLEST_PIVOT * diagonal).all(dim=-1)

        return _raise_until_definite(attempt, self._dampings[index])


class _RowsInverseFisher(InverseFisher):
    """What the two dual forms share: the rows, kept as they came."""

    def __init__(
        self,
        partition: Partition,
        num_gradients: int,
        damping: float,
        communicator: Communicator,
    ) -> None:
        super().__init__(partition, num_gradients, damping, communicator)
        self._rows: Tensor | None = None

    @property
    def state_bytes(self) -> int:
        """Bytes of the state that this rank keeps for its blocks."""
        return (
            0 if self._rows is None else self._rows.numel() * self._rows.element_size()
        )

    def _add(self, rows: Tensor) -> None:
        if self._rows is None:
            self._rows = rows.new_empty(self.num_gradients, self.size)
        self._rows[self._observed : self._observed + len(rows)] = rows

    def _unit_rows(self, unit: Unit) -> Tensor:
        """Rows of a unit's columns as float64 ``[K, N, B]``."""
        assert self._rows is not None, "no gradient was observed"  # noqa: S101
        return _columns(self._rows, self._local(unit), unit)

    def _damped_factor(self, gram: Tensor, damping: Tensor) -> tuple[Tensor, Tensor]:
        """Cholesky factor of NλI + GGᵀ from ``[K, N, N]`` and λ ``[K]``."""
        ridge = (self.num_gradients * damping).unsqueeze(-1)
        return _cholesky(gram + torch.diag_embed(ridge.expand(-1, gram.shape[-1])))


class DualInverseFisher(_RowsInverseFisher):
    """Blocks by Cholesky of the N×N matrix NλI + GGᵀ; state is the rows, N·D_r numbers."""

    def _factorize(self) -> None:
        for index, unit in enumerate(self.units):
            rows = self._unit_rows(unit)
            gram = rows @ rows.mT

            def attempt(
                damping: Tensor, rows: Tensor = rows, gram: Tensor = gram
            ) -> tuple[Tensor, Tensor]:
                factor, bad = self._damped_factor(gram, damping)
                half = torch.linalg.solve_triangular(factor, rows, upper=False)
                complement = 1.0 - half.square().sum(dim=-2)
                unresolved = ~(complement > _SMALLEST_COMPLEMENT).all(dim=-1)
                return complement, bad | unresolved

            damping = self._dampings[index]
            complement = _raise_until_definite(attempt, damping)
            self._blocks(self._diagonal, unit).copy_(complement / damping.unsqueeze(-1))

    def matvec(self, vector: Tensor) -> Tensor:
        """See :meth:`InverseFisher.matvec`.

        Args:
            vector: float64 tensor ``[D_r]``.

        Returns:
            F⁻¹v.
        """
        result = torch.empty_like(vector)
        for index, unit in enumerate(self.units):
            rows, blocks = self._unit_rows(unit), self._blocks(vector, unit)
            solved = self._solve(index, rows, rows @ blocks.unsqueeze(-1))
            product = (rows.mT @ solved).squeeze(-1)
            self._blocks(result, unit).copy_(
                (blocks - product) / self._dampings[index].unsqueeze(-1)
            )
        return result

    def fisher_matvec(self, vector: Tensor) -> Tensor:
        """See :meth:`InverseFisher.fisher_matvec`.

        Args:
            vector: float64 tensor ``[D_r]``.

        Returns:
            Fv.
        """
        result = torch.empty_like(vector)
        for index, unit in enumerate(self.units):
            rows, blocks = self._unit_rows(unit), self._blocks(vector, unit)
            product = (rows.mT @ (rows @ blocks.unsqueeze(-1))).squeeze(-1)
            damped = self._dampings[index].unsqueeze(-1) * blocks
            self._blocks(result, unit).copy_(product / self.num_gradients + damped)
        return result

    def constrained_solve(self, weights: Tensor, removed: Tensor) -> Tensor:
        """See :meth:`InverseFisher.constrained_solve`.

        Args:
            weights: float64 tensor ``[D_r]``.
            removed: bool tensor ``[D_r]``.

        Returns:
            δ.
        """
        change = torch.where(removed, -weights, 0.0)
        for index, unit in enumerate(self.units):
            rows = self._unit_rows(unit)
            kept = (~self._blocks(removed, unit)).double()
            gone = self._blocks(change, unit)
            target = -(rows @ gone.unsqueeze(-1))
            rows = rows * kept.unsqueeze(-2)
            solved = self._solve(index, rows, target)
            gone.add_((rows.mT @ solved).squeeze(-1))
        return change

    def _solve(self, index: int, rows: Tensor, target: Tensor) -> Tensor:
        """Solve (NλI + GGᵀ) x = target for the unit's (masked) rows."""
        gram = rows @ rows.mT

        def attempt(damping: Tensor) -> tuple[Tensor, Tensor]:
            return self._damped_factor(gram, damping)

        factor = _raise_until_definite(attempt, self._dampings[index])
        return torch.cholesky_solve(target, factor)


class FullInverseFisher(_RowsInverseFisher):
    """One block over all weights of all ranks (``block_size=None``), in the dual form.

    K = NλI + Σ_r G_rG_rᵀ is one N×N sum over ranks; all else is local. The sum is exact
    (:meth:`Communicator.sum_exactly`), so every world size gets the same bits.
    """

    def __init__(
        self,
        partition: Partition,
        num_gradients: int,
        damping: float,
        communicator: Communicator,
    ) -> None:
        super().__init__(partition, num_gradients, damping, communicator)
        self._lambda = self._full(1, damping)

    @property
    def damping(self) -> Tensor:
        """λ of the one block, float64 ``[1]``."""
        return self._lambda

    def raised(self) -> dict[int, float]:
        """List the blocks whose damping had to be raised.

        Returns:
            λ under index 0, or nothing.
        """
        value = float(self._lambda)
        return {} if value == self._initial_damping else {0: value}

    def _factorize(self) -> None:
        gram = self._gram(None)

        def attempt(damping: Tensor) -> tuple[Tensor, Tensor]:
            factor, bad = self._damped_factor(gram, damping)
            smallest = self._full(1, 1.0)
            for unit in self.units:
                half = torch.linalg.solve_triangular(
                    factor[0], self._flat_rows(unit), upper=False
                )
                complement = 1.0 - half.square().sum(dim=0)
                self._diagonal[self._local(unit)] = complement / damping
                smallest = torch.minimum(smallest, complement.min())
            smallest = -self._comm.maximum(-smallest.nan_to_num(nan=-1.0))
            return factor, bad | (smallest <= _SMALLEST_COMPLEMENT)

        self._factor = _raise_until_definite(attempt, self._lambda)

    def matvec(self, vector: Tensor) -> Tensor:
        """See :meth:`InverseFisher.matvec`.

        Args:
            vector: float64 tensor ``[D_r]``.

        Returns:
            F⁻¹v.
        """
        solved = torch.cholesky_solve(
            self._project(vector).unsqueeze(-1), self._factor[0]
        )
        return (vector - self._combine(solved.squeeze(-1))) / self._lambda

    def fisher_matvec(self, vector: Tensor) -> Tensor:
        """See :meth:`InverseFisher.fisher_matvec`.

        Args:
            vector: float64 tensor ``[D_r]``.

        Returns:
            Fv.
        """
        product = self._combine(self._project(vector))
        return product / self.num_gradients + self._lambda * vector

    def constrained_solve(self, weights: Tensor, removed: Tensor) -> Tensor:
        """See :meth:`InverseFisher.constrained_solve`.

        Args:
            weights: float64 tensor ``[D_r]``.
            removed: bool tensor ``[D_r]``.

        Returns:
            δ.
        """
        change = torch.where(removed, -weights, 0.0)
        gram = self._gram(~removed)

        def attempt(damping: Tensor) -> tuple[Tensor, Tensor]:
            return self._damped_factor(gram, damping)

        factor = _raise_until_definite(attempt, self._lambda)
        solved = torch.cholesky_solve(-self._project(change).unsqueeze(-1), factor[0])
        return torch.where(removed, change, self._combine(solved.squeeze(-1)))

    def to_dense(self) -> Tensor:
        """Build F⁻¹ as one matrix; for small problems on one rank.

        Returns:
            float64 tensor ``[D, D]``.

        Raises:
            ValueError: on more than one rank.
        """
        if self._comm.world_size > 1:
            raise ValueError("the full inverse Fisher is dense on one rank only")
        return super().to_dense()

    def _flat_rows(self, unit: Unit) -> Tensor:
        """Rows of a unit's columns as float64 ``[N, K·B]``."""
        assert self._rows is not None, "no gradient was observed"  # noqa: S101
        return self._rows[:, self._local(unit)].double().contiguous()

    def _gram(self, kept: Tensor | None) -> Tensor:
        """Σ over ranks of G_rG_rᵀ, float64 ``[1, N, N]``, over the kept columns."""

        def rows_of(unit: Unit) -> Tensor:
            rows = self._flat_rows(unit)
            return rows if kept is None else rows * kept[self._local(unit)]

        # |K_ij| <= max_i |g_i|², summed over units.
        largest = self._full(1, 0.0)
        for unit in self.units:
            largest = torch.maximum(largest, _largest_square_norm(rows_of(unit)))
        total = self._comm.sum_exactly(
            (rows @ rows.mT for rows in map(rows_of, self.units)),
            largest * self._total_units,
            (self.num_gradients, self.num_gradients),
        )
        return total.unsqueeze(0)

    def _project(self, vector: Tensor) -> Tensor:
        """Σ over ranks of G_r v_r, float64 ``[N]``."""
        parts = [self._flat_rows(u) @ vector[self._local(u)] for u in self.units]
        largest = torch.stack([self._full(1, 0.0)[0], *(p.abs().max() for p in parts)])
        return self._comm.sum_exactly(
            parts, largest.max() * self._total_units, (self.num_gradients,)
        )

    def _combine(self, coefficients: Tensor) -> Tensor:
        """G_rᵀc on this rank, float64 ``[D_r]``."""
        result = self._full(self.size, 0.0)
        for unit in self.units:
            result[self._local(unit)] = self._flat_rows(unit).mT @ coefficients
        return result


def _largest_square_norm(rows: Tensor) -> Tensor:
    """Give the largest squared norm of a row.

    Args:
        rows: tensor of shape ``[N, C]``.

    Returns:
        Scalar tensor, zero for no rows.
    """
    return rows.square().sum(dim=1).max() if len(rows) else rows.new_zeros(())


def _columns(rows: Tensor, columns: slice, unit: Unit) -> Tensor:
    """Take a unit's columns of ``[n, D_r]`` as contiguous float64 ``[K, n, B]``."""
    # The copy makes layout and strides, and with them the bits of the products, the
    # same for every world size.
    blocks = rows[:, columns].double().view(len(rows), unit.count, unit.size)
    return blocks.transpose(0, 1).contiguous()


def _cholesky(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Factorise ``[K, n, n]``; tell which of the K failed, bool ``[K]``."""
    factor, info = torch.linalg.cholesky_ex(matrix)
    finite = factor.diagonal(dim1=-2, dim2=-1).isfinite().all(dim=-1)
    return factor, (info != 0) | ~finite


def _raise_until_definite(
    attempt: Callable[[Tensor], tuple[Tensor, Tensor]], damping: Tensor
) -> Tensor:
    """Multiply λ of the failing blocks by ten, in place, until none fails.

    Args:
        attempt: maps λ ``[K]`` to a result and a bool ``[K]`` of failures.
        damping: λ of each block, changed in place.

    Returns:
        The result of the first attempt without failure.

    Raises:
        PruningError: when λ has grown by sixty orders of magnitude in vain.
    """
    for _ in range(_MOST_RAISES):
        result, bad = attempt(damping)
        if not bool(bad.any()):
            return result
        damping[bad] *= 10.0
    raise PruningError(
        f"a block of the Fisher matrix is not positive definite even with damping "
        f"{float(damping.max()):.1e}; are the gradients finite?"
    )


def make_inverse_fisher(
    partition: Partition,
    num_gradients: int,
    damping: float,
    communicator: Communicator,
    *,
    block_size: int | None,
    engine: Engine = "auto",
) -> InverseFisher:
    """Choose the engine and make this rank's part of the inverse Fisher.

    Args:
        partition: all blocks and their owners.
        num_gradients: N.
        damping: λ.
        communicator: the ranks.
        block_size: B, or None for the full Fisher.
        engine: which form; ``"auto"`` takes the cheaper one.

    Returns:
        An empty inverse Fisher that waits for gradients.
    """
    if block_size is None:
        return FullInverseFisher(partition, num_gradients, damping, communicator)
    chosen = choose_engine(engine, num_gradients, block_size)
    cls = PrimalInverseFisher if chosen == "primal" else DualInverseFisher
    return cls(partition, num_gradients, damping, communicator)


def block_cost(
    num_gradients: int, block_size: int | None, engine: Engine
) -> Callable[[int], float]:
    """Model the work for one block, to balance owners.

    Args:
        num_gradients: N.
        block_size: B, or None for the full Fisher.
        engine: as in :func:`make_inverse_fisher`.

    Returns:
        A function of the block's size: N·b² + b³ (primal) or N²·b (dual).
    """
    if block_size is None or choose_engine(engine, num_gradients, block_size) == "dual":
        return lambda size: float(num_gradients) ** 2 * size
    return lambda size: float(num_gradients) * size**2 + float(size) ** 3


def full_column_chunk(sizes: Sequence[int]) -> int:
    """Choose how many columns of the full Fisher form one unit.

    Args:
        sizes: active weights of each tensor.

    Returns:
        A number that depends on the model only, never on the world size.
    """
    return max(64, -(-sum(sizes) // 256))
