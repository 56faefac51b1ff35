"""Write pruned networks to files that other programs read.

Inputs are a checkpoint, a ``state_dict`` (tensors of any shape by name) or a model; outputs
are sparse or dense ``state_dict`` files, ONNX and ``torch.export`` programs, and models
with 2:4 weights. Nothing here prunes or trains: this folder imports no callback, criterion
or Fisher, and neither Lightning nor W&B.
"""

from lightning_woodfisher.export.checkpoint import (
    Checkpoint,
    read_checkpoint,
    strip_prefix,
)
from lightning_woodfisher.export.onnx_and_torch_export import (
    export_onnx,
    export_program,
)
from lightning_woodfisher.export.semi_structured import (
    SpeedComparison,
    compare_speed,
    to_semi_structured,
)
from lightning_woodfisher.export.state_dict_files import (
    load_sparse,
    read_metadata,
    save_dense,
    save_sparse,
)
from lightning_woodfisher.export.summary import ExportSummary, TensorSummary

__all__ = [
    "Checkpoint",
    "ExportSummary",
    "SpeedComparison",
    "TensorSummary",
    "compare_speed",
    "export_onnx",
    "export_program",
    "load_sparse",
    "read_checkpoint",
    "read_metadata",
    "save_dense",
    "save_sparse",
    "strip_prefix",
    "to_semi_structured",
]
