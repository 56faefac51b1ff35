"""HAP: the mean curvature of a layer's slice times its squared norm.

Yu et al., "Hessian-aware pruning and optimal neural implant", WACV 2022. The traces are
those of the Hessian, estimated with random signs as published (Hutchinson 1990), or those
of the Gauss-Newton matrix, which is the mean square of gradients for labels that are drawn
from the model. The latter is ours; it is never negative and needs no second derivatives.
Shapes: S structures, L layers, P probes.
"""

from __future__ import annotations

__all__ = ["count_probes", "score_hap", "spearman"]

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_woodfisher.data.isolation import derive_seed
from lightning_woodfisher.data.losses import differentiate
from lightning_woodfisher.gradients.hessian_rows import second_derivatives
from lightning_woodfisher.structured.scores.evaluation import ComputeLoss, Evaluation
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
_NEEDS = "method='hap' with trace='hutchinson' needs; use trace='gauss_newton'"


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
    weights = vectors.parameters
    ones = [torch.ones_like(weight) for weight in weights]
    # One block of the Hessian for each structure in each layer: [L, S].
    sizes = sum_products(slices, ones, ones, vectors.size).clamp(min=1).cpu()
    norms = sum_products(slices, weights, weights, vectors.size).cpu()

    def scores(traces: Tensor) -> Tensor:
        return (traces.view_as(norms) / sizes * norms).sum(dim=0)

    if config.trace == "gauss_newton":
        return scores(_gauss_newton_traces(evaluation, slices, norms.numel())), {}
    halves = torch.zeros(2, norms.numel(), dtype=torch.float64)
    done, agreement, probes = 0, math.nan, config.probes - config.probes % 2
    while done < probes:
        numbers = range(done, min(done + _PROBES_PER_GRAPH, probes))
        seeds = [derive_seed(seed, "probe", number) for number in numbers]
        signs = _draw_signs(vectors, slices, seeds)
        halves += _probe(evaluation, slices, signs, norms.numel())
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
    return float(torch.corrcoef(ranks)[0, 1])


def _ranks(values: Tensor) -> Tensor:
    _, places, counts = torch.unique(values, return_inverse=True, return_counts=True)
    # The mean rank of equal numbers, plus a half.
    ranks: Tensor = (counts.cumsum(0) - counts / 2).double()[places]
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

    def compute(loss: ComputeLoss, scale: float, labels: int) -> Tensor:
        found = differentiate(loss() * scale, vectors.parameters)
        gradients = [None if g is None else g.double() / scale for g in found]
        squares = sum_products(slices, gradients, gradients, vectors.size)
        return squares.reshape(1, count) * (labels * scale)

    rows = evaluation.compute_rows(
        compute, count, draw_labels=True, batch_size=_SAMPLES_PER_GRADIENT
    )
    return rows.mean(dim=0)


def _probe(
    evaluation: Evaluation,
    slices: Sequence[ParameterSlices],
    signs: Sequence[Tensor],
    count: int,
) -> Tensor:
    """Sum zᵀHz over the even and over the odd probes, by block: ``[2, L·S]``."""
    vectors = evaluation.vectors
    weights, probes = vectors.parameters, len(signs[0])

    def compute(loss: ComputeLoss, scale: float, labels: int) -> Tensor:
        result = torch.zeros(2, count, dtype=torch.float64, device=signs[0].device)
        with second_derivatives("the loss", _NEEDS):
            found = differentiate(loss() * scale, weights, create_graph=True)
            for probe in range(probes):
                z = [s[probe].to(w) for s, w in zip(signs, weights, strict=True)]
                # A gradient without a graph is constant, so it adds nothing.
                pairs = [
                    pair
                    for pair in zip(found, z, strict=True)
                    if pair[0] is not None and pair[0].requires_grad
                ]
                if not pairs:
                    break
                gradients, directions = zip(*pairs, strict=True)
                products = differentiate(
                    gradients, weights, directions, retain_graph=probe + 1 < probes
                )
                # The first number is even, as the number of probes of a graph.
                blocks = sum_products(slices, z, products, vectors.size)
                result[probe % 2] += blocks.flatten()
        return result

    rows = evaluation.compute_rows(compute, count)
    return rows.view(-1, 2, count).mean(dim=0)


def _draw_signs(
    vectors: StructureVectors, slices: Sequence[ParameterSlices], seeds: Sequence[int]
) -> list[Tensor]:
    """Draw -1 or 1 for every entry of the slices, once for all batches.

    Returns:
        int8 ``[P, *shape]`` for each parameter, on its device; 0 outside of the slices.
    """
    # On the CPU, because the numbers of a GPU depend on its model.
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    signs = []
    for place, weight in enumerate(vectors.parameters):
        drawn = [
            torch.randint(0, 2, weight.shape, generator=generator, dtype=torch.int8)
            for generator in generators
        ]
        mask = torch.zeros_like(weight, dtype=torch.bool)
        for one in slices:
            if one.parameter == place:
                inside = (one.owners < vectors.size).nonzero().flatten()
                mask.index_fill_(one.axis, inside, True)
        signs.append(torch.stack(drawn).to(weight.device).mul_(2).sub_(1).mul_(mask))
    return signs
