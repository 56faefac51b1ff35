"""Layer-wise reconstruction: each layer keeps its outputs, whatever the loss."""

from __future__ import annotations

__all__ = ["Layerwise"]

from collections.abc import Sequence
from typing import ClassVar

from typing_extensions import override

from lightning_woodfisher.criteria.base import CriterionBase, Needs
from lightning_woodfisher.weights.partition import Partition, make_partition


class Layerwise(CriterionBase):
    """Reconstruct the outputs of each layer, layer after layer, without retraining.

    The Hessian of a layer is the covariance of its inputs in the pruned network, as in
    L-OBS (Dong et al., NeurIPS 2017), OBC (Frantar & Alistarh, NeurIPS 2022) and SparseGPT
    (Frantar & Alistarh, ICML 2023). The mask is found by ADMM and the kept weights by
    conjugate gradients, as in ALPS (Meng et al., NeurIPS 2024). The targets are the outputs
    of the dense network, plus what is missing from the skip where a layer writes into a
    residual sum. It is computed by :mod:`lightning_woodfisher.layerwise`.
    """

    needs: ClassVar[Needs] = "layer inputs"

    @override
    def layout(
        self,
        segments: Sequence[int],
        world_size: int,
        group_sizes: Sequence[int] | None = None,
    ) -> Partition:
        # Whole layers: all ranks solve each of them together.
        return make_partition(segments, max(1, *segments), world_size)

    @property
    @override
    def engine(self) -> str:
        return "layers"
