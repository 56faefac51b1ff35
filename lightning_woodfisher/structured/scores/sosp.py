"""SOSP: scores that know how structures depend on each other.

Nonnenmacher et al., "SOSP: Efficiently capturing global correlations by second-order
structured pruning", ICLR 2022. All derivatives are those of :mod:`.gates`.

SOSP-H uses one product with the Hessian, ``|θ_s·g| + ½|θ_s·(H Σ_s' θ_s')|``. SOSP-I uses
rows u of θ_s·∂ℓ_n/∂θ with ``Q = UᵀU / N'``: removing a set π of structures costs ``πᵀAπ``
with ``A_ss' = ½|Q_ss'| + δ_ss'|θ_s·g|``, and in the signed search without the magnitude of
``Q_ss'``. A is never formed: a row of it takes one product with U.
Shapes: n samples of a batch, S structures, D classes, M rows of U.
"""

from __future__ import annotations

__all__ = ["PairScores", "score_pairs", "score_sosp_h"]

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_woodfisher.base.errors import PruningError
from lightning_woodfisher.gradients.hessian_rows import second_derivatives
from lightning_woodfisher.structured.scores.evaluation import ComputeLoss, Evaluation
from lightning_woodfisher.structured.scores.gates import FrozenConvolutions, Gates
from lightning_woodfisher.structured.scores.series import keep_ends_of_series

_ROWS_PER_PRODUCT = 256
_NEEDS = "method='sosp_h' needs; use method='sosp_i'"


class PairScores:
    """The matrix A of all pairs of structures.

    Args:
        rows: U, float64 ``[M, S]``.
        samples: N', the divisor of UᵀU; M with one row for each sample.
        first_order: θ_s·g, float64 ``[S]``; the sign is ignored.

    Attributes:
        rows: as given.
        samples: as given.
        first_order: ``|θ_s·g|``, float64 ``[S]``.
        size: S.
    """

    def __init__(self, rows: Tensor, samples: int, first_order: Tensor) -> None:
        self.rows = rows.double()
        self.samples = samples
        self.first_order = first_order.double().abs()
        self.size = rows.shape[1]

    def curvature(self, structures: Sequence[int] | Tensor) -> Tensor:
        """Compute rows of Q, with signs.

        Args:
            structures: k indices of structures.

        Returns:
            float64 ``[k, S]``.
        """
        chosen = torch.as_tensor(structures, dtype=torch.int64)
        return self.rows[:, chosen].T @ self.rows / self.samples

    def diagonal(self) -> Tensor:
        """Compute the cost of removing each structure alone.

        Returns:
            A_ss, float64 ``[S]``.
        """
        return 0.5 * self.rows.square().sum(dim=0) / self.samples + self.first_order

    def row_sums(self) -> Tensor:
        """Sum the rows of A: the cost of each structure together with all others.

        Returns:
            float64 ``[S]``.
        """
        sums = [
            0.5 * self.curvature(indices).abs().sum(dim=1)
            for indices in torch.split(torch.arange(self.size), _ROWS_PER_PRODUCT)
        ]
        return torch.cat(sums) + self.first_order

    def greedy(
        self,
        sizes: Sequence[int],
        most: Sequence[int],
        costs: Sequence[int],
        count: int | None = None,
        *,
        signed: bool = False,
    ) -> Tensor:
        """Remove structures one by one, each time the one that adds the least cost.

        What a structure adds only grows as others are removed, so the added costs never
        decrease, and the K smallest belong to the first K structures removed. With signs
        this does not hold, so places in the order are returned.

        Args:
            sizes: number of structures of each group, S in total.
            most: largest number that each group may lose.
            costs: what a structure of each group saves; the added costs are divided by it.
            count: number of removals; None for all that are allowed.
            signed: add ½Q_ss' in place of its magnitude, so that errors may cancel.

        Returns:
            float64 ``[S]``: what each structure added when it was removed (with ``signed``
            its place in the order); infinite for structures that stay.
        """
        left = list(most)
        group_of = torch.repeat_interleave(
            torch.arange(len(sizes)), torch.tensor(sizes)
        )
        weight = 1.0 / torch.tensor(costs, dtype=torch.float64)[group_of]
        added = torch.full((self.size,), math.inf, dtype=torch.float64)
        marginal = self.diagonal()
        removable = torch.tensor(left)[group_of] > 0
        for place in range(min(sum(left), self.size if count is None else count)):
            candidates = torch.where(removable, marginal * weight, math.inf)
            structure = int(candidates.argmin())
            added[structure] = place if signed else candidates[structure]
            row = self.curvature([structure])[0]
            marginal += row if signed else row.abs()
            group = int(group_of[structure])
            left[group] -= 1
            removable[structure] = False
            if not left[group]:
                removable &= group_of != group
        return added


