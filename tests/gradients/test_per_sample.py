"""Gradients of several samples in one pass: the same numbers as one by one."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conv1d import Conv1D
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from lightning_woodfisher.base.errors import PruningError
from lightning_woodfisher.data.losses import FunctionLoss
from lightning_woodfisher.distributed.communicator import Communicator
from lightning_woodfisher.gradients.collect import collect_gradients
from lightning_woodfisher.gradients.lockstep import Lockstep
from lightning_woodfisher.gradients.per_sample import fill_rows, find_obstacle
from lightning_woodfisher.gradients.task import GradientTask

Loss = Callable[[Any, Any], Tensor]


def squares(model: Any, batch: Any) -> Tensor:
    """A mean over samples whose gradient differs in every output."""
    output = model(batch[0]).flatten(1)
    weights = torch.linspace(-1, 2, output.shape[1], dtype=output.dtype)
    return ((output - weights) ** 2).mean(dim=1).mean()


def weights_of(model: nn.Module) -> dict[str, nn.Parameter]:
    return dict(model.named_parameters())


def one_by_one(
    model: nn.Module, inputs: Tensor, count: int, loss: Loss = squares
) -> Tensor:
    """A row of autograd's gradient for each of ``count`` equal parts of the inputs."""
    rows = []
    for part in inputs.chunk(count):
        found = torch.autograd.grad(
            loss(model, (part,)), list(model.parameters()), allow_unused=True
        )
        rows.append(
            torch.cat(
                [
                    (torch.zeros_like(p) if g is None else g).reshape(-1)
                    for p, g in zip(model.parameters(), found, strict=True)
                ]
            )
        )
    return torch.stack(rows)


def in_one_pass(
    model: nn.Module, inputs: Tensor, count: int, loss: Loss = squares
) -> Tensor:
    parameters = weights_of(model)
    assert find_obstacle(model, parameters) is None
    active = {name: torch.arange(p.numel()) for name, p in parameters.items()}
    width = sum(p.numel() for p in parameters.values())
    rows = torch.full((count, width), torch.nan, dtype=inputs.dtype)
    parts = inputs.chunk(count)
    found = Lockstep(model, parameters).run(
        count, lambda number: loss(model, (parts[number],))
    )
    fill_rows(found.layers, found.losses, active, parameters, rows)
    for value, part in zip(found.losses, parts, strict=True):
        expected = float(loss(model, (part,)).detach())
        assert float(value.detach()) == pytest.approx(expected)
    assert not any("forward" in vars(module) for module in model.modules())
    return rows


def assert_same(
    model: nn.Module, inputs: Tensor, count: int, loss: Loss = squares
) -> None:
    expected = one_by_one(model, inputs, count, loss)
    rows = in_one_pass(model, inputs, count, loss)
    tolerance = 1e-10 if inputs.dtype == torch.float64 else 1e-5
    assert float((rows - expected).norm()) <= tolerance * float(expected.norm())
    assert float(expected.norm()) > 0
    assert all(p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


# ---------------------------------------------------------------- layers


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@given(
    axes=st.integers(1, 3),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 3),
    dilation=st.integers(1, 2),
    padding=st.sampled_from([0, 1, 2, "same", "valid"]),
    mode=st.sampled_from(["zeros", "zeros", "reflect", "replicate", "circular"]),
    groups=st.sampled_from([1, 1, 2, 4]),
    samples=st.integers(1, 3),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    bias=st.booleans(),
    wide=st.booleans(),
)
def test_convolutions(
    axes: int,
    kernel: int,
    stride: int,
    dilation: int,
    padding: Any,
    mode: Any,
    groups: int,
    samples: int,
    dtype: torch.dtype,
    bias: bool,
    wide: bool,
) -> None:
    torch.manual_seed(0)
    convolution: Any = [nn.Conv1d, nn.Conv2d, nn.Conv3d][axes - 1]
    layer = convolution(
        8 if wide else 4,
        8,
        kernel,
        stride=1 if padding == "same" else stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        bias=bias,
        padding_mode=mode,
    ).to(dtype)
    inputs = torch.randn(3 * samples, layer.in_channels, *(7, 6, 5)[:axes], dtype=dtype)
    assert_same(layer, inputs, 3)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_kernels_that_are_not_square() -> None:
    torch.manual_seed(0)
    for kernel, stride, padding, dilation in itertools.product(
        [(3, 2), (1, 4)], [(1, 2), (3, 1)], [(0, 2), "valid"], [(2, 1)]
    ):
        for dtype in (torch.float32, torch.float64):
            layer = nn.Conv2d(
                8, 6, kernel, stride=stride, padding=padding, dilation=dilation
            ).to(dtype)
            assert_same(layer, torch.randn(4, 8, 9, 8, dtype=dtype), 2)
    layer = nn.Conv2d(8, 8, (2, 4), padding="same", dilation=(3, 1))
    assert_same(layer, torch.randn(4, 8, 9, 8), 4)


