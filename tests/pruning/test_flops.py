"""FLOPs by tensor against counts by hand, and steps that aim at a share of them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conv1d import Conv1D
from step_options import in_step
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_woodfisher import (
    ConfigurationError,
    FisherConfig,
    SelectionConfig,
    StepConfig,
    prune,
)
from lightning_woodfisher.data.losses import FunctionLoss
from lightning_woodfisher.distributed.communicator import Communicator
from lightning_woodfisher.pruning.config import PruningConfig
from lightning_woodfisher.pruning.flops import LayerFlops, count_flops
from lightning_woodfisher.weights.layers import prunable_parameters
from lightning_woodfisher.weights.masks import Masks

BATCH = 3


class Network(nn.Module):
    """Products of every kind: two uses of a layer, groups, a weight without its layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(2, 8, 3, padding=1)
        self.grouped = nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=4)
        self.twice = nn.Conv2d(8, 8, 1)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 5)

    def forward(self, pixels: Tensor) -> Tensor:
        x = torch.tanh(self.grouped(torch.tanh(self.first(pixels))))
        x = self.twice(torch.tanh(self.twice(x)))
        tokens = x.flatten(2).mT
        # Products that no selected weight takes part in.
        tokens = tokens @ (tokens.mT @ tokens)
        return self.head(self.attention(tokens, tokens, tokens)[0].mean(dim=1))


def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(60, 2, 8, 8, generator=generator)
    return TensorDataset(pixels, torch.randint(0, 5, (60,), generator=generator))


def loss(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]).float(), batch[1])


# Multiply and add count 2; positions are 8×8 before the stride and 4×4 after it.
BY_HAND = {
    "first.weight": 2 * BATCH * 64 * 8 * 2 * 9,
    "grouped.weight": 2 * BATCH * 16 * 8 * 2 * 9,
    "twice.weight": 2 * 2 * BATCH * 16 * 8 * 8,
    "attention.in_proj_weight": 2 * BATCH * 16 * 8 * 24,
    "attention.out_proj.weight": 2 * BATCH * 16 * 8 * 8,
    "head.weight": 2 * BATCH * 8 * 5,
}
# tᵀt and t(tᵀt), QKᵀ and its product with V.
OTHERS = BATCH * (2 * 2 * 16 * 8 * 8 + 2 * 2 * 16 * 16 * 8)


def counted(comm: Communicator, model: nn.Module, function: Any = loss) -> LayerFlops:
    masks = Masks(prunable_parameters(model))
    source = FunctionLoss(model, data(), function)
    with source.session("eval"):
        batches = source.batches(4, BATCH, 0)
        return count_flops(source, batches, masks, comm, 0)


def test_every_tensor_gets_the_flops_of_its_products(comm: Communicator) -> None:
    model = Network()
    flops = counted(comm, model)
    assert dict(zip(prunable_parameters(model), flops.by_layer, strict=True)) == BY_HAND
    assert flops.dense == sum(BY_HAND.values()) + OTHERS
    assert flops.per_weight == [
        BY_HAND[name] // p.numel() for name, p in prunable_parameters(model).items()
    ]


T, E, H = 7, 8, 6
#: FLOPs by hand of each parameter of a layer, for 3 sequences of 7 tokens of size 8.
FUSED: dict[str, tuple[nn.Module, dict[str, int], int]] = {
    "attention": (
        nn.MultiheadAttention(E, 2, batch_first=True),
        {"in_proj_weight": 3 * E * E, "out_proj.weight": E * E},
        2 * T * E,
    ),
    "separate projections": (
        nn.MultiheadAttention(E, 2, kdim=4, vdim=4, batch_first=True),
        {
            "q_proj_weight": E * E,
            "k_proj_weight": 4 * E,
            "v_proj_weight": 4 * E,
            "out_proj.weight": E * E,
        },
        2 * T * E,
    ),
    "encoder": (
        nn.TransformerEncoder(nn.TransformerEncoderLayer(E, 2, H, batch_first=True), 1),
        {
            "layers.0.self_attn.in_proj_weight": 3 * E * E,
            "layers.0.self_attn.out_proj.weight": E * E,
            "layers.0.linear1.weight": E * H,
            "layers.0.linear2.weight": E * H,
        },
        2 * T * E,
    ),
    "lstm": (
        nn.LSTM(E, H, batch_first=True, bidirectional=True),
        {
            "weight_ih_l0": 4 * E * H,
            "weight_hh_l0": 4 * H * H,
            "weight_ih_l0_reverse": 4 * E * H,
            "weight_hh_l0_reverse": 4 * H * H,
        },
        0,
    ),
    "lstm with projections": (
        nn.LSTM(E, H, batch_first=True, proj_size=2),
        {"weight_ih_l0": 4 * E * H, "weight_hh_l0": 4 * H * 2, "weight_hr_l0": 2 * H},
        0,
    ),
    "gru": (
        nn.GRU(E, H, 1, batch_first=True),
        {"weight_ih_l0": 3 * E * H, "weight_hh_l0": 3 * H * H},
        0,
    ),
    "rnn": (
        nn.RNN(E, H, 1, batch_first=True),
        {"weight_ih_l0": E * H, "weight_hh_l0": H * H},
        0,
    ),
    "Conv1D": (Conv1D(H, E), {"weight": E * H}, 0),
}


