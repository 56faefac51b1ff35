"""Masks, which record the weights that are pruned.

A mask is a bool tensor of its parameter's shape, True where the weight is kept. Pruning never
turns an entry back to True. Masks are stored outside of the model: parameter names, storages
and ``state_dict`` keys stay unchanged.

A mask follows its parameter to another device. Lightning, for example, moves the module to
the CPU when training ends.

Each rank holds the mask of its own shard of a sharded parameter. Counts are those of the
whole parameter, and checkpoints contain whole masks. Methods that communicate for this are
marked "Call on all ranks".
"""

from __future__ import annotations

__all__ = ["Masks"]

import contextlib
import itertools
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_woodfisher.base.errors import (
    ConfigurationError,
    PruningError,
    name_first,
)
from lightning_woodfisher.distributed.checksum import checksum
from lightning_woodfisher.distributed.communicator import Communicator
from lightning_woodfisher.distributed.dtensor import (
    is_sharded,
    local_sizes,
    take_local,
    to_local,
)

# By bytes of a number.
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# Tensors named in an error; the rest are counted.
_NAMED = 4


class Masks:
    """Masks of the selected parameters.

    Args:
        parameters: those that may be pruned, by name; held by reference.
        inputs_first: names of those that have their inputs in the first dimension:
            :func:`~.layers.find_inputs_first`.

    Attributes:
        inputs_first: as given.
        sharded: whether each rank holds only a shard of every parameter.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        inputs_first: Container[str] = frozenset(),
    ) -> None:
        self.parameters = dict(parameters)
        self.inputs_first = inputs_first
        self.sharded = any(is_sharded(p) for p in self.parameters.values())
        # bool; parameters without pruned weights have no entry, so that a dense network needs
        # no memory for masks.
        self._kept: dict[str, Tensor] = {}
        self._zeros = dict.fromkeys(self.parameters, 0)

    def _marks(self) -> Iterator[tuple[str, Tensor]]:
        """Yield names and kept entries, on the devices where the parameters are now."""
        for name, kept in list(self._kept.items()):
            device = self.parameters[name].device
            if kept.device != device:
                kept = self._kept[name] = kept.to(device)
            yield name, kept

    def local(self, name: str) -> Tensor:
        """Return this rank's shard of a parameter.

        Args:
            name: the parameter.

        Returns:
            Plain, detached tensor that shares the parameter's memory; the whole parameter
            unless it is sharded.
        """
        return to_local(self.parameters[name])

    def outputs_first(self, name: str, tensor: Tensor) -> Tensor:
        """View a tensor with its outputs in the first and inputs in the second dimension.

        Args:
            name: the parameter.
            tensor: of the shape of the parameter, or the result of this method.

        Returns:
            View of the tensor; applied twice, the tensor itself.
        """
        return tensor.transpose(0, 1) if name in self.inputs_first else tensor

    def kept(self, name: str) -> Tensor:
        """Return the mask of a parameter on this rank.

        Args:
            name: the parameter.

        Returns:
            bool tensor of the shape and on the device of :meth:`local`, True where the
            weight is kept.
        """
        if name in self._kept:
            return self._kept[name].to(self.parameters[name].device, copy=True)
        return torch.ones_like(self.local(name), dtype=torch.bool)

    def zeros(self) -> dict[str, int]:
        """Count the pruned weights.

        Returns:
            Pruned weights on all ranks, for every parameter by name.
        """
        return dict(self._zeros)

    def sparsity(self) -> float:
        """Return the share of the selected weights that is pruned.

        Returns:
            A number in [0, 1].
        """
        weights = sum(parameter.numel() for parameter in self.parameters.values())
        return sum(self._zeros.values()) / weights

    @torch.no_grad()
    def prune(self, pruned: Mapping[str, Tensor]) -> None:
        """Mark more weights as pruned. Call on all ranks.

        Args:
            pruned: bool tensors by parameter name, of the shape of :meth:`local` on any
                device, True where the weight is removed.
        """
        kept = dict(self._marks())
        for name, gone in pruned.items():
            left = ~gone.to(self.parameters[name].device)
            kept[name] = left & kept[name] if name in kept else left
        counts = self._count_local({name: ~left for name, left in kept.items()})
        self._kept = {name: left for name, left in kept.items() if counts[name]}
        self._zeros = self._add_ranks(counts)

    @torch.no_grad()
    def apply(self) -> None:
        """Set the pruned weights to zero, in place."""
        _set_to_zero([(self.local(name), kept) for name, kept in self._marks()])

    @torch.no_grad()
    def apply_to(self, copies: Mapping[str, Tensor]) -> None:
        """Set the pruned weights of copies to zero, in place.

        Args:
            copies: tensors of the shape of :meth:`local` on any device, by parameter
                name; other names are ignored.
        """
        _set_to_zero(
            [(copies[n], kept.to(copies[n].device)) for n, kept in self._kept.items()]
        )

    @torch.no_grad()
    def apply_to_gradients(self) -> None:
        """Set the gradients of pruned weights to zero, in place.

        Otherwise they would contribute to the clipping norm and to momentum.
        """
        dense: list[tuple[Tensor, Tensor]] = []
        for name, kept in self._marks():
            gradient = self.parameters[name].grad
            if gradient is None:
                continue
            if gradient.is_sparse:
                # The gradient of an embedding: some rows, each possibly repeated.
                rows = gradient.coalesce()
                rows.values().masked_fill_(~kept[rows.indices()[0]], 0.0)
                self.parameters[name].grad = rows
            else:
                dense.append((to_local(gradient), kept))
        _set_to_zero(dense)

    @torch.no_grad()
    def apply_to_optimizers(self, optimizers: Iterable[Optimizer]) -> None:
        """Set the optimizer state of pruned weights to zero, in place.

        Args:
            optimizers: whose state tensors of a parameter's shape are masked.
        """
        for optimizer, (name, kept) in itertools.product(
            optimizers, self._kept.items()
        ):
            for value in optimizer.state.get(self.parameters[name], {}).values():
                part = to_local(value) if isinstance(value, Tensor) else None
                if part is not None and part.shape == kept.shape:
                    part.masked_fill_(~kept.to(part.device), 0.0)

    def violations(self) -> dict[str, int]:
        """Count the pruned weights that are not zero. Call on all ranks.

        Returns:
            Their number by parameter name, for parameters that have any.
        """
        counts = self._count(
            {name: (self.local(name) != 0) & ~kept for name, kept in self._marks()}
        )
        return {name: count for name, count in counts.items() if count}

    def verify(self) -> None:
        """Check that every pruned weight is zero. Call on all ranks.

        Raises:
            PruningError: if one is not, naming the parameters.
        """
        violations = self.violations()
        if violations:
            raise PruningError(
                f"pruned weights are not zero, by parameter: {violations}. Something "
                "has changed the weights after the optimizer step."
            )

    def prune_zeros(self) -> None:
        """Mark the weights that are exactly zero as pruned. Call on all ranks."""
        self.prune({name: self.local(name) == 0 for name in self.parameters})

    def active_zeros(self) -> dict[str, int]:
        """Count the weights that are exactly zero and not pruned. Call on all ranks.

        Returns:
            Their number on all ranks, for every parameter by name.
        """
        return self._count(
            {n: (self.local(n) == 0) & self.kept(n) for n in self.parameters}
        )

    def require_equal_on_ranks(self, communicator: Communicator, when: str) -> None:
        """Check that all ranks hold the same weights and masks. Call on all ranks.

        Ranks of a sharded model hold different shards, which cannot be compared.

        Args:
            communicator: the ranks.
            when: time of the check for the error, such as ``"after the step"``.

        Raises:
            PruningError: naming tensors, and the ranks that differ from rank 0.
        """
        if self.sharded or communicator.world_size == 1:
            return
        names = list(self.parameters)
        hashes = [checksum(self.local(name)) for name in names]
        hashes += [checksum(self.kept(name)) for name in names]
        differing = communicator.find_differing(torch.stack(hashes))
        if not differing:
            return
        labels = [
            f"the {kind} of {n!r}" for kind in ("weights", "masks") for n in names
        ]
        found = [
            f"{labels[index]} (rank {', '.join(map(str, ranks))} differs from rank 0)"
            for index, ranks in differing.items()
        ]
        raise PruningError(
            f"the ranks disagree about {name_first(found, _NAMED, '; ')} {when}. Something "
            "has changed them on one rank only."
        )

    @contextlib.contextmanager
    def restored_on_error(self) -> Iterator[None]:
        """Restore the masks if the body fails, without communication.

        Yields:
            Nothing.
        """
        # The tensors are never changed in place and need no copy.
        kept, zeros = dict(self._kept), dict(self._zeros)
        try:
            yield
        except BaseException:
            self._kept, self._zeros = kept, zeros
            raise

    def state_dict(self) -> dict[str, Tensor]:
        """Return the masks for a checkpoint. Call on all ranks.

        Returns:
            bool tensors on the CPU by parameter name, True where kept; parameters
            without pruned weights are left out. The masks are whole on every rank, so
            that any number of ranks can load them.
        """
        return {
            name: self.whole(name).cpu() for name, zeros in self._zeros.items() if zeros
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load the masks of a checkpoint. Call on all ranks.

        Args:
            state: result of :meth:`state_dict`.

        Raises:
            ConfigurationError: if names or shapes do not fit the parameters.
        """
        for name, kept in state.items():
            if name not in self.parameters:
                raise ConfigurationError(
                    f"the checkpoint has a mask for {name!r}, which is not among the "
                    "selected parameters; use the selection of that run."
                )
            shape = self.parameters[name].shape
            if kept.shape != shape:
                raise ConfigurationError(
                    f"the checkpoint's mask of {name!r} has shape {tuple(kept.shape)}, "
                    f"the parameter {tuple(shape)}."
                )
        self._kept = {
            name: take_local(kept, self.parameters[name])
            .to(self.local(name).device, torch.bool)
            .clone()
            for name, kept in state.items()
        }
        self._zeros = self._count({name: ~kept for name, kept in self._kept.items()})

    def _count(self, marks: Mapping[str, Tensor]) -> dict[str, int]:
        """Count the marks of every parameter, over all ranks."""
        return self._add_ranks(self._count_local(marks))

    def _count_local(self, marks: Mapping[str, Tensor]) -> dict[str, int]:
        """Count the marks of every parameter on this rank, with one wait per device."""
        counts = dict.fromkeys(self.parameters, 0)
        for device in {gone.device for gone in marks.values()}:
            here = [name for name, gone in marks.items() if gone.device == device]
            sums = torch.stack([marks[name].sum() for name in here]).tolist()
            counts.update(zip(here, sums, strict=True))
        return counts

    def _add_ranks(self, counts: dict[str, int]) -> dict[str, int]:
        if not self.sharded:
            return counts
        comm = self._communicator()
        own = torch.tensor(list(counts.values()), device=comm.device)
        return dict(zip(counts, comm.sum_integers(own).tolist(), strict=True))

    def _communicator(self) -> Communicator:
        return Communicator(next(iter(self.parameters.values())).device)

    def whole(self, name: str) -> Tensor:
        """Return the mask of a whole parameter, sharded or not. Call on all ranks.

        Args:
            name: the parameter.

        Returns:
            bool tensor of the parameter's shape, True where the weight is kept.
        """
        parameter, kept = self.parameters[name], self.kept(name)
        if self.sharded:
            part = kept.reshape(-1).to(torch.uint8)
            whole = self._communicator().gather_shards(part, local_sizes(parameter))
            kept = whole.bool().view(parameter.shape)
        return kept


def _set_to_zero(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Set entries of tensors to zero where a mask is False, in place.

    Args:
        pairs: tensors and masks, bool, of equal shapes and devices.
    """
    if not pairs:
        return
    # The bits of the numbers are multiplied by 0 or 1, because 0·∞ is not 0 and −1·0 is −0.
    # masked_fill_ takes five times as long on a CPU.
    bits = [values.view(_INTEGERS[values.element_size()]) for values, _ in pairs]
    torch._foreach_mul_(bits, [kept.view(torch.int8) for _, kept in pairs])
