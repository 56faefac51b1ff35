"""HAP: the mean curvature of a layer's slice times its squared norm.

Yu et al., "Hessian-aware pruning and optimal neural implant", WACV 2022. The traces are
those of the Hessian, estimated with random signs as published (Hutchinson 1990), or those
of the Gauss-Newton matrix, which is the mean square of gradients for labels that are drawn
from the model. The latter is ours; it is never negative and needs no second derivatives.
Shapes: S structures, L layers, P probes.
"""

from __future__ import annotations

__all__ = ["count_probes", "score_hap", "spearman"]

import dataclasses
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lightning_woodfisher.data.isolation import derive_seed
from lightning_woodfisher.data.losses import differentiate
from lightning_woodfisher.structured.scores.evaluation import (
    Evaluation,
    second_derivatives,
)
from lightning_woodfisher.structured.scores.vectors import (
    ParameterSlices,
    StructureVectors,
    sum_products,
)

# Probes that share one graph of the gradient; even, because they alternate between halves.
_PROBES_PER_GRAPH = 20
# Drawn labels give one estimate of the trace for each batch, so batches are small.
_SAMPLES_PER_GRADIENT = 4
_STABLE_CORRELATION = 0.99


def score_hap(evaluation: Evaluation, seed: int) -> tuple[Tensor, dict[str, float]]:
    """Compute ``Σ_layers Tr(H_cc) / p_c · ‖w_c‖²``.

    Args:
        evaluation: with its session entered; its settings say how traces are estimated.
        seed: seed of the signs.

    Returns:
        Scores, float64 ``[S]``, possibly negative with ``trace="hutchinson"``; and for the
        report of that ``probes``, the number used, and ``probe_agreement``, the rank
        correlation between the scores of two halves of them.
    """
    vectors, config = evaluation.vectors, evaluation.config
    # HAP neither probes nor counts the bias of a filter.
    slices = [s for s in vectors.slices if s.role in {"producer", "norm"}]
    layers = list(dict.fromkeys(s.module for s in slices))
    # One block of the Hessian for each structure in each layer: [L, S] in one row.
    count = len(layers) * vectors.size
    masks = vectors.masks(slices)
    for place, one in enumerate(slices):
        shifted = one.structure_of + layers.index(one.module) * vectors.size
        shifted = torch.where(one.structure_of >= 0, shifted, -1)
        slices[place] = dataclasses.replace(one, structure_of=shifted)
    ones = [torch.ones_like(p) for p in vectors.parameters]
    sizes = sum_products(slices, ones, ones, count).clamp(min=1).cpu()
    norms = sum_products(slices, vectors.parameters, vectors.parameters, count).cpu()

    def scores(traces: Tensor) -> Tensor:
        return (traces / sizes * norms).view(-1, vectors.size).sum(dim=0)

    if config.trace == "gauss_newton":
        return scores(_gauss_newton_traces(evaluation, slices, count)), {}
    halves = torch.zeros(2, count, dtype=torch.float64)
    done, agreement, probes = 0, math.nan, config.probes - config.probes % 2
    while done < probes:
        numbers = range(done, min(done + _PROBES_PER_GRAPH, probes))
        seeds = [derive_seed(seed, "probe", number) for number in numbers]
        halves += _probe(evaluation, slices, masks, count, _draw_signs(masks, seeds))
        done = numbers.stop
        agreement = spearman(*(scores(2 * half / done) for half in halves))
        if agreement > _STABLE_CORRELATION:
            break
    notes = {"probes": float(done)}
    if not math.isnan(agreement):
        notes["probe_agreement"] = agreement
    return scores(halves.sum(dim=0) / done), notes


def count_probes(probes: int, agreement: float) -> float:
    """Estimate how many probes would make the ranking stable.

    Noise falls with the number of probes, so the odds a / (1 - a) of the correlation a
    between two halves grow in proportion to it (Spearman and Brown 1910).

    Args:
        probes: number of probes that were used.
        agreement: correlation between the scores of their halves.

    Returns:
        The number for a correlation of 0.99; infinite without any agreement.
    """
    if agreement <= 0.0:
        return math.inf
    odds = _STABLE_CORRELATION / (1.0 - _STABLE_CORRELATION)
    return max(float(probes), math.ceil(probes * odds * (1.0 - agreement) / agreement))


