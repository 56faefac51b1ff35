"""Neural implants: 1×1 filters instead of removal, for the best of the chosen filters.

Yu et al., "Hessian-aware pruning and optimal neural implant", WACV 2022. Of K chosen
structures, the lowest (1 - r)·K are removed and the other r·K become implants: their k×k
filters lose all taps but the center, which saves C_in·(k² - 1) weights each. Biases and
norms stay. With an odd kernel and padding that keeps its center in place, such a filter is
a 1×1 filter. So implants train as a mask, and become an :class:`ImplantedConv` in the
smaller network.
"""

from __future__ import annotations

__all__ = [
    "ImplantConfig",
    "ImplantInit",
    "ImplantedConv",
    "divide_structures",
    "has_center",
    "implant_masks",
    "implantable_layers",
    "initialize_implants",
    "parameter_names",
]

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from lightning_woodfisher.base.errors import require_choice, require_number
from lightning_woodfisher.structured.graph.groups import (
    Group,
    StructureIndices,
    resolve_structures,
)
from lightning_woodfisher.structured.scores.evaluation import ComputeLoss, Evaluation

ImplantInit = Literal["zero", "center", "lstsq"]


@dataclass(frozen=True)
class ImplantConfig:
    """How many implants are made, and their initial values.

    Args:
        ratio: share of the chosen structures that become implants, in [0, 1). The others
            are removed.
        init: ``"zero"``, so that the output of a norm after it is constant (as published;
            where its bias is below zero, a ReLU passes no gradient, and the filter stays
            zero); ``"center"``, the center tap of the filter; ``"lstsq"``, the 1×1 filter
            whose output on the samples is closest to that of the filter.
    """

    ratio: float = 0.0
    init: ImplantInit = "zero"

    def __post_init__(self) -> None:
        meaning = "it is the share of the chosen channels that become 1x1 filters"
        require_number("implant_ratio", self.ratio, "[0, 1)", meaning)
        require_choice("implant_init", self.init, get_args(ImplantInit))


class ImplantedConv(nn.Module):
    """A convolution some of whose filters are 1×1, in the order of the dense one.

    Its parameters have no memory until they are replaced.

    Args:
        conv: a convolution that can have implants.
        kept: the filters of it that are kept, int64.
        implants: the filters that become 1×1, int64. All others are removed.

    Attributes:
        kept: convolution with the k×k filters.
        implant: convolution with the 1×1 filters, of the same stride.
    """

    order: Tensor

    def __init__(self, conv: _ConvNd, kept: Tensor, implants: Tensor) -> None:
        super().__init__()
        self.in_channels, self.out_channels = (
            conv.in_channels,
            len(kept) + len(implants),
        )
        self.stride, self.kernel_size = conv.stride, conv.kernel_size
        kind: Any = type(conv)
        # On the meta device no random numbers are drawn.
        options: Any = {"bias": conv.bias is not None, "device": "meta"}
        self.kept = kind(
            conv.in_channels,
            len(kept),
            conv.kernel_size,
            conv.stride,
            conv.padding,
            conv.dilation,
            padding_mode=conv.padding_mode,
            **options,
        )
        self.implant = kind(conv.in_channels, len(implants), 1, conv.stride, **options)
        # Outputs are in the order of the filters.
        order = torch.cat([kept, implants]).argsort().to(conv.weight.device)
        self.register_buffer("order", order, persistent=False)
        self.train(conv.training)

    def forward(self, inputs: Tensor) -> Tensor:
        """Apply both convolutions.

        Args:
            inputs: ``[n, in_channels, ...]``.

        Returns:
            ``[n, out_channels, ...]``, the channels in the order of the dense filters.
        """
        outputs = torch.cat([self.kept(inputs), self.implant(inputs)], dim=1)
        return outputs.index_select(1, self.order)


