"""Check numerically that masked channels and removed channels compute the same."""

from __future__ import annotations

__all__ = ["check_implants", "check_removal"]

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from lightning_woodfisher.base.errors import first_line
from lightning_woodfisher.base.types import IsolationMode
from lightning_woodfisher.data.isolation import eager, isolated, seeded
from lightning_woodfisher.gradients.hessian_rows import twice_differentiable
from lightning_woodfisher.structured.graph.groups import Group, channel_masks
from lightning_woodfisher.structured.graph.inputs import (
    run_model,
    tensors_in,
)
from lightning_woodfisher.structured.shrink.implants import (
    implant_masks,
    implantable_layers,
)
from lightning_woodfisher.structured.shrink.removal import plan_removal


def check_removal(
    model: nn.Module,
    groups: Sequence[Group],
    example_inputs: Any,
    *,
    implant: bool = False,
    mode: IsolationMode = "eval",
    other_mode: bool = False,
    seed: int = 0,
) -> dict[str, str]:
    """Compare a network with random structures masked and with them removed.

    Both run in float64 where the model supports it. Norms, biases and
    all other constant tensors get noise, because an initialization can hide differences.
    A quarter of each group's structures is chosen, at least one.

    Args:
        model: the network; unchanged afterwards.
        groups: the groups to check.
        example_inputs: see :func:`.trace_groups`.
        implant: make the chosen structures implants instead of removing them.
        mode: of the network: ``"partial_eval"`` where only losses are computed in training
            mode, such as those of detectors, whose detections may jump.
        other_mode: also check that the smaller network runs in the other mode, if the
            network does, because it may call other layers there.
        seed: of the noise and of the choice of structures.

    Returns:
        How the outputs differ, by name of the group. Groups without a difference are left
        out.
    """
    check = functools.partial(_check, model, example_inputs, implant, seed)
    failed = check(groups, mode, exact=True)
    if failed is None:
        mode = "eval"
        failed = check(groups, mode, exact=True) or {}
    if other_mode:
        other: IsolationMode = "partial_eval" if mode == "eval" else "eval"
        rest = [group for group in groups if group.name not in failed]
        failed |= check(rest, other, exact=False) or {}
    return failed


