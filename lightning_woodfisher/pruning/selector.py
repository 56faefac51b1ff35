"""Choice of the weights to remove in one stage, from saliencies, pattern, quotas and FLOPs.

Ranks exchange counts, never saliencies.
"""

from __future__ import annotations

__all__ = [
    "Candidates",
    "Selector",
    "find_untrained",
    "is_too_sparse",
    "layers_of",
    "prune_zeros",
    "weights_to_remove",
]

import math
from collections.abc import Collection, Container
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_woodfisher.base.errors import ConfigurationError
from lightning_woodfisher.criteria import Criterion
from lightning_woodfisher.distributed.communicator import Communicator
from lightning_woodfisher.distributed.quantiles import quantiles_by_group
from lightning_woodfisher.distributed.smallest import select_smallest
from lightning_woodfisher.pruning.config import SelectionConfig
from lightning_woodfisher.pruning.flops import LayerFlops
from lightning_woodfisher.pruning.quotas import Layers, Quotas, make_quotas
from lightning_woodfisher.pruning.report import SALIENCY_SHARES
from lightning_woodfisher.pruning.stages import removed_fraction
from lightning_woodfisher.weights.active import ActiveWeights
from lightning_woodfisher.weights.masks import Masks
from lightning_woodfisher.weights.patterns import parse_pattern

# Relative tolerance of the share of FLOPs.
_FLOPS_TOLERANCE = 0.005


@dataclass(frozen=True)
class Candidates:
    """Competing single weights, or groups of weights; G_r of them on this rank.

    Attributes:
        scores: saliency per weight, float64 ``[G_r]``.
        layers: index of the layer, int64 ``[G_r]``.
        sizes: number of weights that each group loses, int64 ``[G_r]``; None for single
            weights.
        leaving: bool ``[D_r]``, the weights that are removed if their group is chosen; None
            for all.
    """

    scores: Tensor
    layers: Tensor
    sizes: Tensor | None
    leaving: Tensor | None