def parameter_names(model: nn.Module) -> dict[int, list[str]]:
    """List the names of each parameter in the distinct modules of a model.

    Args:
        model: the network.

    Returns:
        Names by id of the parameter; more than one if layers share it.
    """
    names: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(path, False, False):
            names.setdefault(id(parameter), []).append(name)
    return names


def implantable_layers(
    model: nn.Module, groups: Iterable[Group]
) -> dict[str, tuple[str, ...]]:
    """Find the layers that can have implants.

    Excluded are 1×1 filters, which would save nothing, grouped convolutions, and
    convolutions whose kernel or padding has no center.

    Args:
        model: the network.
        groups: its groups.

    Returns:
        Names of convolutions by group name. Groups without any are left out.
    """
    names = parameter_names(model)
    found = {}
    for group in groups:
        layers = tuple(
            member.module
            for member in group.of_role("producer")
            if member.module
            and member.structure_of.tolist() == list(range(group.size))
            and member.axis == 0
            and has_center(model.get_submodule(member.module), names)
        )
        if layers:
            found[group.name] = layers
    return found


def has_center(conv: nn.Module, names: Mapping[int, Sequence[str]]) -> bool:
    """Check if the filters of a layer have a center tap, and are its own.

    Args:
        conv: the layer.
        names: names of the model's parameters, as :func:`parameter_names` returns them.

    Returns:
        Whether it can have implants.
    """
    if type(conv) not in {nn.Conv1d, nn.Conv2d, nn.Conv3d} or conv.groups != 1:
        return False
    if any(len(names[id(parameter)]) > 1 for parameter in conv.parameters(False)):
        return False
    sizes: Any = conv.kernel_size
    steps: Any = conv.dilation
    centered = tuple(d * (k - 1) // 2 for d, k in zip(steps, sizes, strict=True))
    is_odd = all(size % 2 for size in sizes)
    return is_odd and math.prod(sizes) > 1 and conv.padding in {centered, "same"}


def _center_tap(conv: Any) -> tuple[int, ...]:
    return tuple(size // 2 for size in conv.kernel_size)


def implant_masks(
    model: nn.Module, groups: Iterable[Group], implanted: StructureIndices
) -> dict[str, Tensor]:
    """Find the entries to set to zero to make structures implants.

    Args:
        model: the network.
        groups: its groups.
        implanted: the structures.

    Returns:
        bool tensors of the parameters' shapes by name, True for all taps of their filters
        but the center.
    """
    groups = tuple(groups)
    layers = implantable_layers(model, groups)
    masks: dict[str, Tensor] = {}
    for group, structures in resolve_structures(groups, implanted):
        for layer in layers[group.name]:
            conv: Any = model.get_submodule(layer)
            mask = torch.zeros_like(conv.weight, dtype=torch.bool)
            mask[structures.to(mask.device)] = True
            center: Any = (..., *_center_tap(conv))
            mask[center] = False
            masks[f"{layer}.weight"] = mask
    return masks


def divide_structures(
    chosen: Mapping[str, Tensor],
    scores: Mapping[str, Tensor],
    ratio: float,
    implantable: Collection[str],
    removed_before: StructureIndices,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Divide the chosen structures into removed and implanted ones.

    Args:
        chosen: the chosen structures by group.
        scores: of all structures by group.
        ratio: share that becomes implants, those with the highest scores.
        implantable: names of the groups that can have implants. In other groups, all
            chosen structures are removed.
        removed_before: structures that are removed already.

    Returns:
        Removed and implanted structures of every group, ascending.
    """
    candidates = [
        (name, structure)
        for name, structures in chosen.items()
        for structure in structures.tolist()
        if structure not in removed_before.get(name, ())
    ]
    # The sort is stable: of equal scores, the first in order of groups is implanted.
    candidates.sort(key=lambda pair: float(scores[pair[0]][pair[1]]), reverse=True)
    number = round(ratio * sum(map(len, chosen.values())))
    best = {pair for pair in candidates[:number] if pair[0] in implantable}
    removed, implanted = {}, {}
    for name, structures in chosen.items():
        is_implant = torch.tensor(
            [(name, structure) in best for structure in structures.tolist()],
            dtype=torch.bool,
        )
        removed[name] = structures[~is_implant]
        implanted[name] = structures[is_implant]
    return removed, implanted


@torch.no_grad()
def initialize_implants(
    evaluation: Evaluation,
    groups: Sequence[Group],
    implanted: StructureIndices,
    removed: StructureIndices,
    init: ImplantInit,
) -> None:
    """Set the center taps of new implants, in place. Call on all ranks.

    Args:
        evaluation: of the samples, outside its session.
        groups: of its model.
        implanted: the new implants.
        removed: the removed structures, whose outputs the fit leaves out.
        init: the initial values.
    """
    if init == "center":
        return
    model = evaluation.source.model
    layers = implantable_layers(model, groups)
    # All are fitted before any is changed.
    fitted: list[tuple[Any, Tensor, Tensor]] = []
    for group, structures in resolve_structures(groups, implanted):
        for layer in layers[group.name]:
            conv: Any = model.get_submodule(layer)
            if init == "zero":
                values = conv.weight.new_zeros(len(structures), conv.in_channels)
            else:
                inputs = _kept_inputs(layer, conv, groups, removed)
                values = _fit_least_squares(evaluation, conv, structures, inputs)
            fitted.append((conv, structures, values))
    for conv, structures, values in fitted:
        rows = structures.to(conv.weight.device)
        center = (rows, slice(None), *_center_tap(conv))
        conv.weight[center] = values.to(conv.weight)


def _kept_inputs(
    layer: str, conv: Any, groups: Sequence[Group], removed: StructureIndices
) -> Tensor:
    """Find the input channels of a convolution that are not removed."""
    is_kept = torch.ones(conv.in_channels, dtype=torch.bool)
    for group, structures in resolve_structures(groups, removed):
        for member in group.of_role("consumer"):
            if member.module == layer and member.tensor == "weight":
                is_kept[member.slices(structures)] = False
    return is_kept.nonzero().flatten()


def _fit_least_squares(
    evaluation: Evaluation, conv: Any, structures: Tensor, kept: Tensor
) -> Tensor:
    """Fit 1×1 filters to the outputs of k×k filters, by sums over all positions."""
    inputs, outputs = len(kept), len(structures)
    sums = torch.zeros(inputs * (inputs + outputs), dtype=torch.float64)

    def hook(module: nn.Module, args: Any, output: Tensor) -> None:
        # Now, because the next layers may change the tensors in place.
        with torch.no_grad():
            strides = tuple(slice(None, None, step) for step in conv.stride)
            x: Tensor = args[0][(slice(None), slice(None), *strides)]
            x = x.movedim(1, -1).reshape(-1, x.shape[1])[:, kept.to(x.device)]
            y = output.movedim(1, -1).reshape(-1, output.shape[1])
            if conv.bias is not None:
                y = y - conv.bias
            x, y = x.double(), y[:, structures.to(y.device)].double()
            products = torch.cat([x.T @ x, x.T @ y], dim=1)
            sums.add_(products.flatten().cpu())

    def compute(loss: ComputeLoss, scale: float, labels: int) -> Tensor:
        sums.zero_()
        loss()
        return sums.unsqueeze(0) * scale

    with conv.register_forward_hook(hook), evaluation.session():
        rows = evaluation.compute_rows(compute, len(sums))
    system = rows.sum(dim=0).view(inputs, inputs + outputs)
    # Inputs may be zero or linearly dependent: take the solution of least norm.
    inverse = torch.linalg.pinv(system[:, :inputs], rtol=1e-10, hermitian=True)
    values = torch.zeros(outputs, conv.in_channels, dtype=torch.float64)
    values[:, kept] = (inverse @ system[:, inputs:]).T
    return values
