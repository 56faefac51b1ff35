"""The baselines against dense matrices, loops and closed forms in float64."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from conv1d import Conv1D
from devices import DEVICE, called_from_cpu
from step_options import in_step
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_woodfisher import (
    ConfigurationError,
    FisherConfig,
    PruningError,
    SelectionConfig,
    StepConfig,
    prune,
)
from lightning_woodfisher.criteria import (
    CRITERIA,
    Criterion,
    CriterionName,
    make_criterion,
)
from lightning_woodfisher.criteria.obs import Update
from lightning_woodfisher.data.losses import FunctionLoss
from lightning_woodfisher.distributed.communicator import Communicator
from lightning_woodfisher.gradients.kronecker_factors import KroneckerFactors
from lightning_woodfisher.pruning.evaluator import Evaluator
from lightning_woodfisher.weights.active import ActiveWeights
from lightning_woodfisher.weights.layers import prunable_parameters
from lightning_woodfisher.weights.masks import Masks

BASELINES = ["kfac", "diagonal_fisher", "hessian_diagonal"]
UPDATES: tuple[Update, ...] = ("joint", "independent", "none")


def cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def evaluator(
    model: nn.Module, data: Any, loss: Any, fisher: FisherConfig, scale: float = 1.0
) -> tuple[Evaluator, Masks]:
    # The tests compute what they expect with the model as it is, on the CPU.
    model = copy.deepcopy(model).to(DEVICE)
    masks = Masks(prunable_parameters(model))
    masks.prune_zeros()
    source = FunctionLoss(model, data, loss)
    source.loss_scale = scale
    return Evaluator(source, masks, fisher, Communicator(DEVICE)), masks


def observed(
    name: str,
    model: nn.Module,
    data: Any,
    loss: Any,
    fisher: FisherConfig,
    update: Update = "joint",
    scale: float = 1.0,
) -> tuple[Criterion, Tensor, ActiveWeights]:
    """A criterion that has seen the data, with the active weights."""
    asked, masks = evaluator(model, data, loss, fisher, scale)
    criterion = make_criterion(name, fisher, update)
    active = ActiveWeights(masks, criterion.layout, Communicator(DEVICE))
    criterion.begin(active.partition, Communicator(DEVICE))
    with asked.session():
        asked.observe(criterion, active, seed=0)
    return called_from_cpu(criterion), active.read().cpu(), called_from_cpu(active)


def factors(
    model: nn.Module, data: Any, loss: Any, fisher: FisherConfig, scale: float = 1.0
) -> list[KroneckerFactors]:
    asked, masks = evaluator(model, data, loss, fisher, scale)
    layout = make_criterion("kfac", fisher, "joint").layout
    with asked.session():
        active = ActiveWeights(masks, layout, Communicator(DEVICE))
        return list(map(called_from_cpu, asked.factors(active, seed=0)))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(75, 4)
    ).double()


def images(count: int = 24) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(count, 2, 5, 5, generator=generator, dtype=torch.float64)
    return TensorDataset(pixels, torch.randint(0, 4, (count,), generator=generator))


# ---------------------------------------------------------------- every criterion


def test_the_names_are_those_of_the_table() -> None:
    assert set(get_args(CriterionName)) == set(CRITERIA)


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("name", BASELINES)
def test_a_step_prunes_exactly_and_leaves_no_trace(name: str, update: Update) -> None:
    model = network().float()
    model.insert(1, nn.BatchNorm2d(3))
    model.insert(2, nn.Dropout(0.2))
    model[0].weight.grad = kept_grad = torch.ones_like(model[0].weight)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.get_rng_state()
    data = TensorDataset(images().tensors[0].float(), images().tensors[1])
    fisher = FisherConfig(num_gradients=6, gradient_batch_size=4)
    report = prune(
        model,
        data,
        cross_entropy,
        target_sparsity=0.6,
        fisher=fisher,
        criterion=name,
        **in_step(update=update, recompute_steps=2),
    )
    total = model[0].weight.numel() + model[-1].weight.numel()
    zeros = sum(int((m.weight == 0).sum()) for m in (model[0], model[-1]))
    assert zeros == round(0.6 * total)
    assert report.criterion == name
    assert report.predicted_increase is not None
    assert report.predicted_increase >= 0
    assert report.loss_before is not None
    assert report.loss_after != report.loss_before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(m.training for m in model.modules())
    assert model[0].weight.grad is kept_grad
    assert torch.equal(torch.get_rng_state(), state)
    for key, value in model.state_dict().items():
        if key not in {"0.weight", "5.weight"}:
            assert torch.equal(value, before[key]), key


@pytest.mark.parametrize("name", BASELINES)
def test_the_loss_before_is_that_of_the_samples(name: str) -> None:
    model, data = network(), images()
    fisher = FisherConfig(num_gradients=24, gradient_batch_size=1)
    report = prune(
        model, data, cross_entropy, target_sparsity=0.0, fisher=fisher, criterion=name
    )
    expected = float(cross_entropy(network(), data.tensors).detach())
    assert report.loss_before == pytest.approx(expected, rel=1e-9)
    assert report.loss_after == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("name", [*BASELINES, "woodfisher"])
@pytest.mark.filterwarnings("ignore:this pruning step raised the loss")
def test_curvature_keeps_small_weights_of_large_inputs(name: str) -> None:
    # Least squares: weight j costs w_j² s_j² / 2, and the large weights have small s.
    torch.manual_seed(0)
    scales = torch.logspace(-2, 2, 40, dtype=torch.float64)
    inputs = torch.randn(800, 40, dtype=torch.float64) * scales

    def fitted() -> nn.Linear:
        layer = nn.Linear(40, 1, bias=False).double()
        layer.weight.data = 1 / scales.sqrt()[None]
        return layer

    targets = fitted()(inputs).detach()
    targets += torch.randn_like(targets)
    loss = lambda m, b: 0.5 * (m(b[0]) - b[1]).square().sum(1).mean()  # noqa: E731
    data, fisher = TensorDataset(inputs, targets), FisherConfig(800, 1, 40, 1e-8)
    after = {}
    for criterion in (name, "magnitude"):
        model = fitted()
        prune(
            model,
            data,
            loss,
            target_sparsity=0.5,
            fisher=fisher,
            criterion=criterion,
        )
        after[criterion] = float(loss(model, data.tensors).detach())
    assert after[name] < 0.1 * after["magnitude"]


# ---------------------------------------------------------------- diagonal Fisher


@pytest.mark.parametrize("size", [1, 3])
def test_diagonal_fisher_is_the_mean_of_squared_gradients(size: int) -> None:
    model, data = network(), images()
    fisher = FisherConfig(24 // size, size, None, damping=1e-3)
    criterion, weights, _ = observed(
        "diagonal_fisher", model, data, cross_entropy, fisher
    )
    # The same permutation of the samples that the step draws.
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    squares = torch.zeros_like(weights)
    for part in order.split(size):
        loss = cross_entropy(model, [t[part] for t in data.tensors])
        rows = torch.autograd.grad(loss, [model[0].weight, model[3].weight])
        squares += torch.cat([row.flatten() for row in rows]) ** 2
    diagonal = squares / (24 // size) + 1e-3
    expected = 0.5 * weights**2 * diagonal
    torch.testing.assert_close(criterion.score(weights), expected, rtol=1e-10, atol=0)
    removed = expected <= expected.median()
    change = criterion.compensate(weights, removed)
    assert torch.equal(change, torch.where(removed, -weights, 0.0))
    predicted = criterion.predicted_increase(change)
    torch.testing.assert_close(predicted, torch.where(removed, expected, 0.0))


# ---------------------------------------------------------------- Hessian diagonal


class Quadratic(nn.Module):
    """A loss ½wᵀHw of a single matrix; the batch holds H."""

    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        self.layer = nn.Linear(*weights.shape[::-1], bias=False)
        self.layer.weight.data = weights

    def forward(self, batch: Tensor) -> Tensor:
        flat = self.layer.weight.flatten()
        return 0.5 * flat @ batch.mean(0) @ flat


def quadratic(model: nn.Module, batch: list[Tensor]) -> Tensor:
    return model(batch[0])


def test_one_probe_is_exact_for_a_diagonal_hessian() -> None:
    torch.manual_seed(0)
    diagonals = torch.rand(5, 12, dtype=torch.float64)
    model = Quadratic(torch.randn(3, 4, dtype=torch.float64))
    criterion, weights, _ = observed(
        "hessian_diagonal",
        model,
        TensorDataset(torch.diag_embed(diagonals)),
        quadratic,
        FisherConfig(5, 1, damping=1e-2),
    )
    expected = 0.5 * weights**2 * (diagonals.mean(0) + 1e-2)
    torch.testing.assert_close(criterion.score(weights), expected, rtol=1e-12, atol=0)


def test_negative_curvature_counts_as_none() -> None:
    diagonal = torch.tensor([-3.0, 2.0, -1e-3, 0.0], dtype=torch.float64)
    model = Quadratic(torch.ones(2, 2, dtype=torch.float64))
    criterion, weights, _ = observed(
        "hessian_diagonal",
        model,
        TensorDataset(torch.diag(diagonal)[None]),
        quadratic,
        FisherConfig(1, 1, damping=0.5),
    )
    assert (2 * criterion.score(weights)).tolist() == [0.5, 2.5, 0.5, 0.5]


@pytest.mark.parametrize("pruned", [0, 40])
def test_probes_average_to_the_diagonal_of_the_dense_hessian(pruned: int) -> None:
    model, probes = network(), 500
    model[3].weight.data.view(-1)[:pruned] = 0.0
    one = images(1)
    data = TensorDataset(*(t.repeat(probes, *[1] * (t.dim() - 1)) for t in one.tensors))
    criterion, weights, active = observed(
        "hessian_diagonal",
        model,
        data,
        cross_entropy,
        FisherConfig(probes, 1, damping=1e-6),
    )
    names = ["0.weight", "3.weight"]
    shapes = [model[0].weight.shape, model[3].weight.shape]

    def loss(flat: Tensor) -> Tensor:
        parts = torch.split(flat, [shape.numel() for shape in shapes])
        changed = {n: p.view(s) for n, p, s in zip(names, parts, shapes, strict=True)}
        outputs = torch.func.functional_call(model, changed, one.tensors[0])
        return F.cross_entropy(outputs, one.tensors[1])

    flat = torch.cat([model[i].weight.detach().flatten() for i in (0, 3)])
    hessian = torch.autograd.functional.hessian(loss, flat)
    kept = torch.cat(
        [
            active.positions["0.weight"],
            active.positions["3.weight"] + shapes[0].numel(),
        ]
    )
    assert len(kept) == len(flat) - pruned
    hessian = hessian[kept][:, kept]
    # Var z_j Σ_k H_jk z_k = Σ_{k≠j} H_jk²
    error = (hessian.square().sum(1) - hessian.diagonal() ** 2).div(probes).sqrt()
    found = 2 * criterion.score(weights) / weights**2 - 1e-6
    z = (found - hessian.diagonal().clamp(min=0)).abs() / error.clamp(min=1e-12)
    assert float(z.max()) < 5
    assert float(z.square().mean()) < 1.5
    # Pruned weights add no noise: with them the error would be visibly larger.
    assert float(z.square().mean()) > 0.1


def test_a_linear_loss_has_no_curvature() -> None:
    model = nn.Linear(3, 2, bias=False).double()
    criterion, weights, _ = observed(
        "hessian_diagonal",
        model,
        TensorDataset(torch.randn(4, 3, dtype=torch.float64)),
        lambda m, b: m(b[0]).mean(),
        FisherConfig(4, 1, damping=0.25),
    )
    torch.testing.assert_close(criterion.score(weights), 0.125 * weights**2)


class Attention(nn.Module):
    """Attention by torch's fused kernel, which cannot be differentiated twice."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(8, 24)
        self.out = nn.Linear(8, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        q, k, v = self.project(inputs).unflatten(-1, (3, 2, 4)).unbind(-3)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.out(mixed.transpose(1, 2).flatten(2).mean(1))


def test_attention_is_differentiated_twice() -> None:
    torch.manual_seed(0)
    model = Attention()
    data = TensorDataset(torch.randn(8, 5, 8), torch.randint(0, 4, (8,)))
    report = prune(
        model,
        data,
        cross_entropy,
        target_sparsity=0.5,
        fisher=FisherConfig(8, 1),
        criterion="hessian_diagonal",
    )
    assert report.sparsity == 0.5


def test_a_loss_that_cannot_be_differentiated_twice_is_explained() -> None:
    def ctc(model: nn.Module, batch: Any) -> Tensor:
        scores = model(batch[0].view(6, 1, 3)).log_softmax(-1)
        lengths = torch.tensor([6]), torch.tensor([2])
        return F.ctc_loss(scores, torch.tensor([[1, 2]]), *lengths)

    with pytest.raises(PruningError, match="gradient 0 cannot be differentiated twice"):
        prune(
            nn.Linear(3, 4),
            TensorDataset(torch.randn(4, 6, 3)),
            ctc,
            target_sparsity=0.5,
            fisher=FisherConfig(4, 1),
            criterion="hessian_diagonal",
        )


# ---------------------------------------------------------------- K-FAC: the factors


def single(model: nn.Module, loss: Any, *sample: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Inputs and output gradients of every layer for one sample, by plain hooks."""
    seen: dict[nn.Module, list[Any]] = {}

    def note(layer: nn.Module, args: Any, out: Tensor) -> None:
        out.retain_grad()
        seen.setdefault(layer, []).append([args[0].detach(), out])

    layers = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    handles = [layer.register_forward_hook(note) for layer in layers]
    loss(model, [t[None] for t in sample]).backward()
    for handle in handles:
        handle.remove()
    return [
        (layer, [(inputs, out.grad) for inputs, out in calls])  # type: ignore[misc]
        for layer, calls in seen.items()
    ]


def looped_factors(
    model: nn.Module, data: TensorDataset, loss: Any
) -> list[tuple[Tensor, Tensor]]:
    """A and G sample by sample and position by position."""
    sums: dict[nn.Module, list[Any]] = {}
    for sample in data:
        for layer, calls in single(model, loss, *sample):
            a, g, positions = sums.setdefault(layer, [0, 0, 0])
            for inputs, gradient in calls:
                if isinstance(layer, nn.Conv2d):
                    inputs = F.unfold(
                        inputs,
                        layer.kernel_size,
                        layer.dilation,
                        layer.padding,
                        layer.stride,
                    ).mT
                    gradient = gradient.flatten(2).mT
                for vector in inputs.reshape(-1, inputs.shape[-1]):
                    a = a + torch.outer(vector, vector)
                for vector in gradient.reshape(-1, gradient.shape[-1]):
                    g = g + torch.outer(vector, vector)
                    positions += 1
            sums[layer] = [a, g, positions]
    model.zero_grad()
    layers = [m for m in model.modules() if m in sums]
    return [
        (sums[m][0] / len(data), sums[m][1] / sums[m][2])  # type: ignore[arg-type]
        for m in layers
    ]


def require_same(
    found: list[KroneckerFactors], expected: list[tuple[Tensor, Tensor]]
) -> None:
    assert len(found) == len(expected)
    for one, (a, g) in zip(found, expected, strict=True):
        torch.testing.assert_close(one.inputs, a, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(one.outputs, g, rtol=1e-9, atol=1e-12)


class Tokens(nn.Module):
    """A layer over tokens, called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(6, 6)
        self.out = nn.Linear(6, 4, bias=False)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.out(torch.tanh(self.mix(torch.tanh(self.mix(inputs)))).mean(1))


def tokens() -> TensorDataset:
    torch.manual_seed(3)
    inputs = torch.randn(12, 5, 6, dtype=torch.float64)
    return TensorDataset(inputs, torch.randint(0, 4, (12,)))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stride": 2, "padding": (1, 2)},
        {"dilation": 2},
        {"padding": 1, "stride": (2, 1), "bias": False},
    ],
)
def test_factors_of_convolutions_are_those_of_a_loop(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 3, (3, 2), **options),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(12, 4),
    ).double()
    found = factors(model, images(12), cross_entropy, FisherConfig(12, 1))
    model[1].inplace = False
    require_same(found, looped_factors(model, images(12), cross_entropy))


