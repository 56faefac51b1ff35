"""Parameters that are DTensors, and their shards on this rank. No other module uses DTensor.

FSDP2 (``fully_shard``) shards every parameter by rows (dimension 0). Rank r of R holds the
r-th of R runs of ⌈rows/R⌉ rows; the last runs are shorter or empty. Every function here
treats a plain tensor as its own only shard.
"""

from __future__ import annotations

__all__ = [
    "is_sharded",
    "local_sizes",
    "require_supported_sharding",
    "reshard",
    "take_local",
    "to_local",
]

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard

from lightning_woodfisher.base.errors import ConfigurationError


def is_sharded(tensor: Tensor) -> bool:
    """Check whether a tensor is sharded over the ranks.

    Args:
        tensor: any tensor.

    Returns:
        True for a DTensor.
    """
    return isinstance(tensor, DTensor)


def to_local(tensor: Tensor) -> Tensor:
    """Return this rank's shard of a tensor.

    Args:
        tensor: any tensor.

    Returns:
        A plain, detached tensor that shares its memory.
    """
    detached = tensor.detach()
    return detached.to_local() if isinstance(detached, DTensor) else detached


def local_sizes(tensor: Tensor) -> list[int]:
    """Count the elements of every rank's shard.

    Args:
        tensor: any tensor; a DTensor must be sharded by rows.

    Returns:
        R numbers that add up to the elements of the tensor; one for a plain tensor.
    """
    if not isinstance(tensor, DTensor):
        return [tensor.numel()]
    rows, ranks = tensor.shape[0], tensor.device_mesh.size()
    width = tensor.numel() // max(1, rows)
    most = -(-rows // ranks)
    return [max(0, min(most, rows - most * rank)) * width for rank in range(ranks)]


def take_local(whole: Tensor, tensor: Tensor) -> Tensor:
    """Cut this rank's shard out of a full tensor.

    Args:
        whole: plain tensor, equal on all ranks.
        tensor: tensor of the same shape, sharded as the result should be.

    Returns:
        Plain tensor of the shape of ``to_local(tensor)``.
    """
    if not isinstance(tensor, DTensor):
        return whole
    parts = torch.split(whole.reshape(-1), local_sizes(tensor))
    part = parts[tensor.device_mesh.get_local_rank()]
    return part.view(-1, *whole.shape[1:]) if part.numel() else whole[:0]


def require_supported_sharding(
    model: nn.Module, parameters: Mapping[str, Tensor]
) -> None:
    """Check that parameters are sharded by rows over all ranks, on the device of the ranks.

    Args:
        model: the network.
        parameters: those to prune, by name.

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
        if parameter.device.type != mesh.device_type:
            raise ConfigurationError(
                f"the parameter {name!r} is kept on {parameter.device} and computed on "
                f"{mesh.device_type} (CPUOffloadPolicy), where the ranks of a pruning step "
                "cannot exchange it; call fully_shard without offload_policy."
            )
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
    """Replace gathered parameters of an FSDP2 model by its shards.

    A forward pass without a backward pass leaves gathered copies in place of some
    parameters, which would hide what is written to the shards.

    Args:
        model: any network.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