class Selector:
    """Choose the weights of one step, stage by stage.

    Args:
        masks: which weights are selected and pruned at the start of the step.
        selection: the settings.
        communicator: the ranks.
        quotas: number of weights to remove.
        flops: FLOPs by layer, where ``flops_power`` or ``flops_target`` needs them.
        flops_target: share of the dense FLOPs that is left after the step.

    Attributes:
        left_dense: why a tensor loses nothing, by its name.

    Raises:
        ConfigurationError: for a target that cannot be reached.
    """

    def __init__(
        self,
        masks: Masks,
        selection: SelectionConfig,
        communicator: Communicator,
        quotas: Quotas,
        flops: LayerFlops | None = None,
        flops_target: float | None = None,
    ) -> None:
        self._masks = masks
        self._selection = selection
        self._comm = communicator
        self._quotas = quotas
        self._flops = flops
        self._flops_target = flops_target
        self.pattern = parse_pattern(selection.pattern)
        self._layers = layers_of(masks)
        self._start = list(self._layers.zeros)
        self.left_dense: dict[str, str] = {}
        if flops is not None and flops_target is not None:
            self._require_reachable(flops, flops_target)

    def leave_dense(self, names: Collection[str], reason: str) -> None:
        """Remove nothing from some tensors in this and the following stages.

        Args:
            names: the tensors; the others reach their sparsity without them.
            reason: why, for the report.
        """
        new = [name for name in names if name not in self.left_dense]
        if new:
            indices = [self._layers.names.index(name) for name in new]
            self._quotas = self._quotas.without(indices, self._layers)
            self.left_dense |= dict.fromkeys(new, reason)

    def candidates(
        self,
        criterion: Criterion,
        active: ActiveWeights,
        weights: Tensor,
        removed: Tensor | None = None,
    ) -> Candidates:
        """Score the weights that can be removed.

        Args:
            criterion: criterion that has observed all gradients.
            active: the active weights.
            weights: float64 ``[D_r]``.
            removed: bool ``[D_r]``, removed in earlier stages; for single weights only.

        Returns:
            The candidates of this rank.
        """
        sizes: Tensor | None = None
        leaving: Tensor | None = None
        if self.pattern.is_grouped:
            costs, leaving = criterion.score_groups(weights, active.runs, self.pattern)
            layers = active.group_layers()
            shapes = self._layers.shapes
            each = [self.pattern.removed_per_group(shape) for shape in shapes]
            sizes = self._by_layer(each, layers)
            scores = costs / sizes
        else:
            scores, layers = criterion.score(weights), active.weight_layers()
            if removed is not None:
                scores = scores.masked_fill(removed, math.inf)
        power = self._selection.flops_power
        if power and self._flops is not None:
            each = self._flops.per_weight
            mean = sum(self._flops.by_layer) / sum(self._flops.weights)
            factors = torch.tensor([(mean / flops) ** power for flops in each])
            scores = scores * factors.to(scores)[layers]
        return Candidates(scores, layers, sizes, leaving)

    def choose(
        self, candidates: Candidates, active: ActiveWeights, fraction: float
    ) -> tuple[Tensor, list[float | None]]:
        """Choose the weights to remove in one stage.

        Args:
            candidates: result of :meth:`candidates`.
            active: the active weights.
            fraction: fraction of the step at the end of the stage, in (0, 1].

        Returns:
            bool ``[D_r]``, and the largest saliency that is removed from each layer.
        """
        chosen = self._choose(candidates, fraction)
        thresholds = active.largest_by_layer(
            candidates.scores, chosen, candidates.layers
        )
        if candidates.leaving is None:
            return chosen, thresholds
        return active.weights_in_groups(chosen) & candidates.leaving, thresholds

    def flops_before_and_after(self) -> dict[str, Any]:
        """Return FLOPs before the step and now, as fields of a report; none if not counted."""
        if self._flops is None:
            return {}
        return {
            "flops_dense": self._flops.dense,
            "flops_before": self._flops.masked(self._start),
            "flops_after": self._flops.masked(list(self._masks.zeros().values())),
        }

    def quantiles(self, candidates: Candidates) -> list[tuple[float, ...]]:
        """Return quantiles of the saliencies of each layer.

        Args:
            candidates: result of :meth:`candidates`.

        Returns:
            Quantiles at ``SALIENCY_SHARES`` by layer; empty for layers without candidates.
        """
        number = len(self._start)
        return quantiles_by_group(
            candidates.scores, candidates.layers, number, SALIENCY_SHARES, self._comm
        )

    def _choose(self, found: Candidates, fraction: float) -> Tensor:
        comm, quotas = self._comm, self._quotas
        zeros = list(self._masks.zeros().values())
        scores, layers, sizes = found.scores, found.layers, found.sizes
        inside: Tensor | None = None
        if quotas.caps is not None:
            # The smallest of each layer, up to its limit, compete.
            left = [
                max(0, cap - (now - before))
                for cap, now, before in zip(
                    quotas.caps, zeros, self._start, strict=True
                )
            ]
            ones = torch.ones_like(layers) if sizes is None else sizes
            allowed = select_smallest(scores, layers, left, comm, ones)
            inside = allowed.nonzero().squeeze(1)
            scores, layers = scores[inside], layers[inside]
            sizes = None if sizes is None else sizes[inside]
        if self._flops is not None and self._flops_target is not None:
            each = self._by_layer(self._flops.per_weight, layers)
            sizes = each if sizes is None else sizes * each
            counts = [
                self._flops_to_save(self._flops, self._flops_target, fraction, zeros)
            ]
            chosen = select_smallest(scores, None, counts, comm, sizes)
        else:
            groups = None
            if len(quotas.granularity) > 1:
                groups = self._by_layer(quotas.group_of_layer, layers)
            counts = self._counts(fraction, zeros)
            chosen = select_smallest(scores, groups, counts, comm, sizes)
        if inside is None:
            return chosen
        everywhere = torch.zeros_like(found.scores, dtype=torch.bool)
        everywhere[inside[chosen]] = True
        return everywhere

    def _counts(self, fraction: float, zeros: list[int]) -> list[int]:
        """Count the weights that each group must still lose by the end of a stage."""
        quotas = self._quotas
        counts = quotas.until(fraction)
        for layer, group in enumerate(quotas.group_of_layer):
            if self._layers.names[layer] not in self.left_dense:
                counts[group] -= zeros[layer] - self._start[layer]
        return [max(0, count) for count in counts]

    def _flops_to_save(
        self, flops: LayerFlops, target: float, fraction: float, zeros: list[int]
    ) -> int:
        # FLOPs fall over the stages as the kept share of weights does.
        start = flops.masked(self._start)
        ratio = min(1.0, target * flops.dense / start)
        spacing = self._quotas.spacing
        goal = start * (1.0 - removed_fraction(ratio, fraction, spacing))
        return max(0, round(flops.masked(zeros) - goal))

    def _require_reachable(self, flops: LayerFlops, target: float) -> None:
        zeros, caps = self._start, self._quotas.caps
        now = flops.masked(zeros) / flops.dense
        if target > now * (1 + _FLOPS_TOLERANCE):
            raise ConfigurationError(
                f"flops_target: a share of {target:.4f} of the dense FLOPs is above the "
                f"{now:.4f} that the masked network has already; pruning can only lower it."
            )
        most = list(flops.weights)
        if caps is not None:
            most = [gone + cap for gone, cap in zip(zeros, caps, strict=True)]
        least = flops.masked(most) / flops.dense
        if target * (1 + _FLOPS_TOLERANCE) < least:
            raise ConfigurationError(
                f"flops_target: a share of {target:.4f} of the dense FLOPs is out of reach: "
                f"with all weights removed that may be removed, {least:.4f} are left. Select "
                "more layers, raise selection.max_layer_sparsity, or raise flops_target."
            )

    def _by_layer(self, values: list[int] | tuple[int, ...], layers: Tensor) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=layers.device)[layers]


