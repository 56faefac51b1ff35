"""Floating-point operations of a network, by the parameter that is multiplied.

torch's FLOP counter observes one forward pass, so FLOPs are those of the real input shapes.
A masked network needs Σ FLOPs of a layer × its density, plus the FLOPs that depend on no
selected weight.
"""

from __future__ import annotations

__all__ = ["LayerFlops", "count_flops", "flops_by_tensor"]

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from lightning_woodfisher.base.errors import ConfigurationError
from lightning_woodfisher.data.batches import Batches
from lightning_woodfisher.data.isolation import derive_seed, seeded
from lightning_woodfisher.data.losses import LossSource, run_loss
from lightning_woodfisher.distributed.communicator import Communicator
from lightning_woodfisher.gradients.hessian_rows import twice_differentiable
from lightning_woodfisher.weights.masks import Masks


@dataclass(frozen=True)
class LayerFlops:
    """FLOPs of the forward pass of one mini-batch.

    Attributes:
        dense: FLOPs of the whole network.
        by_layer: FLOPs of the products with each selected parameter.
        weights: number of weights of each selected parameter.
    """

    dense: int
    by_layer: tuple[int, ...]
    weights: tuple[int, ...]

    @property
    def per_weight(self) -> list[int]:
        """FLOPs per weight of each layer, at least 1."""
        return [
            max(1, round(flops / weights))
            for flops, weights in zip(self.by_layer, self.weights, strict=True)
        ]

    def masked(self, zeros: Sequence[int]) -> float:
        """Count the FLOPs of the masked network.

        Args:
            zeros: number of pruned weights of each selected parameter.

        Returns:
            Number of FLOPs.
        """
        saved = [
            flops * gone / weights
            for flops, gone, weights in zip(
                self.by_layer, zeros, self.weights, strict=True
            )
        ]
        return self.dense - sum(saved)


def count_flops(
    source: LossSource, batches: Batches, masks: Masks, comm: Communicator, seed: int
) -> LayerFlops:
    """Count the FLOPs of one mini-batch.

    Args:
        source: source of losses, inside its session.
        batches: mini-batches, of which the first is used.
        masks: masks with the parameters.
        comm: the ranks; the counts of rank 0 hold for all.
        seed: seed of random operations.

    Returns:
        The counts.

    Raises:
        ConfigurationError: for sharded parameters, or selected parameters that no
            operation multiplies by.
    """
    if masks.sharded:
        raise ConfigurationError(
            "flops_target and selection.flops_power need whole parameters, and those of "
            "this model are sharded; leave them out."
        )
    with seeded(derive_seed(seed, "flops")):
        batch = batches.fetch(0)
        total, flops, _ = flops_by_tensor(
            lambda: run_loss(source, batch, 0),
            {name: masks.local(name) for name in masks.parameters},
        )
    numbers = comm.gather_numbers([total, *flops.values()])[0]
    unused = [
        n for n, flops in zip(masks.parameters, numbers[1:], strict=True) if not flops
    ]
    if unused:
        raise ConfigurationError(
            f"no FLOPs were counted for {', '.join(unused[:8])}: the loss does not multiply "
            "by them, or it does so in an operation that torch's FLOP counter does not know; "
            "leave them out with selection.exclude."
        )
    return LayerFlops(
        int(numbers[0]),
        tuple(int(number) for number in numbers[1:]),
        tuple(p.numel() for p in masks.parameters.values()),
    )


def flops_by_tensor(
    run: Callable[[], object],
    tensors: Mapping[str, Tensor],
    modules: Mapping[str, nn.Module] | None = None,
) -> tuple[int, dict[str, int], dict[str, int]]:
    """Count the FLOPs of a forward pass.

    Args:
        run: computes it.
        tensors: the weights to tell apart, by name.
        modules: those whose products of activations (attention) are told apart, by name.

    Returns:
        All FLOPs, those of the products with each weight, by its name, and those of the
        products without a weight in each of the modules, by its name.
    """
    with (
        _separate_operations(),
        contextlib.ExitStack() as hooks,
        _Counter(tensors) as mode,
    ):
        for name, module in (modules or {}).items():
            mode.flops_inside[name] = 0

            def enter(*_: object, name: str = name) -> None:
                mode.inside.append(name)

            def leave(*_: object) -> None:
                mode.inside.pop()

            hooks.enter_context(module.register_forward_pre_hook(enter))
            hooks.enter_context(module.register_forward_hook(leave))
        run()
    return mode.total, mode.flops, mode.flops_inside


@contextlib.contextmanager
def _separate_operations() -> Iterator[None]:
    """Run attention and recurrent layers as products that are counted, not as one kernel.

    torch's FLOP counter does not know the fused kernels of encoder layers, of attention on
    CPUs, of oneDNN and of cuDNN.
    """
    libraries: tuple[Any, ...] = (torch.backends.mkldnn, torch.backends.cudnn)
    enabled = [library.enabled for library in libraries]
    try:
        for library in libraries:
            library.enabled = False
        with twice_differentiable():
            yield
    finally:
        for library, was in zip(libraries, enabled, strict=True):
            library.enabled = was


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Assign the FLOPs of each operation to the selected parameter among its arguments.

    Parameters are recognized by their memory, because a layer may use a weight without
    calling the module that owns it.
    """

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0
        self.flops = dict.fromkeys(weights, 0)
        # Modules that are running, innermost last, and their products without a weight.
        self.inside: list[str] = []
        self.flops_inside: dict[str, int] = {}
        # Ranges of bytes by the address of their memory, which several weights may share.
        self._ranges: dict[int, list[tuple[int, int, str]]] = {}
        for name, tensor in weights.items():
            self._own(tensor, name)
        # Keeps the memory of a copy from being reused while its address means a weight.
        self._copies: list[Tensor] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        with FlopCounterMode(display=False) as counter:
            result = func(*args, **(kwargs or {}))
        flops = counter.get_total_flops()
        leaves = tree_leaves((args, kwargs or {}))
        owners = [self._owner(leaf) for leaf in leaves]
        used = [owner for owner in owners if owner is not None]
        self.total += flops
        if used and flops:
            self.flops[used[0]] += flops
        elif flops and self.inside:
            self.flops_inside[self.inside[-1]] += flops
        elif used and isinstance(result, Tensor):
            tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
            # Autocast multiplies by a copy of the weight, or of a part, in another dtype.
            copied = len(tensors) == 1 and result.numel() == tensors[0].numel()
            if copied and self._owner(result) is None:
                self._copies.append(result)
                self._own(result, used[0])
        return result

    def _own(self, tensor: Tensor, name: str) -> None:
        address, start = _address(tensor)
        self._ranges.setdefault(address, []).append(
            (start, start + tensor.nbytes, name)
        )

    def _owner(self, value: Any) -> str | None:
        """Return the weight whose memory a tensor shares; None if there is none."""
        if not isinstance(value, Tensor) or value.layout != torch.strided:
            return None
        address, at = _address(value)
        return next(
            (
                name
                for start, stop, name in self._ranges.get(address, ())
                if start <= at < stop
            ),
            None,
        )


def _address(tensor: Tensor) -> tuple[int, int]:
    """Return the address of a tensor's memory and the byte at which the tensor starts."""
    start = int(tensor.storage_offset()) * tensor.element_size()
    return tensor.untyped_storage().data_ptr(), start