def test_factors_of_tokens_and_of_layers_called_twice() -> None:
    torch.manual_seed(0)
    model = Tokens().double()
    found = factors(model, tokens(), cross_entropy, FisherConfig(12, 1))
    require_same(found, looped_factors(model, tokens(), cross_entropy))


@pytest.mark.parametrize("update", ["joint", "independent", "none"])
def test_kronecker_factors_of_weights_with_their_inputs_first(update: Any) -> None:
    torch.manual_seed(0)
    flipped = Tokens().double()
    flipped.mix, flipped.out = Conv1D(6, 6).double(), Conv1D(4, 6).double()
    plain = Tokens().double()
    with torch.no_grad():
        plain.out = nn.Linear(6, 4).double()
        for name in ("mix", "out"):
            layer, other = getattr(plain, name), getattr(flipped, name)
            layer.weight.copy_(other.weight.T)
            layer.bias.copy_(other.bias)
    found, expected = (
        factors(model, tokens(), cross_entropy, FisherConfig(12, 1))
        for model in (flipped, plain)
    )
    require_same(found, [(one.outputs, one.inputs) for one in expected])
    reports = [
        prune(
            model,
            tokens(),
            cross_entropy,
            target_sparsity=0.5,
            fisher=FisherConfig(12, 1),
            step=StepConfig(update=update),
            criterion="kfac",
        )
        for model in (flipped, plain)
    ]
    for name in ("mix", "out"):
        found, expected = getattr(flipped, name).weight, getattr(plain, name).weight
        torch.testing.assert_close(found.T, expected, rtol=1e-8, atol=1e-10)
    predicted = [report.predicted_increase for report in reports]
    assert predicted[0] == pytest.approx(predicted[1], rel=1e-8)


