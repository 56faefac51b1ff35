"""Scores from products with the Hessian of the loss: SOSP-H and HAP.

Neither forms a matrix: a product Hv is the gradient of g·v, one more backward pass through
the graph of the gradient g (Pearlmutter 1994).
Shapes: S structures, L layers, P probes.
"""

from __future__ import annotations

__all__ = ["score_hap", "score_sosp_h", "spearman"]

import dataclasses
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lightning_woodfisher.base.errors import PruningError
from lightning_woodfisher.data.isolation import derive_seed
from lightning_woodfisher.data.losses import differentiate
from lightning_woodfisher.structured.scores.evaluation import Evaluation
from lightning_woodfisher.structured.scores.vectors import (
    StructureVectors,
    sum_products,
)

# Probes that share one graph of the gradient; even, because they alternate between halves.
_PROBES_PER_GRAPH = 20
_STABLE_CORRELATION = 0.99


def score_sosp_h(evaluation: Evaluation) -> Tensor:
    """Compute ``|θ_s·g| + ½|θ_s·(H Σ_s' θ_s')|`` with one Hessian product for each batch.

    Args:
        evaluation: with its session entered.

    Returns:
        float64 ``[S]``.
    """
    vectors = evaluation.vectors
    weights = zip(vectors.parameters, vectors.masks(vectors.slices), strict=True)
    direction = [parameter.detach() * mask for parameter, mask in weights]

    def compute(loss: Callable[[], Tensor], scale: float) -> Tensor:
        gradients = _gradients(loss() * scale, vectors)
        products = _hessian_product(gradients, direction, vectors)
        return torch.stack(
            [vectors.inner_products(gradients), vectors.inner_products(products)]
        )

    rows = evaluation.compute_rows(compute, vectors.size)
    means = rows.view(-1, 2, vectors.size).mean(dim=0)
    return means[0].abs() + 0.5 * means[1].abs()


def score_hap(
    evaluation: Evaluation, probes: int, seed: int
) -> tuple[Tensor, dict[str, float]]:
    """Compute ``Σ_layers Tr(H_cc) / p_c · ‖w_c‖²`` with estimated traces (Hutchinson 1990).

    A probe has random signs on all entries that belong to a filter (with
    ``structure="bn"`` to a norm), and the same signs for every batch. Probing stops early
    once the scores from both halves of the probes agree (Spearman > 0.99).

    Args:
        evaluation: with its session entered.
        probes: largest number of probes, at least 2; the last of an odd number is not used.
        seed: seed of the signs.

    Returns:
        Scores, float64 ``[S]``, possibly negative; and for the report ``probes``, the
        number used, and ``probe_agreement``, the rank correlation between the halves.
    """
    vectors = evaluation.vectors
    # HAP neither probes nor counts the bias of a filter.
    slices = [s for s in vectors.slices if s.role in {"producer", "norm"}]
    masks = vectors.masks(slices)
    layers = list(dict.fromkeys(s.module for s in slices))
    # One block of the Hessian for each structure in each layer: [L, S] in one row.
    count = len(layers) * vectors.size
    for place, one in enumerate(slices):
        shifted = one.structure_of + layers.index(one.module) * vectors.size
        shifted = torch.where(one.structure_of >= 0, shifted, -1)
        slices[place] = dataclasses.replace(one, structure_of=shifted)
    ones = [torch.ones_like(p) for p in vectors.parameters]
    sizes = sum_products(slices, ones, ones, count).clamp(min=1).cpu()
    norms = sum_products(slices, vectors.parameters, vectors.parameters, count).cpu()

    def scores(traces: Tensor) -> Tensor:
        return (traces / sizes * norms).view(-1, vectors.size).sum(dim=0)

    halves = torch.zeros(2, count, dtype=torch.float64)
    done, agreement, probes = 0, math.nan, probes - probes % 2
    while done < probes:
        numbers = range(done, min(done + _PROBES_PER_GRAPH, probes))
        seeds = [derive_seed(seed, "probe", number) for number in numbers]
        drawn = _draw_signs(masks, seeds)

        def compute(
            loss: Callable[[], Tensor], scale: float, drawn: Tensor = drawn
        ) -> Tensor:
            gradients = _gradients(loss() * scale, vectors)
            result = torch.zeros(2, count, dtype=torch.float64, device=drawn.device)
            for place, row in enumerate(drawn):
                signs = _signs(row, masks, vectors)
                products = _hessian_product(
                    gradients, signs, vectors, retain_graph=place + 1 < len(drawn)
                )
                # The first number is even, as the number of probes of a graph.
                result[place % 2] += sum_products(slices, signs, products, count)
            return result

        rows = evaluation.compute_rows(compute, count)
        halves += rows.view(-1, 2, count).mean(dim=0)
        done = numbers.stop
        agreement = spearman(*(scores(2 * half / done) for half in halves))
        if agreement > _STABLE_CORRELATION:
            break
    notes = {"probes": float(done), "probe_agreement": agreement}
    return scores(halves.sum(dim=0) / done), notes


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


def _gradients(loss: Tensor, vectors: StructureVectors) -> tuple[Tensor | None, ...]:
    return differentiate(loss, vectors.parameters, create_graph=True)


def _hessian_product(
    gradients: Sequence[Tensor | None],
    direction: Sequence[Tensor],
    vectors: StructureVectors,
    retain_graph: bool = False,
) -> tuple[Tensor | None, ...]:
    # A gradient without a graph is constant, so it adds nothing.
    pairs = [
        (gradient, vector)
        for gradient, vector in zip(gradients, direction, strict=True)
        if gradient is not None and gradient.requires_grad
    ]
    if not pairs:
        return (None,) * len(direction)
    try:
        return differentiate(
            [gradient for gradient, _ in pairs],
            vectors.parameters,
            [vector for _, vector in pairs],
            retain_graph=retain_graph,
        )
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise PruningError(
            "the loss cannot be differentiated twice, which methods 'sosp_h' and 'hap' "
            f"need; use method='sosp_i': {error}"
        ) from error
