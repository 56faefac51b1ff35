"""How much the loss is expected to suffer when a structure is removed.

=============  ===========================================================================
``sosp_i``     pairs of structures by the Gauss-Newton matrix: :mod:`.pair_scores`
``sosp_h``     ``|θ_s·g| + ½|θ_s·(H Σ_s' θ_s')|`` (SOSP; Nonnenmacher et al. 2022)
``hap``        ``Σ_layers Tr(H_cc) / p_c · ‖w_c‖²`` (HAP; Yu et al. 2022)
``magnitude``  root of the mean over layers of the squared L2 norm; not divided by the
               number of entries, for an initialisation scaled by fan-in has filters of
               equal norm, whatever the layer
``random``     uniform
=============  ===========================================================================

Every layer of a coupled group counts. SOSP adds inner products over the layers before
taking the magnitude, because θ_s extends over all of them; HAP adds one term for each.
"""

from __future__ import annotations

__all__ = ["StructureScores", "score_structures"]

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_woodfisher.base.errors import PruningError
from lightning_woodfisher.data.isolation import derive_seed
from lightning_woodfisher.data.losses import LossSource
from lightning_woodfisher.data.sampled_labels import UnlabeledBatches
from lightning_woodfisher.distributed.communicator import Communicator
from lightning_woodfisher.structured.config import StructureConfig
from lightning_woodfisher.structured.graph.groups import Group
from lightning_woodfisher.structured.scores.contributions import Contributions
from lightning_woodfisher.structured.scores.evaluation import Evaluation
from lightning_woodfisher.structured.scores.hessian_products import (
    hessian_traces,
    sosp_h,
)
from lightning_woodfisher.structured.scores.pair_scores import PairScores
from lightning_woodfisher.structured.scores.vectors import StructureVectors


@dataclass(frozen=True, eq=False)
class StructureScores:
    """Scores of all structures; the lowest go first.

    Attributes:
        values: float64 ``[group.size]`` for each group, on the CPU. Of SOSP-I the sums of
            the rows of A.
        pairs: the matrix A of SOSP-I, otherwise None.
        notes: figures for the log: ``share_negative``, and of HAP ``probes`` and
            ``probe_agreement``.
    """

    values: tuple[Tensor, ...]
    pairs: PairScores | None = None
    notes: dict[str, float] = field(default_factory=dict)


def score_structures(
    source: LossSource,
    groups: Sequence[Group],
    config: StructureConfig,
    comm: Communicator | None = None,
) -> StructureScores:
    """Score all structures; leaves no trace in the model.

    Args:
        source: where losses come from.
        groups: the structures.
        config: the method and its samples.
        comm: the ranks; they get the same bits, however many there are.

    Returns:
        The scores.

    Raises:
        PruningError: when a score is not finite, or the ranks differ.
    """
    comm = comm or Communicator()
    vectors = StructureVectors(source.model, groups, config.structure)
    pairs, notes = None, {}
    if config.method == "random":
        values = _random(vectors, config.seed)
    elif config.method == "magnitude":
        values = _magnitudes(vectors)
    else:
        evaluation = Evaluation(source, vectors, config, comm)
        with evaluation.session():
            if config.method == "sosp_i":
                pairs = _sosp_i(evaluation, config)
                values = pairs.row_sums()
            elif config.method == "sosp_h":
                first, second = sosp_h(evaluation)
                values = first.abs() + 0.5 * second.abs()
            else:
                seed = derive_seed(config.seed, "hap")
                estimate = hessian_traces(evaluation, config.probes, seed)
                values = estimate.scores
                notes["probes"] = float(estimate.probes)
                notes["probe_agreement"] = estimate.agreement
    if not bool(values.isfinite().all()):
        raise PruningError(f"method={config.method!r} gave scores that are not finite")
    comm.require_equal(values, "the scores of structures")
    notes["share_negative"] = float((values < 0).double().mean())
    return StructureScores(vectors.split(values), pairs, notes)


def _random(vectors: StructureVectors, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(derive_seed(seed, "random structures"))
    return torch.rand(vectors.size, generator=generator, dtype=torch.float64)


def _magnitudes(vectors: StructureVectors) -> Tensor:
    squares = vectors.inner([p.detach() for p in vectors.parameters])
    layers = [
        torch.full((group.size,), len(vectors.layers_of(place)), dtype=torch.float64)
        for place, group in enumerate(vectors.groups)
    ]
    return (squares / torch.cat(layers)).sqrt()


def _sosp_i(evaluation: Evaluation, config: StructureConfig) -> PairScores:
    model, size = evaluation.source.model, evaluation.vectors.size
    watched = Contributions(model, evaluation.vectors, evaluation.source.predictor)

    def of_loss(loss: Callable[[], Tensor], scale: float) -> Tensor:
        value = loss() * scale
        outputs = watched.take_outputs()
        # The loss is a mean, and a row belongs to one sample.
        return watched.backward(outputs, value * len(outputs[0][1]))

    def of_logits(loss: Callable[[], Tensor], scale: float) -> Tensor:
        loss()
        logits = watched.logits()
        outputs = watched.take_outputs()
        share = logits.detach().double().softmax(dim=1)
        classes = share.shape[1]
        rows = []
        for label in range(classes):
            # A column of a root of diag(p) - ppᵀ, the Hessian of the softmax cross-entropy.
            root = -share
            root[:, label] += 1
            root *= share[:, label : label + 1].sqrt() * scale
            more = label < classes - 1
            rows.append(watched.backward(outputs, logits, root.to(logits), retain=more))
        return torch.cat(rows)

    with watched.watching():
        batches = evaluation.batches()
        first_order = found = evaluation.rows(batches, of_loss, size)
        if config.labels == "logits":
            found = evaluation.rows(evaluation.batches(), of_logits, size)
        elif config.labels == "sampled":
            drawn = UnlabeledBatches(evaluation.batches(), evaluation.seed, model)
            found = evaluation.rows(drawn, of_loss, size)
    return PairScores(found, len(first_order), first_order.mean(dim=0))
