"""Second-order pruning for PyTorch Lightning."""

from lightning_woodfisher.base.errors import ConfigurationError, PruningError
from lightning_woodfisher.callbacks.presets import preset
from lightning_woodfisher.callbacks.structured import (
    HAPPruningCallback,
    SOSPPruningCallback,
    StructuredPruningCallback,
)
from lightning_woodfisher.callbacks.woodfisher import WoodFisherPruningCallback
from lightning_woodfisher.fisher.config import FisherConfig
from lightning_woodfisher.layerwise.config import LayerwiseConfig
from lightning_woodfisher.one_shot import prune
from lightning_woodfisher.pruning.config import (
    SelectionConfig,
    StepConfig,
)
from lightning_woodfisher.pruning.report import PruningReport
from lightning_woodfisher.pruning.schedule import (
    ConstantSchedule,
    OneShotSchedule,
    PolynomialSchedule,
    PruningSchedule,
)
from lightning_woodfisher.resources.estimate import ResourceEstimate, estimate
from lightning_woodfisher.structured.config import StructureConfig
from lightning_woodfisher.structured.pruner import prune_structures
from lightning_woodfisher.structured.report import StructureReport
from lightning_woodfisher.structured.shrink.files import load_shrunk
from lightning_woodfisher.sweeps.report import SweepReport
from lightning_woodfisher.sweeps.sweep import sweep

__version__ = "0.2.0"

__all__ = [
    "ConfigurationError",
    "ConstantSchedule",
    "FisherConfig",
    "HAPPruningCallback",
    "LayerwiseConfig",
    "OneShotSchedule",
    "PolynomialSchedule",
    "PruningError",
    "PruningReport",
    "PruningSchedule",
    "ResourceEstimate",
    "SOSPPruningCallback",
    "SelectionConfig",
    "StepConfig",
    "StructureConfig",
    "StructureReport",
    "StructuredPruningCallback",
    "SweepReport",
    "WoodFisherPruningCallback",
    "estimate",
    "load_shrunk",
    "preset",
    "prune",
    "prune_structures",
    "sweep",
]