@pytest.mark.parametrize(
    ("count", "size", "stream", "scale"),
    [
        (24, 1, 0, 1.0),
        (8, 3, 0, 1.0),
        (6, 4, 4, 1.0),
        (24, 1, 0, 1024.0),
        (2, 12, 12, 8.0),
    ],
)
def test_factors_do_not_depend_on_batches_or_scale(
    count: int, size: int, stream: int, scale: float
) -> None:
    data: Any = images()
    if stream:
        data = list(zip(*(t.split(stream) for t in images().tensors), strict=True))
    model = network()
    found = factors(model, data, cross_entropy, FisherConfig(count, size), scale)
    require_same(found, looped_factors(model, images(), cross_entropy))


def test_convolutions_of_one_and_three_dimensions() -> None:
    # By a convolution of two dimensions with taps and positions of length one.
    torch.manual_seed(0)
    weight = torch.randn(3, 2, 3, dtype=torch.float64)
    inputs = torch.randn(6, 2, 9, dtype=torch.float64)
    found = []
    for cls, axes in ((nn.Conv1d, 0), (nn.Conv2d, 1), (nn.Conv3d, 2)):
        layer = cls(2, 3, (3, *[1] * axes), stride=2, bias=False).double()
        layer.weight.data = weight.view(*weight.shape, *[1] * axes)
        data = TensorDataset(inputs.view(*inputs.shape, *[1] * axes))
        found += factors(
            layer, data, lambda m, b: m(b[0]).pow(3).mean(), FisherConfig(6, 1)
        )
    for other in found[1:]:
        torch.testing.assert_close(other.inputs, found[0].inputs)
        torch.testing.assert_close(other.outputs, found[0].outputs)


