"""How many weights each layer, or all layers together, must give up in a step.

Layers compete for what stays: all of them, or each for itself, or those without a target
of their own among themselves. Limits that protect a layer bind exactly; what it may not
give the others must.
"""

from __future__ import annotations

__all__ = [
    "Layers",
    "Quotas",
    "flops_share_of_step",
    "make_quotas",
    "require_flops_target_fits",
    "require_target_fits",
]

import re
from collections.abc import Sequence
from dataclasses import dataclass

from lightning_woodfisher.base.errors import (
    ConfigurationError,
    nearest,
    require_number,
)
from lightning_woodfisher.pruning.selection import SelectionConfig, removal_counts_until
from lightning_woodfisher.pruning.stages import Spacing
from lightning_woodfisher.weights.patterns import parse_pattern

_SAME = 1e-9


@dataclass(frozen=True)
class Layers:
    """The selected tensors.

    Attributes:
        names: of the parameters.
        shapes: of the parameters.
        weights: their number in each.
        zeros: those of them that are pruned already.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    weights: tuple[int, ...]
    zeros: tuple[int, ...]


@dataclass(frozen=True)
class Quotas:
    """What must go.

    Attributes:
        competitors: number of the group in which each layer competes.
        groups: for each group of layers its target, weights and zeros.
        spacing: where the parts of the step end.
        caps: how many weights each layer may give up at most, None without limits.
        granularity: weights that go together in each group of layers; fewer may stay.
    """

    competitors: tuple[int, ...]
    groups: tuple[tuple[float, int, int], ...]
    spacing: Spacing
    caps: tuple[int, ...] | None
    granularity: tuple[int, ...]

    @property
    def totals(self) -> list[int]:
        """Weights that must go in all parts by group of layers, in whole groups."""
        return [
            count if count >= grain else 0
            for count, grain in zip(self.until(1.0), self.granularity, strict=True)
        ]

    def until(self, fraction: float) -> list[int]:
        """Count the weights that must go in the first part of the step.

        Args:
            fraction: of the step that is done then, in [0, 1].

        Returns:
            Their number by group of layers.
        """
        return [
            removal_counts_until(
                "global", target, [weights], [zeros], fraction, self.spacing
            )[0]
            for target, weights, zeros in self.groups
        ]


def make_quotas(
    selection: SelectionConfig,
    layers: Layers,
    target_sparsity: float,
    final_sparsity: float | None = None,
    spacing: Spacing = "geometric",
) -> Quotas:
    """Share what a step must remove out.

    Args:
        selection: scope, targets of layers, limits and pattern.
        layers: the selected tensors.
        target_sparsity: share of the weights that is zero after the step.
        final_sparsity: the same after the last step, by which targets of layers are
            scaled; None when this step is the last.
        spacing: where the parts of the step end.

    Returns:
        The quotas. Targets and limits that contradict one another are a
        :class:`ConfigurationError`.
    """
    own = _own_targets(selection, layers.names)
    if final_sparsity:
        progress = min(1.0, target_sparsity / final_sparsity)
        own = {layer: target * progress for layer, target in own.items()}
    caps = _caps(selection, layers)
    competitors, targets = [], []
    if selection.scope == "layer":
        competitors = list(range(len(layers.names)))
        targets = [own.get(layer, target_sparsity) for layer in competitors]
    else:
        numbers = {layer: 1 + i for i, layer in enumerate(own)}
        competitors = [numbers.get(i, 0) for i in range(len(layers.names))]
        targets = [_rest(layers, own, target_sparsity), *own.values()]
    weights, zeros = [0] * len(targets), [0] * len(targets)
    grains = [1] * len(targets)
    pattern = parse_pattern(selection.pattern)
    for layer, group in enumerate(competitors):
        weights[group] += layers.weights[layer]
        zeros[group] += layers.zeros[layer]
        if pattern.is_grouped:
            leaving = pattern.removed_per_group(layers.shapes[layer])
            grains[group] = max(grains[group], leaving)
    quotas = Quotas(
        tuple(competitors),
        tuple(zip(targets, weights, zeros, strict=True)),
        spacing,
        caps,
        tuple(grains),
    )
    _require_feasible(quotas, layers, selection)
    return quotas


def require_target_fits(
    selection: SelectionConfig, target_sparsity: float, is_final: bool = True
) -> None:
    """Refuse a sparsity that the pattern or a limit does not allow, in any network.

    Args:
        selection: the settings.
        target_sparsity: of a network, or at the end of a schedule.
        is_final: False for a step on the way there.

    Raises:
        ConfigurationError: with the sparsity to ask for.
    """
    pattern = parse_pattern(selection.pattern)
    if pattern.sparsity is not None:
        above = target_sparsity > pattern.sparsity + _SAME
        if above or (is_final and target_sparsity < pattern.sparsity - _SAME):
            raise ConfigurationError(
                f"selection.pattern={selection.pattern!r} has sparsity "
                f"{pattern.sparsity:g} exactly, not {target_sparsity:g}; set "
                f"target_sparsity={pattern.sparsity:g}, or choose another pattern."
            )
    most = selection.max_layer_sparsity
    if most is not None and is_final and target_sparsity > most:
        raise ConfigurationError(
            f"target_sparsity={target_sparsity:g} is out of reach when no layer may have "
            f"more than selection.max_layer_sparsity={most:g}; raise the limit."
        )


def require_flops_target_fits(selection: SelectionConfig, flops_target: float) -> None:
    """Refuse a share of FLOPs that is none, or settings that say already how many go.

    Args:
        selection: the settings.
        flops_target: share of the dense network's FLOPs that is left.

    Raises:
        ConfigurationError: naming the setting.
    """
    require_number("flops_target", flops_target)
    if not 0.0 < flops_target < 1.0:
        raise ConfigurationError(
            f"flops_target={flops_target} is outside (0, 1); it is the share of the dense "
            "network's FLOPs that is left."
        )
    fixed = parse_pattern(selection.pattern).sparsity is not None
    other = {
        "scope='layer'": selection.scope == "layer",
        f"pattern={selection.pattern!r}": fixed,
        "layer_targets": bool(selection.layer_targets),
    }
    for setting, given in other.items():
        if given:
            raise ConfigurationError(
                f"flops_target cannot go with selection.{setting}, which says already how "
                "many weights of a layer go; leave one of them out."
            )


def flops_share_of_step(
    flops_target: float | None, target_sparsity: float, final_sparsity: float | None
) -> float | None:
    """Say how many FLOPs are left after a step on the way to the target.

    Args:
        flops_target: share of the dense FLOPs after the last step.
        target_sparsity: of this step.
        final_sparsity: of the last step; None for a single step.

    Returns:
        The share: as far on its way as the sparsity. None without a target.
    """
    if flops_target is None or not final_sparsity:
        return flops_target
    return 1.0 - (1.0 - flops_target) * min(1.0, target_sparsity / final_sparsity)


def _own_targets(selection: SelectionConfig, names: Sequence[str]) -> dict[int, float]:
    """Targets by number of the layer."""
    found: dict[int, tuple[float, str]] = {}
    for pattern, target in selection.layer_targets.items():
        matching = [i for i, name in enumerate(names) if re.search(pattern, name)]
        if not matching:
            raise ConfigurationError(
                f"the pattern {pattern!r} of selection.layer_targets matches no selected "
                f"weight.{nearest(pattern, names)} Names: {', '.join(names[:12])}"
            )
        for layer in matching:
            if layer in found and found[layer][0] != target:
                raise ConfigurationError(
                    f"{names[layer]} has two targets in selection.layer_targets: "
                    f"{found[layer][0]} by {found[layer][1]!r} and {target} by "
                    f"{pattern!r}; let only one of the patterns match."
                )
            found[layer] = (target, pattern)
    most = selection.max_layer_sparsity
    for layer, (target, _) in found.items():
        if most is not None and target > most:
            raise ConfigurationError(
                f"selection.layer_targets wants {target} of {names[layer]}, but "
                f"selection.max_layer_sparsity={most} forbids more than that."
            )
    return {layer: target for layer, (target, _) in sorted(found.items())}


def _rest(layers: Layers, own: dict[int, float], target_sparsity: float) -> float:
    """Sparsity that the layers without a target must have for the whole to reach its."""
    total, free = sum(layers.weights), sum(layers.weights)
    missing = round(target_sparsity * total)
    for layer, target in own.items():
        free -= layers.weights[layer]
        wanted = round(target * layers.weights[layer])
        missing -= max(wanted, layers.zeros[layer])
    if not own:
        return target_sparsity
    if missing < 0 or missing > free:
        raise ConfigurationError(
            f"selection.layer_targets contradict the sparsity {target_sparsity:g} of all "
            f"{total} weights: {len(own)} layers have targets of their own, and the other "
            f"{free} weights would need {missing} zeros. Change target_sparsity or the "
            "targets."
        )
    return missing / free if free else 0.0


def _caps(selection: SelectionConfig, layers: Layers) -> tuple[int, ...] | None:
    most = selection.max_layer_sparsity
    if most is None:
        return None
    # 0.29 · 100 is 28.999999999999996 in floating point.
    limits = [int(most * count + _SAME) for count in layers.weights]
    return tuple(
        max(0, limit - gone) for limit, gone in zip(limits, layers.zeros, strict=True)
    )


def _require_feasible(
    quotas: Quotas, layers: Layers, selection: SelectionConfig
) -> None:
    if quotas.caps is None:
        return
    pattern = parse_pattern(selection.pattern)
    for group, wanted in enumerate(quotas.totals):
        members = [i for i, g in enumerate(quotas.competitors) if g == group]
        room = 0
        for i in members:
            leaving = (
                pattern.removed_per_group(layers.shapes[i]) if pattern.is_grouped else 1
            )
            room += quotas.caps[i] - quotas.caps[i] % leaving
        if wanted - room >= quotas.granularity[group]:
            names = ", ".join(layers.names[i] for i in members[:8])
            raise ConfigurationError(
                f"{wanted} more weights must go from {names}, but "
                f"selection.max_layer_sparsity={selection.max_layer_sparsity} lets only "
                f"{room} go; raise it or lower the target."
            )