def layers_of(masks: Masks) -> Layers:
    """Describe the selected parameters.

    Args:
        masks: masks with the parameters.

    Returns:
        Names, shapes, weights and zeros.
    """
    parameters = masks.parameters
    return Layers(
        tuple(parameters),
        tuple(tuple(masks.outputs_first(n, p).shape) for n, p in parameters.items()),
        tuple(p.numel() for p in parameters.values()),
        tuple(masks.zeros().values()),
    )


def prune_zeros(
    masks: Masks, selection: SelectionConfig, left_dense: Container[str] = ()
) -> None:
    """Mark weights that are exactly zero as pruned. Call on all ranks.

    With a pattern, only groups with all the zeros that the pattern asks for count.

    Args:
        masks: masks of a network that may be sparse; changed.
        selection: the settings.
        left_dense: names of tensors whose zeros do not count.
    """
    pattern = parse_pattern(selection.pattern)
    pruned = {}
    for name in masks.parameters:
        if name in left_dense:
            continue
        zero = masks.outputs_first(name, masks.local(name) == 0)
        if pattern.is_grouped:
            zero = pattern.complete_groups(zero)
        pruned[name] = masks.outputs_first(name, zero).contiguous()
    masks.prune(pruned)


def find_untrained(masks: Masks, share: float = 0.99) -> list[str]:
    """Find the tensors whose active weights are all exactly zero. Call on all ranks.

    The saliency of a zero is zero. Pruned by it, a tensor that was initialized with zeros
    would lose all of its weights.

    Args:
        masks: which weights are selected and pruned.
        share: smallest share of zeros.

    Returns:
        Names of the tensors.
    """
    zeros, gone = masks.active_zeros(), masks.zeros()
    return [
        name
        for name, parameter in masks.parameters.items()
        if zeros[name] and zeros[name] >= share * (parameter.numel() - gone[name])
    ]


def weights_to_remove(
    masks: Masks,
    selection: SelectionConfig,
    target_sparsity: float,
    final_sparsity: float | None = None,
) -> list[int]:
    """Count the weights that have to be removed to reach a sparsity.

    Args:
        masks: which weights are selected and pruned.
        selection: the settings.
        target_sparsity: share of zeros after the step.
        final_sparsity: share of zeros at the end of the schedule; see
            :func:`~.quotas.make_quotas`.

    Returns:
        Number of weights by group of competing layers; 0 below the granularity.
    """
    quotas = make_quotas(selection, layers_of(masks), target_sparsity, final_sparsity)
    return quotas.totals


def is_too_sparse(
    masks: Masks,
    selection: SelectionConfig,
    target_sparsity: float,
    final_sparsity: float | None = None,
) -> bool:
    """Return whether a network has more zeros than a target, and no layer has too few.

    Args:
        masks: which weights are selected and pruned.
        selection: the settings.
        target_sparsity: share of zeros after the step.
        final_sparsity: share of zeros at the end of the schedule.

    Returns:
        True when the target cannot be met because pruning only adds zeros.
    """
    layers = layers_of(masks)
    above = round(target_sparsity * sum(layers.weights)) < sum(layers.zeros)
    # Always computed, because it refuses contradictory targets.
    missing = weights_to_remove(masks, selection, target_sparsity, final_sparsity)
    return above and not any(missing)
