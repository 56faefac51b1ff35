"""One pruning step from end to end, on plain PyTorch models."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune as torch_prune
from devices import DEVICE
from small_task import samples
from step_options import in_step
from torch import Tensor, nn
from torch.utils.data import (
    DataLoader,
    IterableDataset,
    TensorDataset,
    default_collate,
)
from trained_digits import trained_digits

from lightning_woodfisher import (
    ConfigurationError,
    FisherConfig,
    PruningError,
    PruningReport,
    SelectionConfig,
    StepConfig,
    prune,
)
from lightning_woodfisher.base.types import ModelMode
from lightning_woodfisher.criteria.obs import Update
from lightning_woodfisher.data.losses import FunctionLoss
from lightning_woodfisher.distributed.communicator import Communicator
from lightning_woodfisher.pruning.config import PruningConfig, check_sparsity
from lightning_woodfisher.pruning.pruner import Pruner
from lightning_woodfisher.pruning.report import SALIENCY_SHARES
from lightning_woodfisher.weights.layers import prunable_parameters
from lightning_woodfisher.weights.masks import Masks

Batch = tuple[Tensor, Tensor]

UPDATES: tuple[Update, ...] = ("joint", "independent", "none")
FISHER = FisherConfig(num_gradients=24, gradient_batch_size=4, block_size=20)
FULL = FisherConfig(num_gradients=24, gradient_batch_size=4, block_size=None)
DUAL = FisherConfig(
    num_gradients=24, gradient_batch_size=4, block_size=50, engine="dual"
)


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(8, 16),
        nn.BatchNorm1d(16),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Linear(16, 4),
    ).to(DEVICE)


def convnet() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(24, 4)
    ).to(DEVICE)


def batches(number: int = 24) -> list[Batch]:
    inputs, labels = samples(4 * number).tensors
    return list(zip(inputs.split(4), labels.split(4), strict=True))


def cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
    device = next(model.parameters()).device
    inputs, labels = (tensor.to(device) for tensor in batch)
    return F.cross_entropy(model(inputs).float(), labels)


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: p.detach().cpu()
        for name, p in model.named_parameters()
        if p.dim() > 1 and p.requires_grad
    }


def zeros_of(model: nn.Module) -> dict[str, int]:
    return {name: int((w == 0).sum()) for name, w in weights_of(model).items()}


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: value.detach().cpu().clone() for name, value in model.state_dict().items()
    }


def same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Equal also in the sign of zeros."""
    return list(a) == list(b) and all(
        torch.equal(a[key], b[key]) and torch.equal(a[key].signbit(), b[key].signbit())
        for key in a
    )


def pruned(
    model: nn.Module, data: Any = None, loss: Any = cross_entropy, **options: Any
) -> PruningReport:
    options = {"target_sparsity": 0.7, "fisher": FISHER, **options}
    return prune(
        model,
        samples() if data is None else data,
        loss,
        **in_step(**options),
    )


# --- the contract of a step -----------------------------------------------------------


@pytest.mark.parametrize("target", [0.0, 0.33, 0.5, 0.9])
@pytest.mark.parametrize("criterion", ["woodfisher", "magnitude"])
@pytest.mark.parametrize("fisher", [FISHER, DUAL, FULL], ids=["primal", "dual", "full"])
def test_global_scope_prunes_the_exact_number(
    target: float, criterion: str, fisher: FisherConfig
) -> None:
    model = mlp()
    report = pruned(model, target_sparsity=target, criterion=criterion, fisher=fisher)
    assert sum(zeros_of(model).values()) == round(target * 192)
    assert {layer.name: layer.zeros_after for layer in report.layers} == zeros_of(model)
    assert (report.weights, report.zeros) == (192, round(target * 192))


@pytest.mark.parametrize("target", [0.0, 0.33, 0.5, 0.9])
@pytest.mark.parametrize("criterion", ["woodfisher", "magnitude"])
@pytest.mark.parametrize("recompute_steps", [1, 3])
def test_layer_scope_prunes_the_exact_number_in_every_layer(
    target: float, criterion: str, recompute_steps: int
) -> None:
    model = mlp()
    report = pruned(
        model,
        target_sparsity=target,
        criterion=criterion,
        recompute_steps=recompute_steps,
        selection=SelectionConfig(scope="layer"),
    )
    expected = {"0.weight": round(target * 128), "4.weight": round(target * 64)}
    assert zeros_of(model) == expected
    assert {layer.name: layer.zeros_after for layer in report.layers} == expected


@pytest.mark.parametrize("update", UPDATES)
def test_zeros_are_positive_and_everything_else_stays(update: Update) -> None:
    model = mlp()
    before = bits(model)
    parameters = dict(model.named_parameters())
    pointers = {name: p.data_ptr() for name, p in parameters.items()}
    gradient = torch.ones(16, device=DEVICE)
    model[0].bias.grad = gradient
    flags = [module.training for module in model.modules()]
    torch.manual_seed(4)
    random.seed(4)
    states = torch.get_rng_state(), random.getstate()
    pruned(model, update=update)
    after = bits(model)
    assert list(after) == list(before)
    for name in before:
        if name in weights_of(model):
            zeros = after[name][after[name] == 0]
            assert not bool(zeros.signbit().any())
            assert not torch.equal(after[name], before[name])
        else:
            assert torch.equal(after[name], before[name])
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == pointers
    assert all(p is parameters[name] for name, p in model.named_parameters())
    assert model[0].bias.grad is gradient
    assert model[0].weight.grad is None
    assert [module.training for module in model.modules()] == flags
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("criterion", ["woodfisher", "magnitude"])
def test_without_update_the_kept_weights_keep_their_bits(criterion: str) -> None:
    model = mlp()
    before = bits(model)
    pruned(model, update="none", criterion=criterion)
    for name, weight in weights_of(model).items():
        kept = weight != 0
        assert torch.equal(weight[kept], before[name][kept])


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_same_seed_same_bits(mode: ModelMode) -> None:
    fisher = FisherConfig(
        num_gradients=24, gradient_batch_size=4, block_size=20, model_mode=mode
    )

    def run(seed: int) -> dict[str, Tensor]:
        model = mlp()
        torch.manual_seed(random.randrange(1000))
        pruned(model, fisher=fisher, seed=seed)
        return bits(model)

    first = run(0)
    assert same_bits(first, run(0))
    assert not same_bits(first, run(1))


