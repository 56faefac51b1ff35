"""Neural implants: 1×1 filters as masks, as smaller layers, and from files."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import coupled_networks
import pytest
import torch
import torch.nn.functional as F
from hand_groups import Residual, cross_entropy, images, residual_groups, trained
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from lightning_woodfisher import ConfigurationError, StructureConfig
from lightning_woodfisher.data.isolation import derive_seed
from lightning_woodfisher.data.losses import FunctionLoss
from lightning_woodfisher.distributed.communicator import Communicator
from lightning_woodfisher.structured.graph.groups import (
    channel_masks,
    masked_parameters,
)
from lightning_woodfisher.structured.pruner import StructurePruner
from lightning_woodfisher.structured.shrink.files import load_shrunk, save_shrunk
from lightning_woodfisher.structured.shrink.implants import (
    ImplantConfig,
    ImplantedConv,
    divide_structures,
    has_center,
    implant_masks,
    implantable_layers,
    parameter_names,
)
from lightning_woodfisher.structured.shrink.removal import (
    RemovalPlan,
    plan_removal,
    update_optimizers,
)
from lightning_woodfisher.structured.shrink.removal_check import check_implants
from lightning_woodfisher.structured.tracing import trace_groups
from lightning_woodfisher.weights.masks import Masks

CONFIG = StructureConfig(
    method="hap", num_samples=24, batch_size=8, probes=20, min_kept=1
)


def pruner(model: nn.Module, groups: Any, measure: Any, **implants: Any) -> Any:
    return StructurePruner(
        groups,
        Masks(masked_parameters(model, groups)),
        dataclasses.replace(CONFIG, measure=measure),
        Communicator(),
        ImplantConfig(**implants),
        implantable_layers(model, groups),
    )


def step(
    model: nn.Module, target: float, measure: Any = "structures", **more: Any
) -> Any:
    groups = residual_groups(6, 8)
    source = FunctionLoss(model, images(), cross_entropy)
    return groups, pruner(model, groups, measure, **more).step(source, target)


def residual() -> Any:
    torch.manual_seed(0)
    return trained(Residual(6, 8)).eval()


@pytest.mark.parametrize("init", ["zero", "lstsq"])
def test_statistics_are_estimated_after_implants(init: Any) -> None:
    model, groups = residual(), residual_groups(6, 8)
    made = pruner(model, groups, "structures", ratio=0.6, init=init)
    made.config = dataclasses.replace(made.config, batchnorm_recalibration_batches=2)
    source = FunctionLoss(model, images(), cross_entropy)
    report = made.step(source, 0.5)
    assert sum(map(len, report.implanted.values())) == 4
    smaller = copy.deepcopy(model)
    plan_removal(smaller, groups, report.removed, report.implanted).apply(smaller)
    other = copy.deepcopy(smaller)
    chosen = source.batches(2, 64, derive_seed(0, 0, "batchnorm"), True)
    update_bn([chosen.fetch(index)[0] for index in range(2)], other)
    for name in ("bn", "bn1", "bn2"):
        for kind in ("running_mean", "running_var"):
            mine, theirs = (
                getattr(m.get_submodule(name), kind) for m in (smaller, other)
            )
            torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-7)


def test_zero_implants_are_constants_of_their_norms() -> None:
    dense, model = residual(), residual()
    groups, report = step(model, 0.5, ratio=0.6)
    removed, implanted = report.removed, report.implanted
    assert sum(map(len, removed.values())) == 3  # 7 in all
    assert sum(map(len, implanted.values())) == 4
    # By hand, on the dense network: each channel at the constant of its norm.
    for conv, norm, group in (("stem", "bn", "stem"), ("conv1", "bn1", "conv1"),
                              ("conv2", "bn2", "stem")):  # fmt: skip
        part, scale = dense.get_submodule(norm), torch.ones(1)
        for s in implanted.get(group, ()):
            scale = part.running_var[s].add(part.eps).rsqrt() * part.weight[s]
            bias = dense.get_submodule(conv).bias
            mean = part.running_mean[s] - (bias[s] if bias is not None else 0.0)
            with torch.no_grad():
                part.bias[s] -= scale * mean
                part.weight[s] = 0.0
        for s in removed.get(group, ()):
            with torch.no_grad():
                part.weight[s] = part.bias[s] = 0.0
    pixels = images(8).tensors[0]
    torch.testing.assert_close(model(pixels), dense(pixels), rtol=0, atol=1e-12)


def test_parameters_and_macs_are_those_of_the_exported_network() -> None:
    model = residual()
    dense = sum(p.numel() for p in model.parameters())
    groups, report = step(model, 0.5, ratio=0.6, init="center")
    smaller = copy.deepcopy(model)
    plan_removal(model, groups, report.removed, report.implanted).apply(smaller)
    assert report.parameters_dense == dense
    assert report.parameters == sum(p.numel() for p in smaller.parameters())
    macs, handles = [0], []

    def count(module: Any, inputs: Any, output: Tensor) -> None:
        macs[0] += module.weight.numel() * output[0, 0].numel()

    for module in smaller.modules():
        if isinstance(module, nn.Conv2d):
            handles.append(module.register_forward_hook(count))
    smaller(images(1).tensors[0])
    macs[0] += smaller.fc.weight.numel()
    assert report.macs == macs[0]
    # Implants alone: each saves C_in (k² - 1) in every k×k layer of its channel.
    only = {"conv1": [0, 3, 4]}
    other = copy.deepcopy(model)
    plan_removal(model, groups, {}, only).apply(other)
    saved = dense - sum(p.numel() for p in other.parameters())
    assert saved == 3 * model.conv1.in_channels * 8
    tied = copy.deepcopy(model)
    plan_removal(model, groups, {}, {"stem": [1]}).apply(tied)
    saved = dense - sum(p.numel() for p in tied.parameters())
    assert saved == 8 * (model.stem.in_channels + model.conv2.in_channels)


@pytest.mark.parametrize("measure", ["parameters", "macs"])
def test_targets_are_met_with_implants(measure: str) -> None:
    _, report = step(residual(), 0.6, measure, ratio=0.4)
    left, dense = getattr(report, measure), getattr(report, f"{measure}_dense")
    assert left <= 0.4 * dense
    _, plain = step(residual(), 0.6, measure)
    gone = sum(map(len, report.removed.values()))
    made = sum(map(len, report.implanted.values()))
    assert plain.implanted == {}
    # The same budget takes more channels, fewer of which go.
    assert gone + made > sum(map(len, plain.removed.values())) >= gone
    assert made == round(0.4 * (gone + made))


NAMES = "resnet", "preact", "vgg", "densenet", "twice", "sum_of_concatenation"


@pytest.mark.parametrize("name", NAMES)
def test_masks_are_the_exported_network(name: str) -> None:
    model, pixels = coupled_networks.build(name), coupled_networks.images()
    groups = trace_groups(model, pixels[:1]).groups
    found = implantable_layers(model, groups)
    assert check_implants(copy.deepcopy(model), groups, (pixels[:1],)) == found
    generator = torch.Generator().manual_seed(3)
    removed, implanted = {}, {}
    for group in groups:
        order = torch.randperm(group.size, generator=generator)
        removed[group.name] = order[: group.size // 4]
        if group.name in found:
            implanted[group.name] = order[group.size // 4 : group.size // 4 + 2]
    assert implanted
    plan = plan_removal(model, groups, removed, implanted)
    smaller = copy.deepcopy(model)
    plan.apply(smaller)
    with torch.no_grad():
        for masks in (
            channel_masks(model, groups, removed),
            implant_masks(model, groups, implanted),
        ):
            for parameter, gone in masks.items():
                model.get_parameter(parameter)[gone] = 0.0
        expected = model(pixels)
        assert not torch.allclose(coupled_networks.build(name)(pixels), expected)
        torch.testing.assert_close(smaller(pixels), expected, rtol=0, atol=1e-10)
    made = [m for m in smaller.modules() if isinstance(m, ImplantedConv)]
    assert len(made) == sum(len(found[n]) for n in implanted)
    for module in made:
        assert module.implant.weight.shape[2:].numel() == 1
        assert module.kept.weight.shape[2:].numel() == 9


class Reading(nn.Sequential):
    """Reads the weight of its first layer, which implants divide."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self[0].weight.square().sum()