# ---------------------------------------------------------------- K-FAC: the algebra


def product_of_samples() -> tuple[nn.Linear, TensorDataset, Callable[..., Tensor]]:
    """A layer whose inputs and output gradients are independent: F = G ⊗ A exactly."""
    torch.manual_seed(0)
    layer = nn.Linear(5, 4, bias=False).double()
    inputs = torch.randn(9, 5, dtype=torch.float64)
    slopes = torch.randn(7, 4, dtype=torch.float64)
    data = TensorDataset(
        inputs.repeat_interleave(7, 0), slopes.repeat(9, 1)
    )  # every pair
    return layer, data, lambda m, b: (m(b[0]) * b[1]).sum(1).mean()


def damped(a: Tensor, g: Tensor, damping: float) -> Tensor:
    """The explicit Kronecker product with π-damping."""
    pi = ((a.trace() / len(a)) / (g.trace() / len(g))).sqrt()
    return torch.kron(
        g + damping**0.5 / pi * torch.eye(len(g), dtype=g.dtype),
        a + damping**0.5 * pi * torch.eye(len(a), dtype=a.dtype),
    )


def test_the_kronecker_product_is_the_fisher_where_it_factorizes() -> None:
    layer, data, loss = product_of_samples()
    (found,) = factors(layer, data, loss, FisherConfig(63, 1))
    rows = [
        torch.autograd.grad(loss(layer, [t[None] for t in one]), layer.weight)[0]
        for one in data
    ]
    matrix = torch.stack([row.flatten() for row in rows])
    expected = matrix.T @ matrix / 63
    product = torch.kron(found.outputs, found.inputs)
    torch.testing.assert_close(product, expected, rtol=1e-9, atol=1e-12)


