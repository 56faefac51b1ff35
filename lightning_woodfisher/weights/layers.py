"""Select the tensors to prune by kind of layer, name, regular expression and class path."""

from __future__ import annotations

__all__ = [
    "LAYER_KINDS",
    "LayerKind",
    "axis_of_outputs",
    "class_paths",
    "count_zeros",
    "describe_selection",
    "find_inputs_first",
    "find_kind",
    "is_linear",
    "matches_pattern",
    "prunable_parameters",
]

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList

from lightning_woodfisher.base.errors import ConfigurationError, name_first, nearest
from lightning_woodfisher.distributed.communicator import Communicator
from lightning_woodfisher.distributed.dtensor import (
    is_sharded,
    require_supported_sharding,
    reshard,
    to_local,
)

# A tensor, and the names and layers that use it.
_Owners = list[tuple[str, nn.Module]]


@dataclass(frozen=True)
class LayerKind:
    """Layers whose weights are linear maps, which are pruned by default.

    Attributes:
        layer: class of the layers, or the name of a class of a package that need not be
            installed.
        weights: regular expression of the names of the weights within the layer.
        inputs: dimension of the inputs, 0 or 1; the other one is that of the outputs.
    """

    layer: type[nn.Module] | tuple[type[nn.Module], ...] | str
    weights: str = "weight"
    inputs: int = 1

    def is_kind_of(self, module: nn.Module) -> bool:
        """Check whether a layer is of this kind.

        Args:
            module: any module.

        Returns:
            Whether it is.
        """
        if not isinstance(self.layer, str):
            return isinstance(module, self.layer)
        weight = getattr(module, "weight", None)
        return (
            any(cls.__name__ == self.layer for cls in type(module).__mro__)
            and isinstance(weight, Tensor)
            and weight.dim() == 2
            and isinstance(getattr(module, "nf", None), int)
        )


# Of Hugging Face's transformers, in GPT-2: y = x·W + b with nf outputs.
_CONV1D = LayerKind("Conv1D", inputs=0)

#: The kinds of layers; the first that fits counts.
LAYER_KINDS = (
    LayerKind(nn.Linear),
    LayerKind(_ConvTransposeNd, inputs=0),
    LayerKind(_ConvNd),
    LayerKind(nn.MultiheadAttention, "(in|q|k|v)_proj_weight"),
    LayerKind((nn.RNNBase, nn.RNNCellBase), r"weight_(ih|hh|hr)(_l\d+(_reverse)?)?"),
    _CONV1D,
)

_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
_NORMS = (nn.LayerNorm, nn.GroupNorm, _NormBase)
_BIASES = {"bias", "bias_k", "bias_v"}
# What torch.nn.utils and others append to the name of a weight that they compute from
# parameters before each forward pass.
_SOURCES = ("g", "v", "orig", "raw")

# Why tensors are not pruned.
_VECTOR = "biases, norms and other vectors"
_FROZEN = "frozen"
_EXCLUDED = "matches selection.exclude"
_NOT_ONLY = "not in selection.only"
_EMBEDDING = "embedding"
_TIED = "tied to an embedding"
_COMPUTED = "reparametrized"
_OTHER = "not in a linear layer; selection.include adds it"
_LINES_OF_REASONS = 4
_NAMES_OF_REASON = 3


def find_kind(module: nn.Module) -> LayerKind | None:
    """Find the kind of a layer.

    Args:
        module: any module.

    Returns:
        The first kind that fits; None if there is none.
    """
    return next((kind for kind in LAYER_KINDS if kind.is_kind_of(module)), None)


def axis_of_outputs(module: nn.Module) -> int:
    """Find the axis of a layer's weight that its outputs are on.

    Args:
        module: any module.

    Returns:
        1 for transposed convolutions and ``Conv1D``, whose inputs come first; else 0.
    """
    kind = find_kind(module)
    return 0 if kind is None else 1 - kind.inputs


def is_linear(module: nn.Module) -> bool:
    """Check if a layer is a linear layer, whose channels are on the last axis.

    Args:
        module: any module.

    Returns:
        Whether it is an ``nn.Linear`` or a ``Conv1D`` of transformers.
    """
    return isinstance(module, nn.Linear) or _CONV1D.is_kind_of(module)