def test_the_three_updates_share_the_mask_and_joint_predicts_the_least() -> None:
    models = {update: mlp() for update in UPDATES}
    reports = {
        u: pruned(m, update=u, seed=2, line_search=False) for u, m in models.items()
    }
    masks = [
        torch.cat([w.reshape(-1) == 0 for w in weights_of(m).values()])
        for m in models.values()
    ]
    assert torch.equal(masks[0], masks[1])
    assert torch.equal(masks[0], masks[2])
    rises = {update: reports[update].predicted_increase or 0.0 for update in UPDATES}
    assert 0 < rises["joint"] < min(rises["independent"], rises["none"])


def test_engines_and_full_fisher_agree_where_they_are_the_same_matrix() -> None:
    def run(**options: Any) -> dict[str, Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 4))
        fisher = FisherConfig(num_gradients=24, gradient_batch_size=4, **options)
        pruned(model, fisher=fisher)
        return weights_of(model)

    primal = run(block_size=32, engine="primal")["0.weight"]
    for other in (run(block_size=32, engine="dual"), run(block_size=None)):
        assert torch.equal(other["0.weight"] == 0, primal == 0)
        assert torch.allclose(other["0.weight"], primal, rtol=1e-5, atol=1e-7)


def test_magnitude_is_that_of_torch() -> None:
    model, other = mlp(), mlp()
    pruned(model, criterion="magnitude")
    torch_prune.global_unstructured(
        [(other[0], "weight"), (other[4], "weight")],
        pruning_method=torch_prune.L1Unstructured,
        amount=round(0.7 * 192),
    )
    assert torch.equal(model[0].weight, other[0].weight)
    assert torch.equal(model[4].weight, other[4].weight)


# --- parts ----------------------------------------------------------------------------


@pytest.mark.parametrize("reuse", [False, True])
def test_quantiles_are_those_of_what_the_last_part_chose_from(reuse: bool) -> None:
    model = mlp()
    weights = {n: w.clone() for n, w in model.named_parameters() if w.dim() == 2}
    options = {"recompute_steps": 2, "reuse_gradients": reuse, "update": "none"}
    report = pruned(model, criterion="magnitude", target_sparsity=0.5, **options)
    magnitudes = {n: w.detach().double().abs().flatten() for n, w in weights.items()}
    # The first part keeps the share √½.
    gone = round((1 - 0.5**0.5) * sum(len(m) for m in magnitudes.values()))
    limit = torch.cat([*magnitudes.values()]).sort().values[gone]
    for layer in report.layers:
        left = magnitudes[layer.name]
        left = left[left >= limit].sort().values.tolist()
        ranks = [math.ceil(share * len(left)) for share in SALIENCY_SHARES]
        assert list(layer.saliency_quantiles) == [left[rank - 1] for rank in ranks]


@pytest.mark.parametrize("criterion", ["woodfisher", "magnitude"])
def test_parts_go_geometrically_and_land_exactly(criterion: str) -> None:
    model = mlp()
    seen: list[int] = []

    def loss(network: nn.Module, batch: Batch) -> Tensor:
        seen.append(sum(zeros_of(network).values()))
        return cross_entropy(network, batch)

    report = pruned(
        model,
        loss=loss,
        target_sparsity=0.9,
        recompute_steps=4,
        criterion=criterion,
        measure_loss=True,
    )
    kept = [0.1 ** (part / 4) for part in range(4)]
    inner = [round((1 - share) * 192) for share in kept]
    assert sorted(set(seen)) == [*inner, round(0.9 * 192)]
    assert seen == sorted(seen)
    assert sum(zeros_of(model).values()) == round(0.9 * 192)
    assert report.stages == 4


def test_parts_start_from_the_zeros_that_are_there() -> None:
    model = mlp()
    pruned(model, target_sparsity=0.5)
    seen: list[int] = []

    def loss(network: nn.Module, batch: Batch) -> Tensor:
        seen.append(sum(zeros_of(network).values()))
        return cross_entropy(network, batch)

    pruned(model, loss=loss, target_sparsity=0.875, recompute_steps=2)
    # From one half to one eighth of the weights, by way of one quarter.
    assert sorted(set(seen)) == [96, 144, 168]


def uneven() -> nn.Sequential:
    """One layer of 128 weights that is almost gone, and a dense one of 64."""
    model = mlp()
    with torch.no_grad():
        model[0].weight.view(-1)[:126] = 0.0
    return model