def test_a_rank_scores_its_own_layers_as_one_rank_does() -> None:
    generator = torch.Generator().manual_seed(0)

    def factor(size: int) -> Tensor:
        rows = torch.randn(9, size, generator=generator, dtype=torch.float64)
        return rows.mT @ rows / 9

    sides = [(3, 4), (2, 5), (4, 4), (3, 3), (2, 4)]
    pairs = [
        KroneckerFactors(factor(i), factor(o), torch.arange(o * i)) for o, i in sides
    ]
    segments = [o * i for o, i in sides]
    weights = torch.randn(sum(segments), generator=generator, dtype=torch.float64)
    fisher = FisherConfig(damping=1e-3)

    def scores(rank: int, world_size: int) -> Tensor:
        criterion = make_criterion("kfac", fisher, "joint")
        partition = criterion.layout(segments, world_size)
        place = Communicator()
        place.rank = rank
        criterion.begin(partition, place)
        own = [pairs[unit.segment] for unit in partition.owned(rank)]
        criterion.observe_factors(copy.deepcopy(own))
        return criterion.score(weights[partition.shard(rank)])

    expected = scores(0, 1)
    for world_size in (2, 3):
        parts = [scores(rank, world_size) for rank in range(world_size)]
        assert all(len(part) for part in parts)
        assert torch.equal(torch.cat(parts), expected)


