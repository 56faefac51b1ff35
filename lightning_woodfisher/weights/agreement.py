"""Whether all ranks hold the same weights and masks, by hashes of their bits."""

from __future__ import annotations

__all__ = ["checksum", "require_same"]

from collections.abc import Iterable

import torch
from torch import Tensor

from lightning_woodfisher.base.errors import PruningError
from lightning_woodfisher.distributed.communicator import Communicator
from lightning_woodfisher.weights.masks import Masks

_PIECE = 2**20
# Any odd number with bits at both ends: two bits that differ must not cancel.
_FACTOR, _OFFSET = 2654435761, 97
_NAMED = 4


@torch.no_grad()
def require_same(masks: Masks, communicator: Communicator, when: str) -> None:
    """Refuse ranks that hold different weights or masks.

    Of a sharded model nobody else holds the same, and there is nothing to compare.

    Args:
        masks: with the parameters.
        communicator: the ranks.
        when: as in "the ranks disagree about ... after the step".

    Raises:
        PruningError: naming tensors, and the ranks that differ from rank 0.
    """
    if masks.sharded or communicator.world_size == 1:
        return
    names = list(masks.parameters)
    hashes = [checksum([masks.local(name)]) for name in names]
    hashes += [checksum([masks.kept(name)]) for name in names]
    differing = communicator.who_differs(torch.stack(hashes))
    if not differing:
        return
    rows = [
        ("the weights" if place < len(names) else "the masks", place, ranks)
        for place, ranks in differing.items()
    ]
    found = [
        f"{kind} of {names[place % len(names)]!r} (rank {', '.join(map(str, ranks))} "
        "differs from rank 0)"
        for kind, place, ranks in rows[:_NAMED]
    ]
    more = f" and {len(rows) - _NAMED} more" if len(rows) > _NAMED else ""
    raise PruningError(
        f"the ranks disagree about {'; '.join(found)}{more} {when}. Something has changed "
        "them on one rank only."
    )


def checksum(tensors: Iterable[Tensor]) -> Tensor:
    """Mix the bits of tensors, one behind the other, into one number, wrapping around.

    Args:
        tensors: of any dtype.

    Returns:
        int64 scalar on the device of the tensors.
    """
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    first, total = 1, torch.zeros((), dtype=torch.int64)
    for tensor in tensors:
        flat = tensor.contiguous().view(-1).view(kinds[tensor.element_size()])
        # Piece by piece: in int64 the whole would need many times the model's memory.
        for piece in torch.split(flat, _PIECE):
            last = first + len(piece)
            index = torch.arange(first, last, device=piece.device)
            mixed = (piece.to(torch.int64) + 1) * (index * _FACTOR + _OFFSET)
            total = total.to(piece.device) + mixed.sum()
            first = last
    return total
