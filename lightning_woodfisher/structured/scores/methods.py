"""Score structures by one of the methods: the expected rise of the loss on removal.

=============  ===========================================================================
``diagonal``   ``½ Q_ss + |θ_s·g|``: each structure removed alone, the diagonal of SOSP-I's
               matrix. An addition of ours, published by nobody that we know of.
``sosp_i``     pairs of structures by the Gauss-Newton matrix: :mod:`.sosp`
``sosp_h``     ``|θ_s·g| + ½|θ_s·(H Σ_s' θ_s')|`` (SOSP; Nonnenmacher et al. 2022)
``hap``        ``Σ_layers Tr(H_cc) / p_c · ‖w_c‖²`` (HAP; Yu et al. 2022)
``magnitude``  root of the mean over layers of the squared L2 norm; not divided by the
               number of entries, because an initialization scaled by fan-in gives filters
               of equal norm in every layer
``random``     uniform
=============  ===========================================================================

Every layer of a coupled group counts. SOSP adds inner products over the layers before
taking the magnitude, because θ_s extends over all of them; HAP adds one term for each.
"""

from __future__ import annotations

__all__ = ["StructureScores", "score_structures"]

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_woodfisher.base.errors import PruningError
from lightning_woodfisher.data.isolation import derive_seed
from lightning_woodfisher.data.losses import LossSource
from lightning_woodfisher.distributed.communicator import Communicator
from lightning_woodfisher.structured.config import StructureConfig
from lightning_woodfisher.structured.graph.groups import Group
from lightning_woodfisher.structured.scores.evaluation import Evaluation
from lightning_woodfisher.structured.scores.hap import score_hap
from lightning_woodfisher.structured.scores.sosp import (
    PairScores,
    score_pairs,
    score_sosp_h,
)
from lightning_woodfisher.structured.scores.vectors import sum_products


@dataclass(frozen=True, eq=False)
class StructureScores:
    """Scores of all structures; the lowest are removed first.

    Attributes:
        values: float64 ``[group.size]`` for each group, on the CPU; for SOSP-I the row
            sums of A.
        pairs: the matrix A for SOSP-I, otherwise None.
        notes: numbers for the report: ``share_negative``, and for HAP with random signs
            ``probes`` and ``probe_agreement`` (left out if all scores are equal).
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
    """Score all structures; the model is left unchanged.

    Args:
        source: where losses come from.
        groups: groups of structures of the model.
        config: the method and its samples.
        comm: the ranks, which all get the same bits; the default process group if None.

    Returns:
        The scores.

    Raises:
        PruningError: if a score is not finite, or the ranks differ.
    """
    comm = comm or Communicator()
    evaluation = Evaluation(source, groups, config, comm)
    vectors, sizes = evaluation.vectors, [group.size for group in groups]
    pairs: PairScores | None = None
    notes: dict[str, float] = {}
    if config.method == "random":
        seed = derive_seed(config.seed, "random structures")
        generator = torch.Generator().manual_seed(seed)
        values = torch.rand(vectors.size, generator=generator, dtype=torch.float64)
    elif config.method == "magnitude":
        weights = vectors.parameters
        ones = [torch.ones_like(weight) for weight in weights]
        squares, entries = (
            sum_products(vectors.slices, factors, factors, vectors.size).cpu()
            for factors in (weights, ones)
        )
        values = (squares.sum(dim=0) / entries.count_nonzero(dim=0)).sqrt()
    else:
        with evaluation.session():
            if config.method == "diagonal":
                values = score_pairs(evaluation).diagonal()
            elif config.method == "sosp_i":
                pairs = score_pairs(evaluation)
                values = pairs.row_sums()
            elif config.method == "sosp_h":
                values = score_sosp_h(evaluation)
            else:
                seed = derive_seed(config.seed, "hap")
                values, notes = score_hap(evaluation, seed)
    if not bool(values.isfinite().all()):
        raise PruningError(
            f"method={config.method!r} computed scores that are not finite"
        )
    comm.require_equal(values, "the scores of structures")
    notes["share_negative"] = float((values < 0).double().mean())
    return StructureScores(torch.split(values, sizes), pairs, notes)