def find_inputs_first(model: nn.Module, names: Sequence[str]) -> frozenset[str]:
    """Find the weights that have their inputs in the first dimension.

    Args:
        model: the network.
        names: names of parameters.

    Returns:
        Those of transposed convolutions and of ``Conv1D``.
    """
    owners = {name: model.get_submodule(name.rpartition(".")[0]) for name in names}
    return frozenset(name for name in names if axis_of_outputs(owners[name]) == 1)


def prunable_parameters(
    model: nn.Module,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    only: Sequence[str] = (),
    *,
    frozen: bool = False,
) -> dict[str, nn.Parameter]:
    """Find the weights to prune.

    A pattern is a class path of a layer (``torch.nn.Conv2d``, ``Conv2d`` or the path of
    your own class; it also matches subclasses) or else a regular expression that is
    searched in the parameter's name (anchor it with ``^`` and ``$`` if needed).

    By default, the weights of the layers in ``LAYER_KINDS`` are selected: linear and
    convolution layers, the projections of attention, recurrent layers. A weight that is
    computed from other tensors (``torch.nn.utils.parametrize``, the older ``weight_norm``,
    ``spectral_norm`` and ``torch.nn.utils.prune``) stays dense, and so does a head that
    shares its weight with an embedding. ``include`` adds tensors, and ``only`` replaces the
    default: every trainable tensor of two or more dimensions that a pattern matches is
    selected; normalization and embedding weights only by their class path, and a head that
    is tied to an embedding also by its name. Biases are never pruned. A tensor that is
    shared by several layers appears once, under its first name.

    Args:
        model: the network.
        include: patterns of tensors to prune in addition to the default.
        exclude: patterns of the tensors to leave dense.
        only: patterns of the tensors to prune in place of the default.
        frozen: also select tensors that are not trainable now but will be later.

    Returns:
        Parameters by name, in the order of ``model.named_parameters()``.

    Raises:
        ConfigurationError: if a pattern is not a regular expression or matches nothing,
            nothing is left to prune, or a tensor is complex, is not the weight of a layer,
            or is sharded in a way that cannot be pruned.
    """
    survey = list(_survey(model, include, exclude, only, frozen))
    tensors = [owners for _, owners, why in survey if why not in {_VECTOR, _FROZEN}]
    if not tensors:
        raise ConfigurationError(
            f"{type(model).__name__} has no trainable parameter of two or more "
            "dimensions, so nothing can be pruned; is everything frozen?"
        )
    names = [owners[0][0] for owners in tensors]
    for pattern in (*only, *include):
        _require_match(
            any(_names(pattern, owners) for owners in tensors), pattern, model, names
        )
    for pattern in exclude:
        _require_match(
            any(matches_pattern(pattern, owners) for owners in tensors),
            pattern,
            model,
            names,
        )
    chosen = {owners[0][0]: parameter for parameter, owners, why in survey if not why}
    if not chosen:
        reasons = dict.fromkeys(why for _, _, why in survey if why != _VECTOR)
        raise ConfigurationError(
            f"Nothing to prune in {type(model).__name__}: only={list(only)}, "
            f"include={list(include)} and exclude={list(exclude)} leave no weight. Reasons: "
            f"{', '.join(reasons)}. Names: {_shorten(names)}"
        )
    for parameter, owners, why in survey:
        if not why:
            _require_plain(parameter, owners)
    require_supported_sharding(model, chosen)
    return chosen


