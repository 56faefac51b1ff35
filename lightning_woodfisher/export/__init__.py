"""Files of a pruned network for those who run it: sparse, dense, ONNX, torch.export, 2:4."""

from lightning_woodfisher.export.checkpoint import Checkpoint, read_checkpoint
from lightning_woodfisher.export.dense import save_dense, strip_prefix
from lightning_woodfisher.export.graph import export_onnx, export_program
from lightning_woodfisher.export.semi_structured import (
    SpeedComparison,
    compare_speed,
    to_semi_structured,
)
from lightning_woodfisher.export.sparse import load_sparse, read_metadata, save_sparse
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
