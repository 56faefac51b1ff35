"""The only code that knows torch-pruning: from a traced graph to coupled channels."""

from __future__ import annotations

__all__ = ["trace_coupling"]

import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from lightning_woodfisher.base.errors import ConfigurationError
from lightning_woodfisher.base.optional_imports import import_optional
from lightning_woodfisher.data.isolation import isolated
from lightning_woodfisher.structured.graph.coupling import Coupling, Side
from lightning_woodfisher.structured.graph.inputs import run_model, tensors_in

# A channel that goes through one of these stays out, whatever the numbers say.
_MIXES_CHANNELS = {
    "LN": "it passes a LayerNorm, whose statistics mix channels",
    "GN": "it passes a GroupNorm, whose statistics mix channels",
    "EMBED": "it is tied to an embedding",
    "PARAMETER": "it is tied to a bare nn.Parameter",
    "MHA": "it passes an attention layer",
    "LSTM": "it passes an LSTM",
    "SPLIT": "it passes a split into parts of fixed sizes",
    "UNBIND": "it passes an unbind into parts",
    "EXPAND": "it passes an expand",
    "OUTPUT": "it is an output of the network",
}
_PARTS = ("SLICE", "SPLIT", "UNBIND")
# Names of backward functions: matrix products between activations.
_ATTENTION = ("bmm", "scaleddotproduct", "softmax")
# Those that give something else than zero for zero, for the reason in a message.
_NOT_ZERO_AT_ZERO = ("sigmoid", "softplus", "exp", "cos", "hardsigmoid", "logsigmoid")


class _Index(NamedTuple):
    """A channel at a node, and the channel of the layer that the walk began at."""

    idx: int
    root_idx: int


def trace_coupling(
    model: nn.Module, example_inputs: Any
) -> tuple[Coupling, dict[str, nn.Module], dict[str, str]]:
    """Trace a model in evaluation mode and find out which channels are tied.

    Args:
        model: the network; left as it was.
        example_inputs: what it is called with: a tensor, a tuple or a dict of keyword
            arguments.

    Returns:
        The coupling; the Conv and Linear layers that the trace has reached, by name;
        the operations with f(0) ≠ 0 on the way of a layer's channels, by its name.
    """
    graph = _build(model, example_inputs)
    import torch_pruning as tp

    names = {module: name for name, module in model.named_modules()}
    nodes = {m: n for m, n in graph.module2node.items() if m in names}
    known = (
        tp.ops.TORCH_CONV,
        tp.ops.TORCH_LINEAR,
        tp.ops.TORCH_BATCHNORM,
        tp.ops.TORCH_INSTANCENORM,
        nn.PReLU,
    )
    layers = {
        name: module
        for name, module in model.named_modules()
        if module in nodes
        and isinstance(module, known)
        and not (isinstance(module, nn.PReLU) and module.num_parameters == 1)
    }
    coupling = Coupling(layers)
    producers = {
        name: layer
        for name, layer in layers.items()
        if isinstance(layer, (tp.ops.TORCH_CONV, tp.ops.TORCH_LINEAR))
    }
    suspects = {}
    for name, layer in producers.items():
        if name not in coupling.reasons:
            suspects[name] = _follow(graph, coupling, name, layer, names)
    return coupling, producers, suspects


