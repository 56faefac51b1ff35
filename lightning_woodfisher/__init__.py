"""Second-order pruning for PyTorch Lightning."""

from lightning_woodfisher.callback import WoodFisherPruningCallback
from lightning_woodfisher.errors import ConfigurationError, PruningError
from lightning_woodfisher.fisher import FisherConfig
from lightning_woodfisher.one_shot import prune
from lightning_woodfisher.presets import preset
from lightning_woodfisher.report import PruningReport
from lightning_woodfisher.resources import ResourceEstimate, estimate
from lightning_woodfisher.schedule import (
    ConstantSchedule,
    OneShotSchedule,
    PolynomialSchedule,
    PruningSchedule,
)
from lightning_woodfisher.selection import SelectionConfig
from lightning_woodfisher.structured.configuration import StructureConfig
from lightning_woodfisher.structured.pruner import prune_structures
from lightning_woodfisher.structured.report import StructureReport
from lightning_woodfisher.structured_callback import (
    HAPPruningCallback,
    SOSPPruningCallback,
    StructuredPruningCallback,
)
from lightning_woodfisher.sweep_report import SweepReport
from lightning_woodfisher.sweeps import sweep

__version__ = "0.1.0"

__all__ = [
    "ConfigurationError",
    "ConstantSchedule",
    "FisherConfig",
    "HAPPruningCallback",
    "OneShotSchedule",
    "PolynomialSchedule",
    "PruningError",
    "PruningReport",
    "PruningSchedule",
    "ResourceEstimate",
    "SOSPPruningCallback",
    "SelectionConfig",
    "StructureConfig",
    "StructureReport",
    "StructuredPruningCallback",
    "SweepReport",
    "WoodFisherPruningCallback",
    "estimate",
    "preset",
    "prune",
    "prune_structures",
    "sweep",
]
