"""Magnitude, Wanda and SparseGPT on a network of blocks, to compare with.

Written from the papers: Wanda (Sun et al., ICLR 2024): score |w|·‖x‖ within each output, no
update; SparseGPT (Frantar & Alistarh, ICML 2023): columns one after another in blocks of
128, saliency w²/[H⁻¹]_jj with the mask of a block chosen when the sweep reaches it, damping
0.01 of the mean diagonal. Both go through the blocks in order, with inputs of the network as
pruned so far. SparseGPT chooses the smallest saliencies of each output within a block of
columns; over all outputs of the block together the loss was higher here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

_COLUMNS = 128
_DAMPING = 0.01

# Returns the new weight for a weight [o, d], inputs [n, d] and a sparsity; None for 2:4.
Method = Callable[[Tensor, Tensor, "float | None"], Tensor]


def _two_of_four(scores: Tensor) -> Tensor:
    groups = scores.unflatten(1, (-1, 4))
    removed = torch.zeros_like(groups, dtype=torch.bool)
    return removed.scatter_(2, groups.argsort(2)[..., :2], True).flatten(1)


def wanda(weight: Tensor, inputs: Tensor, sparsity: float | None) -> Tensor:
    """Remove the smallest |w|·‖x‖ of each output."""
    scores = weight.abs() * inputs.norm(dim=0)
    if sparsity is None:
        return weight.masked_fill(_two_of_four(scores), 0.0)
    count = round(sparsity * weight.shape[1])
    removed = torch.zeros_like(weight, dtype=torch.bool)
    removed.scatter_(1, scores.argsort(1)[:, :count], True)
    return weight.masked_fill(removed, 0.0)


def sparsegpt(weight: Tensor, inputs: Tensor, sparsity: float | None) -> Tensor:
    """Sweep over the columns and spread the error of each over those that follow."""
    weight = weight.double()
    hessian = (inputs.T @ inputs).double() / len(inputs)
    dead = hessian.diagonal() == 0
    hessian[dead, dead] = 1.0
    weight = weight.masked_fill(dead, 0.0)
    hessian.diagonal().add_(_DAMPING * hessian.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    upper = torch.linalg.cholesky(inverse, upper=True)
    for start in range(0, weight.shape[1], _COLUMNS):
        stop = min(start + _COLUMNS, weight.shape[1])
        part, factor = weight[:, start:stop].clone(), upper[start:stop, start:stop]
        errors = torch.zeros_like(part)
        if sparsity is not None:
            scores = part.square() / factor.diagonal().square()
            removed = torch.zeros_like(part, dtype=torch.bool)
            count = round(sparsity * stop) - round(sparsity * start)
            removed.scatter_(1, scores.argsort(1)[:, :count], True)
        else:
            removed = torch.zeros_like(part, dtype=torch.bool)
        for i in range(stop - start):
            if sparsity is None and i % 4 == 0:
                scores = part[:, i : i + 4] / factor.diagonal()[i : i + 4]
                removed[:, i : i + 4] = _two_of_four(scores.square())
            error = torch.where(removed[:, i], part[:, i], 0.0) / factor[i, i]
            part[:, i:] -= error[:, None] * factor[i, i:]
            errors[:, i] = error
        weight[:, start:stop] = part.masked_fill(removed, 0.0)
        weight[:, stop:] -= errors @ upper[start:stop, stop:]
    return weight.float()


@torch.no_grad()
def prune_sequentially(
    model: nn.Module,
    embed: Callable[[Tensor], Tensor],
    blocks: Sequence[nn.Module],
    head: Sequence[nn.Module],
    text: Tensor,
    method: Method,
    sparsity: float | None,
) -> None:
    """Prune the linear layers of all blocks, and the head, in order.

    Args:
        model: the network, changed in place.
        embed: computes the input of the first block.
        blocks: the blocks.
        head: what follows them.
        text: calibration samples, int64 ``[n, t]``.
        method: new weight of a layer.
        sparsity: share of zeros of every layer; None for 2:4.
    """
    model.eval()
    streams = [embed(part) for part in text.split(64)]
    for block in (*blocks, nn.Sequential(*head)):
        layers = [layer for layer in block.modules() if isinstance(layer, nn.Linear)]
        for layer in layers:
            inputs: list[Tensor] = []
            handle = layer.register_forward_pre_hook(
                lambda _, args, inputs=inputs: inputs.append(args[0].flatten(0, -2))
            )
            for stream in streams:
                block(stream)
            handle.remove()
            layer.weight.copy_(method(layer.weight, torch.cat(inputs), sparsity))
        streams = [block(stream) for stream in streams]
