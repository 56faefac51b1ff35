"""Settings of structured pruning: how structures are scored and which may be removed."""

from __future__ import annotations

__all__ = [
    "Measure",
    "ScoreLabels",
    "ScoringMethod",
    "Search",
    "StructureConfig",
    "StructureKind",
    "Trace",
]

import math
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Literal, get_args

from lightning_woodfisher.base.errors import (
    ConfigurationError,
    require_choice,
    require_count,
    require_integer,
    require_number,
    require_patterns,
)
from lightning_woodfisher.base.keywords import explain_keywords

ScoringMethod = Literal["diagonal", "sosp_i", "sosp_h", "hap", "magnitude", "random"]
#: The entries of the vector θ_s of a structure: ``conv`` for filter and bias, ``bn`` for
#: weight and bias of the norms that follow (filter and bias in a group without norms),
#: ``conv+bn`` for both.
StructureKind = Literal["conv", "bn", "conv+bn"]
ScoreLabels = Literal["sampled", "true", "logits"]
Search = Literal["greedy", "signed", "rowsum"]
Trace = Literal["hutchinson", "gauss_newton"]
Measure = Literal["structures", "parameters", "macs"]


@explain_keywords("config")
@dataclass(frozen=True)
class StructureConfig:
    """Settings of structured pruning: how structures are scored and chosen.

    Args:
        method: ``"diagonal"`` (each structure removed alone), ``"sosp_i"`` and
            ``"sosp_h"`` (SOSP, with the correlations between all structures), ``"hap"``
            (trace of the Hessian), or one of the baselines ``"magnitude"`` and
            ``"random"``.
        structure: entries of a structure that are scored: ``"conv"``, ``"bn"`` or
            ``"conv+bn"``.
        num_samples: number of samples that the scores are computed on.
        batch_size: largest number of samples in one forward pass.
        labels: labels for ``"diagonal"`` and SOSP-I: ``"sampled"`` draws them from the
            model, which gives an unbiased estimate of the Gauss-Newton matrix (if the loss
            is the mean over all labels); ``"true"`` gives the empirical Fisher;
            ``"logits"`` gives the exact Gauss-Newton matrix of the softmax cross-entropy,
            with one backward pass for each class. Other methods use the labels of the data.
        search: search for SOSP-I: ``"signed"`` removes one structure after the other, with
            the signs of the correlations, so that errors may cancel; ``"greedy"`` does so
            with their magnitudes, as published; ``"rowsum"`` ranks all structures once.
        trace: HAP's trace: ``"hutchinson"`` is that of the Hessian by random signs, as
            published; ``"gauss_newton"`` is that of the Gauss-Newton matrix by labels that
            are drawn from the model, with less noise and a fraction of the time.
        probes: largest number of random signs for ``trace="hutchinson"``; fewer are used
            once the ranking is stable, and a warning says if many more are needed.
        measure: what the target is a share of: ``"macs"`` (multiply-accumulates, half the
            FLOPs), ``"parameters"`` or ``"structures"`` (channels).
        per_cost: divide the score of a structure by what it costs in the dense network, in
            units of ``measure``. The target is then reached at a smaller sum of scores.
            None does so for methods that estimate the loss, if ``measure="macs"``; for
            ``measure="parameters"`` only for ``"diagonal"`` and the signed search.
        only: class paths of layers, or regular expressions on their names, that may be
            pruned; empty for all layers. Used when the network is traced.
        exclude: class paths or regular expressions of layers that are not pruned.
        min_kept: smallest number of structures that every group keeps.
        min_kept_share: smallest share of its structures that every group keeps.
        max_ratio: largest share of its structures that a group loses.
        round_to: layers of a group that loses any structure keep a multiple of this number
            of channels; 8 fits the vectors of CPUs with AVX and the products of GPUs, 16
            the vectors of AVX-512.
        batchnorm_recalibration_batches: re-estimate the running statistics of BatchNorm on
            this number of batches after each step (of 64 or ``batch_size`` samples,
            whichever is larger); 0 leaves them unchanged.
        seed: seed of samples, labels, probes and random scores.
    """

    method: ScoringMethod = "sosp_i"
    structure: StructureKind = "bn"
    num_samples: int = 1000
    batch_size: int = 128
    labels: ScoreLabels = "sampled"
    search: Search = "signed"
    trace: Trace = "hutchinson"
    probes: int = 300
    measure: Measure = "macs"
    per_cost: bool | None = None
    only: list[str] = field(default_factory=list)
    exclude: list[str] = field(default_factory=list)
    min_kept: int = 2
    min_kept_share: float = 0.05
    max_ratio: float = 1.0
    round_to: int = 1
    batchnorm_recalibration_batches: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        require_choice("method", self.method, get_args(ScoringMethod))
        require_choice("structure", self.structure, get_args(StructureKind))
        require_choice("labels", self.labels, get_args(ScoreLabels))
        require_choice("search", self.search, get_args(Search))
        require_choice("trace", self.trace, get_args(Trace))
        require_choice("measure", self.measure, get_args(Measure))
        for name in ("num_samples", "batch_size", "round_to"):
            require_integer(name, getattr(self, name), least=1)
        hint = "a layer without channels has no output"
        require_integer("min_kept", self.min_kept, least=1, hint=hint)
        require_integer("probes", self.probes, least=2)
        meaning = "it is a share of the structures of a group"
        for name in ("min_kept_share", "max_ratio"):
            require_number(name, getattr(self, name), "[0, 1]", meaning)
        for name in ("only", "exclude"):
            require_patterns(name, getattr(self, name))
        require_integer("seed", self.seed)
        require_count(
            "batchnorm_recalibration_batches",
            self.batchnorm_recalibration_batches,
            least=0,
        )
        if self.per_cost and self.measure == "structures":
            raise ConfigurationError(
                "per_cost=True has no effect with measure='structures', where every "
                "structure costs one; use measure='macs' or 'parameters', or "
                "per_cost=False."
            )

    @property
    def is_per_cost(self) -> bool:
        """Whether scores are divided by costs."""
        if self.per_cost is not None:
            return self.per_cost
        if self.measure == "macs":
            return self.method not in {"magnitude", "random"}
        is_signed = self.method == "sosp_i" and self.search == "signed"
        return self.measure == "parameters" and (is_signed or self.method == "diagonal")

    @property
    def num_batches(self) -> int:
        """Number of batches, independent of the number of ranks."""
        return -(-self.num_samples // self.batch_size)

    def max_removable(self, size: int) -> int:
        """Return the largest number of structures that a group may lose.

        Args:
            size: number of structures of the group.

        Returns:
            The number; ``round_to`` is not taken into account.
        """
        # Decimal fractions as written: 0.05 of 20 is exactly one.
        share = Fraction(str(float(self.min_kept_share)))
        ratio = Fraction(str(float(self.max_ratio)))
        floor = max(self.min_kept, math.ceil(share * size))
        return max(0, min(size - floor, math.floor(ratio * size)))

    def removable(self, size: int, width: int = 1) -> list[int]:
        """Return the numbers of structures that a group may lose.

        Args:
            size: number of structures of the group.
            width: number of channels of a structure, as those of an attention head.

        Returns:
            The permitted numbers, ascending; 0 is always the first.
        """
        counts = range(1, self.max_removable(size) + 1)
        return [0, *(n for n in counts if (size - n) * width % self.round_to == 0)]