@pytest.mark.filterwarnings("ignore:.*RNN module weights are not part of single")
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", FUSED)
def test_fused_kernels_are_counted(
    comm: Communicator, name: str, autocast: bool
) -> None:
    layer, products, others = FUSED[name]
    model = nn.ModuleDict({"0": layer})
    samples = TensorDataset(torch.randn(12, T, E))

    def loss(model: nn.Module, batch: Any) -> Tensor:
        x, layer = batch[0], model["0"]
        many = isinstance(layer, nn.MultiheadAttention)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            if many:
                memory = x[..., : layer.kdim].clone()
                found = layer(x, memory, memory, need_weights=False)
            else:
                found = layer(x)
        first = found[0] if isinstance(found, tuple) else found
        return first.float().square().mean()

    masks = Masks(prunable_parameters(model))
    source = FunctionLoss(model, samples, loss)
    before = torch.backends.mkldnn.enabled, torch.backends.mha.get_fastpath_enabled()
    with source.session("eval"):
        flops = count_flops(source, source.batches(4, BATCH, 0), masks, comm, 0)
    assert before == (
        torch.backends.mkldnn.enabled,
        torch.backends.mha.get_fastpath_enabled(),
    )
    found = dict(zip(masks.parameters, flops.by_layer, strict=True))
    tokens = 2 * BATCH * T
    assert found == {f"0.{key}": tokens * count for key, count in products.items()}
    assert flops.dense == sum(found.values()) + tokens * others


def test_a_frozen_encoder_counts_in_the_total(comm: Communicator) -> None:
    # Without gradients it runs as a single kernel.
    encoder, products, others = FUSED["encoder"]
    model = nn.ModuleDict({"0": copy.deepcopy(encoder), "head": nn.Linear(E, 2)})
    model["0"].requires_grad_(False)

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return model["head"](model["0"](batch[0]).mean(dim=1)).square().mean()

    masks = Masks(prunable_parameters(model))
    source = FunctionLoss(model, TensorDataset(torch.randn(12, T, E)), loss)
    with source.session("eval"):
        flops = count_flops(source, source.batches(4, BATCH, 0), masks, comm, 0)
    assert flops.by_layer == (2 * BATCH * E * 2,)
    total = 2 * BATCH * T * (sum(products.values()) + others)
    assert flops.dense == flops.by_layer[0] + total


def test_weights_that_are_parts_of_one_memory_are_told_apart(
    comm: Communicator,
) -> None:
    # As cuDNN arranges the weights of recurrent layers.
    model = nn.LSTM(E, H, batch_first=True)
    flat = torch.randn(4 * H * (E + H))
    model.weight_ih_l0 = nn.Parameter(flat[: 4 * H * E].view(4 * H, E))
    model.weight_hh_l0 = nn.Parameter(flat[4 * H * E :].view(4 * H, H))
    source = FunctionLoss(
        model, TensorDataset(torch.randn(12, T, E)), lambda m, b: m(b[0])[0].mean()
    )
    masks = Masks(prunable_parameters(model))
    with source.session("eval"):
        flops = count_flops(source, source.batches(4, BATCH, 0), masks, comm, 0)
    assert flops.by_layer == tuple(2 * BATCH * T * 4 * H * n for n in (E, H))


