"""Settings of layer-wise reconstruction."""

from __future__ import annotations

__all__ = ["LayerwiseConfig"]

from dataclasses import dataclass

from lightning_woodfisher.base.errors import (
    require_count,
    require_flag,
    require_number,
)
from lightning_woodfisher.base.keywords import explain_keywords


@explain_keywords("layerwise")
@dataclass(frozen=True)
class LayerwiseConfig:
    """Settings of ``criterion="layerwise"``.

    Args:
        relative_damping: λ of a layer as a share of the mean diagonal of the covariance of
            its inputs. It pulls the weights towards the dense ones. None for 0.1 in linear
            layers and 1e-3 in convolutions, whose inputs are many more than their weights.
        output_weights: weight the outputs of a layer by their mean squared gradients of
            the loss, which takes a backward pass over a few batches. Without them all
            outputs count the same, and no loss is differentiated.
        admm_iterations: iterations of the search for the mask; 0 removes the weights of
            smallest saliency w²/[A⁻¹]_ii without a search.

    Raises:
        ConfigurationError: for a value that cannot work.
    """

    relative_damping: float | None = None
    output_weights: bool = True
    admm_iterations: int = 30

    def __post_init__(self) -> None:
        if self.relative_damping is not None:
            require_number(
                "layerwise.relative_damping",
                self.relative_damping,
                "[1e-12, 1e+12]",
                "without damping, the covariance of fewer inputs than weights of an output "
                "has no inverse",
            )
        require_flag("layerwise.output_weights", self.output_weights)
        require_count("layerwise.admm_iterations", self.admm_iterations, least=0)
