"""Trace a model with torch-pruning; the only module that imports it."""

from __future__ import annotations

__all__ = ["trace_coupling"]

import contextlib
import copy
import traceback
import warnings
from collections import defaultdict, deque
from collections.abc import Mapping
from importlib import import_module
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from lightning_woodfisher.base.errors import ConfigurationError
from lightning_woodfisher.base.optional_imports import import_optional
from lightning_woodfisher.data.isolation import isolated
from lightning_woodfisher.structured.graph.coupling import Coupling, Side
from lightning_woodfisher.structured.graph.inputs import run_model, tensors_in
from lightning_woodfisher.weights.layers import is_linear

# Channels that pass one of these are never pruned, whatever the numerical check finds.
_MIXES_CHANNELS = {
    "LN": "it passes a LayerNorm, whose statistics mix channels",
    "GN": "it passes a GroupNorm, whose statistics mix channels",
    "EMBED": "it is tied to an embedding",
    "PARAMETER": "it is tied to a bare nn.Parameter",
    "MHA": "it passes an attention layer",
    "LSTM": "it passes an LSTM",
    "SPLIT": "it passes a split into pieces of fixed size",
    "UNBIND": "it passes an unbind",
    "EXPAND": "it passes an expand",
    "OUTPUT": "it is an output of the network",
}
_DIVIDES_CHANNELS = ("SLICE", "SPLIT", "UNBIND")
# Beginnings of the names of backward functions: matrix products between activations.
_ATTENTION = ("Bmm", "Baddbmm", "ScaledDotProduct", "Softmax")
# In the names of functions with f(0) ≠ 0, for messages.
_NOT_ZERO_AT_ZERO = ("sigmoid", "softplus", "exp", "cos")


class _Index(NamedTuple):
    """A channel at a node, and the channel that it depends on of the first layer."""

    idx: int
    root_idx: int


def trace_coupling(
    model: nn.Module, example_inputs: Any
) -> tuple[Coupling, dict[str, str]]:
    """Trace a model in evaluation mode and find which channels are coupled.

    Args:
        model: the network; unchanged afterwards.
        example_inputs: a tensor, a tuple of arguments or a dict of keyword arguments.

    Returns:
        The coupling of the layers that the trace reaches, and the operations with
        f(0) ≠ 0 that the outputs of a Conv or Linear layer pass, by its name.
    """
    graph = _build_graph(model, example_inputs)
    names: dict[nn.Module, str] = {m: name for name, m in model.named_modules()}
    layers: dict[str, nn.Module] = {
        name: module
        for module, name in names.items()
        if module in graph.module2node
        and (isinstance(module, (_ConvNd, _NormBase, nn.PReLU)) or is_linear(module))
        and not (isinstance(module, nn.PReLU) and module.num_parameters == 1)
    }
    coupling = Coupling(layers)
    suspects = {
        name: _unite_dependents(graph, coupling, name, layer, names)
        for name, layer in layers.items()
        if (name, "in") in coupling.channels
    }
    return coupling, suspects


