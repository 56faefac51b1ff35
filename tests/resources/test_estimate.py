"""Estimates against counted bytes, real exchanges, real networks and closed forms."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from allocations import AllocationMeter, measure_step_bytes
from fits import Classifier
from lightning.pytorch.utilities.compile import from_compiled
from step_bytes import make_step
from step_options import in_step
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_woodfisher import (
    ConfigurationError,
    FisherConfig,
    SelectionConfig,
    StepConfig,
    estimate,
    prune,
)
from lightning_woodfisher.base.byte_sizes import parse_bytes
from lightning_woodfisher.data.losses import FunctionLoss
from lightning_woodfisher.distributed.communicator import Communicator
from lightning_woodfisher.pruning.config import PruningConfig
from lightning_woodfisher.pruning.pruner import Pruner
from lightning_woodfisher.resources import budget as budget_module
from lightning_woodfisher.resources.budget import free_bytes, require_supported_device
from lightning_woodfisher.resources.network_shapes import SHAPES
from lightning_woodfisher.weights.layers import prunable_parameters
from lightning_woodfisher.weights.masks import Masks

SLICE_OF_RESNET50 = {
    name: shape for name, shape in SHAPES["resnet50"].items() if "layer2.1" in name
}
TRANSFORMER = {
    f"layer{i}.{name}": shape
    for i in range(2)
    for name, shape in {
        "attention": (192, 64),
        "output": (64, 64),
        "inner": (256, 64),
        "outer": (64, 256),
    }.items()
}


def fisher(count: int, block: int | None, **options: Any) -> FisherConfig:
    # One gradient in a round, as rows come from the steps measured here.
    options = {"collection": "loop", **options}
    return FisherConfig(num_gradients=count, block_size=block, **options)


# ---------------------------------------------------------------- bytes


def test_the_meter_counts_what_lives_and_nothing_else() -> None:
    before = torch.zeros(1000)
    with AllocationMeter() as meter:
        first = torch.zeros(1000)
        second = first.view(10, 100) + 1
        del first
        before.add_(1.0).view(-1)[3:].t()
        copies = [second.clone() for _ in range(3)]
        del copies
        with meter.paused():
            uncounted = second + 1
        kept = torch.cat([second[0], uncounted[0]])
    assert meter.peak_bytes == 4 * 4000
    assert meter.live_bytes == 4000 + 800
    del kept
    assert meter.live_bytes == 4000


@pytest.mark.parametrize(
    ("shapes", "settings", "sparsity"),
    [
        pytest.param(SHAPES["resnet20"], fisher(48, 16), 0.0, id="resnet20 primal"),
        pytest.param(SHAPES["resnet20"], fisher(40, 256), 0.0, id="resnet20 dual"),
        pytest.param(SHAPES["resnet20"], fisher(64, None), 0.0, id="resnet20 full"),
        pytest.param(SHAPES["resnet20"], fisher(40, 16), 0.8, id="sparse primal"),
        pytest.param(SHAPES["resnet20"], fisher(100, 128), 0.8, id="sparse dual"),
        pytest.param(SLICE_OF_RESNET50, fisher(16, 50), 0.0, id="resnet50 dual"),
        pytest.param(SLICE_OF_RESNET50, fisher(16, 16), 0.0, id="resnet50 primal"),
        pytest.param(TRANSFORMER, fisher(150, 50), 0.0, id="transformer primal"),
        pytest.param(TRANSFORMER, fisher(80, 192), 0.0, id="transformer dual"),
        pytest.param(
            TRANSFORMER, fisher(70, 64, precision="float64"), 0.0, id="float64"
        ),
    ],
)
def test_a_step_takes_the_bytes_that_were_estimated(
    shapes: dict[str, tuple[int, ...]], settings: FisherConfig, sparsity: float
) -> None:
    step, _ = make_step(shapes, settings, target=0.9, sparsity=sparsity)
    cost = estimate(shapes, fisher=settings, sparsity=sparsity)
    reports = []
    peak = measure_step_bytes(lambda: reports.append(step()))
    assert cost.state_bytes == pytest.approx(reports[0].fisher_bytes[0], rel=0.15)
    assert peak <= 1.15 * cost.peak_bytes
    assert peak >= 0.85 * cost.peak_bytes


@pytest.mark.parametrize(
    ("settings", "options"),
    [
        pytest.param(fisher(8, None), {}, id="search"),
        pytest.param(
            fisher(8, None, first_order_samples=512),
            {"criterion": "woodtaylor"},
            id="first order",
        ),
        pytest.param(
            fisher(8, None),
            {"local_model_points": 3, "measure_loss": True},
            id="local model",
        ),
        pytest.param(fisher(48, 16, centered=True), {}, id="centered primal"),
        pytest.param(fisher(8, 96, centered=True), {}, id="centered dual"),
        pytest.param(
            fisher(8, None), {"selection": SelectionConfig(pattern="4:8")}, id="4:8"
        ),
        pytest.param(
            fisher(8, None), {"selection": SelectionConfig(pattern="rows")}, id="rows"
        ),
    ],
)
def test_what_goes_with_the_search_takes_the_bytes_that_were_estimated(
    settings: FisherConfig, options: dict[str, Any]
) -> None:
    options = {"measure_loss": False, **options}
    step, _ = make_step(TRANSFORMER, settings, target=0.5, **options)
    cost = estimate(TRANSFORMER, fisher=settings, **in_step(**options))
    assert 0.85 * cost.peak_bytes <= measure_step_bytes(step) <= 1.15 * cost.peak_bytes


class Counted:
    """A loss that counts the samples of which it is asked with and without a graph."""

    def __init__(self) -> None:
        self.samples = {True: 0, False: 0}

    def __call__(self, model: nn.Module, batch: Any) -> torch.Tensor:
        self.samples[torch.is_grad_enabled()] += len(batch[0])
        return nn.functional.cross_entropy(model(batch[0]), batch[1])


@pytest.mark.parametrize(
    ("options", "trials"),
    [
        ({}, (4, 4)),
        ({"update": "independent"}, (3, 3)),
        ({"update": "none"}, (0, 0)),
        ({"line_search": False}, (0, 0)),
        ({"criterion": "magnitude"}, (0, 0)),
        ({"criterion": "kfac"}, (4, 4)),
        ({"criterion": "diagonal_fisher"}, (0, 0)),
        ({"local_model_points": 5}, (4, 4)),
        ({"measure_loss": False}, (4, 4)),
    ],
)
def test_passes_are_those_of_a_real_step(
    options: dict[str, Any], trials: tuple[int, int]
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 3))
    inputs = torch.randn(200, 8)
    data = TensorDataset(inputs, inputs[:, :3].argmax(dim=1))
    settings = fisher(24, 10, gradient_batch_size=4)
    cost = estimate(model, fisher=settings, **in_step(**options))
    loss = Counted()
    prune(model, data, loss, target_sparsity=0.6, fisher=settings, **in_step(**options))
    assert cost.trials == trials
    assert loss.samples == {
        True: 4 * cost.gradient_passes,
        False: 4 * cost.loss_passes,
    }


def test_passes_of_a_search_on_many_samples_are_those_of_a_real_step() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 3))
    inputs = torch.randn(400, 8)
    data = TensorDataset(inputs, inputs[:, :3].argmax(dim=1))
    settings = fisher(48, 10, gradient_batch_size=8)
    cost, loss = estimate(model, fisher=settings), Counted()
    prune(model, data, loss, target_sparsity=0.6, fisher=settings)
    assert loss.samples == {
        True: 8 * cost.gradient_passes,
        False: 8 * cost.loss_passes,
    }
    # One that shows whether the loss is a mean, four trials and two finalists.
    assert loss.samples[False] == 64 + 4 * 256 + 2 * 128


def test_passes_of_the_first_order_are_within_those_of_a_search() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 3))
    inputs = torch.randn(200, 8)
    data = TensorDataset(inputs, inputs[:, :3].argmax(dim=1))
    settings = fisher(24, 10, gradient_batch_size=4, first_order_samples=160)
    options: dict[str, Any] = {"criterion": "woodtaylor", "measure_loss": False}
    cost = estimate(
        model, fisher=settings, seconds_per_gradient=1.0, **in_step(**options)
    )
    loss = Counted()
    prune(model, data, loss, target_sparsity=0.6, fisher=settings, **in_step(**options))
    assert (cost.gradient_passes, cost.first_order_passes) == (24, 1)
    assert loss.samples[True] == 24 * 4 + 160
    fewest, most = cost.trials
    assert fewest <= loss.samples[False] / (24 * 4) <= most
    assert fewest * 24 <= cost.loss_passes <= most * 24
    assert cost.seconds["gradients"] == 24 + 40
    assert f"search {fewest} to {most} times" in cost.to_table()


def test_magnitude_keeps_no_state_and_is_estimated_within_its_bytes() -> None:
    step, _ = make_step(SHAPES["resnet20"], fisher(4, 16), criterion="magnitude")
    cost = estimate(SHAPES["resnet20"], criterion="magnitude")
    assert (cost.engine, cost.state_bytes, cost.gradient_passes) == ("none", 0, 0)
    peak = measure_step_bytes(step)
    assert 0.6 * cost.peak_bytes <= peak <= 1.15 * cost.peak_bytes


@pytest.mark.parametrize("sparsity", [0.0, 0.8])
@pytest.mark.parametrize(
    ("criterion", "engine"),
    [
        ("diagonal_fisher", "diagonal"),
        ("hessian_diagonal", "diagonal"),
        ("kfac", "factors"),
    ],
)
def test_baselines_take_the_bytes_that_were_estimated(
    criterion: str, engine: str, sparsity: float
) -> None:
    torch.manual_seed(0)
    widths = (300, 200, 400, 10)
    layers = [nn.Linear(i, o) for i, o in itertools.pairwise(widths)]
    model = nn.Sequential(*[m for layer in layers for m in (layer, nn.Tanh())])
    for layer in layers:
        flat = layer.weight.data.view(-1)
        flat[: round(flat.numel() * sparsity)] = 0.0
    masks = Masks(prunable_parameters(model))
    masks.prune_zeros()
    settings = fisher(16, 16, gradient_batch_size=1)
    config = PruningConfig(criterion, settings, step=StepConfig(measure_loss=False))
    pruner = Pruner(masks, config, Communicator())
    data = [torch.randn(1, 300) for _ in range(16)]
    source = FunctionLoss(model, data, lambda m, batch: m(batch).square().mean())
    cost = estimate(model, fisher=settings, criterion=criterion, sparsity=sparsity)
    assert cost.engine == engine
    reports = []
    peak = measure_step_bytes(lambda: reports.append(pruner.step(source, 0.9)))
    assert cost.state_bytes == reports[0].fisher_bytes[0]
    # Here, activations are small beside the weights.
    assert 0.8 * cost.peak_bytes <= peak <= 1.15 * cost.peak_bytes


def test_factors_of_layers_by_hand() -> None:
    shapes = {"conv": (8, 3, 3, 3), "fc": (10, 20)}
    settings = FisherConfig(num_gradients=96, gradient_batch_size=4)
    one = estimate(shapes, fisher=settings, criterion="kfac")
    # A factor of each side and its inverse, float64.
    assert one.state_bytes == 2 * 8 * (8**2 + 27**2 + 10**2 + 20**2)
    two = estimate(shapes, fisher=settings, criterion="kfac", world_size=2)
    # Sixteen mini-batches of four in a pass; of six passes each rank has three. A rank
    # sends the sums of the layer that it does not own, with two counts.
    assert two.bytes_sent["exchange"] == 3 * 4 * (8**2 + 27**2 + 2)
    assert two.flops["factorize"] == 8**3 + 27**3


def test_sums_of_one_layer_by_hand() -> None:
    # 10 blocks of 10 on one rank, 5 on each of two.
    one = estimate({"w": (10, 10)}, fisher=fisher(20, 10, precision="float64"))
    two = estimate(
        {"w": (10, 10)}, fisher=fisher(20, 10, precision="float64"), world_size=2
    )
    assert (one.blocks, one.state_bytes, two.state_bytes) == (10, 8000, 4000)
    # Ten of twenty rows, 50 numbers of 4 bytes to the other rank.
    # Three lengths and another update are tried, and two of them on more than 256 samples.
    assert two.bytes_sent == {
        "exchange": 10 * 50 * 4,
        "gather": 50 * 5,
        "search": (4 + 2) * 50 * 4,
        "reduce": 0,
    }
    assert not any(one.bytes_sent.values())
    assert (one.gradient_passes, two.gradient_passes) == (20, 10)
    # GᵀG: N multiplications and additions for each of 10 · 10² numbers.
    assert one.flops["accumulate"] == 2 * 20 * 10 * 10**2
    assert two.flops["accumulate"] == one.flops["accumulate"] // 2


def test_gradients_computed_together_are_in_flight_together() -> None:
    # 32 gradients in micro-batches of 8: two of them on each of two ranks.
    alone = fisher(32, 10)
    together = dataclasses.replace(alone, collection="auto")
    one = estimate({"w": (10, 10)}, fisher=alone, world_size=2)
    eight = estimate({"w": (10, 10)}, fisher=together, world_size=2)
    assert one.bytes_sent == eight.bytes_sent
    rows = [cost.phases["collect"].rows for cost in (one, eight)]
    # Two rows of 100 and two of 50 that have arrived, or eight times as many.
    assert rows[1] - rows[0] == 7 * (2 * 100 + 2 * 50) * 4
    halved = dataclasses.replace(together, row_dtype="bfloat16")
    half = estimate({"w": (10, 10)}, fisher=halved, world_size=2)
    assert half.bytes_sent["exchange"] == eight.bytes_sent["exchange"] // 2


def test_a_rank_of_a_sharded_model_needs_what_its_shard_needs() -> None:
    settings = fisher(20, 8)
    shard = estimate({"w": (16, 16), "v": (3, 4)}, fisher=settings)
    # Ten rows on four ranks: the largest part of the second tensor counts.
    sharded = estimate(
        {"w": (64, 16), "v": (10, 4)}, fisher=settings, world_size=4, sharded=True
    )
    assert sharded.weights == 64 * 16 + 10 * 4
    assert sharded.total_bytes_sent == 0
    assert sharded.flops == estimate({"w": (256,), "v": (10,)}, fisher=settings).flops
    assert sharded.peak_bytes == pytest.approx(shard.peak_bytes, rel=0.05)
    replicated = estimate({"w": (64, 16), "v": (10, 4)}, fisher=settings, world_size=4)
    assert sharded.peak_bytes < replicated.peak_bytes


def test_threads_work_on_units_of_their_own() -> None:
    one, four = (
        estimate({"w": (100, 100)}, fisher=fisher(20, 10), threads=threads)
        for threads in (1, 4)
    )
    workspaces = [cost.phases["factorize"].workspace for cost in (one, four)]
    assert workspaces[1] == 4 * workspaces[0]


def test_the_worst_rank_counts() -> None:
    # Three units of equal cost on two ranks.
    cost = estimate({"w": (3, 50)}, fisher=fisher(100, 50), world_size=2)
    alone = estimate({"w": (2, 50)}, fisher=fisher(100, 50))
    assert cost.state_bytes == alone.state_bytes


def test_ranks_without_blocks_are_counted() -> None:
    cost = estimate({"w": (2, 8)}, fisher=fisher(16, 8), world_size=5)
    assert (cost.blocks, cost.idle_ranks) == (2, 3)
    assert "3 of 5 ranks own no block" in cost.summary()


def test_seconds_are_those_of_the_rates() -> None:
    cost = estimate(
        {"w": (64, 64)},
        fisher=fisher(20, 16),
        world_size=2,
        flops_per_second=1e6,
        bytes_per_second=1e3,
        seconds_per_gradient=0.5,
    )
    assert cost.seconds["gradients"] == pytest.approx(5.0)
    assert cost.seconds["send"] == pytest.approx(sum(cost.bytes_sent.values()) / 1e3)
    assert cost.seconds["accumulate"] == pytest.approx(cost.flops["accumulate"] / 1e6)


def test_offloaded_rows_are_in_host_memory() -> None:
    here = estimate(SHAPES["resnet20"], fisher=fisher(40, 256))
    there = estimate(SHAPES["resnet20"], fisher=fisher(40, 256, offload_rows=True))
    assert there.host_bytes == here.state_bytes > 0
    assert (there.state_bytes, here.host_bytes) == (0, 0)
    assert there.peak_bytes < here.peak_bytes


def test_a_model_on_the_meta_device_costs_as_much_as_its_shapes() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 4))
    selected = estimate(model, selection=SelectionConfig(exclude=["Linear"]))
    assert selected == estimate({"conv": (8, 3, 3, 3)})
    assert estimate(model).weights == 8 * 27 + 32


# ---------------------------------------------------------------- the verdict


@pytest.mark.parametrize(
    "settings", [fisher(300, 64), fisher(200, 500), fisher(64, None)]
)
def test_what_is_proposed_fits_and_one_more_does_not(settings: FisherConfig) -> None:
    shapes = SHAPES["resnet20"]
    need = estimate(shapes, fisher=settings).peak_bytes
    memory = int(0.6 * need)
    cost = estimate(shapes, fisher=settings, memory=memory)
    assert cost.fits is False
    count, ranks = cost.largest_num_gradients, cost.world_size_needed
    assert count is not None
    assert ranks is not None
    block = settings.block_size

    def fits(count: int, ranks: int) -> bool | None:
        changed = fisher(count, block)
        return estimate(shapes, fisher=changed, world_size=ranks, memory=memory).fits

    assert fits(count, 1)
    assert not fits(count + 1, 1)
    assert fits(settings.num_gradients, ranks)
    assert not fits(settings.num_gradients, ranks - 1)
    assert f"num_gradients={count}" in cost.verdict
    assert f"{ranks} devices" in cost.verdict
    if cost.largest_block_size is not None:
        smaller = fisher(settings.num_gradients, cost.largest_block_size)
        assert estimate(shapes, fisher=smaller, memory=memory).fits
    assert estimate(shapes, fisher=settings, memory=need).fits is True


def test_what_is_proposed_does_not_depend_on_the_tolerated_gradients() -> None:
    settings = fisher(300, 64)
    tolerant = dataclasses.replace(settings, max_nonfinite=200)
    memory = int(0.6 * estimate(SHAPES["resnet20"], fisher=settings).peak_bytes)
    one, other = (
        estimate(SHAPES["resnet20"], fisher=each, memory=memory)
        for each in (settings, tolerant)
    )
    assert one.largest_num_gradients == other.largest_num_gradients
    assert one.largest_block_size == other.largest_block_size


def test_no_setting_fits_into_next_to_nothing() -> None:
    cost = estimate(SHAPES["resnet20"], memory="1KB")
    assert cost.largest_block_size is None
    assert cost.largest_num_gradients is None
    assert cost.world_size_needed is None
    assert "no block size" in cost.verdict


def test_the_table_and_the_dict_say_the_same() -> None:
    cost = estimate(SHAPES["resnet50"], fisher=fisher(400, 2000), world_size=8)
    plain = json.loads(json.dumps(cost.to_dict()))
    assert plain["peak_bytes"] == cost.peak_bytes
    assert plain["state_bytes"] == cost.state_bytes
    table = cost.to_table()
    for word in ("25,502,912", "N=400", "8 ranks", "peak", "dual", *cost.phases):
        assert word in table


@pytest.mark.parametrize(
    ("text", "size"),
    [("80GB", 80 * 10**9), ("24GiB", 24 * 2**30), (" 1.5 mb ", 1_500_000), (7, 7)],
)
def test_amounts_of_memory_are_read(text: str | int, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["80 apples", "GB", "-3GB", "1e3GB", "", 0, -1, True])
def test_other_amounts_are_refused(text: Any) -> None:
    with pytest.raises(ConfigurationError, match="memory_budget"):
        FisherConfig(memory_budget=text)


@pytest.mark.parametrize("options", [{"sparsity": 1.0}, {"world_size": 0}])
def test_impossible_arguments_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(options))):
        estimate({"w": (2, 2)}, **options)


# ---------------------------------------------------------------- before a step


def small() -> nn.Module:
    return nn.Sequential(nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 4))


def prune_small(**options: Any) -> Any:
    samples = torch.randn(64, 40).split(1)
    return prune(
        small(),
        list(samples),
        lambda model, batch: model(batch).square().mean(),
        target_sparsity=0.5,
        fisher=fisher(30, 20, **options),
    )


def test_prune_refuses_a_budget_that_is_too_small_and_says_what_fits() -> None:
    need = estimate(small(), fisher=fisher(30, 20)).peak_bytes
    assert prune_small(memory_budget=need).sparsity == 0.5
    with pytest.raises(ConfigurationError) as caught:
        prune_small(memory_budget=int(0.7 * need))
    assert f"memory_budget={int(0.7 * need)}" in str(caught.value)
    assert "num_gradients=" in str(caught.value)
    with pytest.raises(ConfigurationError, match=r"'1KB' is too small.*no block size"):
        prune_small(memory_budget="1KB")


def test_without_a_budget_only_what_cannot_fit_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    need = estimate(small(), fisher=fisher(30, 20)).peak_bytes
    for free, works in ((None, True), (need, True), (need // 2, False)):
        monkeypatch.setattr(budget_module, "free_bytes", lambda device, f=free: f)
        if works:
            prune_small()
        else:
            with pytest.raises(ConfigurationError, match="are free on cpu"):
                prune_small()


def test_free_memory_is_known_here_and_not_everywhere() -> None:
    free = free_bytes(torch.device("cpu"))
    assert free is None or 2**20 < free < 2**50
    assert free_bytes(torch.device("meta")) is None


def test_weights_on_unsupported_devices_are_refused() -> None:
    model = small()
    require_supported_device(model, prunable_parameters(model))
    on_mps = {"2.weight": SimpleNamespace(device=torch.device("mps", 0))}
    with pytest.raises(ConfigurationError, match=r"on mps:0, which has no float64"):
        require_supported_device(model, on_mps)
    with pytest.raises(ConfigurationError, match=r"0\.weight on cpu, 2\.weight on mps"):
        require_supported_device(model, prunable_parameters(model) | on_mps)
    model[2].to("meta")
    with pytest.raises(ConfigurationError, match=r"2\.weight is on the meta device"):
        require_supported_device(model, prunable_parameters(model))


def compiled(model: nn.Sequential, mode: str) -> nn.Module:
    return nn.Sequential(torch.compile(model[0], mode=mode), *model[1:])


def compiled_in_place(model: nn.Sequential, mode: str) -> nn.Module:
    model[0].compile(mode=mode)
    return model


def compiled_by_lightning(model: nn.Sequential, mode: str) -> nn.Module:
    return from_compiled(torch.compile(Classifier(build=lambda: model), mode=mode))


@pytest.mark.parametrize(
    "compile_it", [compiled, compiled_in_place, compiled_by_lightning]
)
def test_cuda_graphs_of_compiled_modules_are_refused(
    compile_it: Callable[..., nn.Module],
) -> None:
    on_gpu = {"0.weight": SimpleNamespace(device=torch.device("cuda", 0))}
    graphs = compile_it(small(), "reduce-overhead")
    with pytest.raises(ConfigurationError, match="replays CUDA graphs.*no-cudagraphs"):
        require_supported_device(graphs, on_gpu)
    # Inductor makes no CUDA graphs on a CPU.
    require_supported_device(graphs, {"0.weight": small()[0].weight})
    require_supported_device(compile_it(small(), "default"), on_gpu)


def test_graphed_callables_are_refused() -> None:
    on_gpu = {"0.weight": SimpleNamespace(device=torch.device("cuda", 0))}
    model = small()

    def forward(inputs: Tensor) -> Tensor:
        return inputs

    forward.__module__ = torch.cuda.make_graphed_callables.__module__
    model[0].forward = forward
    with pytest.raises(ConfigurationError, match=r"^0 replays CUDA graphs"):
        require_supported_device(model, on_gpu)


# ---------------------------------------------------------------- shapes


@pytest.mark.parametrize(
    ("name", "total"),
    [
        # Parameters as published, less biases and norms.
        ("resnet20", 269_722 - 10 - 2 * (7 * 16 + 6 * 32 + 6 * 64)),
        ("resnet50", 25_557_032 - 1000 - 2 * 26_560),
        ("mobilenetv1", 4_231_976 - 1000 - 2 * 10_944),
        # Twelve layers of 12·768² and the pooler.
        ("bert_base", 12 * 12 * 768**2 + 768**2),
        # The same, patches of 768·3·16², 1000 classes.
        ("vit_b", 12 * 12 * 768**2 + 768 * 768 + 768_000),
        # Published, less embeddings and norms.
        ("llama7b", 6_738_415_616 - 32_000 * 4096 - (2 * 32 + 1) * 4096),
    ],
)
def test_shapes_add_up_to_the_networks_they_are_named_after(
    name: str, total: int
) -> None:
    assert sum(math.prod(shape) for shape in SHAPES[name].values()) == total


def test_resnet50_is_that_of_torchvision() -> None:
    models = pytest.importorskip("torchvision.models")
    with torch.device("meta"):
        parameters = prunable_parameters(models.resnet50())
    found = sorted(tuple(p.shape) for p in parameters.values())
    assert found == sorted(SHAPES["resnet50"].values())


def test_the_passes_are_counted_in_training_steps_and_are_in_the_total() -> None:
    shapes = {"w": (64, 64)}
    fisher = FisherConfig(num_gradients=12, gradient_batch_size=4, block_size=16)
    cost = estimate(shapes, fisher=fisher, flops_per_second=1e9)
    assert cost.loss_passes > 0
    # A loss is a forward pass, a third of a training step.
    assert cost.training_steps == pytest.approx(12 + cost.loss_passes / 3)
    assert f"as long as {12 + cost.loss_passes / 3:,.0f} training" in cost.to_table()
    assert "without gradients and losses (--seconds_per_gradient)" in cost.to_table()
    timed = estimate(
        shapes, fisher=fisher, flops_per_second=1e9, seconds_per_gradient=0.5
    )
    passes = timed.seconds["gradients"] + timed.seconds["losses"]
    assert passes == pytest.approx(0.5 * cost.training_steps)
    total = passes + sum(cost.seconds.values())
    assert f"together {total:.3g}" in timed.to_table()