@pytest.mark.parametrize("samples", [1, 3, 16])
@pytest.mark.parametrize("middle", [(), (5,), (2, 3)])
def test_linear_layers(samples: int, middle: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).double()
    inputs = torch.randn(4 * samples, *middle, 6, dtype=torch.float64)
    assert_same(model, inputs, 4)


@pytest.mark.parametrize("middle", [(), (3,), (2, 3)])
def test_layers_with_their_inputs_first(middle: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Conv1D(5, 6), nn.Tanh(), nn.Linear(5, 4), Conv1D(3, 4))
    inputs = torch.randn(8, *middle, 6, dtype=torch.float64)
    assert_same(model.double(), inputs, 4)


def test_a_conv1d_of_another_package_is_looped(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Conv1D(5, 6)
    parameters = weights_of(layer)
    assert find_obstacle(layer, parameters) is None
    monkeypatch.setattr(Conv1D.forward, "__module__", "elsewhere")
    assert find_obstacle(layer, parameters) == "weight belongs to a Conv1D"
    monkeypatch.undo()
    layer.forward = lambda x: x  # type: ignore[method-assign]
    assert find_obstacle(layer, parameters) == "weight belongs to a Conv1D"


@pytest.mark.parametrize("samples", [1, 3, 16])
def test_a_network_with_all_that_keeps_samples_apart(samples: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8, affine=False),
        # What it overwrites is the output of a layer further up.
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 16, 3, stride=2, groups=2, bias=False),
        nn.ReLU(inplace=True),
        nn.InstanceNorm2d(16),
        nn.Conv2d(16, 8, 1),
        nn.LeakyReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(8 * 9, 4),
    ).double()
    model.eval()
    assert_same(model, torch.randn(3 * samples, 3, 8, 8, dtype=torch.float64), 3)


