"""Neural implants: 1×1 filters in place of the best of the filters that would go.

Yu et al., "Hessian-aware pruning and optimal neural implant", WACV 2022. Of K structures,
the lowest (1 - r)·K are removed and the next r·K are implanted: their k×k filters lose all
taps but the centre, which saves C_in·(k² - 1) weights each; biases and norms stay. During
training an implant is a mask; the export makes it a smaller layer.
"""

from __future__ import annotations

__all__ = [
    "ImplantConfig",
    "ImplantInit",
    "check_implants",
    "implant_masks",
    "initialise",
    "split",
]

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lightning_woodfisher.base.errors import ConfigurationError, nearest, require_number
from lightning_woodfisher.structured.graph.channels import Chosen, resolve
from lightning_woodfisher.structured.graph.groups import Group
from lightning_woodfisher.structured.graph.inputs import (
    map_tensors,
    run_model,
    tensors_in,
)
from lightning_woodfisher.structured.scores.evaluation import Evaluation
from lightning_woodfisher.structured.shrink.implanted_conv import centre, implantable
from lightning_woodfisher.structured.shrink.removal import plan_removal

ImplantInit = Literal["zero", "center", "lstsq"]


@dataclass(frozen=True)
class ImplantConfig:
    """How many implants there are, and what they begin with.

    Args:
        ratio: share of the chosen structures that are implanted, in [0, 1); the others
            are removed. 0 makes none.
        init: ``"zero"``, so that a norm behind it gives a constant (as published; where
            its bias is below zero, a ReLU lets no gradient pass, and the filter stays);
            ``"center"``, the centre tap of the filter; ``"lstsq"``, the 1×1 filter that
            comes closest to what the filter gives on the samples.
    """

    ratio: float = 0.0
    init: ImplantInit = "zero"

    def __post_init__(self) -> None:
        require_number("implant_ratio", self.ratio)
        if not 0.0 <= self.ratio < 1.0:
            raise ConfigurationError(
                f"implant_ratio={self.ratio} is outside [0, 1); it is the share of the "
                "chosen channels that become 1x1 filters."
            )
        if self.init not in get_args(ImplantInit):
            raise ConfigurationError(
                f"implant_init={self.init!r} is unknown; use one of "
                f"{', '.join(get_args(ImplantInit))}."
                f"{nearest(self.init, get_args(ImplantInit))}"
            )

    def require_multiples(self, round_to: int) -> None:
        """Check that implants go with the widths that are wanted.

        Args:
            round_to: whole channels come in multiples of this.

        Raises:
            ConfigurationError: for multiples of more than one.
        """
        if self.ratio and round_to > 1:
            raise ConfigurationError(
                f"round_to={round_to} counts whole channels, of which implants are none; "
                "use round_to=1 or implant_ratio=0."
            )


