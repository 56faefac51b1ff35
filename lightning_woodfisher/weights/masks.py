"""The masks: the only owner of what is pruned.

A mask is a bool tensor of its parameter's shape, True where the weight is kept. Masks
only ever lose True entries. They live beside the model, never in it: parameter names,
storages and ``state_dict`` keys stay as they are.

Of a sharded parameter each rank holds the mask of its own part. Counts are those of the
whole parameter, and so are the masks in a checkpoint. What needs the other ranks for
that must be called on all of them; it says so.
"""

from __future__ import annotations

__all__ = ["Masks"]

import contextlib
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_woodfisher.base.errors import ConfigurationError, PruningError
from lightning_woodfisher.distributed.communicator import Communicator
from lightning_woodfisher.distributed.dtensor import (
    is_sharded,
    local,
    part_of,
    part_sizes,
)


class Masks:
    """Masks of the selected parameters.

    Args:
        parameters: what may be pruned, by name; held by reference.

    Attributes:
        sharded: whether each rank holds a part of every parameter only.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self.parameters = dict(parameters)
        self.sharded = any(is_sharded(p) for p in self.parameters.values())
        # What is pruned, True where the weight is gone: masked_fill_ wants it that way.
        # Parameters without zeros have no entry, so that a dense network costs nothing.
        self._pruned: dict[str, Tensor] = {}
        self._zeros = dict.fromkeys(self.parameters, 0)

    def local(self, name: str) -> Tensor:
        """Give the weights of one parameter that this rank holds.

        Args:
            name: the parameter.

        Returns:
            Plain tensor without graph that shares the parameter's memory; all of the
            parameter unless it is sharded.
        """
        return local(self.parameters[name])

    def kept(self, name: str) -> Tensor:
        """Give the mask of one parameter.

        Args:
            name: the parameter.

        Returns:
            bool tensor of the shape of :meth:`local`, True where the weight is kept.
        """
        if name in self._pruned:
            return ~self._pruned[name]
        return torch.ones_like(self.local(name), dtype=torch.bool)

    def zeros(self) -> dict[str, int]:
        """Count the pruned weights.

        Returns:
            Pruned weights by parameter name, for every parameter, over all ranks.
        """
        return dict(self._zeros)

    def sparsity(self) -> float:
        """Give the share of the selected weights that is pruned.

        Returns:
            A number in [0, 1).
        """
        weights = sum(parameter.numel() for parameter in self.parameters.values())
        return sum(self.zeros().values()) / weights

    @torch.no_grad()
    def grow(self, pruned: Mapping[str, Tensor]) -> None:
        """Prune more weights; what is pruned stays pruned. Call on all ranks.

        Args:
            pruned: bool tensors by parameter name, of the shape of :meth:`local`, True
                where the weight goes.
        """
        for name, gone in pruned.items():
            if name in self._pruned:
                gone = gone | self._pruned[name]
            if bool(gone.any()):
                self._pruned[name] = gone.clone()
        self._zeros = self._count(self._pruned)

    @torch.no_grad()
    def apply(self) -> None:
        """Set the pruned weights to zero, in place.

        ``masked_fill_`` and not a product: 0·∞ is not 0, and −1·0 is −0.
        """
        for name, gone in self._pruned.items():
            self.local(name).masked_fill_(gone, 0.0)

    @torch.no_grad()
    def apply_to(self, copies: Mapping[str, Tensor]) -> None:
        """Set the pruned weights of copies to zero, in place.

        Args:
            copies: tensors of the shape of :meth:`local` on any device, by the names of
                the parameters; there may be others.
        """
        for name, gone in self._pruned.items():
            copies[name].masked_fill_(gone.to(copies[name].device), 0.0)

    @torch.no_grad()
    def apply_to_gradients(self) -> None:
        """Set the gradients of pruned weights to zero, in place.

        Otherwise they count in the clipping norm and stay in momentum.
        """
        for name, gone in self._pruned.items():
            gradient = self.parameters[name].grad
            if gradient is None:
                continue
            if gradient.is_sparse:
                # Of an embedding: some rows, each perhaps several times.
                rows = gradient.coalesce()
                rows.values().masked_fill_(gone[rows.indices()[0]], 0.0)
                self.parameters[name].grad = rows
            else:
                local(gradient).masked_fill_(gone, 0.0)

    @torch.no_grad()
    def apply_to_optimizers(self, optimizers: Iterable[Optimizer]) -> None:
        """Set the optimizer state of pruned weights to zero, in place.

        Args:
            optimizers: their state tensors of a parameter's shape are masked.
        """
        for optimizer in optimizers:
            for name, gone in self._pruned.items():
                for value in optimizer.state.get(self.parameters[name], {}).values():
                    if not isinstance(value, Tensor):
                        continue
                    part = local(value)
                    if part.shape == gone.shape:
                        part.masked_fill_(gone.to(part.device), 0.0)

    def violations(self) -> dict[str, int]:
        """Count the pruned weights that are not zero. Call on all ranks.

        Returns:
            Their number by parameter name, without the parameters that have none.
        """
        counts = self._count(
            {n: self.local(n)[gone] != 0 for n, gone in self._pruned.items()}
        )
        return {name: count for name, count in counts.items() if count}

    def verify(self) -> None:
        """Check that every pruned weight is zero. Call on all ranks.

        Raises:
            PruningError: naming the parameters where that is not so.
        """
        violations = self.violations()
        if violations:
            raise PruningError(
                f"pruned weights are not zero, by parameter: {violations}. Something "
                "has changed the weights after the optimizer step."
            )

    def take_zeros(self) -> None:
        """Take the weights that are exactly zero now for pruned. Call on all ranks."""
        self.grow({name: self.local(name) == 0 for name in self.parameters})

    @contextlib.contextmanager
    def restored_on_error(self) -> Iterator[None]:
        """Put the masks back when the body fails, without asking the other ranks.

        Yields:
            Nothing.
        """
        # The tensors are never changed in place and need no copy.
        pruned, zeros = dict(self._pruned), dict(self._zeros)
        try:
            yield
        except BaseException:
            self._pruned, self._zeros = pruned, zeros
            raise

    def state_dict(self) -> dict[str, Tensor]:
        """Give the masks for a checkpoint. Call on all ranks.

        Returns:
            bool tensors on the CPU by parameter name, True where kept; parameters
            without pruned weights are left out. Whole masks on every rank, so that any
            number of ranks can load them.
        """
        return {
            name: self.whole(name).cpu() for name, zeros in self._zeros.items() if zeros
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take the masks of a checkpoint. Call on all ranks.

        Args:
            state: what :meth:`state_dict` gave.

        Raises:
            ConfigurationError: when names or shapes do not fit the parameters.
        """
        for name, kept in state.items():
            if name not in self.parameters:
                raise ConfigurationError(
                    f"the checkpoint has a mask for {name!r}, which is not among the "
                    "selected parameters; use the include and exclude of that run."
                )
            shape = self.parameters[name].shape
            if kept.shape != shape:
                raise ConfigurationError(
                    f"the checkpoint's mask of {name!r} has shape {tuple(kept.shape)}, "
                    f"the parameter {tuple(shape)}."
                )
        self._pruned = {
            name: ~part_of(kept, self.parameters[name]).to(self.local(name).device)
            for name, kept in state.items()
        }
        self._zeros = self._count(self._pruned)

    def _count(self, marks: Mapping[str, Tensor]) -> dict[str, int]:
        """Count the True entries of every parameter, over all ranks."""
        counts = [int(marks[n].sum()) if n in marks else 0 for n in self.parameters]
        if self.sharded:
            comm = self._ranks()
            counts = comm.sum_integers(
                torch.tensor(counts, device=comm.device)
            ).tolist()
        return dict(zip(self.parameters, counts, strict=True))

    def _ranks(self) -> Communicator:
        return Communicator(next(iter(self.parameters.values())).device)

    def whole(self, name: str) -> Tensor:
        """Give the mask of a whole parameter, sharded or not. Call on all ranks.

        Args:
            name: the parameter.

        Returns:
            bool tensor of the parameter's shape, True where the weight is kept.
        """
        parameter, kept = self.parameters[name], self.kept(name)
        if self.sharded:
            part = kept.reshape(-1).to(torch.uint8)
            whole = self._ranks().gather_shards(part, part_sizes(parameter))
            kept = whole.bool().view(parameter.shape)
        return kept
