"""The masks: the only owner of what is pruned.

A mask is a bool tensor of its parameter's shape, True where the weight is kept. Masks
only ever lose True entries. They live beside the model, never in it: parameter names,
storages and ``state_dict`` keys stay as they are.
"""

from __future__ import annotations

__all__ = ["Masks"]

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_woodfisher.errors import ConfigurationError, PruningError


class Masks:
    """Masks of the selected parameters.

    Args:
        parameters: what may be pruned, by name; held by reference.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self.parameters = dict(parameters)
        # What is pruned, True where the weight is gone: masked_fill_ wants it that way.
        # Parameters without zeros have no entry, so that a dense network costs nothing.
        self._pruned: dict[str, Tensor] = {}

    def kept(self, name: str) -> Tensor:
        """Give the mask of one parameter.

        Args:
            name: the parameter.

        Returns:
            bool tensor of the parameter's shape, True where the weight is kept.
        """
        if name in self._pruned:
            return ~self._pruned[name]
        return torch.ones_like(self.parameters[name], dtype=torch.bool)

    def zeros(self) -> dict[str, int]:
        """Count the pruned weights.

        Returns:
            Pruned weights by parameter name, for every parameter.
        """
        return {
            name: int(self._pruned[name].sum()) if name in self._pruned else 0
            for name in self.parameters
        }

    def sparsity(self) -> float:
        """Give the share of the selected weights that is pruned.

        Returns:
            A number in [0, 1).
        """
        weights = sum(parameter.numel() for parameter in self.parameters.values())
        return sum(self.zeros().values()) / weights

    @torch.no_grad()
    def grow(self, pruned: Mapping[str, Tensor]) -> None:
        """Prune more weights; what is pruned stays pruned.

        Args:
            pruned: bool tensors by parameter name, True where the weight goes.
        """
        for name, gone in pruned.items():
            if name in self._pruned:
                gone = gone | self._pruned[name]
            if bool(gone.any()):
                self._pruned[name] = gone.clone()

    @torch.no_grad()
    def apply(self) -> None:
        """Set the pruned weights to zero, in place.

        ``masked_fill_`` and not a product: 0·∞ is not 0, and −1·0 is −0.
        """
        for name, gone in self._pruned.items():
            self.parameters[name].masked_fill_(gone, 0.0)

    @torch.no_grad()
    def apply_to_gradients(self) -> None:
        """Set the gradients of pruned weights to zero, in place.

        Otherwise they count in the clipping norm and stay in momentum.
        """
        for name, gone in self._pruned.items():
            gradient = self.parameters[name].grad
            if gradient is not None:
                gradient.masked_fill_(gone, 0.0)

    @torch.no_grad()
    def apply_to_optimizers(self, optimizers: Iterable[Optimizer]) -> None:
        """Set the optimizer state of pruned weights to zero, in place.

        Args:
            optimizers: their state tensors of a parameter's shape are masked.
        """
        for optimizer in optimizers:
            for name, gone in self._pruned.items():
                for value in optimizer.state.get(self.parameters[name], {}).values():
                    if isinstance(value, Tensor) and value.shape == gone.shape:
                        value.masked_fill_(gone.to(value.device), 0.0)

    def violations(self) -> dict[str, int]:
        """Count the pruned weights that are not zero.

        Returns:
            Their number by parameter name, without the parameters that have none.
        """
        counts = {
            name: int((self.parameters[name].detach()[gone] != 0).sum())
            for name, gone in self._pruned.items()
        }
        return {name: count for name, count in counts.items() if count}

    def verify(self) -> None:
        """Check that every pruned weight is zero.

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
        """Take the weights that are exactly zero now for pruned."""
        self.grow({name: p.detach() == 0 for name, p in self.parameters.items()})

    def state_dict(self) -> dict[str, Tensor]:
        """Give the masks for a checkpoint.

        Returns:
            bool tensors on the CPU by parameter name, True where kept; parameters
            without pruned weights are left out.
        """
        return {name: (~gone).cpu() for name, gone in self._pruned.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take the masks of a checkpoint.

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
            name: ~kept.to(self.parameters[name].device) for name, kept in state.items()
        }