def _check(
    model: nn.Module,
    example_inputs: Any,
    implant: bool,
    seed: int,
    groups: Sequence[Group],
    mode: IsolationMode,
    *,
    exact: bool,
) -> dict[str, str] | None:
    """Compare in one mode; return None if it is not "eval" and the model fails in it."""
    generator = torch.Generator().manual_seed(seed)
    # Fused kernels of encoder layers set the outputs of padding to zero, others do not.
    with (
        isolated(model, mode),
        twice_differentiable(),
        _restored(model),
        torch.no_grad(),
    ):
        # Tolerances are relative to the largest output. Rounding is about 1e-15 and 1e-6
        # per layer.
        try:
            tolerance = 1e-8
            inputs = _randomize(model, example_inputs, torch.float64, generator)
        except Exception:  # The model or the device does not support float64.
            tolerance = 1e-3
            try:
                inputs = _randomize(model, example_inputs, torch.float32, generator)
            except Exception:
                if exact and mode == "eval":
                    raise
                return None
        if not exact:
            tolerance = math.inf
        chosen = {
            g.name: torch.randperm(g.size, generator=generator)[: max(1, g.size // 4)]
            for g in groups
        }
        difference = functools.partial(
            _difference, model, inputs, chosen, implant, tolerance
        )
        failed = _failing_groups(list(groups), difference)
        others = [group for group in groups if group.name not in failed]
        if failed and others and (reason := difference(others)):
            failed |= {g.name: f"together with others, {reason}" for g in others}
    return failed


@eager()
def check_implants(
    model: nn.Module, groups: Sequence[Group], example_inputs: Any
) -> dict[str, tuple[str, ...]]:
    """Find the layers that can have implants, and check that exported ones are exact.

    Args:
        model: the network; unchanged afterwards.
        groups: its groups.
        example_inputs: see :func:`.trace_groups`.

    Returns:
        As :func:`.implantable_layers`, without the groups where masks and the exported
        network differ.
    """
    layers = implantable_layers(model, groups)
    possible = [group for group in groups if group.name in layers]
    failed = check_removal(model, possible, example_inputs, implant=True)
    return {name: found for name, found in layers.items() if name not in failed}


def _failing_groups(
    groups: list[Group], difference: Callable[[Sequence[Group]], str | None]
) -> dict[str, str]:
    """Find the groups that cause a difference by bisection."""
    reason = difference(groups) if groups else None
    if reason is None:
        return {}
    if len(groups) == 1:
        return {groups[0].name: reason}
    middle = len(groups) // 2
    failed = _failing_groups(groups[:middle], difference)
    failed |= _failing_groups(groups[middle:], difference)
    # If each half alone is right, no group of them can be trusted.
    return failed or {group.name: f"together, {reason}" for group in groups}


def _difference(
    model: nn.Module,
    inputs: Any,
    chosen: Mapping[str, Tensor],
    implant: bool,
    tolerance: float,
    groups: Sequence[Group],
) -> str | None:
    """Describe how outputs with masked and with removed or implanted structures differ."""
    structures = {group.name: chosen[group.name] for group in groups}
    make_masks = implant_masks if implant else channel_masks
    with _restored(model):
        for name, mask in make_masks(model, groups, structures).items():
            parameter = model.get_parameter(name)
            # In place, so that shared tensors stay shared.
            parameter.data = parameter.masked_fill(mask, 0.0)
        masked = _outputs(model, inputs)
        removed, implanted = ({}, structures) if implant else (structures, {})
        try:
            plan_removal(model, groups, removed, implanted).apply(model)
            cut = _outputs(model, inputs)
        except Exception as error:
            kind, text = type(error).__name__, first_line(error)
            return f"the network fails without its channels: {kind}: {text}"
    if math.isinf(tolerance):
        return None
    if [t.shape for t in masked] != [t.shape for t in cut]:
        return "an output of the network changes its shape"
    gap = max(map(_relative_gap, masked, cut), default=0.0)
    if gap <= tolerance:
        return None
    return (
        "removing its channels is not the same as zeroing them; the output differs by "
        f"{gap:.1e} of its largest value"
    )


def _outputs(model: nn.Module, inputs: Any) -> list[Tensor]:
    # Detectors draw proposals.
    with seeded(0):
        return list(tensors_in(run_model(model, inputs)))


def _relative_gap(one: Tensor, other: Tensor) -> float:
    if not (one.is_floating_point() or one.is_complex()):
        return 0.0 if torch.equal(one, other) else math.inf
    if one.numel() == 0:
        return 0.0
    gap = float((one - other).abs().max()) / max(float(one.abs().max()), 1e-30)
    return gap if math.isfinite(gap) else math.inf


def _randomize(
    model: nn.Module,
    example_inputs: Any,
    dtype: torch.dtype,
    generator: torch.Generator,
) -> Any:
    """Replace all tensors by noisy copies; return inputs with which the model runs."""
    done: dict[int, Tensor] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for key, old in tensors.items():
                if old is None or not old.is_floating_point():
                    continue
                if id(old) not in done:
                    new = old.detach().to(dtype, copy=True)
                    if tensors is module._parameters:
                        new = nn.Parameter(
                            _add_noise(new, generator), old.requires_grad
                        )
                    elif key in {"running_mean", "running_var"}:
                        new = _add_noise(new, generator).abs()
                    done[id(old)] = new
                tensors[key] = done[id(old)]  # type: ignore[assignment]

    def cast(tensor: Tensor) -> Tensor:
        return tensor.detach().to(dtype if tensor.is_floating_point() else tensor.dtype)

    inputs = tree_map_only(Tensor, cast, example_inputs)
    run_model(model, inputs)
    return inputs


def _add_noise(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Add noise to vectors and constant tensors."""
    if tensor.numel() == 0 or (
        tensor.dim() > 1 and bool((tensor != tensor.flatten()[0]).any())
    ):
        return tensor
    noise = torch.rand(tensor.shape, generator=generator, dtype=torch.float64) - 0.5
    return tensor + noise.to(tensor)


@contextlib.contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    """Restore the layers, tensors and sizes of a model after the body."""
    saved = [
        (
            module,
            dict(module._modules),
            dict(module._parameters),
            dict(module._buffers),
            {key: size for key, size in vars(module).items() if isinstance(size, int)},
            type(module),
        )
        for module in model.modules()
    ]
    contents = [(parameter, parameter.data) for parameter in model.parameters()]
    try:
        yield
    finally:
        for module, modules, parameters, buffers, sizes, kind in saved:
            module._modules.update(modules)
            module._parameters.update(parameters)
            module._buffers.update(buffers)
            module.__dict__.update(sizes)
            module.__class__ = kind
        for parameter, data in contents:
            parameter.data = data
