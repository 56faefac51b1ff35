"""What every form of the inverse Fisher can do."""

from __future__ import annotations

__all__ = ["InverseFisher", "group_products", "raise_until_definite"]

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lightning_woodfisher.base.errors import PruningError
from lightning_woodfisher.distributed.communicator import Communicator
from lightning_woodfisher.fisher.config import Precision
from lightning_woodfisher.fisher.parallel import run_pieces
from lightning_woodfisher.weights.partition import Partition, Unit

# From the smallest λ that is allowed to one that dwarfs any gradient.
_MOST_RAISES = 120


class InverseFisher(ABC):
    """This rank's blocks of the inverse Fisher.

    Feed all N gradients with :meth:`observe`, call :meth:`factorize` once, then ask.
    Vectors are float64 tensors of shape ``[D_r]``.

    Args:
        partition: all blocks and their owners.
        num_gradients: N, the number of rows that will be observed.
        damping: λ.
        communicator: the ranks.
        precision: of the products of gradients; factorisations are always float64.
        offload_rows: keep rows in host memory, for the forms that keep rows.
        centered: subtract the mean gradient: F = λI + (1/N) Σ (g_i − ḡ)(g_i − ḡ)ᵀ.
        max_missing: rows that may not come (:meth:`leave_out`).
    """

    def __init__(
        self,
        partition: Partition,
        num_gradients: int,
        damping: float,
        communicator: Communicator,
        precision: Precision = "auto",
        offload_rows: bool = False,
        centered: bool = False,
        max_missing: int = 0,
    ) -> None:
        self.units = partition.owned(communicator.rank)
        self.num_gradients = num_gradients
        self._fewest_gradients = max(1, num_gradients - max_missing)
        self.precision: Precision = precision
        self._comm = communicator
        self._device = communicator.device
        shard = partition.shard(communicator.rank)
        self._offset = shard.start
        self.size = shard.stop - shard.start
        self._observed = 0
        self._total_units = len(partition.units)
        self._total_size = partition.size
        self._initial_damping = damping
        self._centered = centered
        self._is_complete = False
        # False where a weight was dropped; None while none was.
        self._kept: Tensor | None = None
        self._diagonal = torch.zeros(
            self.size, dtype=torch.float64, device=self._device
        )
        self._dampings = [self._full(unit.count, damping) for unit in self.units]
        self._begin(offload_rows)

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

    def leave_out(self, number: int) -> None:
        """Make N the number of rows that have come; call it when no more will.

        Args:
            number: of the announced rows that do not come.

        Raises:
            ValueError: when that is not what is missing, or nothing has come.
        """
        if self._observed + number != self.num_gradients or not self._observed:
            raise ValueError(
                f"{number} gradients left out, but {self._observed} of "
                f"{self.num_gradients} were observed"
            )
        self.num_gradients = self._observed

    def factorize(self) -> None:
        """Invert; call it after the last gradient.

        Raises:
            ValueError: when fewer gradients than announced were observed.
        """
        if self._observed != self.num_gradients:
            raise ValueError(
                f"observed {self._observed} gradients of {self.num_gradients}"
            )
        if not self._is_complete:
            self._complete()
            self._is_complete = True
        self._factorize()

    def restrict(self, kept: Tensor) -> None:
        """Drop weights for good, without new gradients; call :meth:`factorize` again.

        What is left is the inverse of F_RR, the Fisher of the kept weights R, with the
        configured λ. A dropped weight is decoupled from them: its row and column of F are
        those of λI. The work stays that of all weights.

        Args:
            kept: bool tensor ``[D_r]``, R; what was dropped before stays dropped.

        Raises:
            ValueError: when gradients are missing or the width is wrong.
        """
        if not self._is_complete or kept.shape != (self.size,):
            raise ValueError(
                f"restrict to {tuple(kept.shape)} of {self.size} weights after "
                f"{self._observed} of {self.num_gradients} gradients; factorize first"
            )
        self._kept = kept.clone() if self._kept is None else self._kept & kept
        for damping in self._dampings:
            damping.fill_(self._initial_damping)
        self._restrict(self._kept)

    def diagonal(self) -> Tensor:
        """Give the diagonal of F⁻¹.

        Returns:
            float64 tensor ``[D_r]``.
        """
        return self._diagonal

    def sub_blocks(self, size: int) -> Tensor:
        """Give the blocks of F⁻¹ on its diagonal that belong to groups of weights.

        Args:
            size: consecutive weights in a group, q; the first group begins where a block
                begins. What a block has left over at its end is in no group.

        Returns:
            [F⁻¹]_SS of each group S, float64 ``[D_r/q, q, q]``.
        """
        found = [torch.empty(0, size, size, dtype=torch.float64, device=self._device)]
        found *= 1 + len(self.units)

        def keep(index: int, blocks: Tensor) -> None:
            found[index + 1] = blocks

        self.visit_sub_blocks([size] * len(self.units), keep)
        return torch.cat(found)

    def visit_sub_blocks(
        self, sizes: Sequence[int], consume: Callable[[int, Tensor], None]
    ) -> None:
        """Hand the sub-blocks of one unit after another over, to keep few of them.

        Damping may be raised where digits do not suffice. Call it on all ranks.

        Args:
            sizes: q of each unit as in :meth:`sub_blocks`, 0 to pass it over.
            consume: gets the number of a unit and its ``[K·(B // q), q, q]``; it may be
                called for several units at once, and again with better numbers.
        """

        def visit(index: int) -> None:
            if sizes[index]:
                consume(index, self._sub_blocks(index, sizes[index]))

        self._each_unit(visit)

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
            weights: float64 tensor ``[D_r]``, or several of them ``[V, D_r]``, which
                share one factorisation.
            removed: bool tensor ``[D_r]``.

        Returns:
            δ of the shape of ``weights``: F_RR⁻¹F_RS w_S on the kept weights R and −w_S
            on the removed weights S.
        """

    def to_dense(self) -> Tensor:
        """Build this rank's part of F⁻¹ as one matrix; for small problems and tests.

        Returns:
            float64 tensor ``[D_r, D_r]``, zero outside the blocks.
        """
        identity = torch.eye(self.size, dtype=torch.float64, device=self._device)
        return torch.stack([self.matvec(column) for column in identity], dim=1)

    @abstractmethod
    def _begin(self, offload_rows: bool) -> None:
        """Make the state that waits for gradients; called once all else is set."""

    @abstractmethod
    def _add(self, rows: Tensor) -> None: ...

    @abstractmethod
    def _complete(self) -> None:
        """Do what needs all gradients and is done only once."""

    @abstractmethod
    def _restrict(self, kept: Tensor) -> None:
        """Set the gradients of all weights but the kept ones to zero, ``[D_r]``."""

    @abstractmethod
    def _factorize(self) -> None: ...

    @abstractmethod
    def _sub_blocks(self, index: int, size: int) -> Tensor:
        """[F⁻¹]_SS of the groups of one unit, float64 ``[K·(B // q), q, q]``."""

    def _each_unit(self, work: Callable[[int], None]) -> None:
        """Do something for the number of every unit, several at a time."""
        run_pieces(work, range(len(self.units)), self._device)

    def _full(self, size: int, value: float) -> Tensor:
        return torch.full((size,), value, dtype=torch.float64, device=self._device)

    def _local(self, unit: Unit) -> slice:
        return slice(unit.start - self._offset, unit.stop - self._offset)

    def _stacked(self, vectors: Tensor) -> Tensor:
        """View one vector, or several, as ``[V, D_r]``."""
        return vectors if vectors.dim() > 1 else vectors.unsqueeze(0)

    def _blocks(self, vector: Tensor, unit: Unit) -> Tensor:
        """View the weights of a unit as ``[..., K, B]``."""
        shape = (*vector.shape[:-1], unit.count, unit.size)
        return vector[..., self._local(unit)].view(shape)


def group_products(columns: Tensor, size: int) -> Tensor:
    """Multiply groups of columns by themselves.

    Args:
        columns: X, ``[K, n, B]``.
        size: columns of a group, q.

    Returns:
        X_SᵀX_S of each group, ``[K, B // q, q, q]``.
    """
    blocks, length, width = columns.shape
    number = width // size
    groups = columns[..., : number * size].reshape(blocks, length, number, size)
    groups = groups.transpose(1, 2)
    return groups.mT @ groups


def raise_until_definite(
    attempt: Callable[[Tensor], tuple[Tensor, Tensor]], damping: Tensor
) -> Tensor:
    """Multiply λ of the failing blocks by ten, in place, until none fails.

    Args:
        attempt: maps λ ``[K]`` to a result and a bool ``[K]`` of failures.
        damping: λ of each block, changed in place.

    Returns:
        The result of the first attempt without failure.

    Raises:
        PruningError: when λ has grown by 120 orders of magnitude in vain.
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