def _build(model: nn.Module, example_inputs: Any) -> Any:
    """Let torch-pruning trace the model."""
    tp = import_optional("torch_pruning", "tracing channels")
    failures: list[Exception] = []

    def forward(model: nn.Module, inputs: Any) -> Any:
        try:
            return run_model(model, inputs)
        except Exception as error:
            failures.append(error)
            raise

    with isolated(model, "eval"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # The trace follows autograd's graph, which frozen weights leave out.
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.requires_grad_(True)
        try:
            return tp.DependencyGraph().build_dependency(
                model,
                example_inputs,
                forward_fn=forward,
                output_transform=_with_graph,
                verbose=False,
            )
        except Exception as error:
            what = "traced by torch-pruning"
            if failures:
                what = "called with example_inputs"
            raise ConfigurationError(
                f"{type(model).__name__} cannot be {what}: {type(error).__name__}: "
                f"{error}. Pass example_inputs that the model's forward takes (a tensor, a "
                "tuple of arguments or a dict of keyword arguments), or groups made by "
                "hand."
            ) from error


def _with_graph(outputs: Any) -> list[Tensor]:
    found = [t for t in tensors_in(outputs) if t.grad_fn is not None]
    if not found:
        raise ValueError("no output depends on a parameter")
    return found


def _follow(
    graph: Any,
    coupling: Coupling,
    name: str,
    layer: nn.Module,
    names: Mapping[Any, str],
) -> str:
    """Unite what is tied to the outputs of one layer; name suspicious operations."""
    # Not by get_pruning_group: it finds all index maps anew for each layer, and of a
    # channel that is reached from several it keeps one.
    outputs = coupling.ports[name, "out"].channels
    roots = [coupling.channel(name, "out", i) for i in range(outputs)]
    start = (
        graph.module2node[layer],
        graph.get_pruner_of_module(layer).prune_out_channels,
    )
    seen: dict[tuple[Any, Any], set[Any]] = {}
    waiting = [(*start, [_Index(i, i) for i in range(outputs)])]
    suspects: list[str] = []
    while waiting:
        node, fn, pairs = waiting.pop()
        known = seen.setdefault((node, fn), set())
        fresh = [pair for pair in dict.fromkeys(pairs) if pair not in known]
        known.update(fresh)
        if not fresh:
            continue
        own = graph.get_pruner_of_module(node.module)
        side: Side = "out" if fn == own.prune_out_channels else "in"
        other = names.get(node.module)
        reason = coupling.reasons.get(str(other)) or _obstacle(node, side)
        if reason is None and other is not None and (other, "out") in coupling.ports:
            channels = [coupling.channel(other, side, pair.idx) for pair in fresh]
            if min(channels) < 0:
                reason = f"its channels do not match those of {other} (padding?)"
            else:
                for channel, pair in zip(channels, fresh, strict=True):
                    coupling.unite(roots[pair.root_idx], channel)
        if reason is not None:
            _leave_out(coupling, roots, fresh, reason)
            continue
        operation = str(getattr(node.module, "_grad_fn", ""))
        if any(word in operation.lower() for word in _NOT_ZERO_AT_ZERO):
            suspects.append(operation)
        for edge in node.dependencies:
            if edge.is_triggered_by(fn):
                mapped = fresh
                if edge.target.type.name in _PARTS:
                    # The map drops the channels of the other parts, which stay, too.
                    _leave_out(coupling, roots, fresh, _obstacle(edge.target, side))
                for mapping in filter(None, edge.index_mapping):
                    mapped = mapping(mapped)
                waiting.append((edge.target, edge.handler, mapped))
    return ", ".join(dict.fromkeys(suspects))


def _leave_out(
    coupling: Coupling, roots: list[int], pairs: list[_Index], reason: str | None
) -> None:
    if reason is not None:
        for pair in pairs:
            coupling.leave_out(roots[pair.root_idx], reason)


def _obstacle(node: Any, side: Side) -> str | None:
    """Tell why channels that come to a node cannot be pruned."""
    kind, operation = node.type.name, str(getattr(node.module, "_grad_fn", ""))
    if kind in _MIXES_CHANNELS:
        return _MIXES_CHANNELS[kind]
    if kind == "SLICE" and _cuts_channels(node):
        return "it passes a slice of channels"
    if any(word in operation.lower() for word in _ATTENTION):
        return f"it passes an attention product ({operation})"
    if not node.outputs and side == "out":
        return _MIXES_CHANNELS["OUTPUT"]
    return None


def _cuts_channels(node: Any) -> bool:
    """Tell whether a slice is along the channels: axis 1 of images, the last of tokens."""
    sizes = node.grad_fn._saved_self_sym_sizes
    axis = 2 if len(sizes) == 3 else 1
    return int(node.grad_fn._saved_dim) == axis and int(sizes[axis]) != min(
        int(node.grad_fn._saved_end), int(sizes[axis])
    ) - int(node.grad_fn._saved_start)
