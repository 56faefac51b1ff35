"""``criterion="layerwise"`` from end to end."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conv1d import Conv1D
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_woodfisher import (
    ConfigurationError,
    FisherConfig,
    LayerwiseConfig,
    PruningError,
    PruningReport,
    SelectionConfig,
    StepConfig,
    estimate,
    prune,
    sweep,
)
from lightning_woodfisher.weights.layers import prunable_parameters
from tests.support.curvatures import record_curvatures

Loss = Callable[[Any, Any], Tensor]


def cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def reconstruct(
    model: nn.Module,
    data: TensorDataset,
    loss: Loss = cross_entropy,
    samples: int = 128,
    **options: Any,
) -> PruningReport:
    options.setdefault("target_sparsity", 0.6)
    fisher = {"num_gradients": samples, "gradient_batch_size": 1}
    fisher |= options.pop("fisher", {})
    return prune(
        model,
        data,
        loss,
        criterion="layerwise",
        fisher=FisherConfig(**fisher),
        **options,
    )


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.expand = nn.Linear(width, 2 * width)
        self.contract = nn.Linear(2 * width, width)

    def forward(self, stream: Tensor) -> Tensor:
        return stream + self.contract(self.expand(self.norm(stream)).relu())


def perceptron() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(12, 16), *[Residual(16) for _ in range(3)], nn.Linear(16, 4)
    )


def vectors(number: int = 128) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    mix = torch.randn(12, 12, generator=generator)
    inputs = torch.randn(number, 12, generator=generator) @ mix
    return TensorDataset(inputs, torch.randint(0, 4, (number,), generator=generator))


def convolutional() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, 2, dilation=2, padding=2, groups=4),
        nn.ReLU(),
        nn.ConvTranspose2d(8, 8, 3, stride=2, groups=2),
        nn.ReLU(),
        nn.Conv2d(8, 8, 1, groups=8),
        nn.Flatten(),
        nn.LazyLinear(4),
    )
    model.train()
    model(torch.randn(64, 2, 8, 8))
    return model.eval()


def images(number: int = 128) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(number, 2, 8, 8, generator=generator)
    return TensorDataset(pixels, torch.randint(0, 4, (number,), generator=generator))


def relative_error(dense: nn.Module, model: nn.Module, inputs: Tensor) -> float:
    with torch.no_grad():
        wanted, found = dense.eval()(inputs), model.eval()(inputs)
    gap = (wanted - found).square().sum()
    return float(gap / (wanted - wanted.mean(0)).square().sum())


def require_sparse(
    report: PruningReport, model: nn.Module, sparsity: float, by_layer: bool = False
) -> None:
    parameters = prunable_parameters(model)
    zeros = sum(int((p == 0).sum()) for p in parameters.values())
    sizes = [p.numel() for p in parameters.values()]
    sizes = sizes if by_layer else [sum(sizes)]
    assert zeros == report.zeros == sum(round(sparsity * size) for size in sizes)


@pytest.mark.parametrize("build", [perceptron, convolutional])
def test_outputs_stay_closer_than_with_other_criteria(
    build: Callable[[], nn.Module],
) -> None:
    data = vectors() if build is perceptron else images()
    errors = {}
    for criterion in ("layerwise", "woodfisher", "magnitude"):
        model, dense = build(), build()
        report = prune(
            model,
            data,
            cross_entropy,
            target_sparsity=0.5,
            criterion=criterion,
            fisher=FisherConfig(num_gradients=128, gradient_batch_size=1),
        )
        require_sparse(report, model, 0.5)
        errors[criterion] = relative_error(dense, model, data.tensors[0])
    assert errors["layerwise"] < 0.8 * errors["woodfisher"]
    assert errors["layerwise"] < 0.8 * errors["magnitude"]


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("stages", [1, 3])
def test_exact_counts_and_report(scope: Any, stages: int) -> None:
    model = perceptron()
    report = reconstruct(
        model,
        vectors(),
        selection=SelectionConfig(scope=scope),
        step=StepConfig(recompute_steps=stages),
    )
    require_sparse(report, model, 0.6, by_layer=scope == "layer")
    assert report.stages == stages
    assert report.collection == "8 layers, 3 of them with residual targets"
    for layer in report.layers:
        found = layer.reconstruction
        assert found is not None
        assert 0 <= found.error <= found.error_masked
        # What writes into the residual stream has the skip in its targets, but for the
        # first block, whose skip the first layer has just written.
        assert (found.target == "residual sum") == ("contract" in layer.name)
        if scope == "layer":
            assert layer.zeros_after == round(0.6 * layer.weights)
    assert report.loss_before is not None
    assert PruningReport.from_dict(report.to_dict()) == report
    assert "residual sum" in report.to_table()
    name = report.layers[0].name
    assert report.metrics()[f"pruning/reconstruction/error/{name}"] >= 0


@pytest.mark.parametrize("pattern", ["2:4", "block4", "rows"])
def test_patterns(pattern: str) -> None:
    model = perceptron()
    report = reconstruct(
        model,
        vectors(),
        target_sparsity=0.5,
        selection=SelectionConfig(pattern=pattern, scope="layer"),
    )
    for name, parameter in prunable_parameters(model).items():
        groups = (parameter == 0).view(
            -1, parameter.shape[1] if pattern == "rows" else 4
        )
        wanted = {2} if pattern == "2:4" else {0, groups.shape[1]}
        assert set(groups.sum(1).tolist()) <= wanted, name
    assert report.sparsity == pytest.approx(0.5)


def test_earlier_zeros_stay() -> None:
    model, data = perceptron(), vectors()
    reconstruct(model, data, target_sparsity=0.4)
    before = {n: p == 0 for n, p in prunable_parameters(model).items()}
    report = reconstruct(model, data, target_sparsity=0.7)
    require_sparse(report, model, 0.7)
    for name, parameter in prunable_parameters(model).items():
        assert (parameter[before[name]] == 0).all()


def test_mask_only() -> None:
    model, dense = perceptron(), perceptron()
    report = reconstruct(model, vectors(), step=StepConfig(update="none"))
    require_sparse(report, model, 0.6)
    for (name, new), old in zip(
        model.named_parameters(), dense.parameters(), strict=True
    ):
        kept = new != 0 if name in prunable_parameters(model) else new == new
        assert torch.equal(new[kept], old[kept]), name


def test_one_layer_is_exact_least_squares() -> None:
    torch.manual_seed(0)
    data = vectors(256)
    model = nn.Sequential(nn.Linear(12, 4))
    dense = copy.deepcopy(model)
    reconstruct(
        model, data, samples=256, layerwise=LayerwiseConfig(relative_damping=1e-8)
    )
    inputs = data.tensors[0].double()
    rows = torch.cat([inputs, torch.ones(256, 1, dtype=torch.float64)], dim=1)
    with torch.no_grad():
        targets = dense.double()(inputs)
    for o in range(4):
        kept = torch.cat([model[0].weight[o] != 0, torch.ones(1, dtype=torch.bool)])
        expected = torch.linalg.lstsq(rows[:, kept], targets[:, o]).solution
        found = torch.cat([model[0].weight[o], model[0].bias[o, None]])[kept]
        torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-3)


def test_batchnorm_takes_the_bias_of_a_layer_without_one() -> None:
    model, dense, data = convolutional(), convolutional(), images()
    reconstruct(model, data)
    assert not torch.equal(model[1].running_mean, dense[1].running_mean)
    assert torch.equal(model[1].running_var, dense[1].running_var)
    # The mean of each channel after BatchNorm is that of the dense network.
    with torch.no_grad():
        found, wanted = (
            net[1](net[0](data.tensors[0])).mean((0, 2, 3)) for net in (model, dense)
        )
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-3)


class Tied(nn.Module):
    """Three linear maps of one input, a weight that is used twice, and Conv1D."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v = (nn.Linear(12, 12) for _ in range(3))
        self.twice = nn.Linear(12, 12)
        self.out = Conv1D(4, 12)

    def forward(self, inputs: Tensor) -> Tensor:
        mixed = self.q(inputs) * self.k(inputs).sigmoid() + self.v(inputs)
        result: Tensor = self.out(self.twice(self.twice(mixed).relu()))
        return result


