"""Several losses of a network, each exact, from one pass of the network.

The loss of a batch is often no mean of the losses of its samples: class weights, masks and
sums divide by something of the whole batch. The losses here are therefore computed one by
one, each from its own mini-batch, as in a loop. Only the calls of the network are shared.
When a loss calls the network, it is stopped; once all losses have been stopped, the network
runs on their inputs together. Then the losses start again, and each call returns their own
part of the outputs.

This gives the same numbers as a loop if the network treats samples independently, and if the
losses depend on its weights only through its outputs. What can be seen of that is checked in
each pass: inputs that differ when the loss starts again, weights that are used elsewhere,
random numbers, changed buffers; and for one of the losses, the outputs of the network alone.
"""

from __future__ import annotations

__all__ = ["Lockstep", "SharedPass"]

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from lightning_woodfisher.base.errors import PruningError
from lightning_woodfisher.data.isolation import RandomStates
from lightning_woodfisher.gradients.per_sample import (
    LayerCall,
    make_layer_call,
    owners_of,
)

# Each further call repeats what all losses do before it.
_MOST_CALLS = 8
_PLAIN = (bool, int, float, complex, str, bytes, type(None))
_LEAVES = (Tensor, *_PLAIN)


class _Stopped(BaseException):
    """A loss has reached a call of the network that has no outputs yet."""


class _NotSplit(BaseException):
    """The outputs of a module are not one part for each loss."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


@dataclass
class _Inputs:
    """The arguments of one loss in a call of the network."""

    module: nn.Module
    leaves: list[Any]
    structure: Any
    versions: list[int]

    @classmethod
    def of(cls, module: nn.Module, args: Any, kwargs: Any) -> _Inputs:
        leaves = [*args, *kwargs.values()]
        structure: Any = tuple(kwargs)
        if not all(isinstance(leaf, _LEAVES) for leaf in leaves):
            leaves, structure = tree_flatten((args, kwargs))
        versions = [x._version if isinstance(x, Tensor) else 0 for x in leaves]
        return cls(module, leaves, structure, versions)

    def rebuild(self, leaves: list[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arrange other leaves as the arguments are."""
        if isinstance(self.structure, tuple):
            names, number = self.structure, len(leaves) - len(self.structure)
            return (*leaves[:number],), dict(zip(names, leaves[number:], strict=True))
        args, kwargs = tree_unflatten(leaves, self.structure)
        return args, kwargs


@dataclass
class _Call:
    """A call of the network for all losses.

    Attributes:
        inputs: the arguments of each loss.
        pieces: the outputs of each loss, not to be changed in place.
        begins: nodes of the graph at which the outputs of all losses end.
        ends: nodes of the graph at which the arguments of the network end.
    """

    inputs: list[_Inputs]
    pieces: list[Any]
    begins: list[Any]
    ends: list[Any]


@dataclass
class SharedPass:
    """The losses of several mini-batches, computed with one pass of the network.

    Attributes:
        losses: scalars with a graph, one for each mini-batch.
        layers: the calls of the layers that own one of the wanted parameters.
        unequal: bool scalars, True where a loss, started again, called the network with
            other inputs.
        distances: for each compared output of the network: the norm of the difference
            between one mini-batch alone and in the shared pass, and the norm of the output.
    """

    losses: list[Tensor] = field(default_factory=list)
    layers: list[LayerCall] = field(default_factory=list)
    unequal: list[Tensor] = field(default_factory=list)
    distances: list[tuple[Tensor, Tensor]] = field(default_factory=list)


