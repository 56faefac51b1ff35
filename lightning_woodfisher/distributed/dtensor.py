"""DTensor parameters and what this rank holds of them; nothing else knows DTensors.

FSDP2 (``fully_shard``) cuts every parameter by rows (dimension 0). Rank r of R holds the
r-th of R runs of ⌈rows/R⌉ rows, which is shorter or empty at the end. A plain tensor
passes through every function here as if it were its own only part.
"""

from __future__ import annotations

__all__ = [
    "is_sharded",
    "local",
    "part_of",
    "part_sizes",
    "require_supported",
    "reshard",
    "undisturbed",
]

import contextlib
from collections.abc import Iterator, Mapping

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard

from lightning_woodfisher.base.errors import ConfigurationError


def is_sharded(tensor: Tensor) -> bool:
    """Tell whether ranks may hold different parts of a tensor.

    Args:
        tensor: any tensor.

    Returns:
        True for a DTensor.
    """
    return isinstance(tensor, DTensor)


def local(tensor: Tensor) -> Tensor:
    """Give this rank's part of a tensor.

    Args:
        tensor: any tensor.

    Returns:
        A plain tensor without graph that shares its memory.
    """
    detached = tensor.detach()
    return detached.to_local() if isinstance(detached, DTensor) else detached


def part_sizes(tensor: Tensor) -> list[int]:
    """Count the elements of every rank's part.

    Args:
        tensor: any tensor; a DTensor is cut by rows.

    Returns:
        R numbers that add up to the elements of the tensor; one for a plain tensor.
    """
    if not isinstance(tensor, DTensor):
        return [tensor.numel()]
    rows, ranks = tensor.shape[0], tensor.device_mesh.size()
    width = tensor.numel() // max(1, rows)
    most = -(-rows // ranks)
    return [max(0, min(most, rows - most * rank)) * width for rank in range(ranks)]


def part_of(whole: Tensor, tensor: Tensor) -> Tensor:
    """Cut this rank's part out of a full tensor.

    Args:
        whole: plain tensor, equal on all ranks.
        tensor: of the same shape; says how it is sharded.

    Returns:
        Plain tensor of the shape of ``local(tensor)``.
    """
    if not isinstance(tensor, DTensor):
        return whole
    rank = tensor.device_mesh.get_local_rank()
    sizes = part_sizes(tensor)
    start = sum(sizes[:rank])
    part = whole.reshape(-1)[start : start + sizes[rank]]
    return part.view(-1, *whole.shape[1:]) if part.numel() else whole[:0]


def require_supported(model: nn.Module, parameters: Mapping[str, Tensor]) -> None:
    """Refuse parameters that are not cut by rows over all ranks.

    Args:
        model: the network.
        parameters: what is to be pruned, by name.

    Raises:
        ConfigurationError: naming the parameter.
    """
    if not any(is_sharded(parameter) for parameter in model.parameters()):
        return
    for name, parameter in parameters.items():
        if not isinstance(parameter, DTensor):
            raise ConfigurationError(
                f"the parameter {name!r} is not sharded, but others of the model are; "
                "apply fully_shard to the module that holds it, or exclude it."
            )
        mesh, placements = parameter.device_mesh, parameter.placements
        # The exact class: a strided shard (tensor parallel and FSDP) is another one.
        if mesh.ndim != 1 or type(placements[0]) is not Shard or placements[0].dim != 0:
            raise ConfigurationError(
                f"the parameter {name!r} has placements {tuple(placements)} on a mesh of "
                f"{mesh.ndim} dimension(s); only Shard(0) on one dimension, as made by "
                "fully_shard on a one-dimensional mesh, can be pruned. Exclude it, or use "
                "tensor_parallel_size=1."
            )
        if mesh.mesh.tolist() != list(range(dist.get_world_size())):
            raise ConfigurationError(
                f"the parameter {name!r} is sharded over the ranks {mesh.mesh.tolist()} of "
                f"{dist.get_world_size()}; shard it over all ranks in order "
                "(data_parallel_size = number of processes, tensor_parallel_size=1)."
            )


def reshard(model: nn.Module) -> None:
    """Let the parameters of an FSDP2 model be its shards again.

    A forward pass without a backward pass leaves gathered copies in the place of some
    parameters. What is then written to the shards would not be seen.

    Args:
        model: any network.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Take the ``.grad`` of all parameters away, and put them back on leaving.

    Args:
        model: a network whose gradients come from ``.backward()``.

    Yields:
        Nothing; the parameters are shards, before and after.
    """
    reshard(model)
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    try:
        for parameter, _ in gradients:
            parameter.grad = None
        yield
    finally:
        reshard(model)
        for parameter, gradient in gradients:
            parameter.grad = gradient