@pytest.mark.parametrize("damping", [1e-6, 1e-2])
@pytest.mark.parametrize("pruned", [0, 6])
def test_scores_and_updates_are_those_of_the_dense_matrix(
    damping: float, pruned: int
) -> None:
    layer, data, loss = product_of_samples()
    layer.weight.data.view(-1)[torch.randperm(20)[:pruned]] = 0.0
    kept = layer.weight.detach().flatten() != 0
    fisher = FisherConfig(63, 1, damping=damping)
    (pair,) = factors(layer, data, loss, fisher)
    dense = damped(pair.inputs, pair.outputs, damping)
    inverse = dense.inverse()[kept][:, kept]
    dense = dense[kept][:, kept]
    found = {}
    for update in UPDATES:
        criterion, weights, _ = observed("kfac", layer, data, loss, fisher, update)
        scores = criterion.score(weights)
        expected = weights**2 / (2 * inverse.diagonal())
        torch.testing.assert_close(scores, expected, rtol=1e-9, atol=0)
        removed = scores <= scores.median()
        found[update] = criterion.compensate(weights, removed)
        predicted = criterion.predicted_increase(found[update])
        assert predicted is not None
        exact = 0.5 * found[update] @ dense @ found[update]
        torch.testing.assert_close(predicted.sum(), exact, rtol=1e-9, atol=0)
        assert criterion.raised_damping() == {}
    stay = ~removed
    single = -inverse @ torch.where(removed, weights / inverse.diagonal(), 0.0)
    best = torch.linalg.solve(
        dense[stay][:, stay], dense[stay][:, removed] @ weights[removed]
    )
    for update, expected in (
        ("joint", best),
        ("independent", single[stay]),
        ("none", torch.zeros_like(best)),
    ):
        assert torch.equal(found[update][removed], -weights[removed])
        torch.testing.assert_close(found[update][stay], expected, rtol=1e-6, atol=1e-9)