def _build_graph(model: nn.Module, example_inputs: Any) -> Any:
    """Trace a model with torch-pruning."""
    tp = import_optional("torch_pruning", "tracing channels")
    with isolated(model, "eval"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # The trace follows the graph of autograd, which leaves out frozen weights.
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.requires_grad_(True)
        graph = tp.DependencyGraph()
        try:
            graph.build_dependency(
                model,
                example_inputs,
                customized_pruners=_describe_layers(tp, model),
                forward_fn=run_model,
                output_transform=_require_graph,
                verbose=False,
            )
        except Exception as error:
            places = [frame.name for frame in traceback.extract_tb(error.__traceback__)]
            if "update_index_mapping" in places:
                _map_indices(graph)
                return graph
            name, cause = type(model).__name__, f"{type(error).__name__}: {error}"
            if {"run_model", "_require_graph"}.isdisjoint(places):
                raise ConfigurationError(
                    f"{name} cannot be traced, because torch-pruning does not know one of "
                    f"its operations (it failed in {places[-1]}: {cause}). Pass groups "
                    "made by hand, or remove single weights."
                ) from error
            raise ConfigurationError(
                f"{name} cannot be traced with example_inputs: {cause}. Pass inputs that "
                "the model's forward accepts (a tensor, a tuple of arguments or a dict of "
                "keyword arguments), or groups made by hand."
            ) from error
    return graph


def _describe_layers(tp: Any, model: nn.Module) -> dict[type[nn.Module], Any]:
    """Describe linear layers that torch-pruning does not know."""
    description = tp.pruner.function.LinearPruner()
    description.get_out_channels = lambda layer: layer.weight.shape[1]
    description.get_in_channels = lambda layer: layer.weight.shape[0]
    return {
        type(module): description
        for module in model.modules()
        if is_linear(module) and not isinstance(module, nn.Linear)
    }


def _map_indices(graph: Any) -> None:
    """Map the channels of one operation after the other, without those that fail.

    What is then coupled wrongly does not pass the numerical check.
    """
    mapping = import_module("torch_pruning.dependency.index_mapping")
    for module, node in graph.module2node.items():
        alone = copy.copy(graph)
        alone.module2node = {module: node}
        with contextlib.suppress(Exception):
            mapping.update_index_mapping(alone)


def _require_graph(outputs: Any) -> list[Tensor]:
    """Return the output tensors that depend on a parameter."""
    found = [t for t in tensors_in(outputs) if t.grad_fn is not None]
    if not found:
        raise ValueError("no output depends on a parameter")
    return found


def _unite_dependents(
    graph: Any,
    coupling: Coupling,
    name: str,
    layer: nn.Module,
    names: Mapping[Any, str],
) -> str:
    """Unite the channels tied to the outputs of a layer; list operations with f(0) ≠ 0."""
    # Not by get_pruning_group: it computes all index maps again for each layer, and keeps
    # one of the roots of a channel that is reached from several.
    roots = coupling.channels[name, "out"]
    node, function = graph.module2node[layer], _output_pruner(graph, layer)
    visited: dict[tuple[Any, Any], set[_Index]] = defaultdict(set)
    # Near ones first, and nothing beyond an obstacle: where the index maps along a cycle
    # do not fit together (rotary positions, repeated heads), indices would grow forever.
    waiting = deque([(node, function, [_Index(i, i) for i in range(len(roots))])])
    most = max(map(len, coupling.channels.values()))
    suspects: dict[str, None] = {}
    while waiting:
        node, function, indices = waiting.popleft()
        known = visited[node, function]
        fresh = [
            index
            for index in dict.fromkeys(indices)
            if index not in known and coupling.reason(roots[index.root_idx]) is None
        ]
        known.update(fresh)
        if not fresh:
            continue
        side: Side = "out" if function == _output_pruner(graph, node.module) else "in"
        other = names.get(node.module)
        reason = coupling.reasons.get(str(other)) or _obstacle(node, side)
        if reason is None and other is not None and (other, "out") in coupling.channels:
            channels = [coupling.channel(other, side, index.idx) for index in fresh]
            if min(channels) < 0:
                reason = f"its channels do not match those of {other} (padding?)"
            else:
                for channel, index in zip(channels, fresh, strict=True):
                    coupling.unite(roots[index.root_idx], channel)
        if reason is None and max(index.idx for index in fresh) >= most:
            reason = "its channels are rearranged in a way that is not followed"
        if reason is not None:
            _leave_out(coupling, roots, fresh, reason)
            continue
        operation = _operation(node)
        if any(word in operation.lower() for word in _NOT_ZERO_AT_ZERO):
            suspects[operation] = None
        for edge in node.dependencies:
            if not edge.is_triggered_by(function):
                continue
            if edge.target.type.name in _DIVIDES_CHANNELS:
                # The index map drops the channels of the other pieces; leave them out, too.
                obstacle = _obstacle(edge.target, side)
                if obstacle is not None:
                    _leave_out(coupling, roots, fresh, obstacle)
            mapped = fresh
            for mapping in filter(None, edge.index_mapping):
                mapped = mapping(mapped)
            waiting.append((edge.target, edge.handler, mapped))
    return ", ".join(suspects)


def _output_pruner(graph: Any, module: nn.Module) -> Any:
    return graph.get_pruner_of_module(module).prune_out_channels


def _leave_out(
    coupling: Coupling, roots: range, indices: list[_Index], reason: str
) -> None:
    for index in indices:
        coupling.leave_out(roots[index.root_idx], reason)


def _operation(node: Any) -> str:
    """Return the name of the backward function of an operation without a layer."""
    return str(getattr(node.module, "_grad_fn", ""))


def _obstacle(node: Any, side: Side) -> str | None:
    """Return why channels that reach a node cannot be pruned, or None."""
    kind, operation = node.type.name, _operation(node)
    if kind in _MIXES_CHANNELS:
        return _MIXES_CHANNELS[kind]
    if kind == "SLICE" and _slices_channels(node):
        return "it passes a slice of channels"
    if operation.startswith(_ATTENTION):
        return f"it passes an attention product ({operation})"
    if not node.outputs and side == "out":
        return _MIXES_CHANNELS["OUTPUT"]
    return None


def _slices_channels(node: Any) -> bool:
    """Check if a slice is along the channels: axis 1 of images, the last of tokens."""
    sizes = node.grad_fn._saved_self_sym_sizes
    axis = 2 if len(sizes) == 3 else 1
    start, end = int(node.grad_fn._saved_start), int(node.grad_fn._saved_end)
    size = int(sizes[axis])
    return int(node.grad_fn._saved_dim) == axis and min(end, size) - start != size