@pytest.mark.parametrize("target", [0.5, 0.75])
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("criterion", ["woodfisher", "magnitude"])
def test_a_sparse_layer_does_not_count_for_the_others(
    target: float, parts: int, criterion: str
) -> None:
    model, seen = uneven(), []

    def loss(network: nn.Module, batch: Batch) -> Tensor:
        seen.append(zeros_of(network))
        return cross_entropy(network, batch)

    masks = Masks(prunable_parameters(model))
    masks.prune_zeros()
    config = PruningConfig(
        criterion,
        FISHER,
        SelectionConfig(scope="layer"),
        StepConfig(recompute_steps=parts),
    )
    # A step before the last one: the final target is above the sparsity of the layer.
    report = Pruner(masks, config, Communicator(DEVICE)).step(
        FunctionLoss(model, batches(), loss), target, final_sparsity=0.99
    )
    expected = {"0.weight": 126, "4.weight": round(target * 64)}
    assert zeros_of(model) == expected
    assert [layer.zeros_after for layer in report.layers] == [*expected.values()]
    # The kept share of the dense layer falls geometrically, and that of the other stays.
    shares = [(1 - target) ** (part / parts) for part in range(parts + 1)]
    assert {found["4.weight"] for found in seen} == {
        round((1 - s) * 64) for s in shares
    }
    assert {found["0.weight"] for found in seen} == {126}


@pytest.mark.parametrize(
    "selection",
    [
        SelectionConfig(scope="layer"),
        SelectionConfig(layer_targets={"0.weight": 0.6}),
        SelectionConfig(scope="layer", layer_targets={"0.weight": 0.6}),
    ],
)
def test_a_layer_with_more_zeros_than_its_target_is_refused(
    selection: SelectionConfig,
) -> None:
    model = uneven()
    before = bits(model)
    with pytest.raises(ConfigurationError, match=r"0\.weight \(0\.9844, target 0\.6\)"):
        # In all layers together there are fewer zeros than wanted.
        pruned(
            model,
            target_sparsity=0.6 if selection.scope == "layer" else 0.8,
            selection=selection,
        )
    assert same_bits(bits(model), before)


# --- zeros of an initialization ---------------------------------------------------------


def fresh(share: float) -> tuple[nn.Sequential, Masks]:
    """A network whose last layer has that share of zeros, and masks without any."""
    model = mlp()
    with torch.no_grad():
        flat = model[4].weight.view(-1)
        flat[: round(share * len(flat))] = 0.0
    return model, Masks(prunable_parameters(model))


def step_of(
    model: nn.Module,
    masks: Masks,
    target: float,
    final: float,
    criterion: str = "magnitude",
    **selection: Any,
) -> PruningReport:
    config = PruningConfig(criterion, FISHER, SelectionConfig(**selection))
    source = FunctionLoss(model, batches(), cross_entropy)
    return Pruner(masks, config, Communicator(DEVICE)).step(source, target, 0, final)


@pytest.mark.parametrize(
    "selection",
    [
        {},
        {"scope": "layer"},
        {"layer_targets": {"0.weight": 0.5}},
        {"layer_targets": {"4.weight": 0.5}},
        {"max_layer_sparsity": 0.9},
        {"pattern": "2:4"},
    ],
    ids=str,
)
@pytest.mark.parametrize("share", [0.995, 1.0])
def test_a_layer_of_zeros_is_not_pruned_and_caught_up_later(
    selection: dict[str, Any], share: float
) -> None:
    model, masks = fresh(share)
    with pytest.warns(UserWarning, match=r"not pruned in this step.* 4\.weight: "):
        report = step_of(model, masks, 0.5, 0.5, **selection)
    assert list(report.left_dense) == ["4.weight"]
    assert report.missing == 32
    # The others reach the sparsity without it.
    assert masks.zeros() == {"0.weight": 64, "4.weight": 0}
    with torch.no_grad():
        model[4].weight.copy_(torch.randn(4, 16))
    step_of(model, masks, 0.5, 0.5, **selection)
    assert sum(masks.zeros().values()) == 96


def test_a_layer_with_many_zeros_is_pruned() -> None:
    model, masks = fresh(0.9)
    step_of(model, masks, 0.5, 0.5)
    assert masks.zeros()["4.weight"] >= 57


def test_zeros_that_masks_explain_are_no_initialization() -> None:
    model, masks = fresh(1.0)
    masks.prune({"4.weight": torch.arange(64).view(4, 16) > 0})
    with torch.no_grad():
        model[4].weight.view(-1)[0] = 1.0
    step_of(model, masks, 0.6, 0.9)
    assert masks.sparsity() == pytest.approx(0.6, abs=0.003)


