"""Pruning criteria: each observes gradients, scores weights and compensates the loss."""

from __future__ import annotations

__all__ = ["CRITERIA", "Criterion", "CriterionName", "make_criterion"]

from typing import Literal

from lightning_woodfisher.criteria.base import Criterion
from lightning_woodfisher.criteria.diagonal_fisher import DiagonalFisher
from lightning_woodfisher.criteria.hessian_diagonal import HessianDiagonal
from lightning_woodfisher.criteria.kfac import KFAC
from lightning_woodfisher.criteria.magnitude import Magnitude
from lightning_woodfisher.criteria.woodfisher import WoodFisher
from lightning_woodfisher.criteria.woodtaylor import WoodTaylor
from lightning_woodfisher.errors import ConfigurationError, nearest
from lightning_woodfisher.fisher import FisherConfig
from lightning_woodfisher.obs import Update

CriterionName = Literal[
    "woodfisher",
    "woodtaylor",
    "kfac",
    "diagonal_fisher",
    "hessian_diagonal",
    "magnitude",
]

CRITERIA: dict[str, type[Criterion]] = {
    "woodfisher": WoodFisher,
    "woodtaylor": WoodTaylor,
    "kfac": KFAC,
    "diagonal_fisher": DiagonalFisher,
    "hessian_diagonal": HessianDiagonal,
    "magnitude": Magnitude,
}


def make_criterion(name: str, fisher: FisherConfig, update: Update) -> Criterion:
    """Look a criterion up.

    Args:
        name: a key of :data:`CRITERIA`.
        fisher: how gradients become a Fisher matrix.
        update: how the kept weights make up for the removed ones.

    Returns:
        A fresh criterion for one part of a pruning step.

    Raises:
        ConfigurationError: for an unknown name.
    """
    if name not in CRITERIA:
        raise ConfigurationError(
            f"criterion={name!r} is unknown; use one of {', '.join(CRITERIA)}."
            f"{nearest(name, CRITERIA)}"
        )
    return CRITERIA[name](fisher, update)
