"""Check that the device supports a pruning step, and has the memory for it."""

from __future__ import annotations

__all__ = ["fit_into_memory", "free_bytes", "require_supported_device"]

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_woodfisher.base.byte_sizes import format_bytes
from lightning_woodfisher.base.errors import ConfigurationError
from lightning_woodfisher.distributed.communicator import Communicator
from lightning_woodfisher.pruning.config import PruningConfig
from lightning_woodfisher.resources.estimate import ResourceEstimate, estimate_workload
from lightning_woodfisher.resources.workload import Workload
from lightning_woodfisher.weights.masks import Masks

# Largest ratio of estimated to counted bytes that the tests allow.
_TOLERANCE = 1.15
# Attributes of a module that torch.compile and Lightning replace by compiled functions.
_COMPILED = ("_compiled_call_impl", "forward", "training_step")


def require_supported_device(
    model: nn.Module, parameters: Mapping[str, nn.Parameter]
) -> None:
    """Refuse weights without values, on several devices, on MPS or in CUDA graphs.

    Args:
        model: the network.
        parameters: the selected parameters by name.

    Raises:
        ConfigurationError: with the names of parameters or of a module.
    """
    devices: dict[torch.device, str] = {}
    for name, parameter in parameters.items():
        devices.setdefault(parameter.device, name)
    for device, name in devices.items():
        if device.type == "meta":
            raise ConfigurationError(
                f"{name} is on the meta device and has no values; allocate the weights "
                "(to_empty) and initialize them before pruning."
            )
    if len(devices) > 1:
        found = ", ".join(f"{name} on {device}" for device, name in devices.items())
        raise ConfigurationError(
            f"the selected weights are on several devices ({found}); move the model to "
            "one device, or restrict the selection with selection.only or exclude."
        )
    for device in devices:
        if device.type == "mps":
            raise ConfigurationError(
                f"the selected weights are on {device}, which has no float64 for the "
                "factorizations of a pruning step; train on a CPU or on a CUDA GPU "
                "(accelerator='cpu' or 'cuda')."
            )
        if device.type == "cuda":
            _require_no_cuda_graphs(model)


def _require_no_cuda_graphs(model: nn.Module) -> None:
    for name, module in model.named_modules():
        functions = [vars(module).get(attribute) for attribute in _COMPILED]
        if any(map(_replays_cuda_graph, functions)):
            raise ConfigurationError(
                f"{name or type(module).__name__} replays CUDA graphs, which are recorded "
                "for one batch size and overwrite their results, so they cannot compute "
                "gradients for pruning; use torch.compile without mode='reduce-overhead' "
                "('max-autotune-no-cudagraphs' has no graphs), and no "
                "make_graphed_callables."
            )


def _replays_cuda_graph(function: Any) -> bool:
    if getattr(function, "__module__", None) == "torch.cuda.graphs":
        return True
    read = getattr(function, "get_compiler_config", None)
    config = read() if read is not None else None
    return bool(config and config.get("triton.cudagraphs"))


def fit_into_memory(
    masks: Masks, config: PruningConfig, comm: Communicator, ranks_on_host: int = 1
) -> tuple[PruningConfig, ResourceEstimate]:
    """Check the next step against ``fisher.memory_budget``, or against free memory.

    If the step exceeds the budget on a GPU, gradient rows are offloaded to host memory,
    provided that is enough; settings that change the result are never changed. Without a
    budget, only a step that certainly does not fit is refused.

    Args:
        masks: current masks.
        config: settings of the step.
        comm: the ranks.
        ranks_on_host: number of ranks that share the memory of this machine.

    Returns:
        The settings to use, and their estimate.

    Raises:
        ConfigurationError: on every rank, with the memory needed and settings that fit.
    """
    zeros, parameters = masks.zeros(), masks.parameters
    workload = Workload(
        config,
        [masks.outputs_first(name, p).shape for name, p in parameters.items()],
        [parameter.numel() - zeros[name] for name, parameter in parameters.items()],
        comm.world_size,
        max(parameter.element_size() for parameter in parameters.values()),
        torch.get_num_threads() if comm.device.type == "cpu" else 1,
        masks.sharded,
    )
    budget = config.fisher.memory_budget
    if budget is not None:
        cost = estimate_workload(workload, budget)
        if cost.fits:
            return config, cost
        if comm.device.type == "cuda":
            fisher = dataclasses.replace(config.fisher, offload_rows=True)
            offloaded = dataclasses.replace(config, fisher=fisher)
            workload = dataclasses.replace(workload, config=offloaded)
            offloaded_cost = estimate_workload(workload, budget)
            if offloaded_cost.fits:
                return offloaded, offloaded_cost
        raise ConfigurationError(
            f"fisher.memory_budget={budget!r} is too small: the pruning step "
            f"{cost.verdict}."
        )
    cost = estimate_workload(workload)
    sharing = ranks_on_host if comm.device.type == "cpu" else 1
    known = free_bytes(comm.device)
    rows = comm.gather_numbers([math.inf if known is None else known])
    free = min(row[0] for row in rows)
    # Ranks that share memory together need at least this much.
    needed = max(sharing * cost.smallest_peak_bytes, cost.peak_bytes) / _TOLERANCE
    if needed > free:
        advice = estimate_workload(workload, max(1, int(free) // sharing))
        raise ConfigurationError(
            f"{format_bytes(free)} are free on {comm.device} for {sharing} rank(s), but "
            f"the pruning step {advice.verdict}."
        )
    return config, cost


def free_bytes(device: torch.device) -> int | None:
    """Return the memory that is available for new tensors on a device.

    Args:
        device: the device.

    Returns:
        Bytes, or None if unknown.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        reserved = torch.cuda.memory_reserved(device)
        return int(free + reserved - torch.cuda.memory_allocated(device))
    if device.type != "cpu":
        return None
    try:
        lines = Path("/proc/meminfo").read_text("ascii").splitlines()
        found = dict(line.split(":", 1) for line in lines)
        return int(found["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None
