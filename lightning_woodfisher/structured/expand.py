"""Expand-pruning: find layers that are too narrow by how little of them pruning removes.

A group that loses much less than the others is a bottleneck. Widen it in the dense network,
train that from scratch, and prune it back to the old size (SOSP; Nonnenmacher et al. 2022).
The paper gives no threshold for "much less"; the defaults here are our choice.
"""

from __future__ import annotations

__all__ = ["find_bottlenecks", "target_for_size"]

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

    A group is a bottleneck if its pruning ratio (removed structures over all) is among the
    lowest of the groups, and clearly below that of the network. Layers that are tied to
    each other belong to one group, and are widened together. Raise a ConfigurationError
    for numbers out of range.

    Args:
        report: of the last pruning step.
        quantile: share of the groups that can be bottlenecks, those with the lowest
            ratios. Groups with the same ratio as the last one count as well.
        share: a bottleneck loses less than this times the ratio of the network.
        factor: how much wider it should become.

    Returns:
        Width multipliers by name of the producing layer. Empty if there is no bottleneck.
    """
    require_number("quantile", quantile, "(0, 1]")
    require_number("share", share, "(0, 1]")
    require_number("factor", factor, "(1, inf)")
    ratios = {group.name: len(group.removed) / group.size for group in report.groups}
    overall = sum(len(group.removed) for group in report.groups) / report.structures
    limit = sorted(ratios.values())[math.ceil(quantile * len(ratios)) - 1]
    return {
        layer: factor
        for group in report.groups
        if ratios[group.name] <= limit and ratios[group.name] < share * overall
        for layer in group.layers
    }


def target_for_size(parameters: int, dense_parameters: int) -> float:
    """Compute the target that prunes a network to a number of parameters.

    Args:
        parameters: largest number of parameters after pruning.
        dense_parameters: number of parameters of the dense network.

    Returns:
        The target for ``measure="parameters"``.

    Raises:
        ConfigurationError: if the dense network is smaller.
    """
    if not 0 < parameters <= dense_parameters:
        raise ConfigurationError(
            f"a network of {dense_parameters} parameters cannot be pruned to {parameters}."
        )
    target = 1.0 - parameters / dense_parameters
    # At most (1 - target) · N parameters are left. Rounding must not allow one more.
    while (1.0 - target) * dense_parameters > parameters:
        target = math.nextafter(target, 1.0)
    return target
