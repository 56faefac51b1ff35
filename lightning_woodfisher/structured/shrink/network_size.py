"""Parameters and multiplications of the network that is left when structures are gone."""

from __future__ import annotations

__all__ = ["NetworkSize", "Removed"]

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from lightning_woodfisher.base.errors import ConfigurationError
from lightning_woodfisher.data.isolation import derive_seed, isolated, seeded
from lightning_woodfisher.data.losses import LossSource
from lightning_woodfisher.distributed.communicator import Communicator
from lightning_woodfisher.structured.graph.groups import Group, Member

#: Numbers of the removed structures of each group, by the name of the group.
Removed = Mapping[str, Tensor]


class NetworkSize:
    """Counts parameters and multiply-accumulates without building the smaller network.

    A tensor shrinks along every axis that is a member of a group, also along two. MACs are
    those of Conv and Linear layers: their weights times the positions at which they are
    used, as seen in one forward pass. Norms, activations and products of two activations
    (attention) are not counted.

    Args:
        model: the network, dense.
        groups: its groups.
        forward: runs the model once on a batch; called in evaluation mode.
        implants: convolutions that implanted structures have 1×1 filters in, by group.

    Attributes:
        dense_parameters: of the whole network.
        dense_macs: for one sample.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[Group],
        forward: Callable[[], Any],
        implants: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        self._shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        # A parameter with two names counts once.
        unique = {id(p): name for name, p in model.named_parameters()}
        self._axes: dict[str, list[tuple[int, str, Tensor]]] = {}
        everything = dict(model.named_parameters(remove_duplicate=False))
        seen: set[tuple[str, int, str]] = set()
        for group in groups:
            for member in group.members:
                if member.name not in everything:
                    continue
                name = unique[id(everything[member.name])]
                _require_fits(member, self._shapes[name])
                if (name, member.axis, group.name) not in seen:
                    seen.add((name, member.axis, group.name))
                    axes = self._axes.setdefault(name, [])
                    axes.append((member.axis, group.name, member.structure_of.cpu()))
        self._implants = {
            unique[id(model.get_submodule(layer).weight)]: group
            for group, layers in (implants or {}).items()
            for layer in layers
        }
        with isolated(model, "eval"), torch.no_grad():
            self._positions = _positions(model, unique, forward)
        self.dense_parameters = self.parameters({})
        self.dense_macs = self.macs({})

    @classmethod
    def of_source(
        cls,
        source: LossSource,
        groups: Sequence[Group],
        comm: Communicator,
        seed: int = 0,
        implants: Mapping[str, Sequence[str]] | None = None,
    ) -> NetworkSize:
        """Measure on a sample of the training data.

        Args:
            source: where losses come from; its session is entered here.
            groups: the groups of its model.
            comm: the ranks; the shapes that rank 0 sees hold for all.
            seed: of the sample.
            implants: as for the class.

        Returns:
            The sizes.
        """

        def forward() -> None:
            seed_ = derive_seed(seed, "size")
            batches = source.batches(1, 1, seed_)
            with seeded(seed_), torch.enable_grad():
                source.loss(batches.fetch(0), 0)

        with source.session("eval"):
            size = cls(source.model, groups, forward, implants)
        numbers = comm.gather_numbers(list(size._positions.values()))[0]
        size._positions = dict(zip(size._positions, numbers, strict=True))
        size.dense_macs = size.macs({})
        return size

    def parameters(self, removed: Removed, implanted: Removed | None = None) -> int:
        """Count the parameters that are left.

        Args:
            removed: the structures that are gone.
            implanted: those with 1×1 filters.

        Returns:
            Their number, those of layers that never shrink included.
        """
        return sum(self._numel(name, removed, implanted) for name in self._shapes)

    def macs(self, removed: Removed, implanted: Removed | None = None) -> int:
        """Count the multiply-accumulates that are left.

        Args:
            removed: the structures that are gone.
            implanted: those with 1×1 filters.

        Returns:
            Their number for one sample.
        """
        return round(
            sum(
                positions * self._numel(name, removed, implanted)
                for name, positions in self._positions.items()
            )
        )

    def of_one(self, group: Group, measure: Literal["parameters", "macs"]) -> int:
        """Count what goes with the first structure of a group from the dense network.

        Args:
            group: whose structures have one size.
            measure: what to count.

        Returns:
            Parameters, or multiply-accumulates for one sample; at least 1.
        """
        first = {group.name: torch.tensor([0])}
        if measure == "parameters":
            return max(1, self.dense_parameters - self.parameters(first))
        return max(1, self.dense_macs - self.macs(first))

    def _numel(
        self, name: str, removed: Removed, implanted: Removed | None = None
    ) -> int:
        shape = list(self._shapes[name])
        for axis, group, structure_of in self._axes.get(name, ()):
            gone = removed.get(group)
            if gone is not None and len(gone):
                shape[axis] -= int(torch.isin(structure_of, gone.cpu()).sum())
        saved = 0
        if implanted and name in self._implants:
            rows = len(implanted.get(self._implants[name], ()))
            saved = rows * shape[1] * (math.prod(shape[2:]) - 1)
        return math.prod(shape) - saved


def _positions(
    model: nn.Module, unique: Mapping[int, str], forward: Callable[[], Any]
) -> dict[str, float]:
    """Count the positions of a sample at which each weight is used, by its name."""
    positions: dict[str, float] = {}

    def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
        name = unique[id(module.weight)]
        data = inputs[0] if inputs else output
        where = data if isinstance(module, _ConvTransposeNd) else output
        used = (
            where.numel() / where.shape[-1]
            if isinstance(module, nn.Linear)
            else where.numel() / where.shape[1]
        )
        positions[name] = positions.get(name, 0.0) + used / len(where)

    layers = [m for m in model.modules() if isinstance(m, _ConvNd | nn.Linear)]
    handles = [layer.register_forward_hook(hook) for layer in layers]
    try:
        forward()
    finally:
        for handle in handles:
            handle.remove()
    return positions


def _require_fits(member: Member, shape: Sequence[int]) -> None:
    if shape[member.axis] != len(member.structure_of):
        raise ConfigurationError(
            f"{member.name!r} has {shape[member.axis]} slices on axis {member.axis}, but "
            f"its group knows {len(member.structure_of)}; the groups are of another network."
        )