def test_damping_is_raised_where_a_factor_is_singular() -> None:
    layer, data, loss = product_of_samples()
    data = TensorDataset(data.tensors[0][:1].repeat(8, 1), data.tensors[1][:8])
    fisher = FisherConfig(8, 1, damping=1e-60)
    report = prune(
        layer, data, loss, target_sparsity=0.5, fisher=fisher, criterion="kfac"
    )
    assert list(report.raised_damping) == ["weight from weight 0"]
    assert report.raised_damping["weight from weight 0"] > 1e-40


def test_a_layer_that_the_loss_does_not_see_goes_first() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"used": nn.Linear(4, 3), "unused": nn.Linear(4, 3)})
    inputs = torch.randn(20, 4)
    report = prune(
        model,
        TensorDataset(inputs, torch.randint(0, 3, (20,))),
        lambda m, b: F.cross_entropy(m["used"](b[0]), b[1]),
        target_sparsity=0.5,
        fisher=FisherConfig(20, 1, damping=1e-12),
        criterion="kfac",
    )
    assert {one.name: one.zeros_after for one in report.layers} == {
        "used.weight": 0,
        "unused.weight": 12,
    }


def test_layers_that_are_pruned_altogether_are_left_out() -> None:
    model = network()
    model[0].weight.data.zero_()
    report = prune(
        model,
        images(),
        cross_entropy,
        target_sparsity=0.5,
        fisher=FisherConfig(24, 1),
        criterion="kfac",
    )
    assert int((model[3].weight == 0).sum()) == round(0.5 * 354) - 54
    assert report.sparsity == 0.5


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("layer", "include", "message"),
    [
        (
            nn.Conv1d(4, 4, 1, groups=4),
            [],
            "0.weight belongs to a Conv1d with groups=4",
        ),
        (nn.ConvTranspose1d(4, 4, 1), [], "0.weight belongs to a ConvTranspose1d"),
        (nn.Embedding(4, 4), ["Embedding"], "0.weight belongs to a Embedding"),
        (
            nn.MultiheadAttention(4, 2),
            ["in_proj"],
            "0.in_proj_weight belongs to a MultiheadAttention",
        ),
    ],
)
def test_layers_without_kronecker_factors_are_named(
    layer: nn.Module, include: list[str], message: str
) -> None:
    model = nn.Sequential(layer, nn.Linear(4, 4))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ConfigurationError, match=message):
        prune(
            model,
            TensorDataset(torch.randn(8, 4)),
            lambda m, b: m[1](b[0]).square().mean(),
            target_sparsity=0.5,
            fisher=FisherConfig(8, 1),
            selection=SelectionConfig(include=include),
            criterion="kfac",
        )
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("name", ["kfac", "hessian_diagonal"])
@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda m, b: m(b[0]).square().mean() / 0, "the loss of .* 0 .* is inf"),
        (lambda m, b: m(b[0]).detach().mean(), "has no graph"),
    ],
)
def test_useless_losses_are_explained(name: str, loss: Any, message: str) -> None:
    model = nn.Linear(4, 4)
    fisher = dataclasses.replace(FisherConfig(), num_gradients=8, gradient_batch_size=1)
    with pytest.raises(PruningError, match=message):
        prune(
            model,
            TensorDataset(torch.randn(8, 4)),
            loss,
            target_sparsity=0.5,
            fisher=fisher,
            criterion=name,
        )
    assert not model._forward_hooks
