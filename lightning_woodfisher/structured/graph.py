"""The only code that knows torch-pruning: from a traced graph to coupled channels."""

from __future__ import annotations

__all__ = ["trace_coupling"]

import warnings
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from lightning_woodfisher.errors import ConfigurationError
from lightning_woodfisher.isolation import isolated
from lightning_woodfisher.structured.coupling import Coupling, Side
from lightning_woodfisher.structured.inputs import run_model, tensors_in

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
# Names of backward functions: matrix products between activations.
_ATTENTION = ("bmm", "scaleddotproduct", "softmax")
# Those that give something else than zero for zero, for the reason in a message.
NOT_ZERO_AT_ZERO = ("sigmoid", "softplus", "exp", "cos", "hardsigmoid", "logsigmoid")


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
    try:
        import torch_pruning as tp
    except ImportError as error:
        raise ConfigurationError(
            "tracing channels needs torch-pruning: pip install "
            "lightning-woodfisher[structured]"
        ) from error
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
    outputs = coupling.ports[name, "out"].channels
    roots = [coupling.channel(name, "out", i) for i in range(outputs)]
    pruner = graph.get_pruner_of_module(layer)
    suspects: list[str] = []

    def leave_out(reason: str) -> None:
        for root in roots:
            coupling.leave_out(root, reason)

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            group = graph.get_pruning_group(
                layer, pruner.prune_out_channels, list(range(outputs))
            )
    except Exception as error:
        leave_out(f"torch-pruning cannot follow it: {type(error).__name__}: {error}")
        return ""
    for item in group:
        node, fn = item.dep.target, item.dep.handler
        own = graph.get_pruner_of_module(node.module)
        side: Side = "out" if fn == own.prune_out_channels else "in"
        kind, operation = (
            node.type.name,
            str(getattr(node.module, "_grad_fn", "")).lower(),
        )
        other = names.get(node.module)
        if kind in _MIXES_CHANNELS:
            leave_out(_MIXES_CHANNELS[kind])
        elif kind == "SLICE" and _cuts_channels(node):
            leave_out("it passes a slice of channels")
        elif any(word in operation for word in _ATTENTION):
            leave_out(f"it passes an attention product ({operation})")
        elif not node.outputs and side == "out":
            leave_out(_MIXES_CHANNELS["OUTPUT"])
        elif other in coupling.reasons:
            leave_out(f"{coupling.reasons[other]} ({other})")
        elif any(word in operation for word in NOT_ZERO_AT_ZERO):
            suspects.append(node.module._grad_fn)
        elif (other, "out") in coupling.ports:
            _unite(coupling, roots, (str(other), side), item, leave_out)
    return ", ".join(dict.fromkeys(suspects))


def _unite(
    coupling: Coupling,
    roots: list[int],
    port: tuple[str, Side],
    item: Any,
    leave_out: Callable[[str], None],
) -> None:
    for index, root in zip(item.idxs, item.root_idxs, strict=True):
        channel = coupling.channel(*port, index)
        if channel < 0 or root is None:
            leave_out(f"its channels do not match those of {port[0]} (padding?)")
            return
        coupling.unite(roots[root], channel)


def _cuts_channels(node: Any) -> bool:
    """Tell whether a slice is along the channels: axis 1 of images, the last of tokens."""
    sizes = node.grad_fn._saved_self_sym_sizes
    axis = 2 if len(sizes) == 3 else 1
    return int(node.grad_fn._saved_dim) == axis and int(sizes[axis]) != min(
        int(node.grad_fn._saved_end), int(sizes[axis])
    ) - int(node.grad_fn._saved_start)