class Lockstep:
    """Compute losses of several mini-batches with one pass of the network.

    Args:
        model: the network; the losses call it or any of its modules.
        parameters: the wanted parameters, by name. Their layers are plain
            (:func:`.find_obstacle`).
    """

    def __init__(
        self, model: nn.Module, parameters: Mapping[str, nn.Parameter]
    ) -> None:
        self._model = model
        self._owners = owners_of(model, parameters)
        self._names = {id(p): name for name, p in parameters.items()}
        self._modules = [
            module
            for module in model.modules()
            if next(module.parameters(), None) is not None
        ]
        # Modules that must run separately for each loss, such as one that returns a loss.
        self._separate: set[nn.Module] = set()

    def run(
        self, count: int, compute: Callable[[int], Tensor], compared: int = 0
    ) -> SharedPass:
        """Compute all losses.

        Args:
            count: number of losses, at least 2.
            compute: computes the loss with a number; called twice or more for each number.
                It must do the same in each call.
            compared: number of the loss for which the network also runs alone; not the
                last one.

        Returns:
            The losses.

        Raises:
            PruningError: if they cannot be computed in this way; names the reason.
        """
        while True:
            run = _Run(self._owners, self._names, self._separate, count, compared)
            versions = [buffer._version for buffer in self._model.buffers()]
            try:
                with run.intercepting(self._modules):
                    run.compute_all(compute)
            except _NotSplit as found:
                self._separate.add(found.module)
                continue
            if versions != [buffer._version for buffer in self._model.buffers()]:
                raise PruningError("the loss changes buffers of the network")
            run.require_no_other_use()
            return run.result


