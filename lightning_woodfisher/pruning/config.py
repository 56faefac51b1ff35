"""How a step prunes, checked as far as that can be done without a network."""

from __future__ import annotations

__all__ = ["PruningConfig", "check_sparsity"]

import math
from dataclasses import dataclass, field
from typing import get_args

from lightning_woodfisher.base.errors import (
    ConfigurationError,
    nearest,
    require_count,
    require_flag,
    require_integer,
    require_number,
)
from lightning_woodfisher.criteria import CRITERIA
from lightning_woodfisher.criteria.obs import Update
from lightning_woodfisher.data.batchnorm import require_recalibration_batches
from lightning_woodfisher.fisher.config import FisherConfig
from lightning_woodfisher.pruning.local_model import require_points
from lightning_woodfisher.pruning.quotas import (
    require_flops_target_fits,
)
from lightning_woodfisher.pruning.selection import SelectionConfig
from lightning_woodfisher.pruning.stages import Spacing


@dataclass(frozen=True)
class PruningConfig:
    """How a step prunes; see :class:`~.WoodFisherPruningCallback` for the meaning."""

    fisher: FisherConfig = field(default_factory=FisherConfig)
    selection: SelectionConfig = field(default_factory=SelectionConfig)
    criterion: str = "woodfisher"
    update: Update = "joint"
    recompute_steps: int = 1
    measure_loss: bool = True
    local_model_points: int = 0
    seed: int = 0
    flops_target: float | None = None
    step_search: bool = True
    update_scale: float = 1.0
    recompute_spacing: Spacing = "geometric"
    reuse_gradients: bool = False
    trust: float | None = None
    batchnorm_recalibration_batches: int = 0

    @property
    def counts_flops(self) -> bool:
        """Whether a step counts FLOPs."""
        return self.flops_target is not None or self.selection.flops_power > 0

    @property
    def searches(self) -> bool:
        """Whether the length of an update is measured: there must be an update."""
        updates = self.update != "none" and CRITERIA[self.criterion].compensates
        return self.step_search and updates

    @property
    def reads_data(self) -> bool:
        """Whether a step looks at any sample."""
        return (
            self.measure_loss
            or self.counts_flops
            or self.batchnorm_recalibration_batches > 0
            or self.searches
            or CRITERIA[self.criterion].needs != "nothing"
        )

    def __post_init__(self) -> None:
        for name, kind in (("fisher", FisherConfig), ("selection", SelectionConfig)):
            if not isinstance(getattr(self, name), kind):
                raise ConfigurationError(
                    f"{name}={getattr(self, name)!r} is no {kind.__name__}; give "
                    f"{kind.__name__}(...)."
                )
        # What cannot be hashed is no key either.
        if self.criterion not in list(CRITERIA):
            raise ConfigurationError(
                f"criterion={self.criterion!r} is unknown; use one of "
                f"{', '.join(CRITERIA)}.{nearest(self.criterion, CRITERIA)}"
            )
        if self.update not in get_args(Update):
            raise ConfigurationError(
                f"update={self.update!r} is unknown; use one of "
                f"{', '.join(get_args(Update))}.{nearest(self.update, get_args(Update))}"
            )
        require_count("recompute_steps", self.recompute_steps)
        require_integer("seed", self.seed)
        if not -(2**63) <= self.seed < 2**63:
            raise ConfigurationError(f"seed={self.seed} is no 64-bit number.")
        for name in ("measure_loss", "step_search"):
            require_flag(name, getattr(self, name))
        require_number("update_scale", self.update_scale)
        if not 0.0 <= self.update_scale <= 1.0:
            raise ConfigurationError(
                f"update_scale={self.update_scale} is outside [0, 1]; 1 is the whole "
                "update, 0 none."
            )
        if self.recompute_steps < 1:
            raise ConfigurationError(
                f"recompute_steps={self.recompute_steps} must be at least 1."
            )
        if self.flops_target is not None:
            require_flops_target_fits(self.selection, self.flops_target)
        require_points(self.local_model_points, self.measure_loss)
        self._check_stages()
        self._check_nonfinite()
        require_recalibration_batches(self.batchnorm_recalibration_batches)

    def _check_nonfinite(self) -> None:
        """Refuse to leave gradients out where that cannot be done."""
        most = self.fisher.max_nonfinite
        if most and CRITERIA[self.criterion].needs == "factors":
            raise ConfigurationError(
                f"fisher.max_nonfinite={most} cannot go with criterion="
                f"{self.criterion!r}, which has no gradients of single mini-batches; "
                "set it to 0."
            )
        if most and most >= self.fisher.num_gradients:
            raise ConfigurationError(
                f"fisher.max_nonfinite={most} would let all of "
                f"num_gradients={self.fisher.num_gradients} be left out; lower it."
            )

    def _check_stages(self) -> None:
        """Refuse what cannot work about the parts of a step."""
        spacing = self.recompute_spacing
        if spacing not in get_args(Spacing):
            raise ConfigurationError(
                f"recompute_spacing={spacing!r} is unknown; use one of "
                f"{', '.join(get_args(Spacing))}.{nearest(spacing, get_args(Spacing))}"
            )
        require_flag("reuse_gradients", self.reuse_gradients)
        criterion = CRITERIA[self.criterion]
        if self.reuse_gradients and not criterion.can_restrict:
            able = [name for name, other in CRITERIA.items() if other.can_restrict]
            raise ConfigurationError(
                f"reuse_gradients cannot go with criterion={self.criterion!r}; use "
                f"{' or '.join(able)}, or new gradients for each part."
            )
        if self.reuse_gradients and self.selection.pattern != "unstructured":
            raise ConfigurationError(
                "reuse_gradients cannot go with selection.pattern="
                f"{self.selection.pattern!r}; take new gradients for each part."
            )
        if self.trust is None:
            return
        require_number("trust", self.trust)
        if not (self.trust > 0 and math.isfinite(self.trust)):
            raise ConfigurationError(
                f"trust={self.trust} must be positive and finite: the measured rise of "
                "the loss that is tolerated, as a multiple of the predicted one."
            )
        if not self.measure_loss or criterion.needs == "nothing":
            raise ConfigurationError(
                f"trust={self.trust} compares the measured with the predicted rise of the "
                "loss; it needs measure_loss and a criterion that predicts one."
            )
        if self.recompute_steps == 1:
            raise ConfigurationError(
                f"trust={self.trust} makes the parts that follow smaller, but "
                "recompute_steps=1 has none; set recompute_steps to 2 or more."
            )


def check_sparsity(target_sparsity: float) -> None:
    """Check a sparsity.

    Args:
        target_sparsity: share of zeros.

    Raises:
        ConfigurationError: outside [0, 1), or not a number.
    """
    require_number("target_sparsity", target_sparsity)
    if not 0.0 <= target_sparsity < 1.0:
        raise ConfigurationError(
            f"target_sparsity={target_sparsity} is outside [0, 1); it is the share of zeros, "
            "so 90 % is 0.9."
        )
