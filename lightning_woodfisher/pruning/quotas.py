"""How many weights each group of layers must lose in a pruning step.

All layers compete with each other, or every layer is a group of its own, or layers with a
target of their own are taken out of the competition. A limit on the sparsity of a layer is
exact; the other layers compensate for it.
"""

from __future__ import annotations

__all__ = [
    "Layers",
    "Quotas",
    "flops_share_of_step",
    "make_quotas",
    "removal_count",
    "require_layers_fit",
]

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from lightning_woodfisher.base.errors import ConfigurationError, nearest
from lightning_woodfisher.pruning.config import SelectionConfig
from lightning_woodfisher.pruning.stages import Spacing, removed_fraction
from lightning_woodfisher.weights.patterns import parse_pattern

_SAME = 1e-9


@dataclass(frozen=True)
class Layers:
    """Names, shapes and counts of the selected parameters.

    Attributes:
        names: name of each parameter.
        shapes: shape of each parameter, outputs first.
        weights: number of weights of each parameter.
        zeros: number of pruned weights of each parameter.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    weights: tuple[int, ...]
    zeros: tuple[int, ...]


@dataclass(frozen=True)
class Quotas:
    """Number of weights to remove, by group of competing layers.

    Attributes:
        group_of_layer: index of the group of each layer.
        groups: target sparsity, weights and zeros of each group.
        spacing: how sparsity grows over the stages of the step.
        caps: largest number of weights that each layer may lose; None without limits.
        granularity: number of weights that are removed together, by group; a remainder
            smaller than this may stay.
    """

    group_of_layer: tuple[int, ...]
    groups: tuple[tuple[float, int, int], ...]
    spacing: Spacing
    caps: tuple[int, ...] | None
    granularity: tuple[int, ...]

    @property
    def totals(self) -> list[int]:
        """Weights to remove in the whole step, by group; 0 below the granularity."""
        return [
            count if count >= grain else 0
            for count, grain in zip(self.until(1.0), self.granularity, strict=True)
        ]

    def without(self, layers: Collection[int], every: Layers) -> Quotas:
        """Let some layers lose nothing; the others reach their sparsity without them.

        Args:
            layers: indices of the layers.
            every: all layers, at the start of the step.

        Returns:
            The quotas of the other layers.
        """
        groups = [list(group) for group in self.groups]
        room = [n - z for n, z in zip(every.weights, every.zeros, strict=True)]
        caps = room if self.caps is None else list(self.caps)
        for layer in layers:
            group = groups[self.group_of_layer[layer]]
            group[1] -= every.weights[layer]
            group[2] -= every.zeros[layer]
            caps[layer] = 0
        return replace(
            self,
            groups=tuple((t, int(n), int(z)) for t, n, z in groups),
            caps=tuple(caps),
        )

    def until(self, fraction: float) -> list[int]:
        """Count the weights to remove in the first fraction of the step.

        Args:
            fraction: fraction of the step, in [0, 1].

        Returns:
            Number of weights by group of layers.
        """
        return [
            removal_count(target, weights, zeros, fraction, self.spacing)
            for target, weights, zeros in self.groups
        ]


def make_quotas(
    selection: SelectionConfig,
    layers: Layers,
    target_sparsity: float,
    final_sparsity: float | None = None,
    spacing: Spacing = "geometric",
    left_dense: Collection[str] = (),
) -> Quotas:
    """Distribute the weights that a step must remove over groups of layers.

    Args:
        selection: scope, layer targets, limits and pattern.
        layers: the selected parameters.
        target_sparsity: share of the weights that is zero after the step.
        final_sparsity: share of zeros after the last step, by which layer targets are
            scaled; None when this step is the last.
        spacing: how sparsity grows over the stages of the step.
        left_dense: names of layers that lose nothing in this step. The others reach the
            sparsity without them.

    Returns:
        The quotas. Contradictory targets and limits raise :class:`ConfigurationError`.
    """
    own = _own_targets(selection, layers.names)
    if final_sparsity:
        progress = min(1.0, target_sparsity / final_sparsity)
        own = {layer: target * progress for layer, target in own.items()}
    held = {i for i, name in enumerate(layers.names) if name in left_dense}
    own = {layer: target for layer, target in own.items() if layer not in held}
    caps = _caps(selection, layers, held)
    if selection.scope == "layer":
        group_of_layer = list(range(len(layers.names)))
        targets = [own.get(layer, target_sparsity) for layer in group_of_layer]
    else:
        numbers = {layer: 1 + i for i, layer in enumerate(own)}
        group_of_layer = [numbers.get(i, 0) for i in range(len(layers.names))]
        targets = [_rest(layers, own, target_sparsity, held), *own.values()]
    weights, zeros = [0] * len(targets), [0] * len(targets)
    grains = [1] * len(targets)
    pattern = parse_pattern(selection.pattern)
    for layer, group in enumerate(group_of_layer):
        if layer in held:
            continue
        weights[group] += layers.weights[layer]
        zeros[group] += layers.zeros[layer]
        leaving = pattern.removed_per_group(layers.shapes[layer])
        grains[group] = max(grains[group], leaving)
    quotas = Quotas(
        tuple(group_of_layer),
        tuple(zip(targets, weights, zeros, strict=True)),
        spacing,
        caps,
        tuple(grains),
    )
    _require_feasible(quotas, layers, selection)
    return quotas


def removal_count(
    target_sparsity: float,
    weights: int,
    zeros: int,
    fraction: float = 1.0,
    spacing: Spacing = "geometric",
) -> int:
    """Count the weights that competing layers must lose in the first fraction of a step.

    Args:
        target_sparsity: share of weights that is zero after the step.
        weights: number of weights of the layers together.
        zeros: number of pruned weights at the start of the step.
        fraction: fraction of the step, in [0, 1].
        spacing: how the kept share falls; see :func:`~.stages.removed_fraction`.

    Returns:
        A number that never falls as the fraction grows: at the end
        round(target · weights) − zeros, but at least 0.
    """
    total = max(0, round(target_sparsity * weights) - zeros)
    kept = weights - zeros
    if fraction >= 1.0 or not kept:
        return total
    ratio = min(1.0, (1.0 - target_sparsity) * weights / kept)
    return min(total, round(kept * removed_fraction(ratio, fraction, spacing)))


def require_layers_fit(
    selection: SelectionConfig, layers: Layers, target_sparsity: float
) -> None:
    """Check that no layer with a target of its own has more zeros than that.

    Args:
        selection: scope and layer targets.
        layers: the selected parameters.
        target_sparsity: sparsity at the end.

    Raises:
        ConfigurationError: naming the layers, because pruning only adds zeros.
    """
    targets = _own_targets(selection, layers.names)
    if selection.scope == "layer":
        targets = dict.fromkeys(range(len(layers.names)), target_sparsity) | targets
    above = [
        f"{layers.names[i]} ({layers.zeros[i] / layers.weights[i]:.4f}, target {target:g})"
        for i, target in targets.items()
        if layers.zeros[i] > round(target * layers.weights[i])
    ]
    if above:
        raise ConfigurationError(
            "layers have more zeros than their own target, and pruning can only add zeros: "
            f"{', '.join(above[:8])}. Raise the target, leave the layers out with "
            "selection.exclude, or use scope='global' without layer_targets."
        )


def flops_share_of_step(
    flops_target: float | None, target_sparsity: float, final_sparsity: float | None
) -> float | None:
    """Return the share of FLOPs that is left after one step of a schedule.

    Args:
        flops_target: share of the dense FLOPs after the last step, or None.
        target_sparsity: sparsity after this step.
        final_sparsity: sparsity after the last step; None for a single step.

    Returns:
        The share, in proportion to the progress of the sparsity; None without a target.
    """
    if flops_target is None or not final_sparsity:
        return flops_target
    return 1.0 - (1.0 - flops_target) * min(1.0, target_sparsity / final_sparsity)


def _own_targets(selection: SelectionConfig, names: Sequence[str]) -> dict[int, float]:
    """Return the layers that have a target of their own, by index."""
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
                f"selection.layer_targets asks for {target} of {names[layer]}, which is "
                f"above selection.max_layer_sparsity={most}; change one of them."
            )
    return {layer: target for layer, (target, _) in sorted(found.items())}


def _rest(
    layers: Layers, own: dict[int, float], target_sparsity: float, held: Collection[int]
) -> float:
    """Return the sparsity that the layers without a target need to reach the total."""
    total = sum(n for i, n in enumerate(layers.weights) if i not in held)
    free = total
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
            "layer targets."
        )
    return missing / free if free else 0.0


def _caps(
    selection: SelectionConfig, layers: Layers, held: Collection[int]
) -> tuple[int, ...] | None:
    most = selection.max_layer_sparsity
    if most is None and not held:
        return None
    # 0.29 · 100 is 28.999999999999996 in floating point.
    share = 1.0 if most is None else most
    limits = [int(share * count + _SAME) for count in layers.weights]
    return tuple(
        0 if layer in held else max(0, limit - gone)
        for layer, (limit, gone) in enumerate(zip(limits, layers.zeros, strict=True))
    )


def _require_feasible(
    quotas: Quotas, layers: Layers, selection: SelectionConfig
) -> None:
    if quotas.caps is None:
        return
    pattern = parse_pattern(selection.pattern)
    for group, wanted in enumerate(quotas.totals):
        members = [i for i, g in enumerate(quotas.group_of_layer) if g == group]
        room = 0
        for i in members:
            leaving = pattern.removed_per_group(layers.shapes[i])
            room += quotas.caps[i] - quotas.caps[i] % leaving
        if wanted - room >= quotas.granularity[group]:
            names = ", ".join(layers.names[i] for i in members[:8])
            raise ConfigurationError(
                f"{wanted} more weights must be removed from {names}, but "
                f"selection.max_layer_sparsity={selection.max_layer_sparsity} allows only "
                f"{room}; raise it or lower the target."
            )
