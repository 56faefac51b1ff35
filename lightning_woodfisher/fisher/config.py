"""Settings of the empirical Fisher, and the batch sizes that follow from them."""

from __future__ import annotations

__all__ = [
    "Collection",
    "Engine",
    "FisherConfig",
    "Precision",
    "RowDtype",
    "choose_engine",
    "first_order_batches",
    "mini_batches_in_group",
    "rows_in_chunk",
]

import math
from dataclasses import dataclass
from typing import Literal, get_args

from lightning_woodfisher.base.byte_sizes import parse_bytes
from lightning_woodfisher.base.errors import (
    ConfigurationError,
    require_count,
    require_flag,
    require_integer,
    require_number,
)
from lightning_woodfisher.base.types import ModelMode

Engine = Literal["auto", "primal", "dual"]
Collection = Literal["auto", "loop"]
Precision = Literal["auto", "float32", "float64"]
RowDtype = Literal["float32", "bfloat16"]

# Beyond, products and inverses of λ overflow.
_SMALLEST_DAMPING, _LARGEST_DAMPING = 1e-100, 1e100
# Numbers that a chunk of gradients may hold before it takes fewer gradients.
_ENTRIES_IN_CHUNK = 2**26
# Samples of a mini-batch of the first order.
_FIRST_ORDER_BATCH = 256
_SAMPLES_EVALUATED_AT_ONCE = 64


@dataclass(frozen=True)
class FisherConfig:
    """How the empirical Fisher is estimated.

    Args:
        num_gradients: N, the number of gradients.
        gradient_batch_size: m, samples in the mini-batch of one gradient. 1 is the
            empirical Fisher proper; larger m is the paper's heuristic for large data.
        block_size: B, most weights in a block; None for one block over all weights (best
            where N gradients fit into memory).
        damping: λ, added to the diagonal.
        model_mode: ``"eval"`` takes gradients with running BatchNorm statistics and no
            dropout, ``"train"`` with those of training.
        engine: ``"primal"``, ``"dual"``, or ``"auto"`` for the cheaper one; they are the
            same matrix.
        precision: of the products of gradients: ``"auto"`` goes over from float32 to
            float64 where float32 would cost F⁻¹ more than 1e-5.
        offload_rows: keep gradient rows in host memory where the Fisher keeps rows.
        memory_budget: most memory that a step may take on each rank for itself, beside the
            network and its activations: bytes, ``"80GB"`` or ``"24GiB"``. Checked before
            training starts; None checks against the memory that is free then.
        collection: ``"auto"`` computes many gradients in one pass where that gives the
            same numbers, ``"loop"`` each of them on its own.
        row_dtype: of gradients that are exchanged and kept; bfloat16 halves both.
        first_order_samples: samples of the mean gradient of ``criterion="woodtaylor"``,
            rounded down to whole mini-batches of 256; None takes those of the N gradients.
            The step search measures its losses on the latter in either case.
        sample_labels: draw labels from the model's own softmax (the true Fisher, where
            m = 1) in place of those of the data (the empirical Fisher). Batches must be
            ``(inputs, class labels)`` and ``model(inputs)`` the logits ``[n, C, ...]``, or
            the model must have a method ``sample_labels(batch)`` that returns the batch
            with labels drawn from what it predicts.
        centered: subtract the mean gradient, which leaves the covariance of the gradients.
        repeat_samples: where N·m samples are more than there are, go through the data
            again in another order; without it that is an error.
        max_nonfinite: so many gradients of a part may be NaN or infinite: they are left
            out, N becomes the number of the others, and the report counts them. One more
            is an error that names its samples.
    """

    num_gradients: int = 256
    gradient_batch_size: int = 16
    block_size: int | None = 256
    damping: float = 1e-4
    model_mode: ModelMode = "eval"
    engine: Engine = "auto"
    precision: Precision = "auto"
    offload_rows: bool = False
    memory_budget: str | int | None = None
    collection: Collection = "auto"
    row_dtype: RowDtype = "float32"
    first_order_samples: int | None = None
    sample_labels: bool = False
    centered: bool = False
    repeat_samples: bool = False
    max_nonfinite: int = 0

    def __post_init__(self) -> None:
        optional = ("block_size", "first_order_samples")
        for name in ("num_gradients", "gradient_batch_size", *optional):
            value = getattr(self, name)
            if name in optional and value is None:
                continue
            require = require_integer if name == "block_size" else require_count
            require(f"fisher.{name}", value)
            if value < 1:
                hint = "; None means one block over all weights" * (
                    name == "block_size"
                )
                raise ConfigurationError(
                    f"fisher.{name}={value} must be at least 1{hint}."
                )
        require_integer("fisher.max_nonfinite", self.max_nonfinite)
        if self.max_nonfinite < 0:
            raise ConfigurationError(
                f"fisher.max_nonfinite={self.max_nonfinite} must be at least 0; 0 allows "
                "none."
            )
        require_number("fisher.damping", self.damping)
        if not (self.damping > 0 and math.isfinite(self.damping)):
            raise ConfigurationError(
                f"fisher.damping={self.damping} must be positive and finite; without it "
                "the Fisher of fewer gradients than weights has no inverse."
            )
        if not _SMALLEST_DAMPING <= self.damping <= _LARGEST_DAMPING:
            raise ConfigurationError(
                f"fisher.damping={self.damping} is outside [{_SMALLEST_DAMPING:g}, "
                f"{_LARGEST_DAMPING:g}]; its products would leave the range of float64."
            )
        if self.memory_budget is not None:
            parse_bytes(self.memory_budget, "fisher.memory_budget")
        choices = {
            "model_mode": ModelMode,
            "engine": Engine,
            "precision": Precision,
            "collection": Collection,
            "row_dtype": RowDtype,
        }
        for name, known in choices.items():
            if getattr(self, name) not in get_args(known):
                raise ConfigurationError(
                    f"fisher.{name}={getattr(self, name)!r} is unknown; use one of "
                    f"{', '.join(get_args(known))}."
                )
        for name in ("sample_labels", "centered", "repeat_samples", "offload_rows"):
            require_flag(f"fisher.{name}", getattr(self, name))
        if self.block_size is None and self.engine == "primal":
            raise ConfigurationError(
                "fisher.engine='primal' cannot go with fisher.block_size=None: it would "
                "hold a matrix over all weights; use 'auto', or set a block size."
            )


