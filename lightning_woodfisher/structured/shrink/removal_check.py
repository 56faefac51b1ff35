"""Check by numbers that masked channels and removed channels are the same function."""

from __future__ import annotations

__all__ = ["check_removal"]

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_woodfisher.base.errors import ConfigurationError
from lightning_woodfisher.data.isolation import isolated
from lightning_woodfisher.structured.graph.channels import channel_masks
from lightning_woodfisher.structured.graph.groups import Group
from lightning_woodfisher.structured.graph.inputs import (
    map_tensors,
    run_model,
    tensors_in,
)
from lightning_woodfisher.structured.shrink.removal import plan_removal

# Relative to the largest output; rounding is about 1e-15 and 1e-6 a layer.
_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3}
_Chosen = dict[str, Tensor]


def check_removal(
    model: nn.Module,
    groups: Sequence[Group],
    example_inputs: Any,
    *,
    seed: int = 0,
) -> dict[str, str]:
    """Compare the network with random structures masked and with them removed.

    Both run in evaluation mode with noise on norms, biases and all that is constant, so
    that an initialisation hides nothing, in float64 where the model allows. A quarter of
    each group's structures is taken, at least one.

    Args:
        model: the network; left as it was.
        groups: what to check.
        example_inputs: what the model is called with.
        seed: of the noise and of the choice of structures.

    Returns:
        For each group where the two differ, how, by group name.
    """
    generator = torch.Generator().manual_seed(seed)
    with isolated(model, "eval"), _borrowed(model), torch.no_grad():
        inputs, dtype = _randomised(model, example_inputs, generator)
        chosen = {
            g.name: torch.randperm(g.size, generator=generator)[: max(1, g.size // 4)]
            for g in groups
        }
        trial = _Trial(model, inputs, chosen, _TOLERANCE[dtype])
        failed = trial.failing(list(groups))
        rest = [group for group in groups if group.name not in failed]
        if failed and rest and (reason := trial.difference(rest)):
            failed |= {group.name: f"together with others, {reason}" for group in rest}
    return failed


class _Trial:
    """One choice of structures on one set of weights."""

    def __init__(
        self, model: nn.Module, inputs: Any, chosen: _Chosen, tolerance: float
    ) -> None:
        self._model = model
        self._inputs = inputs
        self._chosen = chosen
        self._tolerance = tolerance

    def failing(self, groups: list[Group]) -> dict[str, str]:
        """Find the groups at fault by halving."""
        reason = self.difference(groups) if groups else None
        if reason is None:
            return {}
        if len(groups) == 1:
            return {groups[0].name: reason}
        middle = len(groups) // 2
        found = self.failing(groups[:middle]) | self.failing(groups[middle:])
        # Each half works alone: none of them can be trusted.
        return found or {group.name: f"together, {reason}" for group in groups}

    def difference(self, groups: list[Group]) -> str | None:
        """Tell how masking and removing the chosen structures of some groups differ."""
        chosen = {group.name: self._chosen[group.name] for group in groups}
        with _borrowed(self._model):
            masks = channel_masks(self._model, groups, chosen)
            for name, parameter in list(self._model.named_parameters()):
                if name in masks:
                    # In place: shared tensors stay shared. Put back below.
                    parameter.data = parameter.masked_fill(masks[name], 0.0)
            masked = list(tensors_in(run_model(self._model, self._inputs)))
            try:
                plan_removal(self._model, groups, chosen).apply(self._model)
                removed = list(tensors_in(run_model(self._model, self._inputs)))
            except Exception as error:
                text = str(error).strip().split("\n")[0]
                return f"the network fails without it: {type(error).__name__}: {text}"
        if [t.shape for t in masked] != [t.shape for t in removed]:
            return "an output of the network changes its shape"
        gap = max(map(_gap, masked, removed), default=0.0)
        if gap <= self._tolerance:
            return None
        return (
            "removing its channels is not the same as zeroing them; the output differs "
            f"by {gap:.1e} of its largest value"
        )


def _gap(one: Tensor, other: Tensor) -> float:
    if not (one.is_floating_point() or one.is_complex()):
        return 0.0 if torch.equal(one, other) else math.inf
    largest = float(one.abs().max()) if one.numel() else 0.0
    gap = float((one - other).abs().max()) if one.numel() else 0.0
    relative = gap / max(largest, 1e-30)
    return relative if math.isfinite(relative) else math.inf


def _randomised(
    model: nn.Module, example_inputs: Any, generator: torch.Generator
) -> tuple[Any, torch.dtype]:
    """Put noisy copies in the place of all tensors; find a dtype that the model takes."""
    device = next(model.parameters()).device
    state = generator.get_state()
    failure: Exception | None = None
    for dtype in (torch.float64, torch.float32):
        generator.set_state(state)

        def cast(tensor: Tensor, dtype: torch.dtype = dtype) -> Tensor:
            tensor = tensor.detach().to(device)
            return tensor.to(dtype) if tensor.is_floating_point() else tensor.clone()

        try:
            _replace_tensors(model, dtype, generator)
            inputs = map_tensors(cast, example_inputs)
            run_model(model, inputs)
        except Exception as error:
            failure = error
        else:
            return inputs, dtype
    raise ConfigurationError(
        f"{type(model).__name__} cannot be called with example_inputs: "
        f"{type(failure).__name__}: {failure}"
    ) from failure


def _replace_tensors(
    model: nn.Module, dtype: torch.dtype, generator: torch.Generator
) -> None:
    done: dict[int, Tensor] = {}
    for module in model.modules():
        for owner in (module._parameters, module._buffers):
            for key, old in owner.items():
                if old is None or not old.is_floating_point():
                    continue
                if id(old) not in done:
                    new = old.detach().to(dtype, copy=True)
                    if owner is module._parameters:
                        new = nn.Parameter(_noisy(new, generator), old.requires_grad)
                    elif key in {"running_mean", "running_var"}:
                        new = _noisy(new, generator).abs()
                    done[id(old)] = new
                owner[key] = done[id(old)]  # type: ignore[assignment]


def _noisy(tensor: Tensor, generator: torch.Generator) -> Tensor:
    # Norms, biases and what else is constant at first would hide differences.
    if tensor.numel() == 0 or (
        tensor.dim() > 1 and bool((tensor != tensor.flatten()[0]).any())
    ):
        return tensor
    noise = torch.rand(tensor.shape, generator=generator, dtype=torch.float64) - 0.5
    return tensor + noise.to(tensor)


@contextlib.contextmanager
def _borrowed(model: nn.Module) -> Iterator[None]:
    """Put back the tensors and sizes of all layers on leaving; contents are kept apart."""
    sizes = (
        "in_channels",
        "out_channels",
        "in_features",
        "out_features",
        "num_features",
        "num_parameters",
        "groups",
    )
    saved = [
        (
            module,
            dict(module._parameters),
            dict(module._buffers),
            {key: module.__dict__[key] for key in sizes if key in module.__dict__},
        )
        for module in model.modules()
    ]
    contents = [(p, p.data) for p in model.parameters()]
    try:
        yield
    finally:
        for module, parameters, buffers, attributes in saved:
            module._parameters.update(parameters)
            module._buffers.update(buffers)
            module.__dict__.update(attributes)
        for parameter, data in contents:
            parameter.data = data
