"""Pruning criteria: the saliency of each weight, and the update of the kept weights.

Each criterion observes gradient rows ``[n, D_r]``, returns a saliency for each of the D_r
active weights of this rank, and computes the change ``[D_r]`` that compensates for the
removed ones. This folder must not know the model, the data or the selection of weights: it
imports only ``fisher``, ``gradients.kronecker_factors`` (a type), ``weights``,
``distributed`` and ``base``.
"""

from __future__ import annotations

__all__ = [
    "CRITERIA",
    "Criterion",
    "CriterionBase",
    "CriterionName",
    "DiagonalCriterion",
    "make_criterion",
    "register_criterion",
]

import inspect
from typing import Literal

from lightning_woodfisher.base.errors import ConfigurationError, require_choice
from lightning_woodfisher.criteria.base import Criterion, CriterionBase
from lightning_woodfisher.criteria.diagonal import DiagonalCriterion
from lightning_woodfisher.criteria.diagonal_fisher import DiagonalFisher
from lightning_woodfisher.criteria.hessian_diagonal import HessianDiagonal
from lightning_woodfisher.criteria.kfac import KFAC
from lightning_woodfisher.criteria.layerwise import Layerwise
from lightning_woodfisher.criteria.magnitude import Magnitude
from lightning_woodfisher.criteria.obs import Update
from lightning_woodfisher.criteria.woodfisher import WoodFisher
from lightning_woodfisher.criteria.woodtaylor import WoodTaylor
from lightning_woodfisher.fisher.config import FisherConfig

CriterionName = Literal[
    "woodfisher",
    "woodtaylor",
    "layerwise",
    "kfac",
    "diagonal_fisher",
    "hessian_diagonal",
    "magnitude",
]

CRITERIA: dict[str, type[CriterionBase]] = {
    "woodfisher": WoodFisher,
    "woodtaylor": WoodTaylor,
    "layerwise": Layerwise,
    "kfac": KFAC,
    "diagonal_fisher": DiagonalFisher,
    "hessian_diagonal": HessianDiagonal,
    "magnitude": Magnitude,
}


def make_criterion(name: str, fisher: FisherConfig, update: Update) -> Criterion:
    """Create a criterion by its name.

    Args:
        name: a key of :data:`CRITERIA`, but not ``"layerwise"``, which has no gradient rows.
        fisher: settings of the Fisher matrix.
        update: how the kept weights compensate for the removed ones.

    Returns:
        A new criterion for one stage of a pruning step.

    Raises:
        TypeError: for a criterion without gradient rows.
    """
    require_choice("criterion", name, CRITERIA)
    criterion = CRITERIA[name](fisher, update)
    if not isinstance(criterion, Criterion):
        raise TypeError(f"{name} scores no rows; see lightning_woodfisher.layerwise")
    return criterion


def register_criterion(name: str, criterion: type[Criterion]) -> None:
    """Register your own criterion under a name; call this in every process that prunes.

    Args:
        name: value for ``criterion=``. A class that is defined again, as in a notebook,
            replaces its earlier definition.
        criterion: a subclass of :class:`Criterion` with all abstract methods defined.

    Raises:
        ConfigurationError: if another class has this name, or the class is not a complete
            subclass.
    """
    if not (inspect.isclass(criterion) and issubclass(criterion, Criterion)):
        raise ConfigurationError(
            f"{criterion!r} is not a subclass of lightning_woodfisher.criteria.Criterion."
        )
    if inspect.isabstract(criterion):
        missing = ", ".join(sorted(criterion.__abstractmethods__))
        raise ConfigurationError(
            f"{criterion.__name__} lacks {missing}; define them, or derive it from "
            "lightning_woodfisher.criteria.DiagonalCriterion."
        )
    taken = CRITERIA.get(name, criterion)
    path = f"{taken.__module__}.{taken.__qualname__}"
    if path != f"{criterion.__module__}.{criterion.__qualname__}":
        raise ConfigurationError(
            f"criterion={name!r} is {path} already; choose another name."
        )
    CRITERIA[name] = criterion
