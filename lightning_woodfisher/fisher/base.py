"""Common interface of all forms of the inverse Fisher."""

from __future__ import annotations

__all__ = [
    "BlockwiseInverseFisher",
    "InverseFisher",
    "group_products",
    "raise_until_definite",
]

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from typing_extensions import override

from lightning_woodfisher.base.errors import PruningError
from lightning_woodfisher.distributed.communicator import Communicator
from lightning_woodfisher.fisher.config import FisherConfig
from lightning_woodfisher.fisher.parallel import run_in_threads
from lightning_woodfisher.weights.partition import Partition, Unit

# Enough to go from the smallest allowed λ to one that exceeds any gradient.
_MAX_RAISES = 120


class InverseFisher(ABC):
    """This rank's blocks of the inverse Fisher.

    Pass all N gradients to :meth:`observe` and call :meth:`factorize` once before any
    query. Vectors are float64 tensors of shape ``[D_r]``.

    Args:
        partition: all blocks and their owners.
        fisher: the settings; N, the damping λ and the precision among them.
        communicator: the ranks.
    """

    def __init__(
        self, partition: Partition, fisher: FisherConfig, communicator: Communicator
    ) -> None:
        self.units = partition.owned(communicator.rank)
        self.num_gradients = fisher.num_gradients
        shard = partition.shard(communicator.rank)
        self.size = shard.stop - shard.start
        self._offset = shard.start
        self._partition = partition
        self._fisher = fisher
        self._comm = communicator
        self._device = communicator.device
        self._observed = 0
        self._is_complete = False
        # False where a weight was dropped; None until :meth:`restrict` is called.
        self._kept: Tensor | None = None
        self._diagonal = self._full(self.size, 0.0)
        self._dampings = [self._full(unit.count, fisher.damping) for unit in self.units]
        self._allocate()

    @property
    def damping(self) -> Tensor:
        """λ of each block of this rank, float64 ``[blocks]``; raised where needed."""
        return torch.cat([self._full(0, 0.0), *self._dampings])

    def raised_damping(self) -> dict[int, float]:
        """List the blocks whose damping had to be raised.

        Returns:
            λ by index of the block's first active weight (global number).
        """
        return {
            unit.start + block * unit.size: value
            for unit, damping in zip(self.units, self._dampings, strict=True)
            for block, value in enumerate(damping.tolist())
            if value != self._fisher.damping
        }

    @property
    @abstractmethod
    def state_bytes(self) -> int:
        """Bytes on the device of the state that this rank keeps for its blocks."""

    def observe(self, rows: Tensor) -> None:
        """Add the next gradients.

        Args:
            rows: tensor of shape ``[n, D_r]``, any floating-point dtype.

        Raises:
            ValueError: if there are more than N rows or their width is wrong.
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
        """Reduce N to the number of observed rows, after the last row.

        Args:
            number: gradients of the N that were left out.

        Raises:
            ValueError: if a different number is missing, or no row was observed.
        """
        if self._observed + number != self.num_gradients or not self._observed:
            raise ValueError(
                f"{number} gradients left out, but {self._observed} of "
                f"{self.num_gradients} were observed"
            )
        self.num_gradients = self._observed

    def factorize(self) -> None:
        """Invert the Fisher, after the last gradient.

        Raises:
            ValueError: if fewer than N gradients were observed.
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
        """Drop weights permanently without new gradients; call :meth:`factorize` again.

        The result is the inverse of F_RR, the Fisher of the kept weights R, with the
        configured λ. Rows and columns of F that belong to a dropped weight become those of
        λI. The cost stays that of all weights.

        Args:
            kept: R, bool tensor ``[D_r]``; weights dropped before stay dropped.

        Raises:
            ValueError: if gradients are missing or the width is wrong.
        """
        if not self._is_complete or kept.shape != (self.size,):
            raise ValueError(
                f"restrict to {tuple(kept.shape)} of {self.size} weights after "
                f"{self._observed} of {self.num_gradients} gradients; factorize first"
            )
        self._kept = kept.clone() if self._kept is None else self._kept & kept
        for damping in self._dampings:
            damping.fill_(self._fisher.damping)
        self._restrict(self._kept)

    def diagonal(self) -> Tensor:
        """Return the diagonal of F⁻¹.

        Returns:
            float64 tensor ``[D_r]``.
        """
        return self._diagonal

    @abstractmethod
    def visit_sub_blocks(
        self, sizes: Sequence[int], consume: Callable[[int, Tensor], None]
    ) -> None:
        """Compute the diagonal sub-blocks of F⁻¹ that belong to groups of weights.

        Few units are computed at a time, so that few sub-blocks are in memory.
        Damping is raised where float64 has too few digits. Call on all ranks.

        Args:
            sizes: consecutive weights in a group, q, for each unit; 0 skips the unit. The
                first group begins where a block begins. Weights left over at the end of a
                block are in no group.
            consume: called with the index of a unit and [F⁻¹]_SS of each of its groups S,
                float64 ``[K·(B // q), q, q]``. Several calls may run at the same time; a
                later call for the same unit replaces an earlier one.
        """

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
        """Minimize ½δᵀFδ under ``weights + δ = 0`` where ``removed`` holds.

        Args:
            weights: float64 tensor ``[D_r]``, or several vectors ``[V, D_r]`` that share
                one factorization.
            removed: bool tensor ``[D_r]``.

        Returns:
            δ of the shape of ``weights``: F_RR⁻¹F_RS w_S on the kept weights R and −w_S
            on the removed weights S.
        """

    @abstractmethod
    def _allocate(self) -> None:
        """Create the state for the gradients; called at the end of ``__init__``."""

    @abstractmethod
    def _add(self, rows: Tensor) -> None: ...

    @abstractmethod
    def _complete(self) -> None:
        """Finish the sums over all gradients; called once."""

    @abstractmethod
    def _restrict(self, kept: Tensor) -> None:
        """Set the gradients of all weights outside ``kept`` to zero, bool ``[D_r]``."""

    @abstractmethod
    def _factorize(self) -> None: ...

    def _each_unit(self, work: Callable[[int], None]) -> None:
        """Call ``work`` with the index of each unit, several units at a time."""
        run_in_threads(work, len(self.units), self._device)

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