def test_copies_in_the_dtype_of_autocast_count(comm: Communicator) -> None:
    def autocast(model: nn.Module, batch: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return loss(model, batch)

    assert counted(comm, Network(), autocast).by_layer == tuple(BY_HAND.values())


def test_a_masked_network_needs_its_density(comm: Communicator) -> None:
    flops = counted(comm, Network())
    none, everything = [0] * 6, list(flops.weights)
    assert flops.masked(none) == flops.dense
    assert flops.masked(everything) == pytest.approx(OTHERS)
    first = [flops.weights[0] // 2, 0, 0, 0, 0, 0]
    saved = BY_HAND["first.weight"] / 2
    assert flops.masked(first) == pytest.approx(flops.dense - saved)


def test_a_weight_that_is_not_multiplied_is_named(comm: Communicator) -> None:
    model = Network()
    model.idle = nn.Linear(3, 3)
    with pytest.raises(ConfigurationError, match=r"no FLOPs .* idle.weight:"):
        counted(comm, model)


# --- steps ------------------------------------------------------------------------------


def masked_by_hand(model: nn.Module) -> float:
    total = float(OTHERS)
    for name, parameter in prunable_parameters(model).items():
        density = float((parameter != 0).double().mean())
        total += BY_HAND[name] * density
    return total


@pytest.mark.parametrize("criterion", ["woodfisher", "magnitude"])
@pytest.mark.parametrize("target", [0.9, 0.6, 0.45])
@pytest.mark.parametrize("options", [{}, {"recompute_steps": 3}, {"power": 0.7}])
def test_the_target_is_met_within_half_a_per_cent(
    criterion: str, target: float, options: dict[str, Any]
) -> None:
    model = Network()
    power = options.get("power", 0.0)
    report = prune(
        model,
        data(),
        loss,
        flops_target=target,
        criterion=criterion,
        selection=SelectionConfig(flops_power=power),
        fisher=FisherConfig(num_gradients=12, gradient_batch_size=BATCH, block_size=16),
        step=StepConfig(
            recompute_steps=options.get("recompute_steps", 1), measure_loss=False
        ),
    )
    dense = sum(BY_HAND.values()) + OTHERS
    assert report.flops_dense == report.flops_before == dense
    assert report.flops_after == pytest.approx(masked_by_hand(model))
    assert report.flops_share == pytest.approx(target, rel=0.005)
    assert report.target_sparsity == report.sparsity > 0
    assert report.metrics()["pruning/flops_share"] == report.flops_share


def test_expensive_weights_go_first_with_a_power() -> None:
    shares, sparsities = [], []
    for power in (1e-9, 0.5, 1.0, 2.0):
        report = prune(
            Network(),
            data(),
            loss,
            target_sparsity=0.5,
            criterion="magnitude",
            selection=SelectionConfig(flops_power=power),
            fisher=FisherConfig(num_gradients=4, gradient_batch_size=BATCH),
        )
        shares.append(report.flops_share)
        sparsities.append(report.sparsity)
    assert shares == sorted(shares, reverse=True)
    assert len(set(shares)) == 4
    assert set(sparsities) == {sparsities[0]}


def test_the_order_under_a_power_is_that_of_the_quotient() -> None:
    model = Network()
    parameters = prunable_parameters(model)
    scores = []
    for name, p in parameters.items():
        each = BY_HAND[name] / p.numel()
        scores += [
            (abs(float(w)) / each**0.7, name, i)
            for i, w in enumerate(p.detach().flatten())
        ]
    expected = {(name, i) for _, name, i in sorted(scores)[: round(0.4 * len(scores))]}
    prune(
        model,
        data(),
        loss,
        target_sparsity=0.4,
        criterion="magnitude",
        selection=SelectionConfig(flops_power=0.7),
        fisher=FisherConfig(num_gradients=4, gradient_batch_size=BATCH),
    )
    gone = {
        (name, i)
        for name, p in parameters.items()
        for i, w in enumerate(p.flatten())
        if w == 0
    }
    assert gone == expected


def test_a_limit_binds_while_flops_fall() -> None:
    model = Network()
    report = prune(
        model,
        data(),
        loss,
        flops_target=0.6,
        criterion="magnitude",
        selection=SelectionConfig(max_layer_sparsity=0.75),
        fisher=FisherConfig(num_gradients=4, gradient_batch_size=BATCH),
    )
    assert report.flops_share == pytest.approx(0.6, rel=0.005)
    assert all(layer.sparsity <= 0.75 for layer in report.layers)


# --- refused ----------------------------------------------------------------------------


FEW = FisherConfig(num_gradients=4, gradient_batch_size=BATCH)


def step(**options: Any) -> None:
    prune(
        Network(), data(), loss, criterion="magnitude", fisher=FEW, **in_step(**options)
    )


def test_a_share_below_what_is_always_left_is_refused() -> None:
    left = OTHERS / (sum(BY_HAND.values()) + OTHERS)
    with pytest.raises(ConfigurationError, match=f"out of reach.* {left:.4f} are left"):
        step(flops_target=left * 0.99)
    with pytest.raises(ConfigurationError, match="out of reach"):
        step(flops_target=0.5, selection=SelectionConfig(exclude=["first"]))
    with pytest.raises(ConfigurationError, match="out of reach"):
        step(flops_target=0.5, selection=SelectionConfig(max_layer_sparsity=0.2))


def test_a_share_above_what_there_is_is_refused() -> None:
    model = Network()
    with torch.no_grad():
        model.first.weight.zero_()
    with pytest.raises(ConfigurationError, match="already"):
        prune(model, data(), loss, criterion="magnitude", fisher=FEW, flops_target=0.9)


@pytest.mark.parametrize("target", [0.0, 1.0, -1, "half", True])
def test_what_is_no_share_is_refused(target: Any) -> None:
    with pytest.raises(ConfigurationError, match="flops_target"):
        PruningConfig(flops_target=target)


@pytest.mark.parametrize(
    "selection",
    [
        SelectionConfig(scope="layer"),
        SelectionConfig(pattern="2:4"),
        SelectionConfig(layer_targets={"x": 0.5}),
    ],
)
def test_what_says_already_how_many_go_is_refused(selection: SelectionConfig) -> None:
    with pytest.raises(
        ConfigurationError, match="flops_target cannot be combined with"
    ):
        PruningConfig(flops_target=0.5, selection=selection)


def test_one_target_and_not_two() -> None:
    with pytest.raises(ConfigurationError, match="either target_sparsity or"):
        step(flops_target=0.5, target_sparsity=0.5)
    with pytest.raises(ConfigurationError, match="either target_sparsity or"):
        step()