def test_shared_inputs_and_tied_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    made = record_curvatures(monkeypatch)
    model = Tied()
    report = reconstruct(model, vectors(), selection=SelectionConfig(scope="layer"))
    require_sparse(report, model, 0.6, by_layer=True)
    assert len(report.layers) == 5
    # q, k and v share the covariance of their inputs.
    assert len(made) == 3


class JoinedBias(nn.Module):
    """Computes the bias of a layer from parameters, as BEiT and Swin V2 do."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Linear(12, 4, bias=False)
        self.first, self.last = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))

    def forward(self, inputs: Tensor) -> Tensor:
        bias = torch.cat([self.first, self.last.exp()])
        return F.linear(inputs, self.weight.weight, bias)


class Accumulating(JoinedBias):
    """Adds a product to activations in one function."""

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.addmm(inputs[:, :4].tanh(), inputs, self.weight.weight.t())


@pytest.mark.parametrize("build", [JoinedBias, Accumulating])
def test_a_bias_that_is_no_parameter_stays_and_the_weights_fit_it(
    build: Callable[[], nn.Module],
) -> None:
    data, model, dense = vectors(256), build(), build()
    inputs = data.tensors[0] + 1.0
    data = TensorDataset(inputs, data.tensors[1])
    few = LayerwiseConfig(relative_damping=1e-8)
    reconstruct(model, data, samples=256, layerwise=few)
    rows = inputs.double()
    products = rows @ dense.weight.weight.detach().double().t()
    for o, weight in enumerate(model.weight.weight.detach()):
        kept = weight != 0
        expected = torch.linalg.lstsq(rows[:, kept], products[:, o]).solution
        torch.testing.assert_close(
            weight[kept].double(), expected, rtol=1e-3, atol=1e-3
        )
    assert torch.equal(model.first, dense.first)


def test_attention_and_packed_projections() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerDecoderLayer(12, 2, 24, batch_first=True)
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(64, 2, 5, 12, generator=generator)

    def loss(model: nn.Module, batch: Any) -> Tensor:
        result: Tensor = model(batch[0][:, 0], batch[0][:, 1])
        return (result * result.detach().roll(1, 2)).mean()

    report = reconstruct(layer, TensorDataset(rows), loss, samples=64)
    require_sparse(report, layer, 0.6)
    # The second attention has queries and keys of different inputs.
    assert report.collection.startswith("7 layers")  # type: ignore[union-attr]


def training_flags(model: nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


def test_training_state_is_untouched() -> None:
    model = convolutional().train()
    model[1].eval()
    flags = training_flags(model)
    before = torch.random.get_rng_state()
    reconstruct(model, images())
    assert training_flags(model) == flags
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


# ---------------------------------------------------------------- bad input


class Unstable(nn.Module):
    """Counts its calls, which changes its outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.calls = nn.Linear(12, 4), 0

    def forward(self, inputs: Tensor) -> Tensor:
        self.calls += 1
        result: Tensor = self.layer(inputs + self.calls)
        return result


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.spare = nn.Linear(12, 4), nn.Linear(3, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        result: Tensor = self.layer(inputs)
        return result


class Changing(nn.Module):
    """Runs its layers in another order for some batches."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = (nn.Linear(12, 12) for _ in range(3))

    def forward(self, inputs: Tensor) -> Tensor:
        layers = [self.one, self.two]
        if float(inputs.sum()) > 0:
            layers.reverse()
        for layer in layers:
            inputs = layer(inputs).relu()
        result: Tensor = self.head(inputs)
        return result


class Noisy(nn.Module):
    """Draws from a generator of its own between two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(12, 12), nn.Linear(12, 4)
        self.generator = torch.Generator()

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.one(inputs)
        noise = torch.randn(hidden.shape, generator=self.generator)
        result: Tensor = self.two(hidden + 0.3 * noise)
        return result


class Strides(nn.Module):
    """Runs one weight with another stride for some batches."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.head = nn.Conv1d(1, 4, 3), nn.Linear(4, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        stride = 2 if float(inputs.sum()) > 0 else 1
        hidden = F.conv1d(inputs.unsqueeze(1), self.weight.weight, None, stride)
        result: Tensor = self.head(hidden.mean(2))
        return result


def with_infinity() -> TensorDataset:
    data = vectors()
    data.tensors[0][5, 3] = float("inf")
    return data


def detached(model: nn.Module, batch: Any) -> Tensor:
    return cross_entropy(model, batch).detach()


BAD: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any], Loss, str]] = {
    "unused": (Unused, vectors, cross_entropy, "did not run as such.*spare.weight"),
    "recurrent": (
        lambda: nn.Sequential(nn.LSTM(12, 4)),
        vectors,
        lambda model, batch: model(batch[0])[0].mean(),
        "0.weight_ih_l0",
    ),
    "unstable": (Unstable, vectors, cross_entropy, "^layer.weight.* a second time"),
    "noisy": (Noisy, vectors, cross_entropy, "^two.weight .* of the network's own"),
    "strides": (Strides, lambda: vectors(512), cross_entropy, "with another stride"),
    "order": (Changing, lambda: vectors(512), cross_entropy, "same order for every"),
    "no graph": (perceptron, vectors, detached, "has no graph"),
    "infinite": (perceptron, with_infinity, cross_entropy, "(is|not) (nan|finite)"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_leaves_the_model_as_it_was(name: str) -> None:
    build, data, loss, message = BAD[name]
    torch.manual_seed(0)
    model = build()
    next(model.children()).eval()
    before, flags = copy.deepcopy(model.state_dict()), training_flags(model)
    with pytest.raises((ConfigurationError, PruningError), match=message) as error:
        reconstruct(model, samples := data(), loss, samples=len(samples))
    assert "\n" not in str(error.value)
    assert training_flags(model) == flags
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_inputs_that_are_not_finite_are_named() -> None:
    model = perceptron()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(PruningError, match=r"of 0.weight are not finite .*sample"):
        reconstruct(
            model,
            with_infinity(),
            step=StepConfig(measure_loss=False),
            layerwise=LayerwiseConfig(output_weights=False),
        )
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_a_failure_between_layers_is_rolled_back() -> None:
    model = perceptron()
    before = copy.deepcopy(model.state_dict())

    class Failing(nn.Module):
        """Fails in the third run, in the middle of the forward pass."""

        def __init__(self) -> None:
            super().__init__()
            self.net = model

        def forward(self, inputs: Tensor) -> Tensor:
            hidden = self.net[0](inputs)
            # The pruned network: the first weight has zeros by now.
            if (self.net[0].weight == 0).any():
                raise RuntimeError("broken")
            result: Tensor = self.net[1:](hidden)
            return result

    with pytest.raises(RuntimeError, match="broken"):
        reconstruct(Failing(), vectors())
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_loss_without_gradient_at_the_dense_network() -> None:
    model, dense = perceptron(), perceptron()

    def distill(student: nn.Module, batch: Any) -> Tensor:
        with torch.no_grad():
            target = dense(batch[0])
        return F.mse_loss(student(batch[0]), target)

    with pytest.warns(UserWarning, match="no gradient at the dense network"):
        report = reconstruct(model, vectors(), distill)
    require_sparse(report, model, 0.6)


@pytest.mark.parametrize(
    "options",
    [
        {"fisher": {"model_mode": "train"}},
        {"step": StepConfig(update="independent")},
        {"step": StepConfig(update_scale=0.5)},
        {"step": StepConfig(local_model_points=3)},
        {"step": StepConfig(trust_ratio=2.0, recompute_steps=2)},
        {"selection": SelectionConfig(flops_power=1.0)},
        {"flops_target": 0.5, "target_sparsity": None},
    ],
)
def test_settings_without_a_meaning_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match="layerwise"):
        reconstruct(perceptron(), vectors(), **options)


def test_damping_is_needed() -> None:
    with pytest.raises(ConfigurationError, match="fewer inputs than weights"):
        LayerwiseConfig(relative_damping=0.0)
    # With it, fewer samples than inputs are enough.
    model = perceptron()
    require_sparse(reconstruct(model, vectors(), samples=6), model, 0.6)


def test_sweep_and_estimate() -> None:
    model = perceptron()
    before = copy.deepcopy(model.state_dict())
    data = vectors()
    report = sweep(
        model,
        data,
        cross_entropy,
        lambda net: cross_entropy(net, data.tensors).item(),
        {"criterion": ["layerwise", "magnitude"], "admm_iterations": [0, 30]},
        target_sparsity=0.8,
        fisher=FisherConfig(num_gradients=128, gradient_batch_size=1),
    )
    assert all(result.error is None for result in report.results)
    assert {k: v.tolist() for k, v in model.state_dict().items()} == {
        k: v.tolist() for k, v in before.items()
    }
    cost = estimate(model, criterion="layerwise")
    assert cost.engine == "layers"
    assert cost.peak_bytes > 0
    # The survey looks at four groups of four mini-batches.
    assert cost.gradient_passes == 16


def iterate(data: TensorDataset) -> Iterator[Any]:
    for i in range(0, len(data), 16):
        yield tuple(tensor[i : i + 16] for tensor in data.tensors)


def test_batches_of_an_iterator() -> None:
    model = perceptron()
    report = reconstruct(model, iterate(vectors()), samples=8)  # type: ignore[arg-type]
    require_sparse(report, model, 0.6)
