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
from lightning_woodfisher.fisher.config import FisherConfig, count_kept_factors
from lightning_woodfisher.fisher.linalg import Arithmetic, choose_arithmetics
from lightning_woodfisher.fisher.parallel import run_in_threads
from lightning_woodfisher.weights.partition import Partition, Unit

# Enough to go from the smallest allowed λ to one that exceeds any gradient.
_MAX_RAISES = 120
# Verdicts on a block: good, needs more digits, not positive definite.
_FINE, _TOO_COARSE, _SINGULAR = 0, 1, 2


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
        self._is_factorized = False
        self._row_dtype = torch.float32
        # Those that may be used, the fastest first.
        self._arithmetics = choose_arithmetics(fisher.precision, self._device)
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
        starts = [
            unit.start + block * unit.size
            for unit in self.units
            for block in range(unit.count)
        ]
        return {
            start: value
            for start, value in zip(starts, self.damping.tolist(), strict=True)
            if value != self._fisher.damping
        }

    @property
    @abstractmethod
    def state_bytes(self) -> int:
        """Bytes on the device of the state that this rank keeps for its blocks."""

    def count_arithmetics(self) -> dict[str, int]:
        """Count the weights of this rank by the arithmetic of their units.

        Returns:
            Numbers of weights, after :meth:`factorize`.
        """
        counts: dict[str, int] = {}
        for index, unit in enumerate(self.units):
            kind = self._final_arithmetic(index)
            counts[kind] = counts.get(kind, 0) + unit.size * unit.count
        return counts

    @abstractmethod
    def _final_arithmetic(self, index: int) -> Arithmetic:
        """Return the arithmetic in which a unit was computed."""

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
        if rows.dtype == torch.float64:
            self._row_dtype, self._arithmetics = rows.dtype, ("float64",)
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
        """Invert the Fisher, after the last gradient; another call does nothing.

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
        if not self._is_factorized:
            self._factorize()
            self._is_factorized = True

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
        self._is_factorized = False

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
                later call for the same unit replaces an earlier one, whose matrices may
                be wrong.
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

    def _each_unit(
        self, work: Callable[[int], None], indices: Sequence[int] | None = None
    ) -> None:
        """Call ``work`` with the index of each unit, several units at a time."""
        chosen = range(len(self.units)) if indices is None else indices
        run_in_threads(lambda i: work(chosen[i]), len(chosen), self._device)

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
    """An inverse Fisher whose blocks are independent of each other.

    A unit is computed, judged on the device and computed again where necessary. The host
    waits once for the verdicts on all units.
    """

    def __init__(
        self, partition: Partition, fisher: FisherConfig, communicator: Communicator
    ) -> None:
        # By unit, how many arithmetics have turned out to have too few digits.
        self._refined: dict[int, int] = {}
        self._factors: dict[int, Tensor] = {}
        super().__init__(partition, fisher, communicator)
        sizes = [(unit.size, unit.count) for unit in self.units]
        self._keeping, _ = count_kept_factors(fisher, sizes)

    def _keep_factor(self, index: int, factor: Tensor) -> None:
        """Keep a factor of all columns for :meth:`matvec`, if there is memory for it."""
        if index < self._keeping:
            self._factors[index] = factor

    def _start_again(self) -> None:
        """Forget what was found out about the weights before some were dropped."""
        self._refined.clear()
        self._factors.clear()

    def _arithmetic(self, index: int) -> Arithmetic:
        """Return the arithmetic of a unit."""
        return self._arithmetics[self._refined.get(index, 0)]

    @override
    def _final_arithmetic(self, index: int) -> Arithmetic:
        return self._arithmetic(index)

    def _judge(self, index: int, singular: Tensor, coarse: Tensor) -> Tensor:
        """Judge the blocks of a unit.

        Args:
            index: index of the unit.
            singular: bool ``[K]``, whether λ is too small.
            coarse: bool ``[K]``, whether the arithmetic of the unit has too few digits.

        Returns:
            Verdicts, int64 ``[K]``.
        """
        if self._refined.get(index, 0) + 1 < len(self._arithmetics):
            return torch.where(singular | coarse, _TOO_COARSE, _FINE)
        return torch.where(singular, _SINGULAR, _FINE)

    @override
    def visit_sub_blocks(
        self, sizes: Sequence[int], consume: Callable[[int, Tensor], None]
    ) -> None:
        def visit(index: int) -> Tensor:
            blocks, verdicts = self._sub_blocks(index, sizes[index])
            consume(index, blocks)
            return verdicts

        wanted = [
            index
            for index, (size, unit) in enumerate(zip(sizes, self.units, strict=True))
            if 0 < size <= unit.size
        ]
        raised = self._settle(visit, wanted)
        self._settle(self._factorize_unit, raised)

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

        def solve(index: int) -> Tensor:
            unit = self.units[index]
            blocks = self._blocks(vectors, unit).movedim(0, -1)
            kept = ~self._blocks(removed, unit)
            inside = kept.unsqueeze(-1)
            found, verdicts = self._solve_kept(
                index, blocks.masked_fill(inside, 0.0), kept
            )
            blocks.copy_(torch.where(inside, found, blocks))
            return verdicts

        self._settle(solve)
        return change

    def _factorize(self) -> None:
        self._settle(self._factorize_unit)

    def _settle(
        self, attempt: Callable[[int], Tensor], indices: Sequence[int] | None = None
    ) -> list[int]:
        """Compute units until every verdict is good.

        Units that need more digits use the next arithmetic, and λ of singular blocks is
        multiplied by ten.

        Args:
            attempt: computes a unit and returns its verdicts, int64 ``[K]``. It may be
                called again and then overwrites what it has computed.
            indices: which units; None for all.

        Returns:
            The units whose damping was raised.

        Raises:
            PruningError: if a block is still singular after λ has grown by 120 orders of
                magnitude.
        """
        pending = list(range(len(self.units)) if indices is None else indices)
        raised: set[int] = set()
        for _ in range(_MAX_RAISES):
            if not pending:
                return sorted(raised)
            verdicts: dict[int, Tensor] = {}

            def visit(index: int, found: dict[int, Tensor] = verdicts) -> None:
                found[index] = attempt(index)

            self._each_unit(visit, pending)
            worst = torch.stack([verdicts[index].max() for index in pending]).tolist()
            verdict_of = dict(zip(pending, worst, strict=True))
            pending = [index for index in pending if verdict_of[index] != _FINE]
            for index in pending:
                self._factors.pop(index, None)
                if verdict_of[index] == _TOO_COARSE:
                    self._refined[index] = self._refined.get(index, 0) + 1
                else:
                    singular = verdicts[index] == _SINGULAR
                    self._dampings[index].mul_(torch.where(singular, 10.0, 1.0))
                    raised.add(index)
        raise PruningError(_not_definite(self.damping))

    @abstractmethod
    def _factorize_unit(self, index: int) -> Tensor:
        """Fill in the diagonal of F⁻¹ of one unit; return the verdicts."""

    @abstractmethod
    def _sub_blocks(self, index: int, size: int) -> tuple[Tensor, Tensor]:
        """Return [F⁻¹]_SS of the groups of one unit, and the verdicts.

        The first are float64 ``[K·(B // q), q, q]``.
        """

    @abstractmethod
    def _solve(self, index: int, blocks: Tensor) -> Tensor:
        """Return F⁻¹v of one unit, ``[K, B]``, after :meth:`factorize`."""

    @abstractmethod
    def _multiply(self, index: int, blocks: Tensor) -> Tensor:
        """Return GᵀGv/N of one unit, ``[K, B]``."""

    @abstractmethod
    def _solve_kept(
        self, index: int, blocks: Tensor, kept: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return −F_RR⁻¹F_RS δ_S of one unit on R, ``[K, B, V]``, and the verdicts.

        Other rows are ignored. ``blocks`` is δ_S, ``[K, B, V]``, and ``kept`` is R, bool
        ``[K, B]``.
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
    raise PruningError(_not_definite(damping))


def _not_definite(damping: Tensor) -> str:
    return (
        f"a block of the Fisher matrix is not positive definite even with damping "
        f"{float(damping.max()):.1e}; are the gradients finite?"
    )