class Adapted(nn.Module):
    """A linear layer beside a LoRA adapter, whose second factor starts at zero."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.down = nn.Linear(8, 4), nn.Linear(8, 2, bias=False)
        self.up = nn.Linear(2, 4, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.base(inputs) + self.up(self.down(inputs))


@pytest.mark.parametrize(
    "criterion", ["woodfisher", "diagonal_fisher", "woodtaylor", "magnitude"]
)
def test_a_layer_without_gradient_is_not_pruned(criterion: str) -> None:
    torch.manual_seed(0)
    model = Adapted().to(DEVICE)
    masks = Masks(prunable_parameters(model))
    with pytest.warns(
        UserWarning, match=r"not pruned in this step.*up\.weight: "
    ) as told:
        report = step_of(model, masks, 0.5, 0.5, criterion)
    zeros = masks.zeros()
    if criterion == "magnitude":
        assert zeros["base.weight"] + zeros["down.weight"] == 24
        return
    # The gradient of the first factor is a product with the second.
    assert "down.weight: all gradients of its weights are zero" in str(told[0].message)
    assert zeros == {"base.weight": 16, "down.weight": 0, "up.weight": 0}
    assert report.missing == 12
    again = PruningReport.from_dict(report.to_dict())
    assert again.left_dense == report.left_dense


def test_a_layer_without_gradient_is_pruned_by_layer_in_a_later_stage() -> None:
    torch.manual_seed(0)
    model = Adapted()
    masks = Masks(prunable_parameters(model))
    config = PruningConfig(
        "woodfisher", FISHER, SelectionConfig("layer"), StepConfig(recompute_steps=2)
    )
    pruner = Pruner(masks, config, Communicator())
    source = FunctionLoss(model, batches(), cross_entropy)
    with pytest.warns(UserWarning, match="not pruned in this step"):
        pruner.step(source, 0.25, 0, 0.5)
    assert masks.zeros() == {"base.weight": 8, "down.weight": 0, "up.weight": 0}
    with torch.no_grad():
        model.up.weight.normal_()
    assert not pruner.step(source, 0.5, 1, 0.5).left_dense
    assert masks.zeros() == {"base.weight": 16, "down.weight": 8, "up.weight": 4}


def test_nothing_but_zeros_leaves_the_network_as_it_is() -> None:
    model, masks = fresh(1.0)
    model[0].weight.data.zero_()
    with pytest.warns(UserWarning, match=r"0\.weight: .*4\.weight: "):
        report = step_of(model, masks, 0.5, 0.5)
    assert report.sparsity == 0.0
    assert report.model_sparsity == report.model_zeros / report.model_parameters > 0.8


def test_the_sparsity_of_the_whole_model_counts_everything_once() -> None:
    model = mlp()
    model.add_module("tied", nn.Linear(8, 16))
    model.tied.weight = model[0].weight
    model.tied.bias.requires_grad_(False).zero_()
    model.forward = lambda x: nn.Sequential.forward(model[:5], x)
    report = pruned(model, target_sparsity=0.5)
    everything = list(model.parameters())
    zeros = sum(int((p == 0).sum()) for p in everything)
    assert report.model_zeros == zeros >= 96 + 16
    assert report.model_parameters == sum(p.numel() for p in everything)
    assert report.metrics()["pruning/model_sparsity"] == report.model_sparsity


def test_more_zeros_than_wanted_in_every_layer_are_refused() -> None:
    model = uneven()
    with torch.no_grad():
        model[4].weight.view(-1)[:40] = 0.0
    with pytest.raises(ConfigurationError, match=r"0\.6 is below the 0\.8646"):
        pruned(model, target_sparsity=0.6, selection=SelectionConfig(scope="layer"))


def test_parts_take_new_gradients() -> None:
    taken: list[tuple[float, ...]] = []

    def loss(network: nn.Module, batch: Batch) -> Tensor:
        taken.append(tuple(batch[0].flatten().tolist()))
        return cross_entropy(network, batch)

    fisher = dataclasses.replace(FISHER, collection="loop")
    pruned(mlp(), loss=loss, fisher=fisher, recompute_steps=2, measure_loss=False)
    # Each part has 24 gradients, and 4 trials in two batches of half of the samples.
    assert len(taken) == 2 * (24 + 8)
    assert set(taken[:24]) != set(taken[32:56])


# --- whole or absent ------------------------------------------------------------------


def failing_loss(at: int, error: BaseException) -> Callable[[nn.Module, Batch], Tensor]:
    calls = iter(range(10_000))

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        if next(calls) == at:
            raise error
        return cross_entropy(model, batch)

    return loss


# A part takes 24 gradients and measures 24 losses: both places, in both parts.
@pytest.mark.parametrize("at", [0, 23, 30, 48 + 11, 72 + 23])
@pytest.mark.parametrize("error", [LookupError("lost"), KeyboardInterrupt("stop")])
def test_a_failure_leaves_weights_and_masks_as_they_were(
    at: int, error: BaseException
) -> None:
    model = mlp()
    with torch.no_grad():
        model[0].weight[0, 0] = -0.0
        model[0].weight[0, 1] = 0.0
    masks = Masks(prunable_parameters(model))
    masks.prune_zeros()
    pruner = Pruner(
        masks,
        PruningConfig(fisher=FISHER, step=StepConfig(recompute_steps=2)),
        Communicator(DEVICE),
    )
    before, kept = bits(model), masks.state_dict()
    source = FunctionLoss(model, batches(), failing_loss(at, error))
    with pytest.raises(type(error), match=str(error)):
        pruner.step(source, 0.7)
    assert same_bits(bits(model), before)
    assert list(masks.state_dict()) == list(kept)
    assert all(torch.equal(masks.state_dict()[name], kept[name]) for name in kept)
    assert all(module.training for module in model.modules())
    # And the step can be done again, as if nothing had happened.
    pruner.step(FunctionLoss(model, batches(), cross_entropy), 0.7)
    other = mlp()
    with torch.no_grad():
        other[0].weight[0, :2] = 0.0
    pruned(other, batches(), recompute_steps=2)
    assert torch.equal(model[4].weight, other[4].weight)


def test_an_update_that_is_not_finite_is_an_error_and_changes_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def compensate(self: Any, weights: Tensor, removed: Tensor) -> Tensor:
        change = torch.where(removed, -weights, 0.0)
        change[(~removed).nonzero()[:3]] = torch.inf
        return change

    model = mlp()
    before = bits(model)
    magnitude = "lightning_woodfisher.criteria.magnitude.Magnitude"
    monkeypatch.setattr(f"{magnitude}.compensate", compensate)
    monkeypatch.setattr(f"{magnitude}.compensates", True)
    with pytest.raises(PruningError, match="3 updated weights are not finite"):
        pruned(model, criterion="magnitude")
    assert same_bits(bits(model), before)


@pytest.mark.parametrize(
    ("dtype", "overflows"), [(torch.float16, True), (torch.float32, False)]
)
def test_an_update_that_overflows_the_dtype_of_the_weights_is_an_error(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, overflows: bool
) -> None:
    def compensate(self: Any, weights: Tensor, removed: Tensor) -> Tensor:
        change = torch.where(removed, -weights, 0.0)
        change[(~removed).nonzero()[:3]] = 1e5
        return change

    model = mlp().to(dtype)
    before = bits(model)
    magnitude = "lightning_woodfisher.criteria.magnitude.Magnitude"
    monkeypatch.setattr(f"{magnitude}.compensate", compensate)
    monkeypatch.setattr(f"{magnitude}.compensates", True)
    options: dict[str, Any] = {
        "criterion": "magnitude",
        "measure_loss": False,
        "line_search": False,
    }
    if not overflows:
        assert pruned(model, **options).zeros == round(0.7 * 192)
        return
    with pytest.raises(PruningError, match="3 updated weights are not finite"):
        pruned(model, **options)
    assert same_bits(bits(model), before)


# --- step after step ------------------------------------------------------------------


@pytest.mark.parametrize("nonfinite", [1, 2])
def test_a_rehearsal_takes_a_gradient_and_those_that_may_be_left_out(
    nonfinite: int,
) -> None:
    model = mlp()
    fisher = dataclasses.replace(FISHER, max_nonfinite=nonfinite)
    masks = Masks(prunable_parameters(model))
    pruner = Pruner(masks, PruningConfig(fisher=fisher), Communicator(DEVICE))
    before = bits(model)
    enough = 4 * (1 + nonfinite)
    pruner.rehearse(FunctionLoss(model, samples(enough), cross_entropy))
    assert same_bits(bits(model), before)
    assert not any(masks.zeros().values())
    with pytest.raises(ConfigurationError, match=f"needs {enough} samples"):
        pruner.rehearse(FunctionLoss(model, samples(enough - 1), cross_entropy))


def test_a_second_step_keeps_the_zeros_of_the_first() -> None:
    model = mlp()
    pruned(model, target_sparsity=0.5)
    first = {name: w == 0 for name, w in weights_of(model).items()}
    report = pruned(model, target_sparsity=0.8, seed=1)
    for name, weight in weights_of(model).items():
        assert bool((weight[first[name]] == 0).all())
    assert sum(zeros_of(model).values()) == round(0.8 * 192)
    assert sum(layer.zeros_before for layer in report.layers) == 96


@pytest.mark.parametrize("fisher", [FISHER, DUAL, FULL], ids=["primal", "dual", "full"])
def test_the_same_sparsity_again_changes_nothing(fisher: FisherConfig) -> None:
    model = mlp()
    pruned(model, fisher=fisher)
    before = bits(model)
    report = pruned(model, fisher=fisher)
    assert same_bits(bits(model), before)
    assert report.threshold is None
    assert report.predicted_increase == 0.0
    assert report.measured_increase == pytest.approx(0.0, abs=1e-6)


def test_less_sparsity_than_there_is_is_refused() -> None:
    model = mlp()
    pruned(model, target_sparsity=0.7)
    before = bits(model)
    with pytest.raises(ConfigurationError, match=r"sparsity 0.6 is below the 0.6979"):
        pruned(model, target_sparsity=0.6)
    assert same_bits(bits(model), before)


@pytest.mark.parametrize("fisher", [FISHER, DUAL, FULL], ids=["primal", "dual", "full"])
@pytest.mark.parametrize("criterion", ["woodfisher", "magnitude"])
def test_a_target_that_rounds_to_everything(
    fisher: FisherConfig, criterion: str
) -> None:
    model = nn.Sequential(nn.Linear(8, 4))
    for _ in range(2):
        report = pruned(
            model,
            target_sparsity=0.999,
            fisher=fisher,
            criterion=criterion,
            recompute_steps=2,
        )
        assert report.sparsity == 1.0
        assert zeros_of(model) == {"0.weight": 32}


# --- what is reported -----------------------------------------------------------------


def test_report_of_a_step() -> None:
    model = mlp()
    dense = copy.deepcopy(model).eval()
    data = batches()
    report = pruned(model, data)
    losses = [
        torch.stack([cross_entropy(m.eval(), b) for b in data]).mean().item()
        for m in (dense, model)
    ]
    assert report.loss_before == pytest.approx(losses[0], rel=1e-6)
    assert report.loss_after == pytest.approx(losses[1], rel=1e-6)
    assert report.measured_increase == pytest.approx(losses[1] - losses[0], abs=1e-6)
    assert report.criterion == "woodfisher"
    assert report.damping == FISHER.damping
    assert report.raised_damping == {}
    assert report.target_sparsity == 0.7
    assert (report.num_gradients, report.stages, report.world_size) == (24, 1, 1)
    assert report.bytes_exchanged == 0
    # 128 = 6 · 20 + 8 and 64 = 3 · 20 + 4 weights; B <= N: matrices in float64.
    assert report.fisher_bytes == ((9 * 20**2 + 8**2 + 4**2) * 4,)
    assert [layer.shape for layer in report.layers] == [(16, 8), (4, 16)]
    layers = [layer.predicted_increase or 0.0 for layer in report.layers]
    assert sum(layers) == pytest.approx(report.predicted_increase)
    assert report.threshold == max(layer.threshold or 0.0 for layer in report.layers)
    assert (report.epoch, report.step) == (None, None)
    assert {"collect", "accumulate", "factorize", "select", "update"} <= set(
        report.seconds
    )
    assert PruningReport.from_dict(report.to_dict()) == report


def test_threshold_of_magnitude_is_the_largest_weight_that_went() -> None:
    model = mlp()
    before = weights_of(copy.deepcopy(model))
    report = pruned(model, criterion="magnitude", target_sparsity=0.5)
    for layer in report.layers:
        gone = before[layer.name][weights_of(model)[layer.name] == 0].abs()
        assert layer.threshold == float(gone.max())
    assert report.damping is None
    assert report.predicted_increase is None
    assert report.fisher_bytes == (0,)


def test_losses_are_measured_on_request_only() -> None:
    calls: list[int] = []

    def loss(network: nn.Module, batch: Batch) -> Tensor:
        calls.append(1)
        return cross_entropy(network, batch)

    report = pruned(mlp(), batches(), loss, measure_loss=False, line_search=False)
    assert len(calls) == 24
    assert report.loss_after is None
    assert report.measured_increase is None
    assert report.loss_before is not None
    calls.clear()
    magnitude = pruned(
        mlp(), batches(), loss, measure_loss=False, criterion="magnitude"
    )
    assert calls == []
    assert magnitude.loss_before is None


@pytest.mark.parametrize("criterion", ["woodfisher", "magnitude"])
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("number", [24, 23])
def test_losses_are_measured_on_the_samples_of_the_gradients(
    number: int, mode: ModelMode, criterion: str
) -> None:
    """They may come in larger batches, but in the order of the gradients."""
    taken: dict[bool, list[list[float]]] = {True: [], False: []}

    def loss(network: nn.Module, batch: Batch) -> Tensor:
        taken[torch.is_grad_enabled()] += batch[0].tolist()
        return cross_entropy(network, batch)

    fisher = FisherConfig(
        num_gradients=number, gradient_batch_size=4, block_size=20, model_mode=mode
    )
    report = pruned(mlp(), loss=loss, fisher=fisher, criterion=criterion, seed=3)
    measured = taken[False]
    # Gradients that are computed together are checked with some of them alone.
    gradients = [list(row) for row in dict.fromkeys(map(tuple, taken[True]))]
    if mode == "train":
        assert gradients == taken[True]
    assert len(gradients) == (number * 4 if criterion == "woodfisher" else 0)
    if (mode, criterion, number) == ("eval", "woodfisher", 24):
        # A group of 12 mini-batches is compared with the mean of their losses.
        assert measured[: 12 * 4] == measured[12 * 4 :][: 12 * 4]
        measured = measured[12 * 4 :]
    once = measured[: number * 4]
    assert once in (gradients, measured[number * 4 :])
    assert measured == once * (len(measured) // len(once))
    data = samples()
    index = [data.tensors[0].tolist().index(row) for row in once]
    assert len(set(index)) == number * 4
    if mode == "eval":
        dense = mlp().eval()
        batch = data.tensors[0][index], data.tensors[1][index]
        expected = float(cross_entropy(dense, batch).detach())
        assert report.loss_before == pytest.approx(expected)


def test_raised_damping_names_the_block() -> None:
    model = nn.Sequential(nn.Linear(8, 16, bias=False), nn.Linear(16, 4, bias=False))
    # Two equal inputs of huge size: the columns of their weights cannot be told apart.
    inputs = torch.randn(96, 8, generator=torch.Generator().manual_seed(0))
    inputs[:, :2] = 1e6
    labels = torch.arange(96) % 4
    fisher = FisherConfig(
        num_gradients=24, gradient_batch_size=4, block_size=8, damping=1e-9
    )

    def loss(network: nn.Module, batch: Batch) -> Tensor:
        return (network(batch[0]).mean(dim=0) * 1e3).sum() + 0 * batch[1].sum()

    report = pruned(model, TensorDataset(inputs, labels), loss, fisher=fisher)
    assert "0.weight from weight 0" in report.raised_damping
    assert all(value > 1e-9 for value in report.raised_damping.values())
    assert set(report.raised_damping) <= {
        *(f"0.weight from weight {8 * i}" for i in range(16)),
        *(f"1.weight from weight {128 + 8 * i}" for i in range(8)),
    }


def test_progress_is_shown() -> None:
    events: list[Any] = []

    @contextlib.contextmanager
    def progress(title: str, total: int) -> Iterator[Callable[[int], object]]:
        events.append((title, total))
        yield events.append
        events.append("done")

    report = pruned(mlp(), progress=progress, recompute_steps=2)
    assert events == [("Collecting gradients", 24), *[8] * 3, "done"] * 2
    assert report.collection == "per-sample"
    events.clear()
    report = pruned(mlp(), batches(), progress=progress)
    assert events == [("Collecting gradients", 24), *[1] * 24, "done"]
    assert report.collection == "loop: the data comes in batches"
    assert pruned(mlp(), criterion="magnitude").collection is None


# --- data and models of every kind ----------------------------------------------------


class Stream(IterableDataset[Any]):
    """The samples of :func:`batches` one by one."""

    def __iter__(self) -> Iterator[Any]:
        return iter(samples(96))


def test_lists_generators_and_loaders_of_batches_give_the_same() -> None:
    results = []
    for data in (
        batches(),
        (batch for batch in batches()),
        iter(batches(30)),
        DataLoader(Stream(), batch_size=4),
    ):
        model = mlp()
        report = pruned(model, data)
        results.append((bits(model), report.loss_before, report.loss_after))
    for result in results[1:]:
        assert same_bits(result[0], results[0][0])
        assert result[1:] == results[0][1:]


class Shuffled(IterableDataset[Batch]):
    """An iterable that shuffles with the global generator whenever it is opened."""

    def __iter__(self) -> Iterator[Batch]:
        given = batches()
        return (given[i] for i in torch.randperm(len(given)))


def test_a_shuffling_stream_measures_the_samples_of_the_gradients() -> None:
    taken: list[tuple[float, ...]] = []

    def loss(network: nn.Module, batch: Batch) -> Tensor:
        taken.append(tuple(batch[0].flatten().tolist()))
        return cross_entropy(network, batch)

    pruned(mlp(), Shuffled(), loss)
    # Gradients, and four trials: the last measurement is one of them.
    assert len(taken) == 5 * 24
    assert taken == 5 * taken[:24]
    assert taken[0] != tuple(batches()[0][0].flatten().tolist())


@pytest.mark.parametrize("shuffle", [True, False])
def test_of_a_loader_only_the_dataset_and_collate_fn_count(shuffle: bool) -> None:
    """Its own order would be another one on every rank."""
    sizes = []

    def collate(items: list[Any]) -> Any:
        sizes.append(len(items))
        return default_collate(items)

    expected, model = mlp(), mlp()
    pruned(expected, samples())
    loader = DataLoader(samples(), batch_size=7, shuffle=shuffle, collate_fn=collate)
    pruned(model, loader)
    assert same_bits(bits(model), bits(expected))
    assert all(size % 4 == 0 for size in sizes)


def test_a_generator_feeds_part_after_part() -> None:
    model = mlp()
    report = pruned(model, (b for b in batches(48)), recompute_steps=2)
    assert report.zeros == round(0.7 * 192)
    left = mlp()
    with pytest.raises(ConfigurationError, match=r"ended after 23 .*num_gradients=24"):
        pruned(left, (b for b in batches(47)), recompute_steps=2)
    assert same_bits(bits(left), bits(mlp()))


@pytest.mark.parametrize("number", [0, 1, 23])
def test_data_that_ends_early_is_refused(number: int) -> None:
    model = mlp()
    with pytest.raises(ConfigurationError, match=f"ended after {number} batches"):
        pruned(model, batches(24)[:number])
    assert same_bits(bits(model), bits(mlp()))


def test_a_dataset_that_is_too_small_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"needs 96 samples.* has 95"):
        pruned(mlp(), samples(95))


@pytest.mark.parametrize("criterion", ["woodfisher", "magnitude"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions(dtype: torch.dtype, criterion: str) -> None:
    model = mlp().to(dtype)
    data = [(x.to(dtype), y) for x, y in batches()]
    report = pruned(model, data, criterion=criterion)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert sum(zeros_of(model).values()) == report.zeros == round(0.7 * 192)
    single = mlp()
    pruned(single, criterion=criterion)
    for name, weight in weights_of(model).items():
        assert bool(weight.isfinite().all())
        if dtype == torch.float64:
            double = weights_of(single)[name].shape
            assert double == weight.shape


def test_a_double_model_is_pruned_in_double() -> None:
    data = batches()
    single, double = mlp(), mlp().double()
    pruned(single, data)
    pruned(double, [(x.double(), y) for x, y in data])
    for name, weight in weights_of(double).items():
        assert torch.equal(weight == 0, weights_of(single)[name] == 0)
        assert torch.allclose(weight.float(), weights_of(single)[name], atol=1e-4)
        assert not torch.equal(weight.float().double(), weight)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("fisher", [FISHER, FULL], ids=["blocks", "full"])
def test_convolution_and_batch_norm(mode: ModelMode, fisher: FisherConfig) -> None:
    model = convnet().to(memory_format=torch.channels_last)
    images = torch.randn(96, 1, 4, 4, generator=torch.Generator().manual_seed(2))
    data = TensorDataset(images, torch.arange(96) % 4)
    fisher = FisherConfig(
        num_gradients=24,
        gradient_batch_size=4,
        block_size=fisher.block_size,
        model_mode=mode,
    )
    before = bits(model)
    strides = model[0].weight.stride()
    report = pruned(model, data, fisher=fisher, recompute_steps=2)
    assert [layer.name for layer in report.layers] == ["0.weight", "4.weight"]
    assert sum(zeros_of(model).values()) == round(0.7 * (54 + 96)) == report.zeros
    assert model[0].weight.stride() == strides
    after = bits(model)
    assert all(torch.equal(after[k], before[k]) for k in after if k.startswith("1."))


def test_channels_last_gives_the_weights_of_the_usual_layout() -> None:
    images = torch.randn(96, 3, 4, 4, generator=torch.Generator().manual_seed(2))
    data = TensorDataset(images.double(), torch.arange(96) % 4)
    results = []
    for layout in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(3, 5, 3), nn.Flatten(), nn.Linear(20, 4)
        ).double()
        pruned(model.to(memory_format=layout), data)
        results.append(weights_of(model))
    for name in results[0]:
        assert torch.equal(results[0][name] == 0, results[1][name] == 0)
        assert torch.allclose(results[0][name], results[1][name])


def test_tied_weights_are_pruned_once_and_stay_tied() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    model[2].weight = model[0].weight
    report = pruned(model)
    assert report.weights == 64
    assert model[2].weight is model[0].weight
    assert int((model[2].weight == 0).sum()) == round(0.7 * 64)


def test_selection_is_respected() -> None:
    model = mlp()
    dense = bits(model)
    report = pruned(model, selection=SelectionConfig(exclude=["^0"]))
    assert [layer.name for layer in report.layers] == ["4.weight"]
    assert torch.equal(bits(model)["0.weight"], dense["0.weight"])
    assert zeros_of(model)["4.weight"] == round(0.7 * 64)


def test_frozen_layers_stay() -> None:
    model = mlp()
    model[0].requires_grad_(False)
    dense = bits(model)
    pruned(model)
    assert torch.equal(bits(model)["0.weight"], dense["0.weight"])
    assert zeros_of(model) == {"4.weight": round(0.7 * 64)}


def test_pruning_under_no_grad() -> None:
    model, other = mlp(), mlp()
    with torch.no_grad():
        pruned(model)
    pruned(other)
    assert same_bits(bits(model), bits(other))


# --- configuration --------------------------------------------------------------------


@pytest.mark.parametrize("target", [-0.1, 1.0, 1.5, 90.0, float("nan")])
def test_sparsity_outside_the_unit_interval_is_refused(target: float) -> None:
    with pytest.raises(
        ConfigurationError, match=rf"target_sparsity={target} is outside"
    ):
        check_sparsity(target)
    with pytest.raises(ConfigurationError, match=f"{target}"):
        pruned(mlp(), target_sparsity=target)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"criterion": "magnitud"}, "'magnitud' .*Did you mean 'magnitude'"),
        ({"update": "jont"}, "'jont' .*Did you mean 'joint'"),
        ({"recompute_steps": 0}, "recompute_steps=0"),
        ({"recompute_steps": -2}, "recompute_steps=-2"),
        ({"selection": SelectionConfig(only=["nope"])}, "'nope'"),
        ({"selection": SelectionConfig(exclude=["Linear"])}, "Linear"),
        ({"selection": SelectionConfig(pattern="2:4"), "target_sparsity": 0.7}, "2:4"),
        # What a reconstruction layer by layer has no meaning for.
        *[
            ({"criterion": "layerwise", **option}, f"{name} cannot be combined")
            for name, option in {
                "step.update='independent'": {"update": "independent"},
                "step.trust_ratio=0.5": {"trust_ratio": 0.5, "recompute_steps": 2},
                "step.update_scale=0.5": {"update_scale": 0.5},
                "flops_target=0.5": {"flops_target": 0.5, "target_sparsity": None},
            }.items()
        ],
    ],
)
def test_bad_settings_are_refused(options: dict[str, Any], message: str) -> None:
    model = mlp()
    with pytest.raises(ConfigurationError, match=message):
        pruned(model, **options)
    assert same_bits(bits(model), bits(mlp()))


def test_a_loss_that_is_not_finite_names_its_samples() -> None:
    inputs, labels = samples(96).tensors
    inputs[17] = float("nan")
    with pytest.raises(PruningError, match=r"samples .*\b17\b.* is nan"):
        pruned(mlp(), TensorDataset(inputs, labels))


# --- is it right, is it any good ------------------------------------------------------


class Quadratic(nn.Module):
    """Samples whose mean loss is ½(w − w*)ᵀF(w − w*), F the damped Fisher at w = w*."""

    def __init__(self, size: int, damping: float) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        start = torch.randn(2, size // 2, generator=generator, dtype=torch.float64)
        self.damping = damping
        self.weight = nn.Parameter(start)
        self.register_buffer("best", start.clone())
        self.best: Tensor

    def samples(self, number: int) -> list[tuple[Tensor, float]]:
        """Directions in pairs of opposite slope, so that the mean gradient is zero."""
        generator = torch.Generator().manual_seed(4)
        mix = torch.randn(12, 12, generator=generator, dtype=torch.float64)
        directions = (
            torch.randn(number // 2, 12, generator=generator, dtype=torch.float64) @ mix
        )
        return [(row, sign) for row in directions for sign in (1.0, -1.0)]

    def forward(self, batch: tuple[Tensor, float]) -> Tensor:
        direction, sign = batch
        away = (self.weight - self.best).reshape(-1)
        slope = direction @ away
        return (
            0.5 * slope.square()
            + sign * slope
            + 0.5 * self.damping * away.square().sum()
        )


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("block_size", [12, None])
@pytest.mark.parametrize("number", [8, 40])
def test_prediction_is_the_measured_rise_of_a_quadratic_loss(
    update: Update, block_size: int | None, number: int
) -> None:
    model = Quadratic(12, damping=1e-2)
    report = pruned(
        model,
        DataLoader(model.samples(number), batch_size=None),
        lambda network, batch: network(batch),
        update=update,
        target_sparsity=0.5,
        selection=SelectionConfig(only=["weight"]),
        fisher=FisherConfig(num_gradients=number, block_size=block_size, damping=1e-2),
    )
    assert report.loss_before == 0.0
    assert report.predicted_increase == pytest.approx(
        report.measured_increase, rel=1e-6
    )
    assert report.predicted_increase != 0.0


def accuracy(model: nn.Module, data: TensorDataset) -> float:
    inputs, labels = data.tensors
    with torch.no_grad():
        return float((model(inputs).argmax(dim=1) == labels).float().mean())


@pytest.mark.filterwarnings("ignore:this pruning step raised the loss")
def test_second_order_beats_magnitude_on_digits() -> None:
    dense, train, test = trained_digits()

    def accuracy_at(target: float, **options: Any) -> float:
        model = copy.deepcopy(dense)
        fisher = FisherConfig(num_gradients=300, gradient_batch_size=1, block_size=None)
        prune(
            model,
            train,
            cross_entropy,
            target_sparsity=target,
            fisher=fisher,
            **in_step(**options),
        )
        return accuracy(model, test)

    assert accuracy(dense, test) > 0.9
    magnitude = accuracy_at(0.9, criterion="magnitude")
    joint = accuracy_at(0.9, recompute_steps=4)
    independent = accuracy_at(0.9, update="independent")
    assert joint > magnitude + 0.2
    assert independent > magnitude