class Entangled(nn.Module):
    """Layers used twice, a weight of two layers, and one that is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.twice = nn.Linear(6, 6)
        self.unused = nn.Linear(6, 2)
        self.forward_only = nn.Linear(6, 6)
        self.one = nn.Linear(6, 4, bias=False)
        self.other = nn.Linear(6, 4)
        self.other.weight = self.one.weight
        self.convolution = nn.Conv1d(1, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.twice(torch.tanh(self.twice(input=x))))
        self.forward_only(x)
        x = x + self.forward_only(x).detach()
        y = self.convolution(x.unsqueeze(1))
        return self.one(x) * self.other(x * x) + self.convolution(y[:, :1]).sum(
            dim=(1, 2)
        ).unsqueeze(1)


def test_layers_used_twice_tied_weights_and_layers_without_use() -> None:
    torch.manual_seed(0)
    model = Entangled().double()
    assert_same(model, torch.randn(6, 6, dtype=torch.float64), 3)
    inputs = torch.randn(6, 6, dtype=torch.float64)
    rows = in_one_pass(model, inputs, 3)
    sizes = [p.numel() for p in model.parameters()]
    parts = dict(zip(weights_of(model), rows.split(sizes, dim=1), strict=True))
    for name, part in parts.items():
        assert bool((part == 0).all()) == name.startswith(("unused", "forward")), name


def test_only_active_weights_have_columns_and_the_scale_is_undone() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).double()
    inputs = torch.randn(8, 6, dtype=torch.float64)
    whole = one_by_one(model, inputs, 4)
    parameters = {"2.weight": model[2].weight, "0.weight": model[0].weight}
    active = {"2.weight": torch.tensor([3, 19]), "0.weight": torch.tensor([0, 7])}
    rows = torch.empty(4, 4, dtype=torch.float64)
    parts = inputs.chunk(4)
    found = Lockstep(model, parameters).run(4, lambda i: squares(model, (parts[i],)))
    fill_rows(found.layers, found.losses, active, (), rows, 1024.0)
    assert torch.allclose(rows, whole[:, [35 + 3, 35 + 19, 0, 7]], rtol=1e-12)


def test_the_model_is_as_before_when_the_loss_fails() -> None:
    model = nn.Sequential(nn.Linear(6, 5))
    own = model[0].forward
    vars(model[0])["forward"] = own

    def fail(number: int) -> Tensor:
        model(torch.zeros(2, 6))
        raise LookupError

    with pytest.raises(LookupError):
        Lockstep(model, weights_of(model)).run(2, fail)
    assert vars(model[0])["forward"] is own
    assert "forward" not in vars(model)


# ---------------------------------------------------------------- what it cannot do


class OwnForward(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight / self.weight.norm(), self.bias)


class OwnConvolution(nn.Conv2d):
    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Any) -> Tensor:
        return super()._conv_forward(x, weight * 2, bias)


class OwnName(nn.Linear):
    """Computes what Linear does."""


def frozen() -> nn.Module:
    return nn.Linear(3, 4).requires_grad_(False)


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.MultiheadAttention(4, 2), "in_proj_weight belongs to a MultiheadAttention"),
        (nn.LSTM(3, 4), "weight_ih_l0 belongs to a LSTM"),
        (nn.ConvTranspose2d(3, 4, 2), "weight belongs to a ConvTranspose2d"),
        (nn.Embedding(3, 4), "weight belongs to a Embedding"),
        (OwnForward(3, 4), "weight belongs to a OwnForward"),
        (OwnConvolution(3, 4, 3), "weight belongs to a OwnConvolution"),
        (
            nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)),
            "parametrizations.weight.original0 belongs to a ParametrizationList",
        ),
        (frozen(), "weight is frozen"),
        (OwnName(3, 4), None),
        (nn.Linear(3, 4), None),
    ],
)
def test_layers_that_are_left_to_the_loop(layer: nn.Module, reason: str | None) -> None:
    parameters = {n: p for n, p in layer.named_parameters() if "bias" not in n}
    assert find_obstacle(layer, parameters) == reason


def test_the_output_layer_of_attention_and_a_tied_embedding_are_left_to_the_loop() -> (
    None
):
    attention = nn.MultiheadAttention(4, 2)
    found = find_obstacle(attention, {"out_proj.weight": attention.out_proj.weight})
    assert found is not None
    assert "NonDynamicallyQuantizableLinear" in found
    model = nn.ModuleDict(
        {"head": nn.Linear(4, 9, bias=False), "words": nn.Embedding(9, 4)}
    )
    model["words"].weight = model["head"].weight
    found = find_obstacle(model, {"head.weight": model["head"].weight})
    assert found == "head.weight belongs to a Embedding"
    # A layer whose parameters are not wanted may be anything.
    assert find_obstacle(attention, {}) is None


# ---------------------------------------------------------------- collection


def data(samples: int = 96) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(
        torch.randn(samples, 6, generator=generator),
        torch.randint(3, (samples,), generator=generator),
    )


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def collect(
    model: nn.Module,
    dataset: Any,
    loss: Loss,
    *,
    count: int = 20,
    size: int = 3,
    how: Any = "auto",
    mode: Any = "eval",
    row_dtype: Any = "float32",
    scale: float = 1.0,
) -> tuple[Tensor, list[float], str]:
    source = FunctionLoss(model, dataset, loss)
    source.loss_scale = scale
    parameters = {n: p for n, p in model.named_parameters() if p.dim() > 1}
    active = {name: torch.arange(p.numel()) for name, p in parameters.items()}
    losses: list[float] = []
    notes: list[str] = []
    task = GradientTask(source, parameters, active, count, 4, Communicator(), losses)
    with source.session(mode):
        rows = list(
            collect_gradients(
                task,
                source.batches(count, size, 4),
                [sum(p.numel() for p in parameters.values())],
                collection=how,
                row_dtype=row_dtype,
                note=notes.append,
            )
        )
    (text,) = notes
    return torch.cat(rows), losses, text


@pytest.mark.parametrize(
    ("count", "size"), [(20, 1), (20, 3), (17, 16), (200, 1), (2, 9)]
)
def test_collection_gives_what_the_loop_gives(count: int, size: int) -> None:
    dataset = data(count * size)
    model = network()
    passes: list[int] = []
    model[1].register_forward_pre_hook(lambda _, args: passes.append(len(args[0])))
    rows, losses, how = collect(model, dataset, cross_entropy, count=count, size=size)
    # One pass for at least two gradients with one alone, and gradients alone as a check.
    assert len(passes) <= 2 * -(-count // 2) + 3
    assert max(passes) >= 2 * size
    expected, expected_losses, loop = collect(
        network(), dataset, cross_entropy, count=count, size=size, how="loop"
    )
    assert how == "per-sample"
    assert loop == "loop: requested"
    error = (rows - expected).norm(dim=1) / expected.norm(dim=1)
    assert float(error.max()) < 1e-5
    assert losses == pytest.approx(expected_losses, rel=1e-5)


def test_samples_are_drawn_under_the_seed_of_their_gradient() -> None:
    class Noisy(Dataset[Any]):
        def __len__(self) -> int:
            return 96

        def __getitem__(self, index: int) -> Any:
            return data()[index][0] + torch.randn(6), data()[index][1]

    rows, _, how = collect(network(), Noisy(), cross_entropy)
    expected, _, _ = collect(network(), Noisy(), cross_entropy, how="loop")
    assert how == "per-sample"
    assert torch.allclose(rows, expected, rtol=1e-3, atol=1e-6)


def test_reasons_that_are_known_before() -> None:
    dataset = data()
    stream = [dataset[3 * i : 3 * i + 3] for i in range(20)]
    assert collect(network(), stream, cross_entropy)[2] == (
        "loop: the data comes in batches"
    )
    assert (
        "training mode" in collect(network(), dataset, cross_entropy, mode="train")[2]
    )
    assert collect(network(), data(200), cross_entropy, count=2, size=100)[2] == (
        "loop: one gradient fills a micro-batch"
    )
    model = nn.Sequential(nn.Bilinear(6, 6, 3))
    how = collect(model, dataset, lambda m, b: F.cross_entropy(m[0](b[0], b[0]), b[1]))
    assert how[2] == "loop: 0.weight belongs to a Bilinear"


@pytest.mark.parametrize("index", [1, 13])
def test_a_loss_that_is_not_finite_names_its_sample(index: int) -> None:
    pixels, labels = data().tensors
    order = FunctionLoss(network(), data(), cross_entropy).batches(20, 1, 4)
    bad = order.describe(index)
    pixels = pixels.clone()
    pixels[int(bad.removeprefix("samples "))] = torch.inf
    with pytest.raises(
        PruningError, match=rf"loss of gradient {index} \({bad}\) is nan"
    ):
        collect(network(), TensorDataset(pixels, labels), cross_entropy, size=1)


def test_overflow_under_the_loss_scale_is_tried_again_with_less() -> None:
    """A float16 layer: 65,504 is its largest gradient."""
    model = nn.Sequential(nn.Linear(6, 3, bias=False))

    def through_the_layer(model: Any, batch: Any) -> Tensor:
        return (model[0](batch[0]).half() * 8.0).float().sum(dim=1).mean()

    dataset = TensorDataset(torch.ones(96, 6))
    for scale in (1.0, 2.0**15, 2.0**23):
        rows, _, how = collect(model, dataset, through_the_layer, size=4, scale=scale)
        assert how == "per-sample"
        assert torch.equal(rows, torch.full((20, 18), 8.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_of_sixteen_bits(dtype: torch.dtype) -> None:
    pixels, labels = data().tensors
    dataset = TensorDataset(pixels.to(dtype), labels)
    rows, _, how = collect(network().to(dtype), dataset, cross_entropy)
    assert how == "per-sample"
    assert rows.dtype == torch.float32
    exact, _, _ = collect(network(), data(), cross_entropy, how="loop")
    assert float((rows - exact).norm()) < 0.02 * float(exact.norm())


def test_autocast() -> None:
    def loss(model: Any, batch: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return cross_entropy(model, batch)

    rows, _, how = collect(network(), data(), loss)
    expected, _, _ = collect(network(), data(), loss, how="loop")
    exact, _, _ = collect(network(), data(), cross_entropy, how="loop")
    assert how == "per-sample"
    assert float((rows - expected).norm()) < 0.01 * float(expected.norm())
    assert float((rows - exact).norm()) > 1e-4 * float(exact.norm())


def test_rows_of_bfloat16_are_rounded() -> None:
    exact, _, _ = collect(network(), data(), cross_entropy)
    rows, _, _ = collect(network(), data(), cross_entropy, row_dtype="bfloat16")
    assert rows.dtype == torch.bfloat16
    assert torch.equal(rows, exact.bfloat16())


def test_nothing_is_left_in_the_model() -> None:
    model = network()
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    collect(model, data(), cross_entropy)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())
    assert model.training
