"""Layers of a structure that lie in series count once.

A depthwise convolution carries a channel on, so the layers before and after it belong to
one structure. If all of them were scored, the channel would count several times: with
f(α) = α·α·f the slope is 2f and the curvature 4f² instead of f and f². Only what such a
series sends to the next layers is scored. At α = 0 that is the network without the channel.
"""

from __future__ import annotations

__all__ = ["keep_ends_of_series"]

import contextlib
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_woodfisher.data.losses import graph_nodes
from lightning_woodfisher.structured.scores.evaluation import Evaluation


def keep_ends_of_series(evaluation: Evaluation) -> None:
    """Leave out the entries of layers whose output only goes on to a later scored layer.

    Runs the network on two samples if a group has a depthwise convolution.

    Args:
        evaluation: with its session entered; its vectors change.
    """
    vectors = evaluation.vectors
    scored: dict[int, set[str]] = defaultdict(set)
    for one in vectors.slices:
        if one.group in vectors.depthwise:
            scored[one.group].add(one.module)
    pairs = sorted((group, name) for group, names in scored.items() for name in names)
    if not pairs:
        return

    def find_inner(loss: Callable[[], Tensor], scale: float, labels: int) -> Tensor:
        inner = _find_inner(vectors.model, scored, vectors.depthwise, loss)
        return scale * torch.tensor([[float(pair in inner) for pair in pairs]])

    flags = evaluation.probe().compute_rows(find_inner, len(pairs))[0].tolist()
    dropped = {pair for pair, flag in zip(pairs, flags, strict=True) if flag}
    vectors.slices = [s for s in vectors.slices if (s.group, s.module) not in dropped]


def _find_inner(
    model: nn.Module,
    scored: dict[int, set[str]],
    depthwise: dict[int, set[str]],
    loss: Callable[[], Tensor],
) -> set[tuple[int, str]]:
    """Find the pairs of group and layer that reach the loss through a later layer only."""
    outputs: dict[str, list[Any]] = defaultdict(list)
    convolved: dict[str, set[Any]] = defaultdict(set)
    one = torch.ones((), requires_grad=True, device=next(model.parameters()).device)

    def record(name: str) -> Callable[[Any, Any, Any], Any]:
        def hook(module: Any, inputs: Any, output: Any) -> Any:
            if not isinstance(output, Tensor) or not torch.is_grad_enabled():
                return None
            convolved[name].add(output.grad_fn)
            marked = output * one.to(output.dtype)
            outputs[name].append(marked.grad_fn)
            return marked

        return hook

    with contextlib.ExitStack() as hooks:
        for name in set().union(*scored.values(), *depthwise.values()):
            layer = model.get_submodule(name)
            hooks.enter_context(layer.register_forward_hook(record(name), prepend=True))
        value = loss()
    found = set()
    for group, names in scored.items():
        own = {node for name in names for node in outputs[name]}
        between = set().union(*(convolved[name] for name in depthwise[group]))
        # Scored layers that receive what a depthwise convolution has carried on.
        ends = {
            node
            for node in own
            if graph_nodes((inputs for inputs, _ in node.next_functions), own) & between
        }
        seen = graph_nodes([value.grad_fn], ends)
        found |= {
            (group, name)
            for name in names
            if outputs[name] and seen.isdisjoint(outputs[name])
        }
    return found
