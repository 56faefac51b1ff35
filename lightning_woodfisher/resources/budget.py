"""Whether a pruning step fits into memory, asked before the first one."""

from __future__ import annotations

__all__ = ["fit_into_memory", "free_bytes", "require_one_device", "within_memory"]

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from lightning_woodfisher.base.byte_sizes import format_bytes
from lightning_woodfisher.base.errors import ConfigurationError
from lightning_woodfisher.distributed.communicator import Communicator
from lightning_woodfisher.fisher.config import FisherConfig
from lightning_woodfisher.pruning.config import PruningConfig
from lightning_woodfisher.resources.estimate import ResourceEstimate, estimate_counts
from lightning_woodfisher.resources.workload import Work
from lightning_woodfisher.weights.masks import Masks
from lightning_woodfisher.weights.patterns import parse_pattern

# What tests allow between the estimate and the bytes counted.
_TOLERANCE = 1.15


def require_one_device(parameters: Mapping[str, nn.Parameter]) -> None:
    """Refuse parameters without values, or on several devices.

    Args:
        parameters: the selected ones.

    Raises:
        ConfigurationError: naming some of them.
    """
    devices: dict[torch.device, str] = {}
    for name, parameter in parameters.items():
        devices.setdefault(parameter.device, name)
    if any(device.type == "meta" for device in devices):
        raise ConfigurationError(
            f"{devices[torch.device('meta')]} is on the meta device and has no values; "
            "give the weights memory (to_empty) and values before pruning."
        )
    if len(devices) > 1:
        found = ", ".join(f"{name} on {device}" for device, name in devices.items())
        raise ConfigurationError(
            f"the selected weights are on several devices ({found}); move the model to "
            "one, or leave some out with selection.include or exclude."
        )


def fit_into_memory(
    work: Work, comm: Communicator, ranks_on_host: int = 1
) -> tuple[FisherConfig, ResourceEstimate]:
    """Check a step against ``fisher.memory_budget``, or the memory that is free.

    With a budget that the step exceeds, gradient rows move to host memory where that is
    another memory and enough; nothing that changes the result is changed. Without a
    budget only what cannot fit is refused.

    Args:
        work: the part of a step with most active weights.
        comm: the ranks.
        ranks_on_host: how many of them share the memory of this machine.

    Returns:
        The settings to use and their estimate.

    Raises:
        ConfigurationError: with what is needed and what would fit; on every rank.
    """
    fisher = work.fisher
    budget = fisher.memory_budget
    if budget is not None:
        cost = estimate_counts(work, budget)
        if not cost.fits and comm.device.type == "cuda" and not fisher.offload_rows:
            offloaded = dataclasses.replace(fisher, offload_rows=True)
            there = estimate_counts(dataclasses.replace(work, fisher=offloaded), budget)
            if there.fits:
                return offloaded, there
        if not cost.fits:
            raise ConfigurationError(
                f"fisher.memory_budget={budget!r} is too small. The pruning step "
                f"{cost.verdict}."
            )
        return fisher, cost
    cost = estimate_counts(work)
    sharing = ranks_on_host if comm.device.type == "cpu" else 1
    free = _least_free(comm)
    if free is not None and _least_needed(cost, sharing) > free:
        advice = estimate_counts(work, max(1, free // sharing))
        raise ConfigurationError(
            f"{format_bytes(free)} are free on {comm.device} for {sharing} rank(s). The "
            f"pruning step {advice.verdict}."
        )
    return fisher, cost


def free_bytes(device: torch.device) -> int | None:
    """Ask for the memory that tensors on a device could still take.

    Args:
        device: which one.

    Returns:
        Bytes, or None when that cannot be known.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(
            device
        )
        return int(free + unused)
    if device.type != "cpu":
        return None
    try:
        lines = Path("/proc/meminfo").read_text("ascii").splitlines()
        found = dict(line.split(":", 1) for line in lines)
        return int(found["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None


def _least_free(comm: Communicator) -> int | None:
    """Free memory of the rank with the least of it, the same number on every rank."""
    known = free_bytes(comm.device)
    rows = comm.gather_numbers([-1.0 if known is None else float(known)])
    least = min((row[0] for row in rows if row[0] >= 0), default=None)
    return None if least is None else int(least)


def _least_needed(cost: ResourceEstimate, sharing: int) -> float:
    """What the ranks that share one memory are sure to take of it together."""
    return max(sharing * cost.smallest_peak_bytes, cost.peak_bytes) / _TOLERANCE


def within_memory(
    masks: Masks, config: PruningConfig, comm: Communicator, ranks_on_host: int = 1
) -> tuple[PruningConfig, ResourceEstimate]:
    """Check that the next step fits into memory; see :func:`~.budget.fit_into_memory`.

    Args:
        masks: what is pruned already.
        config: how to prune.
        comm: the ranks.
        ranks_on_host: how many of them share the memory of this machine.

    Returns:
        The settings, changed where only that makes it fit, and the estimate.
    """
    zeros = masks.zeros()
    weights = {name: p.numel() for name, p in masks.parameters.items()}
    work = Work(
        list(weights.values()),
        [count - zeros[name] for name, count in weights.items()],
        config.fisher,
        comm.world_size,
        config.criterion,
        config.step.update,
        max(p.element_size() for p in masks.parameters.values()),
        torch.get_num_threads() if comm.device.type == "cpu" else 1,
        masks.sharded,
        [p.shape for p in masks.parameters.values()],
        config.step.line_search,
        config.step.measure_loss,
        config.step.local_model_points,
        parse_pattern(config.selection.pattern),
    )
    fisher, cost = fit_into_memory(work, comm, ranks_on_host)
    return dataclasses.replace(config, fisher=fisher), cost