class _Run:
    """One attempt to compute all losses."""

    def __init__(
        self,
        owners: Mapping[nn.Module, dict[str, str]],
        names: Mapping[int, str],
        separate: set[nn.Module],
        count: int,
        compared: int,
    ) -> None:
        self.result = SharedPass()
        self._owners = owners
        self._names = names
        self._separate = separate
        self._count = count
        self._compared = compared
        self._calls: list[_Call] = []
        # Of the loss that is running: its number, and the calls that it has made.
        self._loss = 0
        self._made = 0
        # Inputs of the losses that have reached the next call.
        self._waiting: list[_Inputs] = []
        self._inside = False
        self._samples = 0

    @contextlib.contextmanager
    def intercepting(self, modules: Sequence[nn.Module]) -> Iterator[None]:
        """Replace ``forward`` of modules."""
        replaced: list[tuple[nn.Module, Any]] = []
        try:
            for module in modules:
                replaced.append((module, vars(module).get("forward")))
                vars(module)["forward"] = functools.partial(
                    self._forward, module, module.forward
                )
            yield
        finally:
            for module, forward in replaced:
                if forward is None:
                    vars(module).pop("forward", None)
                else:
                    vars(module)["forward"] = forward

    def compute_all(self, compute: Callable[[int], Tensor]) -> None:
        """Compute all losses, call by call of the network."""
        numbers = range(self._count)
        while True:
            self._waiting = []
            losses = [self._attempt(compute, number) for number in numbers]
            stopped = [loss is None for loss in losses]
            if not any(stopped[:-1]) or (stopped[-1] and not all(stopped)):
                raise PruningError(
                    "the losses of different mini-batches call the network differently"
                    if self._calls
                    else "the loss does not call the network"
                )
            if stopped[-1]:
                continue
            # The last loss is complete: it was the one that ran the network.
            self._waiting = []
            losses[:-1] = [self._attempt(compute, number) for number in numbers[:-1]]
            for loss in losses:
                if loss is None:
                    raise PruningError(
                        "the losses of different mini-batches call the network "
                        "differently"
                    )
                self.result.losses.append(loss)
            return

    def _attempt(self, compute: Callable[[int], Tensor], number: int) -> Tensor | None:
        """Compute a loss up to a call that has no outputs yet."""
        self._loss, self._made = number, 0
        try:
            loss = compute(number)
        except _Stopped:
            return None
        if self._made < len(self._calls):
            raise PruningError(
                "the losses of different mini-batches call the network differently"
            )
        return loss

    def _forward(
        self,
        module: nn.Module,
        forward: Callable[..., Any],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Run in place of ``forward`` of a module."""
        if self._inside:
            output = forward(*args, **kwargs)
            self._record(module, args, kwargs, output)
            return output
        if module in self._separate:
            return forward(*args, **kwargs)
        inputs = _Inputs.of(module, args, kwargs)
        place = self._made
        self._made += 1
        if place == len(self._calls):
            self._waiting.append(inputs)
            if len(self._waiting) < self._count or self._loss != self._count - 1:
                raise _Stopped
            self._run_network(forward)
        piece = self._calls[place].pieces[self._loss]
        self._require_same(self._calls[place].inputs[self._loss], inputs)
        if self._loss == self._compared:
            self._compare(forward, args, kwargs, piece)
        # A copy, because the loss may change it in place.
        if isinstance(piece, Tensor):
            return piece.clone()
        return tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, piece)

    def _run_network(self, forward: Callable[..., Any]) -> None:
        """Run a module on the inputs of all losses."""
        if len(self._calls) == _MOST_CALLS:
            raise PruningError(
                f"the loss calls the network more than {_MOST_CALLS} times"
            )
        module = self._waiting[0].module
        leaves, size = self._join(self._waiting)
        self._samples = self._count * size
        args, kwargs = self._waiting[0].rebuild(leaves)
        layers, ends = len(self.result.layers), _nodes(leaves)
        states = RandomStates.capture()
        with self._running():
            output = forward(*args, **kwargs)
            self._record(module, args, kwargs, output)
        if states.have_changed():
            raise PruningError("the network draws random numbers")
        pieces = _split(output, self._count, size)
        if pieces is None:
            del self.result.layers[layers:]
            raise _NotSplit(module)
        self._calls.append(_Call(self._waiting, pieces, _nodes(_leaves(output)), ends))
        self._waiting = []

    def _join(self, inputs: Sequence[_Inputs]) -> tuple[list[Any], int]:
        """Concatenate the inputs of all losses; return also the samples of each."""
        first = inputs[0]
        for other in inputs:
            if other.module is not first.module or other.structure != first.structure:
                raise PruningError(
                    "the losses of different mini-batches call the network differently"
                )
        shapes = [x.shape for x in first.leaves if isinstance(x, Tensor) and x.dim()]
        if not shapes:
            raise PruningError(
                f"a {type(first.module).__name__} is called without a batch"
            )
        size = shapes[0][0]
        joined = []
        for leaves in zip(*(each.leaves for each in inputs), strict=True):
            leaf = leaves[0]
            if isinstance(leaf, Tensor) and leaf.dim() and len(leaf) == size:
                for other in leaves:
                    if other.shape != leaf.shape:
                        raise PruningError(
                            "the inputs of different mini-batches have different "
                            f"shapes: {tuple(leaf.shape)} and {tuple(other.shape)}"
                        )
                joined.append(torch.cat(leaves))
            else:
                for other in leaves:
                    self._require_equal(leaf, other, first.module)
                joined.append(leaf)
        return joined, size

    def _require_same(self, before: _Inputs, now: _Inputs) -> None:
        """Check that a loss calls the network as it did before."""
        if before.module is not now.module or before.structure != now.structure:
            raise PruningError("the loss calls the network differently when repeated")
        for old, new, version, number in zip(
            before.leaves, now.leaves, before.versions, now.versions, strict=True
        ):
            if old is not new or version != number:
                self._require_equal(old, new, before.module, again=True)

    def _require_equal(
        self, one: Any, other: Any, module: nn.Module, again: bool = False
    ) -> None:
        """Check that two arguments are equal; tensors are compared later."""
        if isinstance(one, Tensor) and isinstance(other, Tensor):
            if one is other and not again:
                return
            if one.shape == other.shape and one.dtype == other.dtype:
                with torch.no_grad():
                    self.result.unequal.append((one != other).any())
                return
        elif one is other or (
            type(one) is type(other) and isinstance(one, _PLAIN) and one == other
        ):
            return
        raise PruningError(
            f"the losses of different mini-batches pass different values to a "
            f"{type(module).__name__}: {_describe(one)} and {_describe(other)}"
        )

    @torch.no_grad()
    def _compare(
        self, forward: Callable[..., Any], args: Any, kwargs: Any, pieces: Any
    ) -> None:
        """Run a module for one loss alone and compare the outputs."""
        recorded = len(self.result.layers)
        with self._running():
            alone = forward(*args, **kwargs)
        del self.result.layers[recorded:]
        for one, other in zip(_leaves(alone), _leaves(pieces), strict=True):
            if isinstance(one, Tensor):
                if one.shape != other.shape:
                    raise PruningError(
                        "the shape of the outputs depends on the number of samples"
                    )
                one, other = one.detach().double(), other.detach().double()
                self.result.distances.append(((one - other).norm(), one.norm()))

    def _record(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        names = self._owners.get(module)
        if names is None:
            return
        call = make_layer_call(module, names, args, kwargs, output)
        if call is None:
            return
        if len(call.inputs) != self._samples:
            raise PruningError(
                f"a {type(module).__name__} got a tensor of shape "
                f"{tuple(call.inputs.shape)} for {self._samples} samples"
            )
        self.result.layers.append(call)

    @contextlib.contextmanager
    def _running(self) -> Iterator[None]:
        """Let the modules called in the body run as they are."""
        self._inside = True
        try:
            yield
        finally:
            self._inside = False

    def require_no_other_use(self) -> None:
        """Check that the losses depend on the weights only through calls of layers."""
        network: set[Any] = set()
        uses: dict[str, int] = {}
        for call in self._calls:
            for name in self._walk(call.begins, {*call.ends}, network):
                uses[name] = uses.get(name, 0) + 1
        for layer in self.result.layers:
            for name in layer.names.values():
                uses[name] = uses.get(name, 0) - 1
        for name, number in uses.items():
            if number > 0:
                raise PruningError(f"{name} is also used outside of its layer")
        pieces = {
            node
            for call in self._calls
            for piece in call.pieces
            for node in _nodes(_leaves(piece))
        }
        begins = _nodes(self.result.losses)
        for call in self._calls:
            begins += call.ends
        rest: set[Any] = set()
        for name in self._walk(begins, pieces | network, rest):
            raise PruningError(f"{name} is also used outside of the network")
        if any(child in network for node in rest for child, _ in node.next_functions):
            raise PruningError("the loss uses values from inside the network")

    def _walk(
        self, begins: Sequence[Any], ends: set[Any], seen: set[Any]
    ) -> Iterator[str]:
        """Visit a graph.

        Args:
            begins: nodes at which it begins.
            ends: nodes that are not visited.
            seen: receives the nodes that were visited.

        Yields:
            The name of a wanted parameter for each edge to one.
        """
        nodes = [*begins]
        while nodes:
            node = nodes.pop()
            if node is None or node in seen or node in ends:
                continue
            seen.add(node)
            for following, _ in node.next_functions:
                variable = getattr(following, "variable", None)
                if variable is None:
                    nodes.append(following)
                elif id(variable) in self._names:
                    yield self._names[id(variable)]


def _split(output: Any, count: int, size: int) -> list[Any] | None:
    """Split the outputs of a network into those of each loss, None if impossible."""
    if isinstance(output, Tensor):
        whole = output.dim() and len(output) == count * size
        return list(torch.split(output, size)) if whole else None
    leaves, structure = tree_flatten(output)
    parts: list[Sequence[Any]] = []
    for leaf in leaves:
        part = [leaf] * count if isinstance(leaf, _PLAIN) else None
        if isinstance(leaf, Tensor):
            part = _split(leaf, count, size)
        if part is None:
            return None
        parts.append(part)
    if not any(isinstance(leaf, Tensor) for leaf in leaves):
        return None
    return [tree_unflatten(piece, structure) for piece in zip(*parts, strict=True)]


def _leaves(output: Any) -> list[Any]:
    return [output] if isinstance(output, Tensor) else tree_flatten(output)[0]


def _nodes(leaves: Sequence[Any]) -> list[Any]:
    """List the nodes of the graph of tensors."""
    return [
        leaf.grad_fn
        for leaf in leaves
        if isinstance(leaf, Tensor) and leaf.grad_fn is not None
    ]


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} {tuple(value.shape)}"
    return repr(value) if isinstance(value, _PLAIN) else type(value).__name__