def test_layers_that_are_more_than_called_have_no_implants() -> None:
    model, pixels = coupled_networks.build("vgg_bn"), coupled_networks.images()
    groups = trace_groups(model, pixels).groups
    assert [*implantable_layers(model, groups)] == ["0", "4"]
    assert [*check_implants(model, groups, pixels)] == ["0", "4"]
    model.__class__ = Reading
    state = copy.deepcopy(model.state_dict())
    assert [*check_implants(model, groups, pixels)] == ["4"]
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in state.items())
    assert not any(isinstance(m, ImplantedConv) for m in model.modules())


def test_files_give_the_same_bits(tmp_path: Path) -> None:
    model = residual()
    groups, report = step(model, 0.5, ratio=0.6, init="center")
    plan = plan_removal(model, groups, report.removed, report.implanted)
    plan.apply(model)
    save_shrunk(tmp_path, model.state_dict(), plan)
    fresh = load_shrunk(tmp_path, Residual(6, 8).double().eval())
    pixels = images(8).tensors[0]
    assert torch.equal(fresh(pixels), model(pixels))
    for (one, a), (other, b) in zip(
        fresh.state_dict().items(), model.state_dict().items(), strict=True
    ):
        assert one == other
        assert torch.equal(a, b)
    with pytest.raises(ConfigurationError, match="another model, or has been applied"):
        plan.apply(fresh)
    wrong = RemovalPlan({}, {"fc": (1,)})
    with pytest.raises(ConfigurationError, match="1x1 filters into 'fc'"):
        wrong.apply(residual())