def score_sosp_h(evaluation: Evaluation) -> Tensor:
    """Compute ``|θ_s·g| + ½|θ_s·(H Σ_s' θ_s')|`` with one Hessian product for each batch.

    Args:
        evaluation: with its session entered.

    Returns:
        float64 ``[S]``.
    """
    keep_ends_of_series(evaluation)
    gates = Gates(evaluation.vectors)

    def compute(loss: ComputeLoss, scale: float, labels: int) -> Tensor:
        value = gates.run(loss) * scale
        with second_derivatives("the loss", _NEEDS):
            gradient = gates.derivatives(value, create_graph=True)
            product = gates.derivatives(gradient.sum())
        return torch.cat([gradient.detach(), product])

    with gates.attached(), FrozenConvolutions():
        rows = evaluation.compute_rows(compute, gates.size)
    means = rows.view(-1, 2, gates.size).mean(dim=0)
    return means[0].abs() + 0.5 * means[1].abs()


def score_pairs(evaluation: Evaluation) -> PairScores:
    """Compute the rows U for SOSP-I.

    Drawn labels make ``UᵀU / N'`` an unbiased estimate of the Gauss-Newton matrix of the
    mean loss, also where that is a mean over T labels of each sample (pixels, tokens): a
    row is then the mean of T independent terms, and is multiplied by √T.

    Args:
        evaluation: with its session entered.

    Returns:
        The scores of all pairs of structures.
    """
    keep_ends_of_series(evaluation)
    # Where samples share the first axis with something else (frames, proposals, tokens),
    # they are run one by one.
    apart = _are_samples_apart(evaluation)
    gates = Gates(evaluation.vectors, per_sample=apart)
    compute = functools.partial(
        evaluation.compute_rows, width=gates.size, batch_size=None if apart else 1
    )
    kind = evaluation.config.labels
    logits: list[Tensor] = []

    def record(module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.requires_grad:
            logits.append(output)

    def differentiate_loss(loss: ComputeLoss, scale: float, labels: int) -> Tensor:
        # The loss is a mean, and a row belongs to one sample.
        rows = gates.derivatives(gates.run(loss) * scale)
        return rows * len(rows)

    def differentiate_drawn(loss: ComputeLoss, scale: float, labels: int) -> Tensor:
        rows = differentiate_loss(loss, scale, labels)
        return rows * math.sqrt(labels / len(rows))

    def differentiate_logits(loss: ComputeLoss, scale: float, labels: int) -> Tensor:
        logits.clear()
        gates.run(loss)
        shapes = [tuple(one.shape) for one in logits]
        if len(shapes) != 1 or len(shapes[0]) != 2:
            raise PruningError(
                "labels='logits' needs a loss that calls the model once and gets logits "
                f"[n, D], but the outputs had the shapes {shapes}; use labels='sampled'"
            )
        share = logits[0].detach().double().softmax(dim=1)
        classes = share.shape[1]
        rows = []
        for label in range(classes):
            # A column of a root of diag(p) - ppᵀ, the Hessian of the softmax cross-entropy.
            root = -share
            root[:, label] += 1
            root *= share[:, label : label + 1].sqrt() * scale
            more = label < classes - 1
            rows.append(
                gates.derivatives(logits[0], root.to(logits[0]), retain_graph=more)
            )
        return torch.cat(rows)

    predictor = evaluation.source.predictor
    with gates.attached(), predictor.register_forward_hook(record):
        rows = first_order = compute(differentiate_loss)
        if kind == "logits":
            rows = compute(differentiate_logits)
        elif kind == "sampled":
            rows = compute(differentiate_drawn, draw_labels=True)
    return PairScores(rows, len(first_order), first_order.mean(dim=0))


def _are_samples_apart(evaluation: Evaluation) -> bool:
    """Check that gated outputs have a row for each sample; assume it of a stream."""
    if not evaluation.regroupable:
        return True
    probe = evaluation.probe()
    gates = Gates(evaluation.vectors)

    def find_lengths(loss: ComputeLoss, scale: float, labels: int) -> Tensor:
        gates.run(loss)
        return torch.tensor([[float(length)] for length in gates.lengths]) * scale

    with gates.attached():
        lengths = probe.compute_rows(find_lengths, 1)
    return bool((lengths == probe.config.num_samples).all())
