"""Pruned weights stay pruned and exactly zero, and nothing else changes."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    FakeTensorMode,
)
from torch.optim import Optimizer

from lightning_woodfisher.base.errors import ConfigurationError, PruningError
from lightning_woodfisher.weights.masks import Masks

OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.1, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1, foreach=True),
    "fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.1, momentum=0.9, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))


def masks_of(model: nn.Module) -> Masks:
    named = dict(model.named_parameters())
    return Masks({name: named[name] for name in named if name.endswith("weight")})


def marked(shape: tuple[int, ...], *positions: int) -> Tensor:
    gone = torch.zeros(math.prod(shape), dtype=torch.bool)
    gone[list(positions)] = True
    return gone.view(shape)


def is_positive_zero(values: Tensor) -> bool:
    return bool((values == 0).all()) and not bool(values.signbit().any())


def test_fresh_masks_keep_everything() -> None:
    masks = masks_of(network())
    assert bool(masks.kept("0.weight").all())
    assert masks.kept("0.weight").shape == (3, 4)
    assert masks.zeros() == {"0.weight": 0, "1.weight": 0}
    assert masks.sparsity() == 0.0
    assert masks.state_dict() == {}
    assert masks.violations() == {}
    masks.verify()


def test_masks_only_grow() -> None:
    masks = masks_of(network())
    masks.prune({"0.weight": marked((3, 4), 0, 5)})
    masks.prune({"0.weight": marked((3, 4), 5, 7), "1.weight": marked((2, 3), 1)})
    masks.prune({"0.weight": marked((3, 4))})
    assert torch.equal(~masks.kept("0.weight"), marked((3, 4), 0, 5, 7))
    assert masks.zeros() == {"0.weight": 3, "1.weight": 1}
    assert masks.sparsity() == 4 / 18


def test_growing_copies_what_it_is_given() -> None:
    masks = masks_of(network())
    gone = marked((3, 4), 2)
    masks.prune({"0.weight": gone})
    gone.fill_(True)
    masks.kept("0.weight").fill_(False)
    assert torch.equal(~masks.kept("0.weight"), marked((3, 4), 2))
    assert masks.zeros()["0.weight"] == 1


@pytest.mark.parametrize("value", [1.0, -1.0, math.inf, -math.inf, math.nan, -0.0])
def test_pruned_weights_become_positive_zero_and_others_stay(value: float) -> None:
    model = network()
    masks = masks_of(model)
    gone = marked((3, 4), 1, 6)
    with torch.no_grad():
        model[0].weight[gone] = value
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    masks.prune({"0.weight": gone})
    masks.apply()
    assert is_positive_zero(model[0].weight[gone])
    for name, parameter in model.named_parameters():
        kept = ~gone if name == "0.weight" else torch.ones_like(parameter).bool()
        assert torch.equal(parameter[kept], before[name][kept])


def test_names_storages_and_strides_stay() -> None:
    model = nn.Conv2d(4, 3, 3).to(memory_format=torch.channels_last)
    masks = masks_of(model)
    pointer, stride, keys = (
        model.weight.data_ptr(),
        model.weight.stride(),
        list(model.state_dict()),
    )
    gone = torch.rand(model.weight.shape) < 0.5
    masks.prune({"weight": gone})
    masks.apply()
    assert model.weight.data_ptr() == pointer
    assert model.weight.stride() == stride
    assert list(model.state_dict()) == keys
    assert list(model.buffers()) == []
    assert not model._forward_pre_hooks
    assert torch.equal(model.weight == 0, gone)


def test_gradients_of_pruned_weights_become_zero() -> None:
    model = network()
    masks = masks_of(model)
    masks.prune({"0.weight": marked((3, 4), 3), "1.weight": marked((2, 3), 0)})
    model[0].weight.grad = torch.full((3, 4), -math.inf)
    model[0].bias.grad = torch.ones(3)
    masks.apply_to_gradients()
    assert is_positive_zero(model[0].weight.grad[marked((3, 4), 3)])
    assert bool((model[0].weight.grad[~marked((3, 4), 3)] == -math.inf).all())
    assert torch.equal(model[0].bias.grad, torch.ones(3))
    assert model[1].weight.grad is None


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_optimizer_states_of_pruned_weights_become_zero(name: str) -> None:
    model = network()
    optimizer = OPTIMIZERS[name](list(model.parameters()))
    masks = masks_of(model)
    gone = marked((3, 4), 0, 7, 11)

    def train() -> None:
        generator = torch.Generator().manual_seed(1)
        optimizer.zero_grad()
        model(torch.randn(8, 4, generator=generator)).square().sum().backward()
        optimizer.step()

    train()
    full = {
        key: value.clone()
        for key, value in optimizer.state[model[0].weight].items()
        if isinstance(value, Tensor)
    }
    other = {
        key: value.clone()
        for key, value in optimizer.state[model[1].weight].items()
        if isinstance(value, Tensor)
    }
    masks.prune({"0.weight": gone})
    masks.apply()
    masks.apply_to_optimizers([optimizer])
    masked_any = False
    for key, value in optimizer.state[model[0].weight].items():
        if isinstance(value, Tensor) and value.shape == gone.shape:
            masked_any = True
            assert is_positive_zero(value[gone])
            assert torch.equal(value[~gone], full[key][~gone])
        elif isinstance(value, Tensor):
            assert torch.equal(value, full[key])
    assert masked_any
    for key, before in other.items():
        assert torch.equal(optimizer.state[model[1].weight][key], before)
    # Without its states, and with masked gradients, nothing comes back.
    optimizer.zero_grad()
    model(torch.ones(8, 4)).square().sum().backward()
    masks.apply_to_gradients()
    optimizer.step()
    masks.verify()
    train()
    assert masks.violations() == {"0.weight": 3}


def test_an_optimizer_that_has_not_stepped_is_fine() -> None:
    model = network()
    masks = masks_of(model)
    masks.prune({"0.weight": marked((3, 4), 0)})
    masks.apply_to_optimizers([torch.optim.Adam(model.parameters())])
    masks.apply_to_optimizers([])


def test_violations_are_counted_and_named() -> None:
    model = network()
    masks = masks_of(model)
    masks.prune({"0.weight": marked((3, 4), 0, 1), "1.weight": marked((2, 3), 2)})
    masks.apply()
    masks.verify()
    with torch.no_grad():
        model[0].weight[0, 1] = 1e-30
    assert masks.violations() == {"0.weight": 1}
    with pytest.raises(PruningError, match=r"\{'0.weight': 1\}"):
        masks.verify()
    with torch.no_grad():
        model[0].weight[0, 1] = math.nan
    assert masks.violations() == {"0.weight": 1}


def test_zeros_are_taken_for_pruned() -> None:
    model = network()
    with torch.no_grad():
        model[0].weight[1] = torch.tensor([0.0, -0.0, 1e-45, 1.0])
    masks = masks_of(model)
    masks.prune({"0.weight": marked((3, 4), 0)})
    masks.prune_zeros()
    assert torch.equal(~masks.kept("0.weight"), marked((3, 4), 0, 4, 5))
    assert masks.zeros()["1.weight"] == 0


def test_state_dict_round_trip() -> None:
    masks = masks_of(network())
    gone = marked((3, 4), 0, 5)
    masks.prune({"0.weight": gone})
    state = masks.state_dict()
    assert {name: type(value) for name, value in state.items()} == {"0.weight": Tensor}
    assert torch.equal(state["0.weight"], ~gone)
    restored = masks_of(network())
    restored.prune({"1.weight": marked((2, 3), 0)})
    restored.load_state_dict(state)
    assert restored.zeros() == {"0.weight": 2, "1.weight": 0}
    state["0.weight"].fill_(False)
    assert masks.zeros() == restored.zeros()


def test_a_state_that_does_not_fit_is_refused_and_changes_nothing() -> None:
    masks = masks_of(network())
    masks.prune({"0.weight": marked((3, 4), 0)})
    good = ~marked((2, 3), 1)
    with pytest.raises(ConfigurationError, match=r"'2.weight'.*selection of that run"):
        masks.load_state_dict({"1.weight": good, "2.weight": good})
    with pytest.raises(ConfigurationError, match=r"shape \(2, 3\).*\(3, 4\)"):
        masks.load_state_dict({"1.weight": good, "0.weight": good})
    assert masks.zeros() == {"0.weight": 1, "1.weight": 0}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_precisions(dtype: torch.dtype) -> None:
    model = network().to(dtype)
    masks = masks_of(model)
    masks.prune({"0.weight": marked((3, 4), 0)})
    masks.apply()
    masks.verify()
    assert model[0].weight.dtype == dtype
    assert is_positive_zero(model[0].weight[0, :1])


def test_masks_follow_their_weights_to_another_device() -> None:
    """Lightning moves the module to the CPU after training, before on_fit_end."""
    # Fake tensors have a device and no values, and refuse operations on two devices. They
    # need no GPU.
    with FakeTensorMode():
        weight = nn.Parameter(torch.ones(3, 4))
        weight.grad = torch.ones(3, 4)
        masks = Masks({"weight": weight})
        # Marked during training; prune() would need values.
        masks._kept["weight"] = torch.ones(3, 4, dtype=torch.bool, device="cuda")
        assert masks.kept("weight").device.type == "cpu"
        masks.apply()
        masks.apply_to_gradients()
        masks.apply_to({"weight": torch.ones(3, 4, device="cuda")})
        with pytest.raises(DataDependentOutputException):
            masks.verify()
