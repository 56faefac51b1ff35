"""Select the tensors to prune by name, regular expression and class path."""

from __future__ import annotations

__all__ = ["class_paths", "matches_pattern", "prunable_parameters"]

import re
from collections.abc import Iterator, Sequence

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList

from lightning_woodfisher.base.errors import ConfigurationError, nearest
from lightning_woodfisher.distributed.dtensor import (
    require_supported_sharding,
    to_local,
)

# Layers that are pruned if `include` is empty.
_DEFAULT_LAYERS = (nn.Linear, _ConvNd)
# Layers whose tensors are selected only by class path, never by a regular expression.
_NEVER_BY_NAME = (nn.Embedding, nn.EmbeddingBag, nn.LayerNorm, nn.GroupNorm, _NormBase)


def prunable_parameters(
    model: nn.Module,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    *,
    frozen: bool = False,
) -> dict[str, nn.Parameter]:
    """Find the weights to prune.

    A pattern is a class path of a layer (``torch.nn.Conv2d``, ``Conv2d`` or the path of
    your own class; it also matches subclasses) or else a regular expression that is
    searched in the parameter's name (anchor it with ``^`` and ``$`` if needed).

    Without ``include`` the weights of Linear and convolution layers are selected. A layer
    whose weight is computed from other tensors (``torch.nn.utils.parametrize``, the older
    ``weight_norm`` and ``spectral_norm``) stays dense. With ``include``, every trainable
    tensor of two or more dimensions that a pattern matches is selected; normalization and
    embedding weights only by their class path. Biases are never pruned. A tensor that is
    shared by several layers appears once, under its first name.

    Args:
        model: the network.
        include: patterns of the tensors to prune; empty for the default.
        exclude: patterns of the tensors to leave dense.
        frozen: also select tensors that are not trainable now but will be later.

    Returns:
        Parameters by name, in the order of ``model.named_parameters()``.

    Raises:
        ConfigurationError: if a pattern is not a regular expression or matches nothing,
            nothing is left to prune, or a tensor is sharded in a way that cannot be
            pruned.
    """
    tensors = list(_tensors(model, frozen))
    if not tensors:
        raise ConfigurationError(
            f"{type(model).__name__} has no trainable parameter of two or more "
            "dimensions, so nothing can be pruned; is everything frozen?"
        )
    unmatched = {*include, *exclude}
    chosen: dict[str, nn.Parameter] = {}
    for parameter, owners in tensors:
        included = [p for p in include if matches_pattern(p, owners)]
        excluded = [p for p in exclude if matches_pattern(p, owners)]
        unmatched -= {*included, *excluded}
        by_default = any(
            isinstance(m, _DEFAULT_LAYERS) and n.split(".")[-1] == "weight"
            for n, m in owners
        )
        if (included if include else by_default) and not excluded:
            chosen[owners[0][0]] = parameter
            _require_plain(*owners[0])
    names = [name for _, owners in tensors for name, _ in owners]
    for pattern in (p for p in (*include, *exclude) if p in unmatched):
        raise ConfigurationError(
            f"The pattern {pattern!r} matches no trainable weight of "
            f"{type(model).__name__}.{nearest(pattern, names)} Names: {_shorten(names)}"
        )
    if not chosen:
        raise ConfigurationError(
            f"Nothing to prune in {type(model).__name__}: include={list(include)} and "
            f"exclude={list(exclude)} leave no weight. Without include, layers whose "
            f"weight is reparametrized are left out. Names: {_shorten(names)}"
        )
    require_supported_sharding(model, chosen)
    return chosen


def _require_plain(name: str, owner: nn.Module) -> None:
    if isinstance(owner, ParametrizationList):
        raise ConfigurationError(
            f"{name} is not the weight of a layer: a parametrization computes the weight "
            "from it, so that its zeros need not be zeros of the weight; leave it out with "
            "exclude, or make the weight permanent with "
            "torch.nn.utils.parametrize.remove_parametrizations()."
        )


def _tensors(
    model: nn.Module, frozen: bool
) -> Iterator[tuple[nn.Parameter, list[tuple[str, nn.Module]]]]:
    """Yield each distinct tensor that may be pruned with the (name, layer)s that use it."""
    uses: dict[object, tuple[nn.Parameter, list[tuple[str, nn.Module]]]] = {}
    for prefix, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            if is_lazy(parameter):
                raise ConfigurationError(
                    f"{prefix}.{key} of a lazy layer has no shape yet; run one batch "
                    "through the model before pruning."
                )
            # A LayerNorm can have biases of several dimensions.
            trainable = parameter.requires_grad or frozen
            if parameter.dim() >= 2 and trainable and key != "bias":
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


def matches_pattern(pattern: str, owners: list[tuple[str, nn.Module]]) -> bool:
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
    return any(
        pattern in class_paths(module)
        or (not isinstance(module, _NEVER_BY_NAME) and regex.search(name) is not None)
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
