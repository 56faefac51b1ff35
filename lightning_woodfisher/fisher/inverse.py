"""The damped empirical Fisher in blocks, and its inverse in closed form.

With rows ``g_i`` (gradients of the mean loss of mini-batch i) and a block's columns ``G`` of
shape ``[N, B]``::

    F = λ I + (1/N) Σ_i g_i g_iᵀ = λ I + GᵀG / N          (WoodFisher, section 3)

The literature inverts F with N rank-one Woodbury updates. Here the same inverse comes from
one factorization, in one of two exact forms:

* **primal** (B <= N): ``A = GᵀG`` is accumulated while gradients arrive, and rows are not
  kept. F is factorized by Cholesky.
* **dual** (N < B, and the full Fisher): rows are kept, ``NλI + GGᵀ = LLᵀ``, ``Z = L⁻¹G``,
  ``F⁻¹ = (I − ZᵀZ) / λ`` (Woodbury identity).

With ``precision="auto"``, products of float32 gradients and factorizations are float32 if
that keeps F⁻¹ within 1e-3, decided for each unit (:mod:`.linalg`).
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
from lightning_woodfisher.fisher.config import FisherConfig, choose_engine
from lightning_woodfisher.fisher.dual import DualInverseFisher
from lightning_woodfisher.fisher.full import FullInverseFisher
from lightning_woodfisher.fisher.primal import PrimalInverseFisher
from lightning_woodfisher.weights.partition import Partition

_ENGINES: dict[str, type[InverseFisher]] = {
    "primal": PrimalInverseFisher,
    "dual": DualInverseFisher,
    "full": FullInverseFisher,
}


def make_inverse_fisher(
    partition: Partition, fisher: FisherConfig, communicator: Communicator
) -> InverseFisher:
    """Create this rank's blocks of the inverse Fisher with the engine of the settings.

    Args:
        partition: all blocks and their owners.
        fisher: the settings.
        communicator: the ranks.

    Returns:
        An empty inverse Fisher that waits for gradients.
    """
    return _ENGINES[choose_engine(fisher)](partition, fisher, communicator)


def block_cost(fisher: FisherConfig) -> Callable[[int], float]:
    """Model the work for one block, to balance the ranks.

    Args:
        fisher: the settings.

    Returns:
        A function of the block size b: N·b² + b³ (primal) or N²·b (dual and full).
    """
    count = float(fisher.num_gradients)
    if choose_engine(fisher) == "primal":
        return lambda size: count * size**2 + float(size) ** 3
    return lambda size: count**2 * size


def full_column_chunk(sizes: Sequence[int]) -> int:
    """Choose how many columns of the full Fisher form one unit.

    Args:
        sizes: active weights of each tensor.

    Returns:
        A number that depends on the model only, never on the world size: about 64 units,
        or more units where columns would become too long to be fast.
    """
    return min(4096, max(64, -(-sum(sizes) // 64)))
