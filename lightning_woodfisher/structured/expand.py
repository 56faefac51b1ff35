"""Expand-pruning: find layers that are too narrow, from what pruning has left of them.

A group that loses much less than the others is a bottleneck. Widen it in the dense network,
train that from scratch, and prune it back to the old size (SOSP; Nonnenmacher et al. 2022).
The authors give no threshold for "much less": the defaults here are our choice.
"""

from __future__ import annotations

__all__ = ["find_bottlenecks", "shrink_target"]

import math

from lightning_woodfisher.base.errors import ConfigurationError, require_number
from lightning_woodfisher.structured.report import StructureReport


def find_bottlenecks(
    report: StructureReport,
    *,
    quantile: float = 0.25,
    share: float = 0.5,
    factor: float = 2.0,
) -> dict[str, float]:
    """Find the layers to widen.

    A group is a bottleneck when its pruning ratio (removed over all structures) is among
    the lowest of the groups, and clearly below that of the network. Layers that are tied
    to each other belong to one group, and are widened together.

    Args:
        report: of the pruned network; its targets should be those of the end.
        quantile: share of the groups that may be bottlenecks, those of the lowest ratios;
            groups with the ratio of the last one count, too.
        share: a bottleneck loses less than this times the ratio of the network.
        factor: how much wider it should be.

    Returns:
        Width multipliers by name of the producing layer; empty without bottlenecks.

    Raises:
        ConfigurationError: for numbers out of range.
    """
    for name, value, low, high in (
        ("quantile", quantile, 0.0, 1.0),
        ("share", share, 0.0, 1.0),
        ("factor", factor, 1.0, math.inf),
    ):
        require_number(name, value)
        if not low < value <= high:
            raise ConfigurationError(f"{name}={value} is outside ({low:g}, {high:g}].")
    ratios = {group.name: len(group.removed) / group.size for group in report.groups}
    whole = sum(len(group.removed) for group in report.groups) / report.structures
    number = math.ceil(quantile * len(ratios))
    lowest = sorted(ratios.values())[number - 1]
    return {
        layer: factor
        for group in report.groups
        if ratios[group.name] <= lowest and ratios[group.name] < share * whole
        for layer in group.layers
    }


def shrink_target(parameters: int, parameters_wide: int) -> float:
    """Work out the target that brings a wider network back to a size.

    Args:
        parameters: at most so many are to be left.
        parameters_wide: of the wider network, dense.

    Returns:
        The target for ``measure="parameters"``.

    Raises:
        ConfigurationError: when the wider network is not larger.
    """
    if not 0 < parameters <= parameters_wide:
        raise ConfigurationError(
            f"a network of {parameters_wide} parameters cannot be pruned to {parameters}."
        )
    target = 1.0 - parameters / parameters_wide
    # The pruner leaves at most (1 - target) · N; rounding must not allow one more.
    while (1.0 - target) * parameters_wide > parameters:
        target = math.nextafter(target, 1.0)
    return target
