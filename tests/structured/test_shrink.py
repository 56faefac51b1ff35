"""Cutting channels out: by hand-made groups, through files, and in the middle of training."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from coupled_networks import build, chain, chain_groups, images
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_woodfisher.base.errors import ConfigurationError
from lightning_woodfisher.structured.graph.groups import (
    channel_masks,
    masked_parameters,
    zero_structures,
)
from lightning_woodfisher.structured.shrink.files import load_shrunk, save_shrunk
from lightning_woodfisher.structured.shrink.removal import (
    RemovalPlan,
    plan_removal,
    shrink,
    update_optimizers,
)
from lightning_woodfisher.structured.tracing import trace_groups
from lightning_woodfisher.weights.masks import Masks


def test_masks_of_a_hand_made_group() -> None:
    model, groups = chain(), chain_groups()
    pruned = channel_masks(model, groups, {"0": torch.tensor([3, 1]), "3": []})
    assert {*pruned} == {"0.weight", "0.bias", "1.weight", "1.bias"}
    assert pruned["0.weight"].shape == (5, 3, 3, 3)
    for gone in pruned.values():
        rows = gone.flatten(1).all(1) if gone.dim() > 1 else gone
        assert rows.tolist() == [False, True, False, True, False]
        assert int(gone.sum()) == 2 * gone[0].numel()
    assert [*masked_parameters(model, groups)] == [
        "0.weight",
        "0.bias",
        "1.weight",
        "1.bias",
        "3.weight",
        "3.bias",
    ]
    assert zero_structures(model, groups) == {}
    with torch.no_grad():
        for name, gone in pruned.items():
            model.get_parameter(name)[gone] = 0.0
        # Zero filters alone are no masked structure.
        model[3].weight[2] = 0.0
    assert {n: s.tolist() for n, s in zero_structures(model, groups).items()} == {
        "0": [1, 3]
    }


def test_shrinks_to_the_network_built_by_hand() -> None:
    model = chain()
    plan = shrink(copy.deepcopy(model), chain_groups(), {"0": [1, 3], "3": [0]})
    small = nn.Sequential(
        nn.Conv2d(3, 3, 3),
        nn.BatchNorm2d(3),
        nn.ReLU(),
        nn.Conv2d(3, 3, 3),
        nn.Flatten(),
        nn.Linear(48, 2),
    ).double()
    first, second = [0, 2, 4], [1, 2, 3]
    state = model.state_dict()
    for name in ("0.weight", "0.bias", "1.weight", "1.bias"):
        small.get_parameter(name).data = state[name][first]
    small[1].running_mean, small[1].running_var = (
        state["1.running_mean"][first],
        state["1.running_var"][first],
    )
    small[3].weight.data = state["3.weight"][second][:, first]
    small[3].bias.data = state["3.bias"][second]
    small[5].weight.data, small[5].bias.data = (
        state["5.weight"][:, 16:],
        state["5.bias"],
    )
    plan.apply(model)
    assert repr(model) == repr(small.eval())
    assert torch.equal(model(images()), small(images()))
    assert (model[3].in_channels, model[3].out_channels) == (3, 3)


def test_plan_leaves_the_model_and_is_plain_data() -> None:
    model = chain()
    before = copy.deepcopy(model.state_dict())
    plan = plan_removal(model, chain_groups(), {"3": [2]})
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    assert RemovalPlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    assert plan_removal(model, chain_groups(), {}) == RemovalPlan({}, {})


def test_flags_and_gradients_survive() -> None:
    model = chain()
    model[3].weight.requires_grad_(False)
    model(images()).sum().backward()
    gradient = model[0].weight.grad
    replacements = plan_removal(model, chain_groups(), {"0": [0]}).apply(model)
    assert torch.equal(model[0].weight.grad, gradient[1:])
    assert not model[3].weight.requires_grad
    assert model[3].weight.grad is None
    assert {r.new for r in replacements} == {
        *model[0].parameters(),
        *model[1].parameters(),
        model[3].weight,
    }
    assert isinstance(model[0].weight, nn.Parameter)
    assert "running_mean" in model[1]._buffers


@pytest.mark.parametrize("name", ["resnet", "grouped", "tied", "prelu_instance_norm"])
@pytest.mark.parametrize("dtype", [torch.float32])
def test_saved_and_loaded_bit_by_bit(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    pytest.importorskip("torch_pruning")
    model = build(name, dtype)
    groups = trace_groups(model, images(dtype)).groups
    removed = {group.name: [0] for group in groups}
    masks = Masks(masked_parameters(model, groups))
    masks.prune(channel_masks(model, groups, removed))
    masks.apply()
    masked = model(images(dtype))
    # What is zero is found again in the masked model.
    plan = shrink(model, groups, zero_structures(model, groups))
    torch.testing.assert_close(model(images(dtype)), masked, rtol=0, atol=1e-5)
    save_shrunk(tmp_path / "small", model.state_dict(), plan)
    fresh = load_shrunk(tmp_path / "small", build(name, dtype))
    state = fresh.state_dict()
    assert [*state] == [*model.state_dict()]
    assert all(torch.equal(state[n], v) for n, v in model.state_dict().items())
    assert repr(fresh) == repr(model)
    assert torch.equal(fresh(images(dtype)), model(images(dtype)))
    if name == "tied":
        assert fresh.one.weight is fresh.other.weight


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"0": range(5)}, "all 5 slices of 0.bias on axis 0 .* keep a structure"),
        ({"0": [5]}, "structures 0 to 4, not 5"),
        ({"0": [-1, 2]}, "not -1"),
        ({"1": [0]}, "no group '1'"),
    ],
)
def test_bad_choices(chosen: dict[str, list[int]], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        plan_removal(chain(), chain_groups(), chosen)


def test_a_plan_for_another_model_changes_nothing() -> None:
    plan = plan_removal(chain(), chain_groups(), {"0": [1], "3": [2]})
    narrow = chain()
    narrow[5] = nn.Linear(32, 2)
    before = repr(narrow)
    with pytest.raises(ConfigurationError, match="made for another model"):
        plan.apply(narrow)
    assert repr(narrow) == before
    assert narrow[0].weight.shape[0] == 5
    with pytest.raises(ConfigurationError, match="no tensor"):
        plan.apply(nn.Sequential(nn.ReLU()))
    done = chain()
    plan.apply(done)
    with pytest.raises(ConfigurationError, match="applied already"):
        plan.apply(done)
    with pytest.raises(ConfigurationError, match="trace the groups again"):
        plan_removal(done, chain_groups(), {"0": [1]})


def test_a_tensor_of_a_layer_outside() -> None:
    model = chain()
    model.extra = nn.Module()
    model.extra.weight = model[3].weight
    with pytest.raises(ConfigurationError, match=r"extra\.weight are one tensor"):
        plan_removal(model, chain_groups(), {"0": [1]})


def test_what_is_no_plan() -> None:
    with pytest.raises(ConfigurationError, match="version"):
        RemovalPlan.from_dict({"version": 2})
    with pytest.raises(ConfigurationError, match="not a removal plan"):
        RemovalPlan.from_dict({"version": 1, "tensors": {"0.weight": 3}})


OPTIMIZERS: dict[str, Callable[[list[dict[str, object]]], Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-2),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9),
}


def train(
    model: nn.Module, optimizer: Optimizer, steps: int, masks: Masks | None = None
) -> None:
    model.train()
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        inputs = torch.randn(8, 3, 8, 8, generator=generator, dtype=torch.float64)
        labels = torch.randint(4, (8,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), labels).backward()
        if masks is not None:
            masks.apply_to_gradients()
        optimizer.step()
        if masks is not None:
            masks.apply()


def two_groups(model: nn.Module) -> list[dict[str, object]]:
    weights = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() == 1]
    return [{"params": weights}, {"params": others, "weight_decay": 0.0, "lr": 0.02}]


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("network", ["resnet", "mobilenet"])
def test_training_goes_on_as_if_masked(network: str, name: str) -> None:
    pytest.importorskip("torch_pruning")
    masked = build(network)
    groups = trace_groups(masked, images()).groups
    removed = {group.name: [0, group.size - 2] for group in groups}
    optimizer = OPTIMIZERS[name](two_groups(masked))
    train(masked, optimizer, 2)
    masks = Masks(masked_parameters(masked, groups))
    masks.prune(channel_masks(masked, groups, removed))
    masks.apply()
    masks.apply_to_optimizers([optimizer])

    small, moved = copy.deepcopy((masked, optimizer))
    replacements = plan_removal(small, groups, removed).apply(small)
    update_optimizers([moved], replacements)
    order = [p for group in moved.param_groups for p in group["params"]]
    expected = [p for group in two_groups(small) for p in group["params"]]
    assert all(a is b for a, b in zip(order, expected, strict=True))
    assert {*moved.state} <= {*small.parameters()}

    train(masked, optimizer, 3, masks)
    train(small, moved, 3)
    shrink(masked, groups, removed)
    for key, value in small.state_dict().items():
        torch.testing.assert_close(value, masked.state_dict()[key], rtol=0, atol=1e-9)


def test_state_keeps_what_is_not_of_the_parameters_shape() -> None:
    model = chain()
    optimizer = torch.optim.Adam(model.parameters())
    model(images()).sum().backward()
    optimizer.step()
    before = copy.deepcopy(optimizer.state[model[0].weight])
    untouched = optimizer.state[model[5].bias]
    update_optimizers(
        [optimizer], plan_removal(model, chain_groups(), {"0": [2]}).apply(model)
    )
    state = optimizer.state[model[0].weight]
    assert torch.equal(state["step"], before["step"])
    assert torch.equal(state["exp_avg"], before["exp_avg"][[0, 1, 3, 4]])
    assert optimizer.state[model[5].bias] is untouched
    assert len(optimizer.state) == len(list(model.parameters()))


class Factored(torch.optim.SGD):
    """Keeps one number per row."""

    def step(self, closure: Callable[[], Tensor] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["rows"] = parameter.detach().flatten(1).sum(1)


def test_state_that_cannot_be_cut() -> None:
    model = chain()
    good = torch.optim.Adam(model.parameters())
    model(images()).sum().backward()
    good.step()
    factored = Factored([model[0].weight, model[3].weight])
    factored.step()
    replacements = plan_removal(model, chain_groups(), {"0": [2]}).apply(model)
    old = {r.old for r in replacements}
    with pytest.raises(ConfigurationError, match="'rows' of Factored"):
        update_optimizers([good, factored], replacements)
    assert old <= {*good.state}
    lbfgs = torch.optim.LBFGS(list(old))
    with pytest.raises(ConfigurationError, match="LBFGS"):
        update_optimizers([lbfgs], replacements)


class Remembering(nn.Sequential):
    """Keeps its activations, as the correlations of torchvision's RAFT."""

    def forward(self, images: Tensor) -> Tensor:
        first, *rest = self
        self.hidden = [first(images)]
        self.last = nn.Sequential(*rest)(self.hidden[0])
        return self.last


def test_a_network_with_activations_on_it_is_copied() -> None:
    model = Remembering(*chain())
    expected = model(images())
    plan = plan_removal(model, chain_groups(), {})
    smaller = plan.apply_to_copy(model)
    assert model.last is expected
    assert not smaller.last.requires_grad
    torch.testing.assert_close(smaller.hidden[0], model.hidden[0], rtol=0, atol=0)
    torch.testing.assert_close(smaller(images()), expected, rtol=0, atol=0)