def describe_selection(
    model: nn.Module,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    only: Sequence[str] = (),
    *,
    frozen: bool = False,
) -> str:
    """Describe what is pruned, and what is not and why.

    Args:
        model: the network.
        include: as of :func:`prunable_parameters`.
        exclude: the same.
        only: the same.
        frozen: the same.

    Returns:
        At most five lines.
    """
    weights = 0
    kinds: Counter[str] = Counter()
    left: dict[str, list[tuple[int, str]]] = {}
    for parameter, owners, why in _survey(model, include, exclude, only, frozen):
        name, owner = owners[0]
        if why:
            left.setdefault(why, []).append((parameter.numel(), name))
        else:
            weights += parameter.numel()
            kinds[_class_name(owner)] += 1
    sizes = {why: sum(size for size, _ in found) for why, found in left.items()}
    total = weights + sum(sizes.values())
    layers = ", ".join(f"{kind} ({count})" for kind, count in kinds.most_common())
    lines = [
        f"{weights:,} of {total:,} parameters ({weights / total:.2%}) may be pruned: "
        f"{layers}"
    ]
    reasons = sorted(left, key=lambda why: -sizes[why])
    for why in reasons[:_LINES_OF_REASONS]:
        names = [name for _, name in sorted(left[why], key=lambda each: -each[0])]
        named = name_first(names, _NAMES_OF_REASON)
        lines.append(f"  left dense: {sizes[why]:,} ({why}): {named}")
    if rest := reasons[_LINES_OF_REASONS:]:
        also = ", ".join(f"{sizes[why]:,} ({why})" for why in rest)
        lines[-1] += f"; {also}"
    return "\n".join(lines)


def count_zeros(model: nn.Module, comm: Communicator) -> tuple[int, int]:
    """Count the zeros of a whole model. Call on all ranks.

    Args:
        model: the network.
        comm: the ranks.

    Returns:
        Number of parameters that are exactly zero, and number of parameters; shared ones
        count once.
    """
    reshard(model)
    tensors = [parameter for parameter, _ in _tensors(model)]
    counts = torch.zeros(2, dtype=torch.int64, device=comm.device)
    for tensor in tensors:
        zeros = (to_local(tensor) == 0).sum().to(counts.device)
        counts[int(is_sharded(tensor))] += zeros
    whole, parts = counts
    if any(map(is_sharded, tensors)):
        parts = comm.sum_integers(parts[None])[0]
    return int(whole + parts), sum(tensor.numel() for tensor in tensors)


def _class_name(module: nn.Module) -> str:
    """Return the name under which users know the class of a layer."""
    names = [
        cls.__name__
        for cls in type(module).__mro__
        if getattr(nn, cls.__name__, None) is cls and cls is not nn.Module
    ]
    return names[0] if names else type(module).__name__


def _survey(
    model: nn.Module,
    include: Sequence[str],
    exclude: Sequence[str],
    only: Sequence[str],
    frozen: bool,
) -> Iterator[tuple[nn.Parameter, _Owners, str]]:
    """Yield each distinct tensor, its owners, and why it is not pruned; "" if it is."""
    for parameter, owners in _tensors(model):
        key = owners[0][0].rpartition(".")[2]
        why = "" if only else _why_not_by_default(owners)
        # A layer without outputs has a weight without elements.
        if parameter.dim() < 2 or key in _BIASES or not parameter.numel():
            why = _VECTOR
        elif not parameter.requires_grad and not frozen:
            why = _FROZEN
        elif any(matches_pattern(pattern, owners) for pattern in exclude):
            why = _EXCLUDED
        elif any(_names(pattern, owners) for pattern in (*only, *include)):
            why = ""
        elif only:
            why = _NOT_ONLY
        yield parameter, owners, why


def _why_not_by_default(owners: _Owners) -> str:
    """Return why a tensor is not pruned unless it is named; "" if it is pruned."""
    layers = [module for _, module in owners]
    linear = False
    for name, module in owners:
        key, kind = name.rpartition(".")[2], find_kind(module)
        if _is_source(key, module):
            return _COMPUTED
        linear |= kind is not None and re.fullmatch(kind.weights, key) is not None
    if any(isinstance(layer, _EMBEDDINGS) for layer in layers):
        return _TIED if linear else _EMBEDDING
    if any(isinstance(layer, _NORMS) for layer in layers):
        return _VECTOR
    return "" if linear else _OTHER


def _is_source(key: str, module: nn.Module) -> bool:
    """Return whether a weight is computed from this parameter of a module."""
    if isinstance(module, ParametrizationList):
        return True
    base, _, suffix = key.rpartition("_")
    # The computed weight is a plain attribute.
    return suffix in _SOURCES and isinstance(vars(module).get(base), Tensor)


