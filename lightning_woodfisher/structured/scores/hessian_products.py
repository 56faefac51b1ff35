"""Scores from products with the Hessian of the loss: SOSP-H and HAP.

Neither forms a matrix: a product Hv is the gradient of g·v, one more backward pass through
the graph of the gradient g (Pearlmutter 1994).
Shapes: S structures, B blocks (a structure in one layer), P probes.
"""

from __future__ import annotations

__all__ = ["TraceEstimate", "hessian_traces", "sosp_h"]

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_woodfisher.base.errors import PruningError
from lightning_woodfisher.data.isolation import derive_seed
from lightning_woodfisher.structured.scores.correlation import spearman
from lightning_woodfisher.structured.scores.evaluation import Evaluation
from lightning_woodfisher.structured.scores.vectors import (
    Part,
    StructureVectors,
    add_slices,
)

# Probes that share one graph of the gradient; the two halves take turns, so even.
_PROBES_AT_ONCE = 20
_SETTLED = 0.99


def sosp_h(evaluation: Evaluation) -> tuple[Tensor, Tensor]:
    """Compute θ_s·g and θ_s·(H Σ_s' θ_s') with one Hessian product for each batch.

    Args:
        evaluation: with its session entered.

    Returns:
        Two float64 tensors ``[S]``, with signs.
    """
    vectors = evaluation.vectors
    direction = vectors.sum()

    def compute(loss: Callable[[], Tensor], scale: float) -> Tensor:
        gradients = _gradients(loss() * scale, vectors)
        products = _product(gradients, direction, vectors)
        return torch.stack([vectors.inner(gradients), vectors.inner(products)])

    rows = evaluation.rows(evaluation.batches(), compute, vectors.size)
    first, second = rows.view(-1, 2, vectors.size).mean(dim=0)
    return first, second


@dataclass(frozen=True)
class TraceEstimate:
    """What HAP knows of each structure.

    Attributes:
        scores: Σ over layers of Tr(H_cc) / p_c · ‖w_c‖², float64 ``[S]``, with signs.
        probes: how many were needed.
        agreement: rank correlation of the scores from one and the other half of them.
    """

    scores: Tensor
    probes: int
    agreement: float


def hessian_traces(evaluation: Evaluation, probes: int, seed: int) -> TraceEstimate:
    """Estimate the traces of the diagonal blocks of the Hessian (Hutchinson 1990).

    A probe has random signs on all entries that belong to a filter (with
    ``structure="bn"`` to a norm), and the same signs for every batch. It ends early once
    the rankings by one and the other half of the probes agree (Spearman > 0.99).

    Args:
        evaluation: with its session entered.
        probes: most probes, at least 2; an odd one is not used.
        seed: of the signs.

    Returns:
        The estimate.
    """
    vectors = evaluation.vectors
    blocks = _Blocks(vectors)
    masks = vectors.masks("producer", "norm")
    halves = torch.zeros(2, blocks.count, dtype=torch.float64)
    done, agreement, probes = 0, float("nan"), probes - probes % 2
    while done < probes:
        numbers = range(done, min(done + _PROBES_AT_ONCE, probes))

        def compute(
            loss: Callable[[], Tensor], scale: float, numbers: range = numbers
        ) -> Tensor:
            gradients = _gradients(loss() * scale, vectors)
            result = torch.zeros(2, blocks.count, dtype=torch.float64)
            for number in numbers:
                signs = _signs(masks, derive_seed(seed, "probe", number))
                signs = [
                    s.to(p) for s, p in zip(signs, vectors.parameters, strict=True)
                ]
                last = number == numbers[-1]
                products = _product(gradients, signs, vectors, retain=not last)
                result[number % 2] += blocks.inner(signs, products)
            return result

        # A stream of batches is opened anew.
        rows = evaluation.rows(evaluation.batches(), compute, blocks.count)
        halves += rows.view(-1, 2, blocks.count).mean(dim=0)
        done = numbers.stop
        agreement = spearman(*(blocks.scores(2 * half / done) for half in halves))
        if agreement > _SETTLED:
            break
    return TraceEstimate(blocks.scores(halves.sum(dim=0) / done), done, agreement)


class _Blocks:
    """The entries of each structure in each layer.

    Args:
        vectors: of the structures.

    Attributes:
        count: B.
    """

    def __init__(self, vectors: StructureVectors) -> None:
        self._vectors = vectors
        # The bias of a filter is neither probed nor counted (HAP).
        self._parts = [p for p in vectors.parts if p.role in {"producer", "norm"}]
        modules = list(dict.fromkeys(part.module for part in self._parts))
        self.count = len(modules) * vectors.size
        self._first = {name: i * vectors.size for i, name in enumerate(modules)}
        ones = [torch.ones_like(p) for p in vectors.parameters]
        weights = [p.detach() for p in vectors.parameters]
        self._sizes = self.inner(ones, ones)
        self._norms = self.inner(weights, weights)

    def inner(self, left: Sequence[Tensor], right: Sequence[Tensor | None]) -> Tensor:
        """Multiply two vectors, block by block.

        Args:
            left: one tensor for each parameter.
            right: the same; None for zeros.

        Returns:
            float64 ``[B]``.
        """
        result = torch.zeros(self.count, dtype=torch.float64)
        places = {id(p): i for i, p in enumerate(self._vectors.parameters)}
        for part in self._parts:
            place = places[id(part.parameter)]
            other = right[place]
            if other is not None:
                values = left[place].double() * other.detach().double()
                add_slices(result, values, part.axis, self._of(part))
        return result

    def scores(self, traces: Tensor) -> Tensor:
        """Add up Tr(H_cc) / p_c · ‖w_c‖² over the layers of each structure.

        Args:
            traces: float64 ``[B]``.

        Returns:
            float64 ``[S]``.
        """
        terms = traces / self._sizes.clamp(min=1) * self._norms
        return terms.view(-1, self._vectors.size).sum(dim=0)

    def _of(self, part: Part) -> Tensor:
        of, first = part.structure_of, self._first[part.module]
        return torch.where(of >= 0, of + first, of)


def _signs(masks: Sequence[Tensor], seed: int) -> list[Tensor]:
    """Draw -1 or 1 where a mask holds, and 0 elsewhere."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (2 * torch.randint(0, 2, mask.shape, generator=generator) - 1) * mask.cpu()
        for mask in masks
    ]


def _gradients(loss: Tensor, vectors: StructureVectors) -> tuple[Tensor | None, ...]:
    gradients: tuple[Tensor | None, ...] = torch.autograd.grad(
        loss, vectors.parameters, create_graph=True, allow_unused=True
    )
    return gradients


def _product(
    gradients: Sequence[Tensor | None],
    direction: Sequence[Tensor],
    vectors: StructureVectors,
    retain: bool = False,
) -> tuple[Tensor | None, ...]:
    """Multiply the Hessian by a direction."""
    # A gradient without graph is constant, and adds nothing.
    pairs = [
        (gradient, vector)
        for gradient, vector in zip(gradients, direction, strict=True)
        if gradient is not None and gradient.requires_grad
    ]
    if not pairs:
        return (None,) * len(direction)
    try:
        products: tuple[Tensor | None, ...] = torch.autograd.grad(
            [gradient for gradient, _ in pairs],
            vectors.parameters,
            [vector for _, vector in pairs],
            retain_graph=retain,
            allow_unused=True,
        )
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise PruningError(
            "the loss cannot be differentiated twice, which methods 'sosp_h' and 'hap' "
            f"need; use method='sosp_i': {error}"
        ) from error
    return products