def spearman(first: Tensor, second: Tensor) -> float:
    """Compute Spearman's rank correlation; equal numbers share their mean rank.

    Args:
        first: ``[n]``.
        second: ``[n]``.

    Returns:
        A number in [-1, 1]; NaN if one list is constant.
    """
    ranks = torch.stack([_ranks(first), _ranks(second)])
    ranks = ranks - ranks.mean(dim=1, keepdim=True)
    norms = ranks.norm(dim=1)
    return float(ranks[0] @ ranks[1] / norms.prod())


def _ranks(values: Tensor) -> Tensor:
    ordered, order = values.double().sort()
    # Equal numbers are neighbors: their run begins and ends at the same places.
    starts = torch.searchsorted(ordered, ordered)
    ends = torch.searchsorted(ordered, ordered, right=True)
    ranks = torch.empty_like(ordered)
    ranks[order] = (starts + ends).double() / 2
    return ranks


def _gauss_newton_traces(
    evaluation: Evaluation, slices: Sequence[ParameterSlices], count: int
) -> Tensor:
    """Estimate the traces by gradients for drawn labels.

    The gradient of the mean of m drawn terms has the mean 0, and its mean square is Tr / m.

    Returns:
        float64 ``[L·S]``, for each block.
    """
    vectors = evaluation.vectors

    def compute(loss: Callable[[], Tensor], scale: float, labels: int) -> Tensor:
        found = differentiate(loss() * scale, vectors.parameters)
        gradients = [None if g is None else g.double() / scale for g in found]
        squares = sum_products(slices, gradients, gradients, count)
        return squares[None] * (labels * scale)

    rows = evaluation.compute_rows(
        compute, count, draw_labels=True, batch_size=_SAMPLES_PER_GRADIENT
    )
    return rows.mean(dim=0)


def _probe(
    evaluation: Evaluation,
    slices: Sequence[ParameterSlices],
    masks: Sequence[Tensor],
    count: int,
    drawn: Tensor,
) -> Tensor:
    """Sum zᵀHz over the even and over the odd probes, by block: ``[2, L·S]``."""
    vectors = evaluation.vectors

    def compute(loss: Callable[[], Tensor], scale: float, labels: int) -> Tensor:
        result = torch.zeros(2, count, dtype=torch.float64, device=drawn.device)
        with second_derivatives():
            found = differentiate(loss() * scale, vectors.parameters, create_graph=True)
            for place, row in enumerate(drawn):
                signs = _signs(row, masks, vectors)
                # A gradient without a graph is constant, so it adds nothing.
                pairs = [
                    (g, z)
                    for g, z in zip(found, signs, strict=True)
                    if g is not None and g.requires_grad
                ]
                if not pairs:
                    break
                products = differentiate(
                    [gradient for gradient, _ in pairs],
                    vectors.parameters,
                    [sign for _, sign in pairs],
                    retain_graph=place + 1 < len(drawn),
                )
                # The first number is even, as the number of probes of a graph.
                result[place % 2] += sum_products(slices, signs, products, count)
        return result

    rows = evaluation.compute_rows(compute, count)
    return rows.view(-1, 2, count).mean(dim=0)


def _draw_signs(masks: Sequence[Tensor], seeds: Sequence[int]) -> Tensor:
    """Draw -1 or 1 for every entry, once for all batches.

    Returns:
        int8 ``[P, entries]``, on the device of the masks: one copy for all probes.
    """
    # On the CPU, because the numbers of a GPU depend on its model.
    sizes = [mask.numel() for mask in masks]
    bits = torch.empty(len(seeds), sum(sizes), dtype=torch.int8)
    for row, seed in zip(bits, seeds, strict=True):
        generator = torch.Generator().manual_seed(seed)
        for part in torch.split(row, sizes):
            part.copy_(torch.randint(0, 2, part.shape, generator=generator))
    return bits.to(masks[0].device).mul_(2).sub_(1)


def _signs(
    drawn: Tensor, masks: Sequence[Tensor], vectors: StructureVectors
) -> list[Tensor]:
    """Return the drawn signs of a probe where a mask is True, and 0 elsewhere."""
    parts = torch.split(drawn, [mask.numel() for mask in masks])
    return [
        (part.view(mask.shape) * mask).to(parameter)
        for part, mask, parameter in zip(parts, masks, vectors.parameters, strict=True)
    ]