def _require_match(
    found: bool, pattern: str, model: nn.Module, names: list[str]
) -> None:
    if not found:
        raise ConfigurationError(
            f"The pattern {pattern!r} matches no trainable weight of "
            f"{type(model).__name__}.{nearest(pattern, names)} Names: {_shorten(names)}"
        )


def _require_plain(parameter: nn.Parameter, owners: _Owners) -> None:
    name = owners[0][0]
    if parameter.is_complex():
        exclude = [f"^{re.escape(name)}$"]
        raise ConfigurationError(
            f"{name} is complex ({parameter.dtype}), and pruning handles real weights "
            f"only; leave it dense with selection.exclude={exclude}."
        )
    if any(_is_source(each.rpartition(".")[2], module) for each, module in owners):
        raise ConfigurationError(
            f"{name} is not the weight of a layer: a parametrization computes the weight "
            "from it, so that its zeros need not be zeros of the weight; leave it out with "
            "exclude, or make the weight permanent with "
            "torch.nn.utils.parametrize.remove_parametrizations() (or remove_weight_norm(), "
            "remove_spectral_norm(), prune.remove() of torch.nn.utils)."
        )


def _tensors(model: nn.Module) -> Iterator[tuple[nn.Parameter, _Owners]]:
    """Yield each distinct tensor with the (name, layer)s that use it."""
    uses: dict[object, tuple[nn.Parameter, _Owners]] = {}
    for prefix, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            if is_lazy(parameter):
                raise ConfigurationError(
                    f"{prefix}.{key} of a lazy layer has no shape yet; run one batch "
                    "through the model before pruning."
                )
            name = f"{prefix}.{key}" if prefix else key
            uses.setdefault(_storage(parameter), (parameter, []))[1].append(
                (name, module)
            )
    yield from uses.values()


def _storage(parameter: nn.Parameter) -> object:
    # Two Parameter objects may share one storage; a meta tensor has none.
    part = to_local(parameter)
    if part.is_meta or part.numel() == 0:
        return id(parameter)
    return part.device, part.data_ptr(), parameter.shape


def _names(pattern: str, owners: _Owners) -> bool:
    """Check if a pattern selects a tensor."""
    embeddings = [each for each in owners if isinstance(each[1], _EMBEDDINGS)]
    if embeddings and any(pattern in class_paths(module) for _, module in owners):
        # The class of the head says nothing about the embedding.
        return matches_pattern(pattern, embeddings)
    return matches_pattern(pattern, owners)


def matches_pattern(pattern: str, owners: _Owners) -> bool:
    """Check if a pattern matches one of the layers that use a tensor.

    Args:
        pattern: a class path or a regular expression.
        owners: names, of the tensor or the layer, and layers.

    Returns:
        Whether the class path is one of the layer's, or the expression is found in a name.

    Raises:
        ConfigurationError: if the pattern is not a regular expression.
    """
    try:
        regex = re.compile(pattern)
    except re.error as error:
        raise ConfigurationError(
            f"The pattern {pattern!r} is not a regular expression: {error}."
        ) from error
    # Only a class path selects these, never a regular expression.
    never_by_name = (*_EMBEDDINGS, *_NORMS)
    return any(
        pattern in class_paths(module)
        or (not isinstance(module, never_by_name) and regex.search(name) is not None)
        for name, module in owners
    )


def class_paths(module: nn.Module) -> Iterator[str]:
    """List the names that select a layer by its class.

    Args:
        module: a layer.

    Yields:
        Plain names and import paths of its class and the classes it derives from.
    """
    for cls in type(module).__mro__:
        if issubclass(cls, nn.Module) and cls is not nn.Module:
            yield cls.__name__
            yield f"{cls.__module__}.{cls.__qualname__}"
            if getattr(nn, cls.__name__, None) is cls:
                yield f"torch.nn.{cls.__name__}"


def _shorten(names: list[str], most: int = 12) -> str:
    shown = ", ".join(names[:most])
    return f"{shown}, … ({len(names)} in all)" if len(names) > most else f"{shown}."