class Stem(nn.Module):
    """A strided, dilated layer with a bias and no norm, read by a flatten."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 5, stride=2, padding=4, dilation=2)
        self.even = nn.Conv2d(5, 4, 2)
        self.wide = nn.Conv2d(4, 4, 3)
        self.fc = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.wide(F.relu(self.even(F.relu(self.conv(x)))))
        return self.fc(F.relu(x).flatten(1))


def test_only_kernels_with_a_middle_get_implants() -> None:
    torch.manual_seed(0)
    model, pixels = Stem().double().eval(), torch.randn(2, 3, 8, 8).double()
    groups = trace_groups(model, pixels).groups
    assert {g.name for g in groups} == {"conv", "even", "wide"}
    assert implantable_layers(model, groups) == {"conv": ("conv",)}
    with pytest.raises(ConfigurationError, match="'even' cannot have implants"):
        plan_removal(model, groups, {}, {"even": [0]})
    # Elsewhere the structures are removed.
    gone = {"conv": torch.tensor([1, 2]), "even": torch.tensor([0, 3])}
    scores = {"conv": torch.arange(5.0), "even": torch.arange(4.0)}
    removed, implanted = divide_structures(gone, scores, 0.5, {"conv"}, {})
    assert implanted["conv"].tolist() == [2]
    assert removed["conv"].tolist() == [1]
    assert removed["even"].tolist() == [0, 3]
    assert implanted["even"].tolist() == []
    removed, implanted = divide_structures(
        gone, scores, 0.5, {"conv", "even"}, {"even": [3]}
    )
    assert removed["even"].tolist() == [0, 3]
    assert implanted["conv"].tolist() == [1, 2]


@pytest.mark.parametrize(
    ("layer", "has"),
    [
        (nn.Conv2d(4, 4, 3, padding=1), True),
        (nn.Conv1d(4, 4, 5, padding=4, dilation=2), True),
        (nn.Conv2d(4, 4, (3, 1), padding="same"), True),
        (nn.Conv2d(4, 4, 3), False),
        (nn.Conv2d(4, 4, 1), False),
        (nn.Conv2d(4, 4, 3, padding=1, groups=2), False),
        (nn.ConvTranspose2d(4, 4, 3, padding=1), False),
        (nn.Linear(4, 4), False),
    ],
)
def test_a_center_is_that_of_a_whole_convolution(layer: nn.Module, has: bool) -> None:
    assert has_center(layer, parameter_names(layer)) == has
    shared = nn.ModuleList([layer, nn.Module()])
    shared[1].register_parameter("again", layer.weight)
    assert not has_center(layer, parameter_names(shared))


def test_least_squares_is_that_of_all_positions() -> None:
    model, dense = residual(), residual()
    groups, report = step(model, 0.5, ratio=0.6, init="lstsq")
    rows = report.implanted["conv1"]
    gone = report.removed.get("stem", ())
    alive = [c for c in range(6) if c not in gone]
    pixels = images().tensors[0]  # all 24 are the samples
    found = {}
    dense.conv1.register_forward_hook(
        lambda m, i, o: found.update(x=i[0].detach(), y=o.detach())
    )
    dense(pixels)
    x = found["x"][:, alive, ::2, ::2].movedim(1, -1).reshape(-1, len(alive))
    y = found["y"][:, list(rows)].movedim(1, -1).reshape(-1, len(rows))
    expected = torch.linalg.lstsq(x, y - dense.conv1.bias[list(rows)]).solution.T
    weight = model.conv1.weight[list(rows)]
    torch.testing.assert_close(weight[:, alive, 1, 1], expected)
    assert bool((weight[:, list(gone), 1, 1] == 0).all())
    assert int((weight != 0).sum()) == weight[:, alive, 0, 0].numel()
    losses = {}
    for init in ("zero", "center", "lstsq"):
        losses[init] = step(residual(), 0.5, ratio=0.6, init=init)[1].loss_after
    assert losses["lstsq"] != losses["center"] != losses["zero"]


def test_implants_may_go_later_but_are_never_whole_again() -> None:
    model = residual()
    groups = residual_groups(6, 8)
    source = FunctionLoss(model, images(), cross_entropy)
    work = pruner(model, groups, "structures", ratio=0.5, init="center")
    first = work.step(source, 0.3)
    second = work.step(source, 0.6, 1)
    before = {(n, s) for n, those in first.implanted.items() for s in those}
    after = {(n, s) for n, those in second.implanted.items() for s in those}
    gone = {(n, s) for n, those in second.removed.items() for s in those}
    assert len(before) == 2
    assert before <= after | gone
    assert not after & gone
    assert {(n, s) for n, those in first.removed.items() for s in those} <= gone
    work.masks.verify()


def test_optimizers_go_on_with_implants() -> None:
    """Training under masks and training the smaller network are the same."""
    model = residual()
    groups, report = step(model, 0.5, ratio=0.6, init="center")
    masks = Masks(masked_parameters(model, groups))
    masks.prune(channel_masks(model, groups, report.removed))
    masks.prune(implant_masks(model, groups, report.implanted))

    def train(net: nn.Module, optimizer: Any, masked: bool) -> None:
        for _ in range(3):
            optimizer.zero_grad()
            cross_entropy(net, images()[:]).backward()
            if masked:
                masks.apply_to_gradients()
            optimizer.step()
            if masked:
                masks.apply()

    optimizer = torch.optim.Adam(model.parameters(), 1e-2, weight_decay=1e-2)
    train(model, optimizer, masked=True)
    smaller = copy.deepcopy(model)
    other = torch.optim.Adam(smaller.parameters(), 1e-2, weight_decay=1e-2)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    plan = plan_removal(smaller, groups, report.removed, report.implanted)
    update_optimizers([other], plan.apply(smaller))
    train(model, optimizer, masked=True)
    train(smaller, other, masked=False)
    pixels = images(8).tensors[0]
    torch.testing.assert_close(smaller(pixels), model(pixels), rtol=0, atol=1e-9)
    for parameter in other.param_groups[0]["params"]:
        assert parameter.grad is not None


def test_bad_settings_are_refused() -> None:
    for options, message in (
        ({"ratio": 1.0}, "implant_ratio=1.0"),
        ({"init": "middle"}, "implant_init='middle'"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            ImplantConfig(**options)
