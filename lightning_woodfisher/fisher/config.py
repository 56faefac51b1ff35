"""Settings of the empirical Fisher and the batch sizes derived from them."""

from __future__ import annotations

__all__ = [
    "Collection",
    "Engine",
    "FisherConfig",
    "Precision",
    "RowDtype",
    "choose_engine",
    "count_kept_factors",
    "first_order_batches",
    "fit_samples",
    "mini_batches_in_group",
    "rows_in_chunk",
]

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal, get_args

from lightning_woodfisher.base.byte_sizes import parse_bytes
from lightning_woodfisher.base.errors import (
    ConfigurationError,
    require_choice,
    require_count,
    require_flag,
    require_integer,
    require_number,
)
from lightning_woodfisher.base.keywords import explain_keywords
from lightning_woodfisher.base.types import ModelMode

Engine = Literal["auto", "primal", "dual"]
Collection = Literal["auto", "loop"]
Precision = Literal["auto", "float32", "split", "float64"]
RowDtype = Literal["float32", "bfloat16"]

# Largest number of entries in a chunk of gradients.
_ENTRIES_IN_CHUNK = 2**26
# Cholesky factors of blocks are kept for the update of the weights up to this size.
_BYTES_OF_FACTORS = 2**30
# Samples in a mini-batch of the mean gradient (``first_order_samples``).
_FIRST_ORDER_BATCH = 256
_SAMPLES_EVALUATED_AT_ONCE = 64
_CHOICES = {
    "model_mode": ModelMode,
    "engine": Engine,
    "precision": Precision,
    "collection": Collection,
    "row_dtype": RowDtype,
}