def split(
    gone: Mapping[str, Tensor],
    scores: Mapping[str, Tensor],
    ratio: float,
    groups: Mapping[str, Any],
    before: Mapping[str, Sequence[int]],
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Divide the chosen structures into removed and implanted ones.

    Args:
        gone: the chosen structures by group.
        scores: of all structures by group.
        ratio: share that is implanted: those with the highest scores.
        groups: names of the groups where implants are possible, as keys; elsewhere a
            structure is removed.
        before: structures that are removed already.

    Returns:
        Removed and implanted structures of every group, ascending.
    """
    entries = [
        (float(scores[name][s]), -place, -s)
        for place, (name, structures) in enumerate(gone.items())
        for s in structures.tolist()
        if s not in before.get(name, ())
    ]
    total = sum(len(structures) for structures in gone.values())
    number = min(round(ratio * total), len(entries))
    names = list(gone)
    best = {
        (names[-place], -s)
        for _, place, s in sorted(entries, reverse=True)[:number]
        if names[-place] in groups
    }
    removed, implanted = {}, {}
    for name, structures in gone.items():
        marks = torch.tensor(
            [(name, s) in best for s in structures.tolist()], dtype=torch.bool
        )
        removed[name], implanted[name] = structures[~marks], structures[marks]
    return removed, implanted


def implant_masks(
    model: nn.Module, groups: Sequence[Group], implanted: Chosen
) -> dict[str, Tensor]:
    """Find the entries to set to zero so that structures are implants.

    Args:
        model: the network.
        groups: its groups.
        implanted: the structures.

    Returns:
        bool tensors of the parameters' shapes by name: all taps but the centre of their
        filters.
    """
    layers = implantable(model, groups)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    masks: dict[str, Tensor] = {}
    for group, structures in resolve(groups, implanted):
        for layer in layers[group.name]:
            conv: Any = model.get_submodule(layer)
            gone = torch.zeros_like(conv.weight, dtype=torch.bool)
            rows = structures.to(gone.device)
            gone[rows] = True
            every: Any = (rows, slice(None), *centre(conv).values())
            gone[every] = False
            masks[names[id(conv.weight)]] = gone
    return masks


@torch.no_grad()
def initialise(
    evaluation: Evaluation,
    groups: Sequence[Group],
    implanted: Chosen,
    removed: Chosen,
    init: ImplantInit,
) -> None:
    """Set the centre taps of new implants, in place; call on all ranks.

    Args:
        evaluation: of the samples, with its session not entered.
        groups: of its model.
        implanted: the structures that are new.
        removed: those that are removed, which implants are not fitted to.
        init: what the taps begin with.
    """
    model = evaluation.source.model
    if init == "center":
        return
    layers = implantable(model, groups)
    # All are fitted to the network as it was before any of them.
    fitted: list[tuple[Any, Tensor, Tensor]] = []
    for group, structures in resolve(groups, implanted):
        for layer in layers[group.name]:
            conv: Any = model.get_submodule(layer)
            if init == "zero":
                values = conv.weight.new_zeros(len(structures), conv.in_channels)
            else:
                alive = _alive_inputs(layer, conv, groups, removed)
                values = _least_squares(evaluation, layer, structures, alive)
            fitted.append((conv, structures, values))
    for conv, structures, values in fitted:
        rows = structures.to(conv.weight.device)
        where = (rows, slice(None), *centre(conv).values())
        conv.weight[where] = values.to(conv.weight)


def check_implants(
    network: nn.Module, groups: Sequence[Group], inputs: Any
) -> dict[str, tuple[str, ...]]:
    """Find the layers for implants, and check that exported ones compute the same.

    Args:
        network: the network, on the device of the inputs; changed, so pass a copy.
        groups: its groups.
        inputs: what it is called with.

    Returns:
        As :func:`.implantable`, without the groups where the numbers differ.
    """
    found = implantable(network, groups)
    double = map_tensors(lambda t: t.double() if t.is_floating_point() else t, inputs)
    network = network.double().eval()
    for group in groups:
        if group.name not in found:
            continue
        chosen = {group.name: list(range(0, group.size - 1, 2))}
        trial = copy.deepcopy(network)
        with torch.no_grad():
            for name, gone in implant_masks(trial, [group], chosen).items():
                trial.get_parameter(name).masked_fill_(gone, 0.0)
            try:
                masked = [t.clone() for t in tensors_in(run_model(trial, double))]
                plan_removal(trial, [group], {}, chosen).apply(trial)
                made = list(tensors_in(run_model(trial, double)))
                same = all(map(torch.allclose, masked, made))
            except (RuntimeError, ConfigurationError):
                same = False
        if not same:
            del found[group.name]
    return found


def _alive_inputs(
    layer: str, conv: Any, groups: Sequence[Group], removed: Chosen
) -> Tensor:
    alive = torch.ones(conv.in_channels, dtype=torch.bool)
    for group, structures in resolve(groups, removed):
        for member in group.of_role("consumer"):
            if member.module == layer and member.tensor == "weight":
                alive[torch.isin(member.structure_of, structures)] = False
    return alive.nonzero().flatten()


def _least_squares(
    evaluation: Evaluation, layer: str, structures: Tensor, alive: Tensor
) -> Tensor:
    """Fit 1×1 filters to the outputs of whole ones, from sums over all positions."""
    conv: Any = evaluation.source.model.get_submodule(layer)
    inputs, outputs = len(alive), len(structures)
    sums = torch.zeros(inputs * (inputs + outputs), dtype=torch.float64)

    def hook(module: nn.Module, args: Any, output: Tensor) -> None:
        # At once: what follows may work in place.
        with torch.no_grad():
            strides = tuple(slice(None, None, step) for step in conv.stride)
            x: Tensor = args[0][(slice(None), slice(None), *strides)]
            x = x.movedim(1, -1).reshape(-1, x.shape[1])[:, alive.to(x.device)]
            y = output.movedim(1, -1).reshape(-1, output.shape[1])
            if conv.bias is not None:
                y = y - conv.bias
            x, y = x.double(), y[:, structures.to(y.device)].double()
            products = torch.cat([x.T @ x, x.T @ y], dim=1)
            sums.add_(products.flatten().cpu())

    def compute(loss: Any, scale: float) -> Tensor:
        sums.zero_()
        loss()
        return sums.unsqueeze(0) * scale

    handle = conv.register_forward_hook(hook)
    try:
        with evaluation.session():
            rows = evaluation.compute_rows(compute, len(sums))
    finally:
        handle.remove()
    system = rows.sum(dim=0).view(inputs, inputs + outputs)
    # Inputs may depend on each other, or be zero: the solution of least norm.
    inverse = torch.linalg.pinv(system[:, :inputs], rtol=1e-10, hermitian=True)
    values = torch.zeros(outputs, conv.in_channels, dtype=torch.float64)
    values[:, alive] = (inverse @ system[:, inputs:]).T
    return values