class BlockwiseInverseFisher(InverseFisher):
    """An inverse Fisher whose blocks are independent of each other."""

    @override
    def visit_sub_blocks(
        self, sizes: Sequence[int], consume: Callable[[int, Tensor], None]
    ) -> None:
        def visit(index: int) -> None:
            if sizes[index]:
                consume(index, self._sub_blocks(index, sizes[index]))

        self._each_unit(visit)

    @override
    def matvec(self, vector: Tensor) -> Tensor:
        return self._map_blocks(self._solve, vector)

    @override
    def fisher_matvec(self, vector: Tensor) -> Tensor:
        def multiply(index: int, blocks: Tensor) -> Tensor:
            damped = self._dampings[index].unsqueeze(-1) * blocks
            return self._multiply(index, blocks) + damped

        return self._map_blocks(multiply, vector)

    @override
    def constrained_solve(self, weights: Tensor, removed: Tensor) -> Tensor:
        change = torch.where(removed, -weights, 0.0)
        vectors = self._stacked(change)

        def solve(index: int) -> None:
            unit = self.units[index]
            blocks = self._blocks(vectors, unit).movedim(0, -1)
            kept = ~self._blocks(removed, unit)
            blocks.add_(self._solve_kept(index, blocks, kept) * kept.unsqueeze(-1))

        self._each_unit(solve)
        return change

    def _factorize(self) -> None:
        self._each_unit(self._factorize_unit)

    @abstractmethod
    def _factorize_unit(self, index: int) -> None:
        """Fill in the diagonal of F⁻¹ of one unit."""

    @abstractmethod
    def _sub_blocks(self, index: int, size: int) -> Tensor:
        """Return [F⁻¹]_SS of the groups of one unit, float64 ``[K·(B // q), q, q]``."""

    @abstractmethod
    def _solve(self, index: int, blocks: Tensor) -> Tensor:
        """Return F⁻¹v of one unit, ``[K, B]``."""

    @abstractmethod
    def _multiply(self, index: int, blocks: Tensor) -> Tensor:
        """Return GᵀGv/N of one unit, ``[K, B]``."""

    @abstractmethod
    def _solve_kept(self, index: int, blocks: Tensor, kept: Tensor) -> Tensor:
        """Return −F_RR⁻¹F_RS δ_S of one unit on R, ``[K, B, V]``; other rows are ignored.

        ``blocks`` is δ_S, ``[K, B, V]``, and ``kept`` is R, bool ``[K, B]``.
        """

    def _map_blocks(
        self, compute: Callable[[int, Tensor], Tensor], vector: Tensor
    ) -> Tensor:
        """Apply ``compute`` to the blocks ``[K, B]`` of each unit of a vector."""
        result = torch.empty_like(vector)

        def run(index: int) -> None:
            unit = self.units[index]
            blocks = self._blocks(vector, unit)
            self._blocks(result, unit).copy_(compute(index, blocks))

        self._each_unit(run)
        return result


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
    """Multiply λ of the failing blocks by ten, in place, until no block fails.

    Args:
        attempt: maps λ ``[K]`` to a result and a bool ``[K]`` of failures.
        damping: λ of each block, changed in place.

    Returns:
        The result of the first attempt without failure.

    Raises:
        PruningError: if a block still fails after λ has grown by 120 orders of magnitude.
    """
    for _ in range(_MAX_RAISES):
        result, bad = attempt(damping)
        if not bool(bad.any()):
            return result
        damping[bad] *= 10.0
    raise PruningError(
        f"a block of the Fisher matrix is not positive definite even with damping "
        f"{float(damping.max()):.1e}; are the gradients finite?"
    )
