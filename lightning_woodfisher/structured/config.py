"""How structures are scored and chosen, checked as far as possible without a network."""

from __future__ import annotations

__all__ = [
    "ScoreLabels",
    "ScoringMethod",
    "Search",
    "StructureConfig",
    "StructureKind",
    "StructureLimits",
]

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, get_args

from lightning_woodfisher.base.errors import (
    ConfigurationError,
    nearest,
    require_integer,
    require_number,
)
from lightning_woodfisher.base.types import ModelMode

ScoringMethod = Literal["sosp_i", "sosp_h", "hap", "magnitude", "random"]
#: Which entries make the vector θ_s of a structure: ``conv`` filter and bias, ``bn`` weight
#: and bias of the norms behind it, ``conv+bn`` both.
StructureKind = Literal["conv", "bn", "conv+bn"]
ScoreLabels = Literal["sampled", "true", "logits"]
Search = Literal["greedy", "rowsum"]


@dataclass(frozen=True)
class StructureLimits:
    """How many structures of a group may go.

    Args:
        min_kept: structures that every group keeps at least.
        min_kept_share: share of a group that is kept at least.
        max_ratio: share of a group that is removed at most.
        round_to: a group that loses any keeps a multiple of this.
    """

    min_kept: int = 2
    min_kept_share: float = 0.05
    max_ratio: float = 1.0
    round_to: int = 1

    def __post_init__(self) -> None:
        for name in ("min_kept", "round_to"):
            require_integer(name, getattr(self, name))
            if getattr(self, name) < 1:
                raise ConfigurationError(
                    f"{name}={getattr(self, name)} must be at least 1."
                )
        for name in ("min_kept_share", "max_ratio"):
            require_number(name, getattr(self, name))
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ConfigurationError(
                    f"{name}={getattr(self, name)} is outside [0, 1]; it is a share of "
                    "the structures of a group."
                )

    def removable(self, size: int) -> list[int]:
        """List how many structures of a group may be removed.

        Args:
            size: structures of the group.

        Returns:
            The permitted numbers, ascending; 0 is always the first.
        """
        # Decimal fractions as they are written: 0.05 of 20 is one, not a little more.
        share = Fraction(str(float(self.min_kept_share)))
        ratio = Fraction(str(float(self.max_ratio)))
        floor = max(self.min_kept, math.ceil(share * size))
        most = min(size - floor, math.floor(ratio * size))
        return [0] + [
            gone for gone in range(1, most + 1) if (size - gone) % self.round_to == 0
        ]


@dataclass(frozen=True)
class StructureConfig:
    """How structures are scored and chosen.

    Args:
        method: ``"sosp_i"`` and ``"sosp_h"`` (SOSP, both with the correlations of all
            structures), ``"hap"`` (trace of the Hessian), or the baselines
            ``"magnitude"`` and ``"random"``.
        structure: what makes up a structure when it is scored: ``"conv"``, ``"bn"`` or
            ``"conv+bn"``.
        num_samples: samples of the estimate.
        batch_size: most samples that go through the network at once.
        labels: of SOSP-I: ``"sampled"`` from the model, which estimates the Gauss-Newton
            matrix without bias; ``"true"``, the empirical Fisher; ``"logits"``, the exact
            Gauss-Newton matrix of the softmax cross-entropy at one backward pass for
            each class. The others take those of the data.
        search: of SOSP-I: ``"greedy"``, or ``"rowsum"`` that ranks once.
        probes: most probes of HAP's trace; fewer where the ranking has settled.
        min_kept: structures that every group keeps at least.
        min_kept_share: share of a group that is kept at least.
        max_ratio: share of a group that is removed at most.
        round_to: a group that loses any structure keeps a multiple of this.
        per_cost: divide scores by what one structure costs in the dense network, in what
            the target counts (multiply-accumulates or parameters), so that the target is
            reached at a small sum of scores.
        seed: of samples, labels, probes and random scores.
        model_mode: only ``"eval"``.
    """

    method: ScoringMethod = "sosp_i"
    structure: StructureKind = "conv+bn"
    num_samples: int = 1000
    batch_size: int = 128
    labels: ScoreLabels = "sampled"
    search: Search = "greedy"
    probes: int = 300
    min_kept: int = 2
    min_kept_share: float = 0.05
    max_ratio: float = 1.0
    round_to: int = 1
    per_cost: bool = False
    seed: int = 0
    model_mode: ModelMode = "eval"

    def __post_init__(self) -> None:
        kinds = {
            "method": ScoringMethod,
            "structure": StructureKind,
            "labels": ScoreLabels,
            "search": Search,
            "model_mode": ModelMode,
        }
        for name, kind in kinds.items():
            value = getattr(self, name)
            if value not in get_args(kind):
                raise ConfigurationError(
                    f"{name}={value!r} is unknown; use one of "
                    f"{', '.join(get_args(kind))}.{nearest(str(value), get_args(kind))}"
                )
        for name, least in (("num_samples", 1), ("batch_size", 1), ("probes", 2)):
            value = getattr(self, name)
            require_integer(name, value)
            if value < least:
                raise ConfigurationError(f"{name}={value} must be at least {least}.")
        require_integer("seed", self.seed)
        if self.model_mode == "train":
            raise ConfigurationError(
                "model_mode='train' cannot score structures: with the statistics of the "
                "batch a BatchNorm takes out the scale of the channel before it, so that "
                "the loss has no slope and no curvature along a filter; use 'eval'."
            )
        _ = self.limits

    @property
    def limits(self) -> StructureLimits:
        """How many structures of a group may go."""
        return StructureLimits(
            self.min_kept, self.min_kept_share, self.max_ratio, self.round_to
        )

    @property
    def batches(self) -> tuple[int, int]:
        """Number and size of the batches, nearly equal parts of the samples.

        They do not depend on the ranks; fewer samples than there are batches are left out.
        """
        count = -(-self.num_samples // self.batch_size)
        return count, self.num_samples // count
