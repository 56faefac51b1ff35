"""The damped empirical Fisher in blocks, and its inverse in closed form.

With rows ``g_i`` (gradients of the mean loss of the i-th mini-batch) and a block's columns
``G`` of shape ``[N, B]``::

    F = λ I + (1/N) Σ_i g_i g_iᵀ = λ I + GᵀG / N          (WoodFisher, section 3)

The literature inverts F with N rank-one Woodbury updates. Here the same inverse comes from
one factorisation, in one of two exact forms:

* **primal** (B <= N): ``A = GᵀG`` is accumulated while gradients arrive, rows are not kept;
  F is factorised by Cholesky.
* **dual** (N < B, and the full Fisher): rows are kept, ``NλI + GGᵀ = LLᵀ``, ``Z = L⁻¹G``,
  ``F⁻¹ = (I − ZᵀZ) / λ`` (Woodbury identity).

Factorisations are float64; products of float32 gradients are float32 as far as that keeps
F⁻¹ within 1e-5, unit by unit (:mod:`.products`).
Shapes: D_r active weights of this rank, N gradients, B block size, K blocks of a unit.
"""

from __future__ import annotations

__all__ = [
    "DualInverseFisher",
    "FullInverseFisher",
    "InverseFisher",
    "PrimalInverseFisher",
    "block_cost",
    "full_column_chunk",
    "make_inverse_fisher",
]

from collections.abc import Callable, Sequence

from lightning_woodfisher.distributed.communicator import Communicator
from lightning_woodfisher.fisher.base import InverseFisher
from lightning_woodfisher.fisher.config import Engine, Precision, choose_engine
from lightning_woodfisher.fisher.dual import DualInverseFisher
from lightning_woodfisher.fisher.full import FullInverseFisher
from lightning_woodfisher.fisher.primal import PrimalInverseFisher
from lightning_woodfisher.weights.partition import Partition


def make_inverse_fisher(
    partition: Partition,
    num_gradients: int,
    damping: float,
    communicator: Communicator,
    *,
    block_size: int | None,
    engine: Engine = "auto",
    precision: Precision = "auto",
    offload_rows: bool = False,
    centered: bool = False,
    max_nonfinite: int = 0,
) -> InverseFisher:
    """Choose the engine and make this rank's part of the inverse Fisher.

    Args:
        partition: all blocks and their owners.
        num_gradients: N.
        damping: λ.
        communicator: the ranks.
        block_size: B, or None for the full Fisher.
        engine: which form; ``"auto"`` takes the cheaper one.
        precision: of the products of gradients.
        offload_rows: keep rows in host memory.
        centered: subtract the mean gradient.
        max_nonfinite: how many gradients may not come.

    Returns:
        An empty inverse Fisher that waits for gradients.
    """
    cls: type[InverseFisher] = FullInverseFisher
    if block_size is not None:
        chosen = choose_engine(engine, num_gradients, block_size)
        cls = PrimalInverseFisher if chosen == "primal" else DualInverseFisher
    return cls(
        partition,
        num_gradients,
        damping,
        communicator,
        precision,
        offload_rows,
        centered,
        max_nonfinite,
    )


def block_cost(
    num_gradients: int, block_size: int | None, engine: Engine
) -> Callable[[int], float]:
    """Model the work for one block, to balance owners.

    Args:
        num_gradients: N.
        block_size: B, or None for the full Fisher.
        engine: as in :func:`make_inverse_fisher`.

    Returns:
        A function of the block's size: N·b² + b³ (primal) or N²·b (dual).
    """
    if block_size is None or choose_engine(engine, num_gradients, block_size) == "dual":
        return lambda size: float(num_gradients) ** 2 * size
    return lambda size: float(num_gradients) * size**2 + float(size) ** 3


def full_column_chunk(sizes: Sequence[int]) -> int:
    """Choose how many columns of the full Fisher form one unit.

    Args:
        sizes: active weights of each tensor.

    Returns:
        A number that depends on the model only, never on the world size: about 64 units,
        more where columns would become longer than is fast.
    """
    return min(4096, max(64, -(-sum(sizes) // 64)))