@explain_keywords("fisher")
@dataclass(frozen=True)
class FisherConfig:
    """Settings of the empirical Fisher.

    Args:
        num_gradients: N, the number of gradients.
        gradient_batch_size: m, samples in the mini-batch of one gradient. 1 is the
            empirical Fisher proper; a larger m is the paper's heuristic for large data.
            Where the data has fewer than N·m samples, the default of m is lowered, then
            that of N, with a message; other values are an error.
        block_size: B, the largest number of weights in a block; None for one block over all
            weights (best if N gradients fit into memory).
        damping: λ, added to the diagonal.
        model_mode: ``"eval"`` computes gradients with running BatchNorm statistics and
            without dropout; ``"train"`` computes them as training does.
        engine: ``"primal"``, ``"dual"``, or ``"auto"`` for the cheaper one. Both give the
            same matrix.
        precision: arithmetic of the inverse: ``"auto"`` (float32, and float64 where float32
            would change F⁻¹ by more than 1e-3), ``"float64"``, ``"float32"`` (products of
            gradients even where that is not enough) or ``"split"`` (these products in
            float32 from two parts of each number, with about 32 bits). ``"auto"`` splits
            before it changes to float64 on GPUs on which float64 is slow.
        offload_rows: keep gradient rows in host memory; has no effect on the primal engine,
            which keeps no rows.
        memory_budget: the most memory that a step may use on each rank, in addition to the
            network and its activations: bytes, ``"80GB"`` or ``"24GiB"``. None takes the
            memory that is free. The budget is checked before training starts.
        collection: ``"auto"`` computes many gradients in one pass if that gives the same
            numbers, ``"loop"`` computes one gradient in each pass.
        row_dtype: dtype of the gradients that are exchanged and kept; bfloat16 halves
            memory and traffic.
        first_order_samples: samples of the mean gradient of ``criterion="woodtaylor"``,
            rounded down to whole mini-batches of 256; None uses the samples of the N
            gradients. The line search always measures its losses on the samples of the N
            gradients.
        sample_labels: draw labels from the model's own softmax (the true Fisher, for
            m = 1) instead of using those of the data (the empirical Fisher). Batches must
            be ``(inputs, class labels)`` and ``model(inputs)`` the logits ``[n, C, ...]``,
            or the model must have a method ``sample_labels(batch)`` that returns the batch
            with labels drawn from the model's predictions.
        centered: subtract the mean gradient, which gives the covariance of the gradients.
        repeat_samples: if the data has fewer than N·m samples, go through it again in
            another order. Without this, too few samples are an error.
        max_nonfinite: number of gradients that may be NaN or infinite. They are left out, N
            becomes the number of the others, and the report counts them. One more is an
            error that names its samples.
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
        require_count("fisher.num_gradients", self.num_gradients, least=1)
        require_count("fisher.gradient_batch_size", self.gradient_batch_size, least=1)
        require_count("fisher.max_nonfinite", self.max_nonfinite, least=0)
        if self.first_order_samples is not None:
            require_count(
                "fisher.first_order_samples", self.first_order_samples, least=1
            )
        if self.block_size is not None:
            # A block may be larger than any sensible count.
            hint = "None means one block over all weights"
            require_integer("fisher.block_size", self.block_size, least=1, hint=hint)
        require_number(
            "fisher.damping",
            self.damping,
            "[1e-100, 1e+100]",
            "without damping the Fisher of fewer gradients than weights has no inverse, "
            "and products with a smaller or larger value overflow",
        )
        if self.memory_budget is not None:
            parse_bytes(self.memory_budget, "fisher.memory_budget")
        for name, choices in _CHOICES.items():
            require_choice(f"fisher.{name}", getattr(self, name), get_args(choices))
        for name in ("sample_labels", "centered", "repeat_samples", "offload_rows"):
            require_flag(f"fisher.{name}", getattr(self, name))
        if self.block_size is None and self.engine == "primal":
            raise ConfigurationError(
                "fisher.engine='primal' cannot be combined with fisher.block_size=None, "
                "because it would need a matrix over all weights; use 'auto', or set a "
                "block size."
            )


def fit_samples(
    fisher: FisherConfig, available: int, *, by_sample: bool, keep_set: bool
) -> FisherConfig:
    """Lower N and m where there is too little data for the defaults.

    Args:
        fisher: the settings.
        available: number of samples, or of batches.
        by_sample: whether it counts samples, so that N·m of them are needed, not N.
        keep_set: leave a number as it is if it is not the default.

    Returns:
        The settings; unchanged if the data suffices or samples may repeat. In training
        mode m, which changes the statistics of BatchNorm, is not lowered.
    """
    if fisher.repeat_samples:
        return fisher
    default = FisherConfig()
    count, size = fisher.num_gradients, fisher.gradient_batch_size
    may_lower_count = not keep_set or count == default.num_gradients
    may_lower_size = not keep_set or size == default.gradient_batch_size
    may_lower_size &= fisher.model_mode == "eval"
    if by_sample and count * size > available and may_lower_size:
        size = max(1, available // count)
    needed = size if by_sample else 1
    if count * needed > available and may_lower_count:
        count = max(1, available // needed)
    return replace(fisher, num_gradients=count, gradient_batch_size=size)


def choose_engine(fisher: FisherConfig) -> Literal["primal", "dual", "full"]:
    """Choose the form of the inverse Fisher.

    Args:
        fisher: the settings.

    Returns:
        ``"full"`` without a block size. Otherwise the engine of the settings; for
        ``"auto"``, ``"primal"`` if N >= B and ``"dual"`` if N < B.
    """
    if fisher.block_size is None:
        return "full"
    if fisher.engine != "auto":
        return fisher.engine
    return "primal" if fisher.num_gradients >= fisher.block_size else "dual"


def count_kept_factors(
    fisher: FisherConfig, blocks: Iterable[tuple[int, int]]
) -> tuple[int, int]:
    """Count the units whose Cholesky factors are kept after the saliencies.

    Other units are factorized again for an update that needs them, with the same bits.

    Args:
        fisher: the settings.
        blocks: size and number of the blocks of each unit of a rank, in order.

    Returns:
        Number of the units, and the bytes of their factors; ``"auto"`` is counted as
        float32.
    """
    engine = choose_engine(fisher)
    if engine == "full":
        return 0, 0
    item = 4 if fisher.precision == "auto" else 8
    units = total = 0
    for size, count in blocks:
        side = size if engine == "primal" else fisher.num_gradients
        added = item * count * side**2
        if total + added > _BYTES_OF_FACTORS:
            break
        units, total = units + 1, total + added
    return units, total


def rows_in_chunk(fisher: FisherConfig, weights: int) -> int:
    """Choose how many gradients are added to the Fisher at once.

    A larger chunk makes products faster but needs more memory. The size does not depend on
    the world size, so that sums have the same bits for every number of ranks.

    Args:
        fisher: the settings.
        weights: D, active weights of all ranks.

    Returns:
        64 to 256 for the primal engine, fewer for larger networks; at most 32 for the other
        engines, which only store the rows.
    """
    if choose_engine(fisher) == "primal":
        largest = max(64, min(256, _ENTRIES_IN_CHUNK // max(1, weights)))
    else:
        largest = 32
    return min(fisher.num_gradients, largest)


def first_order_batches(fisher: FisherConfig) -> tuple[int, int]:
    """Divide ``first_order_samples`` into mini-batches.

    Args:
        fisher: the settings.

    Returns:
        Number and size of the mini-batches; (0, 0) without ``first_order_samples``.
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
    """Choose how many mini-batches are evaluated as one, to avoid many small passes.

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