def choose_engine(engine: Engine, num_gradients: int, block_size: int) -> Engine:
    """Resolve ``"auto"``.

    Args:
        engine: what the user asked for.
        num_gradients: N.
        block_size: B.

    Returns:
        ``"primal"`` when N >= B and ``"dual"`` otherwise, unless one was asked for.
    """
    if engine != "auto":
        return engine
    return "primal" if num_gradients >= block_size else "dual"


def rows_in_chunk(fisher: FisherConfig, weights: int) -> int:
    """Choose how many gradients enter the Fisher at once.

    More make the products larger, but wait in memory. Sums have the same grouping, and
    therefore the same bits, for every world size.

    Args:
        fisher: the settings.
        weights: D, active weights of all ranks.

    Returns:
        For the primal form 64 to 256, few for large networks; the dual one only stores.
    """
    size, most = fisher.block_size, fisher.num_gradients
    if (
        size is None
        or choose_engine(fisher.engine, fisher.num_gradients, size) == "dual"
    ):
        return min(32, most)
    return min(most, max(64, min(256, _ENTRIES_IN_CHUNK // max(1, weights))))


def first_order_batches(fisher: FisherConfig) -> tuple[int, int]:
    """Cut the first-order sample into mini-batches.

    Args:
        fisher: the settings.

    Returns:
        Number and size; (0, 0) without such a sample.
    """
    samples = fisher.first_order_samples
    if samples is None:
        return 0, 0
    # BatchNorm in training mode makes gradients depend on the size of the batch.
    training = fisher.model_mode == "train"
    most = fisher.gradient_batch_size if training else _FIRST_ORDER_BATCH
    size = min(samples, most)
    return samples // size, size


def mini_batches_in_group(fisher: FisherConfig) -> int:
    """Choose how many mini-batches are evaluated as one: small ones are slow one by one.

    Args:
        fisher: the settings.

    Returns:
        A divisor of N with about 64 samples; 1 in training mode, where BatchNorm makes the
        loss depend on the size of the batch.
    """
    if fisher.model_mode == "train":
        return 1
    most = max(1, _SAMPLES_EVALUATED_AT_ONCE // fisher.gradient_batch_size)
    return max(g for g in range(1, most + 1) if fisher.num_gradients % g == 0)
