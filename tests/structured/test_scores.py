"""Scores of structures against dense float64 matrices, forward derivatives and counts."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from devices import DEVICE
from hand_groups import (
    cross_entropy,
    dense_matrix,
    images,
    layer,
    make_plain,
    make_residual,
    member,
    objective,
    plain_groups,
    residual_groups,
    trained,
)
from torch import Tensor, nn
from torch.func import functional_call, hessian, jvp
from torch.overrides import TorchFunctionMode
from torch.utils.data import DataLoader, TensorDataset

from lightning_woodfisher.base.errors import ConfigurationError, PruningError
from lightning_woodfisher.data.losses import FunctionLoss
from lightning_woodfisher.distributed.communicator import Communicator
from lightning_woodfisher.structured.config import StructureConfig
from lightning_woodfisher.structured.graph.groups import Group, Member
from lightning_woodfisher.structured.scores.evaluation import (
    Evaluation,
    enough_samples,
)
from lightning_woodfisher.structured.scores.hap import (
    count_probes,
    score_hap,
    spearman,
)
from lightning_woodfisher.structured.scores.methods import (
    StructureScores,
    score_structures,
)
from lightning_woodfisher.structured.scores.sosp import PairScores

# Forward derivatives import decompositions that are written in TorchScript.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:FutureWarning")

NETWORKS = {
    "residual": (make_residual, residual_groups()),
    "plain": (make_plain, plain_groups()),
}
ROLES = {
    "conv": {"producer", "bias"},
    "bn": {"norm"},
    "conv+bn": {"producer", "bias", "norm"},
}
CASES = [
    ("residual", "conv"),
    ("residual", "bn"),
    ("residual", "conv+bn"),
    ("plain", "conv"),
]
SAMPLES = 12


def settings(**changes: Any) -> StructureConfig:
    known = {"num_samples": SAMPLES, "batch_size": 4, "structure": "conv+bn"}
    return StructureConfig(**{**known, **changes})


def score(
    model: nn.Module, groups: Sequence[Group], samples: int = SAMPLES, **changes: Any
) -> StructureScores:
    if DEVICE.type != "cpu":
        # The tests compute what they expect with the model as it is, on the CPU.
        model = copy.deepcopy(model).to(DEVICE)
    source = FunctionLoss(model, images(samples), cross_entropy)
    return score_structures(source, groups, settings(num_samples=samples, **changes))


def theta(
    model: nn.Module, groups: Sequence[Group], kind: str
) -> list[dict[str, Tensor]]:
    """The vectors θ_s, one structure and member at a time."""
    vectors = []
    for group in groups:
        for number in range(group.size):
            vector = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
            for one in group.members:
                # A tensor of two layers has one name.
                if one.role in ROLES[kind] and one.name in vector:
                    weight = model.get_parameter(one.name).detach()
                    for place, owner in enumerate(one.structure_of.tolist()):
                        if owner == number:
                            vector[one.name].select(one.axis, place).copy_(
                                weight.select(one.axis, place)
                            )
            vectors.append(vector)
    return vectors


def flatten(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors.values()])


class Dense:
    """Everything about a small network as explicit matrices."""

    def __init__(self, name: str, kind: str, samples: int = SAMPLES) -> None:
        make, self.groups = NETWORKS[name]
        self.model = make().eval()
        self.pixels, self.labels = images(samples).tensors
        self.parameters = {n: p.detach() for n, p in self.model.named_parameters()}
        self.vectors = theta(self.model, self.groups, kind)
        self.theta = torch.stack([flatten(vector) for vector in self.vectors])

    def logits(self, parameters: dict[str, Tensor]) -> Tensor:
        return functional_call(self.model, parameters, (self.pixels,))

    def losses(self, parameters: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(self.logits(parameters), self.labels, reduction="none")

    def forward(self, function: Callable[..., Tensor]) -> Tensor:
        """Derivatives along every θ_s, ``[S, ...]``."""
        tangents = [jvp(function, (self.parameters,), (v,))[1] for v in self.vectors]
        return torch.stack(tangents)

    def hessian(self) -> Tensor:
        shapes = {n: p.shape for n, p in self.parameters.items()}
        sizes = [p.numel() for p in self.parameters.values()]

        def loss(flat: Tensor) -> Tensor:
            pieces = torch.split(flat, sizes)
            return self.losses(
                {
                    name: piece.view(shape)
                    for (name, shape), piece in zip(shapes.items(), pieces, strict=True)
                }
            ).mean()

        return hessian(loss)(flatten(self.parameters))

    def gauss_newton(self) -> Tensor:
        """Θ G Θᵀ from the logits' forward derivatives and R_n = diag(p) - ppᵀ."""
        slopes = self.forward(self.logits)
        share = self.logits(self.parameters).softmax(1)
        middle = torch.diag_embed(share) - share[:, :, None] * share[:, None, :]
        return torch.einsum("snd,nde,tne->st", slopes, middle, slopes) / len(share)


@pytest.fixture(scope="module")
def dense() -> Callable[[str, str], Dense]:
    made: dict[tuple[str, str], Dense] = {}

    def get(name: str, kind: str) -> Dense:
        if (name, kind) not in made:
            made[name, kind] = Dense(name, kind)
        return made[name, kind]

    return get


# ---------------------------------------------------------------- SOSP-I


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_rows_are_derivatives_of_samples(dense: Any, name: str, kind: str) -> None:
    exact = dense(name, kind)
    pairs = score(exact.model, exact.groups, labels="true", structure=kind).pairs
    expected = exact.forward(exact.losses).T
    # The samples come in another order.
    order = match(pairs.rows, expected)
    torch.testing.assert_close(pairs.rows, expected[order], rtol=1e-8, atol=1e-10)
    first = expected.mean(0).abs()
    torch.testing.assert_close(pairs.first_order, first, rtol=1e-8, atol=1e-10)


def match(rows: Tensor, expected: Tensor) -> Tensor:
    order = torch.cdist(rows, expected).argmin(dim=1)
    assert sorted(order.tolist()) == list(range(len(expected)))
    return order


def slopes(model: nn.Module, groups: Sequence[Group], samples: Any) -> Tensor:
    """Gradients of one sample after the other, times every θ_s: ``[n, S]``."""
    matrix = torch.stack([flatten(v) for v in theta(model, groups, "conv+bn")])
    rows = []
    for pixels, label in samples:
        loss = cross_entropy(model.eval(), (pixels[None], label[None]))
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        rows.append(matrix @ torch.cat([g.flatten() for g in gradients]))
    return torch.stack(rows)


def test_activations_in_place_do_not_matter() -> None:
    model, groups = make_residual(in_place=True), residual_groups()
    rows = score(model, groups, labels="true").pairs.rows
    model.act = nn.SiLU()
    expected = slopes(model, groups, images(SAMPLES))
    torch.testing.assert_close(rows, expected[match(rows, expected)])


class SideBySide(nn.Module):
    """Two layers whose outputs are concatenated before one norm."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 2, 3), nn.Conv2d(2, 3, 3)
        self.bn, self.fc = nn.BatchNorm2d(5), nn.Linear(5, 3)

    def forward(self, images: Tensor) -> Tensor:
        both = self.bn(torch.cat([self.a(images), self.b(images)], 1))
        return self.fc(both.tanh().mean((2, 3)))


def test_concatenated_channels_belong_to_their_groups() -> None:
    model = trained(SideBySide())
    places = {"a": [0, 1, -1, -1, -1], "b": [-1, -1, 0, 1, 2]}
    groups = []
    for name, place in places.items():
        norms = [
            Member("bn", tensor, 0, "norm", torch.tensor(place))
            for tensor in ("weight", "bias")
        ]
        size = max(place) + 1
        groups.append(Group(name, size, (*layer(name, size, True), *norms)))
    expected = slopes(model, groups, images(SAMPLES))
    rows = score(model, groups, labels="true").pairs.rows
    torch.testing.assert_close(rows, expected[match(rows, expected)])
    first = score(model, groups, method="sosp_h").values
    assert [len(values) for values in first] == [2, 3]


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_logits_give_the_gauss_newton_matrix(dense: Any, name: str, kind: str) -> None:
    exact = dense(name, kind)
    scores = score(exact.model, exact.groups, labels="logits", structure=kind)
    pairs = scores.pairs
    everything = range(pairs.size)
    expected = exact.gauss_newton()
    torch.testing.assert_close(
        pairs.curvature(everything), expected, rtol=1e-8, atol=1e-12
    )
    first = exact.forward(exact.losses).mean(1).abs()
    matrix = 0.5 * expected.abs() + torch.diag(first)
    torch.testing.assert_close(dense_matrix(pairs), matrix, rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(pairs.diagonal(), matrix.diagonal())
    torch.testing.assert_close(torch.cat(scores.values), matrix.sum(1))
    chosen = torch.tensor([0, 3, 4])
    assert objective(pairs, chosen) == pytest.approx(
        float(matrix[chosen][:, chosen].sum())
    )


def test_sampled_labels_estimate_the_gauss_newton_matrix(dense: Any) -> None:
    exact = dense("residual", "conv+bn")
    estimates = torch.stack(
        [
            score(
                exact.model, exact.groups, labels="sampled", seed=seed
            ).pairs.curvature(range(9))
            for seed in range(100)
        ]
    )
    error = estimates.mean(0) - exact.gauss_newton()
    deviation = estimates.std(0) / len(estimates) ** 0.5
    # Three standard errors; of 45 entries a few may lie outside.
    assert (error.abs() <= 3 * deviation).double().mean() > 0.95
    assert (error.abs() <= 4.5 * deviation).all()
    # The labels of the data are something else.
    true = score(exact.model, exact.groups, labels="true").pairs.curvature(range(9))
    assert ((true - exact.gauss_newton()).abs() > 6 * deviation).double().mean() > 0.5


def test_labels_of_samples_have_the_slope_of_the_data(dense: Any) -> None:
    exact = dense("plain", "conv")
    pairs = score(exact.model, exact.groups, structure="conv").pairs
    first = exact.forward(exact.losses).mean(1).abs()
    torch.testing.assert_close(pairs.first_order, first)


class Dense2d(nn.Module):
    """Logits for each of T positions; the hidden layer has a structure for each row."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, tokens: Tensor) -> Tensor:  # [n, T, 3]
        return self.last(torch.tanh(self.first(tokens))).transpose(1, 2)


@pytest.mark.parametrize("ignored", [False, True])
def test_curvature_of_a_mean_over_labels_is_that_of_the_loss(ignored: bool) -> None:
    model = trained(Dense2d())
    members = (*layer("first", 4, True), member("last", "weight", 1, "consumer", 4))
    groups = [Group("first", 4, tuple(members))]
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randn(4, 8, 3, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 3, (4, 8), generator=generator)
    if ignored:
        labels[:2, 3:] = -100

    def logits(parameters: Any) -> Tensor:
        return functional_call(model, parameters, (tokens,)).transpose(1, 2)[
            labels >= 0
        ]

    parameters = {n: p.detach() for n, p in model.named_parameters()}
    slopes = torch.stack(
        [jvp(logits, (parameters,), (v,))[1] for v in theta(model, groups, "conv")]
    )
    share = logits(parameters).softmax(1)
    middle = torch.diag_embed(share) - share[:, :, None] * share[:, None, :]
    exact = torch.einsum("snd,nde,tne->st", slopes, middle, slopes) / len(share)
    data = TensorDataset(tokens, labels)
    found = []
    for seed in range(200):
        config = settings(num_samples=4, structure="conv", seed=seed)
        source = FunctionLoss(model, data, cross_entropy)
        pairs = score_structures(source, groups, config).pairs
        found.append(pairs.curvature(range(4)))
    estimates = torch.stack(found)
    error = (estimates.mean(0) - exact).abs()
    assert (error <= 4 * estimates.std(0) / len(estimates) ** 0.5).all()
    # Not by a factor such as the number of labels of a sample.
    assert float(estimates.mean(0).trace()) == pytest.approx(float(exact.trace()), 0.1)


class Folded(nn.Module):
    """A convolution of two images of each sample, which are folded into the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(1, 4, 3), nn.Linear(4, 3)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.conv(images.flatten(0, 1)[:, None]).tanh().mean((2, 3))
        return self.fc(hidden.view(len(images), 2, 4).mean(1))


@pytest.mark.parametrize("names", [("conv",), ("conv", "fc")])
@pytest.mark.parametrize("labels", ["true", "logits", "sampled"])
def test_folded_samples_are_run_one_by_one(names: tuple[str, ...], labels: Any) -> None:
    model = trained(Folded())
    sizes = {"conv": 4, "fc": 3}
    groups = [Group(n, sizes[n], tuple(layer(n, sizes[n], True))) for n in names]
    pairs = score(model, groups, labels=labels).pairs
    expected = slopes(model, groups, images(SAMPLES))
    torch.testing.assert_close(
        pairs.first_order, expected.mean(0).abs(), rtol=1e-6, atol=1e-9
    )
    assert len(pairs.rows) == SAMPLES * (3 if labels == "logits" else 1)
    if labels == "true":
        torch.testing.assert_close(pairs.rows, expected[match(pairs.rows, expected)])


def test_folded_samples_of_a_stream_are_refused() -> None:
    model = trained(Folded())
    groups = [
        Group(n, s, tuple(layer(n, s, True))) for n, s in (("conv", 4), ("fc", 3))
    ]
    pixels, labels = images(SAMPLES).tensors
    stream = [*zip(pixels.split(4), labels.split(4), strict=True)]
    source = FunctionLoss(model, stream, cross_entropy)
    with pytest.raises(PruningError, match=r"lengths \[4, 8\]; use method='sosp_h'"):
        score_structures(source, groups, settings())
    values = score_structures(source, groups, settings(method="sosp_h")).values
    assert [len(value) for value in values] == [4, 3]


def test_samples_of_items_that_are_batches_are_told_apart() -> None:
    pixels, labels = images(SAMPLES).tensors
    items = [*zip(pixels.split(4), labels.split(4), strict=True)]
    # A list is no Dataset for the types, but is one for the loader.
    loader = DataLoader(items, batch_size=None)  # type: ignore[arg-type]
    source = FunctionLoss(make_residual(), loader, cross_entropy)
    config = settings(num_samples=SAMPLES // 4, batch_size=1, labels="true")
    pairs = score_structures(source, residual_groups(), config).pairs
    expected = slopes(make_residual(), residual_groups(), images(SAMPLES))
    torch.testing.assert_close(pairs.rows, expected[match(pairs.rows, expected)])


def test_a_group_without_norms_is_scored_by_its_filters() -> None:
    model, groups = make_residual(), residual_groups()
    model.bn1 = nn.Identity()
    members = [m for m in groups[1].members if m.module != "bn1"]
    groups[1] = Group("conv1", 5, tuple(members))
    for method in ("sosp_i", "sosp_h", "diagonal", "hap", "magnitude"):
        found = [
            score(model, groups, method=method, structure=kind, probes=2).values
            for kind in ("bn", "conv")
        ]
        if method in {"diagonal", "magnitude"}:  # The others mix the groups, or seeds.
            assert torch.equal(found[0][1], found[1][1])
        assert not torch.equal(found[0][0], found[1][0])


def test_a_weight_that_two_layers_share_counts_once() -> None:
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(128, 3), nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)
    )
    trained(model)[4].weight = model[2].weight
    groups = [Group("2", 3, (*layer("2", 3, True), *layer("4", 3, True)))]
    rows = score(model, groups, labels="true").pairs.rows
    expected = slopes(model, groups, images(SAMPLES))
    torch.testing.assert_close(rows, expected[match(rows, expected)])


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_the_diagonal_is_that_of_sosp_i(dense: Any, name: str, kind: str) -> None:
    exact = dense(name, kind)
    options = {"labels": "logits", "structure": kind}
    values = score(exact.model, exact.groups, method="diagonal", **options).values
    expected = 0.5 * exact.gauss_newton().diagonal()
    expected += exact.forward(exact.losses).mean(1).abs()
    torch.testing.assert_close(torch.cat(values), expected, rtol=1e-8, atol=1e-12)


# ---------------------------------------------------------------- SOSP-H, HAP


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_sosp_h_is_a_product_with_the_hessian(dense: Any, name: str, kind: str) -> None:
    exact = dense(name, kind)
    values = score(exact.model, exact.groups, method="sosp_h", structure=kind).values
    product = exact.theta @ exact.hessian() @ exact.theta.sum(0)
    expected = exact.forward(exact.losses).mean(1).abs() + 0.5 * product.abs()
    torch.testing.assert_close(torch.cat(values), expected, rtol=1e-8, atol=1e-10)


def exact_hap(exact: Dense, kind: str, curvatures: Tensor | None = None) -> Tensor:
    """Σ over layers of mean curvature times squared norm, without the bias of filters."""
    if curvatures is None:
        curvatures = exact.hessian().diagonal()
    diagonal = dict(
        zip(
            exact.parameters,
            torch.split(
                curvatures,
                [p.numel() for p in exact.parameters.values()],
            ),
            strict=True,
        )
    )
    scores = []
    for group in exact.groups:
        for number in range(group.size):
            total = torch.zeros((), dtype=torch.float64)
            chosen = [
                m for m in group.members if m.role in ROLES[kind] and m.role != "bias"
            ]
            for module in {m.module for m in chosen}:
                curvature, weights = [], []
                for one in (m for m in chosen if m.module == module):
                    weight = exact.parameters[one.name]
                    curvature.append(
                        diagonal[one.name].view_as(weight)[number].flatten()
                    )
                    weights.append(weight[number].flatten())
                total += torch.cat(curvature).mean() * torch.cat(weights).square().sum()
            scores.append(total)
    return torch.stack(scores)


@pytest.mark.parametrize("kind", ["conv", "conv+bn"])
def test_traces_converge(dense: Any, kind: str) -> None:
    exact = dense("residual", kind)
    source = FunctionLoss(exact.model, images(SAMPLES), cross_entropy)
    config = settings(batch_size=12, structure=kind, probes=20)
    evaluation = Evaluation(source, exact.groups, config, Communicator())
    with evaluation.session():
        # Twenty probes each, so none ends early for good.
        found = torch.stack([score_hap(evaluation, seed)[0] for seed in range(25)])
    error = (found.mean(0) - exact_hap(exact, kind)).abs()
    assert (error <= 4 * found.std(0) / 25**0.5).all()
    assert spearman(found.mean(0), exact_hap(exact, kind)) > 0.9


def test_gauss_newton_traces_are_mean_squares_of_slopes(dense: Any) -> None:
    exact = dense("residual", "conv+bn")
    share = exact.logits(exact.parameters).softmax(1)
    traces = torch.zeros(exact.theta.shape[1])
    # E over labels of the squared gradient, one label after the other.
    for label in range(3):

        def loss(parameters: Any, sample: int, label: int = label) -> Tensor:
            pixels = exact.pixels[sample : sample + 1]
            logits = functional_call(exact.model, parameters, (pixels,))
            return F.cross_entropy(logits, torch.tensor([label]))

        for sample in range(SAMPLES):
            gradient = flatten(torch.func.grad(loss)(exact.parameters, sample))
            traces = traces + share[sample, label] * gradient.square() / SAMPLES
    expected = exact_hap(exact, "conv+bn", traces)
    options = {"method": "hap", "trace": "gauss_newton"}
    found = torch.stack(
        [
            torch.cat(score(exact.model, exact.groups, seed=seed, **options).values)
            for seed in range(100)
        ]
    )
    error = (found.mean(0) - expected).abs()
    assert (error <= 4 * found.std(0) / 10).all()
    assert (found > 0).all()


def test_traces_depend_on_the_seed_only() -> None:
    model, groups = make_residual(), residual_groups()
    options = {"method": "hap", "structure": "conv", "probes": 30}
    first = score(model, groups, **options)
    again = score(model, groups, **options)
    for one, other in zip(first.values, again.values, strict=True):
        assert torch.equal(one, other)
    cut = score(model, groups, **options, batch_size=12)
    torch.testing.assert_close(torch.cat(first.values), torch.cat(cut.values))
    other = score(model, groups, **options, seed=1)
    assert not torch.equal(first.values[0], other.values[0])
    assert first.notes["probes"] == 30
    negative = (torch.cat(first.values) < 0).double().mean()
    assert first.notes["share_negative"] == pytest.approx(float(negative))


class Calls(TorchFunctionMode):
    """Counts copies to the CPU and draws of random numbers with a generator."""

    def __init__(self) -> None:
        super().__init__()
        self.copies = self.draws = 0

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.copies += function is Tensor.cpu
        self.draws += function is torch.randint and "generator" in kwargs
        return function(*args, **(kwargs or {}))


def count_calls(**changes: Any) -> Calls:
    with Calls() as calls:
        score(make_residual(), residual_groups(), method="hap", **changes)
    return calls


def test_signs_are_drawn_once_and_nothing_is_copied_for_a_probe() -> None:
    few = count_calls(probes=2, batch_size=12)
    more_batches = count_calls(probes=2, batch_size=4)
    more_probes = count_calls(probes=20, batch_size=12)
    assert more_batches.draws == few.draws
    # One draw makes the labels.
    assert more_probes.draws - 1 == 10 * (few.draws - 1)
    assert more_probes.copies == few.copies
    assert more_batches.copies == few.copies + 2  # The rows of each batch.


def test_probes_end_once_the_ranking_has_settled() -> None:
    # A quadratic with one eigenvalue for each filter: every probe gives the exact trace.
    model = nn.Sequential(nn.Linear(3, 5, bias=False), nn.Linear(5, 5, bias=False))
    with torch.no_grad():
        model[1].weight.copy_(torch.diag(torch.arange(1.0, 6.0)))
    group = Group("0", 5, (member("0", "weight", 0, "producer", 5),))
    source = FunctionLoss(
        model, [torch.eye(3)] * 2, lambda net, batch: net(batch).square().sum()
    )
    config = settings(method="hap", structure="conv", num_samples=2, batch_size=1)
    scores = score_structures(source, [group], config)
    assert scores.notes["probes"] == 20
    assert scores.notes["probe_agreement"] == pytest.approx(1.0)
    # H_cc = 2 c² I, so Tr / p = 2 c².
    norms = model[0].weight.detach().double().square().sum(1)
    expected = 2 * torch.arange(1.0, 6.0).double() ** 2 * norms
    torch.testing.assert_close(scores.values[0], expected, rtol=1e-5, atol=1e-6)


def test_the_number_of_probes_that_settles_the_ranking() -> None:
    # Scores with noise of which each probe takes its share.
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(4000, generator=generator, dtype=torch.float64)

    def agreement(probes: int) -> float:
        noise = torch.randn(2, 4000, generator=generator, dtype=torch.float64)
        halves = truth + noise * (20 / (probes / 2)) ** 0.5
        return spearman(halves[0], halves[1])

    few = agreement(20)
    assert 0.2 < few < 0.4
    needed = count_probes(20, few)
    assert 3500 < needed < 4500
    assert agreement(int(needed)) == pytest.approx(0.99, abs=0.003)
    assert count_probes(20, -0.1) == math.inf
    assert count_probes(20, 0.995) == 20


# ---------------------------------------------------------------- baselines


def test_magnitude_is_the_mean_over_layers() -> None:
    model = make_residual()
    values = score(
        model, residual_groups(), method="magnitude", structure="conv"
    ).values
    stem, conv2 = model.stem.weight.detach(), model.conv2.weight.detach()
    expected = [
        ((stem[c].square().sum() + conv2[c].square().sum()) / 2).sqrt()
        for c in range(4)
    ]
    torch.testing.assert_close(values[0], torch.stack(expected))


def test_random_scores_follow_the_seed() -> None:
    model, groups = make_plain(), plain_groups()
    options = {"method": "random", "structure": "conv"}
    first = torch.cat(score(model, groups, **options).values)
    assert torch.equal(first, torch.cat(score(model, groups, **options).values))
    other = torch.cat(score(model, groups, **options, seed=1).values)
    assert not torch.equal(first, other)
    assert len(first.unique()) == len(first)


# ---------------------------------------------------------------- what it costs


@pytest.mark.parametrize(
    ("options", "first", "second"),
    [
        ({"method": "sosp_i", "labels": "true"}, 1, 0),
        ({"method": "sosp_i", "labels": "sampled"}, 2, 0),
        ({"method": "sosp_i", "labels": "logits"}, 1 + 3, 0),
        ({"method": "sosp_h"}, 1, 1),
        ({"method": "hap", "probes": 20}, 1, 20),
        ({"method": "hap", "trace": "gauss_newton"}, 1, 0),
        ({"method": "diagonal"}, 2, 0),
    ],
)
def test_backward_passes(
    options: dict[str, Any], first: int, second: int, monkeypatch: Any
) -> None:
    counts = {False: 0, True: 0}
    grad, graph, calls = torch.autograd.grad, [False], [0]

    def counted(outputs: Any, *args: Any, **kwargs: Any) -> Any:
        # A mode of torch functions calls it once more.
        if calls[0]:
            return grad(outputs, *args, **kwargs)
        # A product differentiates gradients, which come from a graph of their own.
        counts[graph[0] and not kwargs.get("create_graph")] += 1
        graph[0] = bool(kwargs.get("create_graph")) or graph[0]
        calls[0] += 1
        try:
            return grad(outputs, *args, **kwargs)
        finally:
            calls[0] -= 1

    monkeypatch.setattr(torch.autograd, "grad", counted)
    score(make_residual(), residual_groups(), **options)
    assert counts == {False: 3 * first, True: 3 * second}


# ---------------------------------------------------------------- the model's mode


def test_training_mode_is_refused() -> None:
    class Careless(FunctionLoss):
        def loss(self, batch: Any, index: int) -> Tensor:
            self.model.train()
            return super().loss(batch, index)

    model = make_residual()
    source = Careless(model.eval(), images(), cross_entropy)
    with pytest.raises(ConfigurationError, match="training mode"):
        score_structures(source, residual_groups(), settings())
    assert not model.training
    assert not any(m._forward_hooks for m in model.modules())


def test_missing_statistics_are_refused() -> None:
    model = make_residual()
    model.bn1 = nn.BatchNorm2d(5, track_running_stats=False).double()
    with pytest.raises(ConfigurationError, match="'bn1' keeps no running mean"):
        score(model, residual_groups())


@pytest.mark.parametrize("method", ["sosp_i", "sosp_h", "hap"])
def test_nothing_is_left_in_the_model(method: str) -> None:
    model = make_residual()
    model.bn.eval()
    model.conv1.weight.requires_grad_(False)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = copy.deepcopy(model.state_dict())
    flags = [m.training for m in model.modules()]
    state = torch.get_rng_state()
    score(model, residual_groups(), method=method, probes=4)
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in model.modules()] == flags
    assert not model.conv1.weight.requires_grad
    assert not any(m._forward_hooks or m._backward_hooks for m in model.modules())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    for parameter in model.parameters():
        assert torch.equal(parameter.grad, torch.ones_like(parameter))


def test_a_stream_of_batches_serves_every_round() -> None:
    pixels, labels = images(SAMPLES).tensors
    batches = list(zip(pixels.split(4), labels.split(4), strict=True))
    model, groups = make_residual(), residual_groups()

    def iterate() -> Iterator[Any]:
        yield from batches

    for method in ("sosp_i", "hap"):
        config = settings(method=method, probes=40)
        known = score_structures(
            FunctionLoss(model, batches, cross_entropy), groups, config
        )
        once = score_structures(
            FunctionLoss(model, iterate(), cross_entropy), groups, config
        )
        assert torch.equal(torch.cat(known.values), torch.cat(once.values))


@pytest.mark.parametrize(
    ("method", "remedy"), [("sosp_h", "sosp_i"), ("hap", "gauss_newton")]
)
def test_losses_without_second_derivatives(method: str, remedy: str) -> None:
    def loss(net: nn.Module, batch: Any) -> Tensor:
        return F.multi_margin_loss(net(batch[0]), batch[1])

    source = FunctionLoss(make_residual(), images(), loss)
    with pytest.raises(PruningError, match=f"twice, which .*{method}.*use.*{remedy}"):
        score_structures(source, residual_groups(), settings(method=method, probes=2))


def test_bad_settings_are_named() -> None:
    for change in (
        {"method": "sosp"},
        {"labels": "drawn"},
        {"probes": 1},
        {"num_samples": 0},
        {"max_ratio": 1.5},
        {"round_to": 0},
        {"only": "conv"},
        {"exclude": [1]},
    ):
        with pytest.raises(ConfigurationError, match=next(iter(change))):
            settings(**change)
    many = settings(num_samples=50)
    source = FunctionLoss(make_residual(), images(20), cross_entropy)
    with (
        pytest.raises(ConfigurationError, match="num_samples=50"),
        enough_samples(many),
    ):
        score_structures(source, residual_groups(), many)
    with pytest.raises(ConfigurationError, match="trace the groups again"):
        score(make_residual(), residual_groups(outer=5))
    model = make_plain()
    model.conv1.weight.data[0] = 1e200
    with pytest.raises(PruningError, match="not finite"):
        score(model, plain_groups(), structure="conv", method="magnitude")


# ---------------------------------------------------------------- removal and ranks


def test_removal_losses_are_those_of_smaller_networks() -> None:
    from examples.cifar10.structured import removal_losses

    model = make_residual()
    pixels, labels = images().tensors

    def loss(net: nn.Module) -> Tensor:
        return F.cross_entropy(net(pixels), labels)

    structures = [(0, 2), (1, 4)]
    before = copy.deepcopy(model.state_dict())
    rises = removal_losses(model, residual_groups(), structures, loss)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    model.eval()
    for (group, number), rise in zip(structures, rises.tolist(), strict=True):
        smaller = copy.deepcopy(model)
        for one in residual_groups()[group].members:
            module = smaller.get_submodule(one.module)
            kept = torch.tensor([i for i in one.structure_of.tolist() if i != number])
            tensor = getattr(module, one.tensor).detach().index_select(one.axis, kept)
            if one.role == "statistics":
                setattr(module, one.tensor, tensor)
            else:
                setattr(module, one.tensor, nn.Parameter(tensor))
        with torch.no_grad():
            expected = float(loss(smaller) - loss(model))
        assert rise == pytest.approx(expected, abs=1e-12)


def test_rank_correlation() -> None:
    first = torch.tensor([1.0, 2.0, 2.0, 5.0])
    second = torch.tensor([3.0, 10.0, 4.0, 4.0])
    # Mean ranks 0, 1.5, 1.5, 3 and 0, 3, 1.5, 1.5.
    ranks = torch.tensor([[0.0, 1.5, 1.5, 3.0], [0.0, 3.0, 1.5, 1.5]])
    expected = float(torch.corrcoef(ranks)[0, 1])
    assert spearman(first, second) == pytest.approx(expected)
    assert spearman(first, -first) == pytest.approx(-1.0)
    assert math.isnan(spearman(first, torch.ones(4)))
    losses = torch.tensor([0.1, 0.2, 0.4])
    assert spearman(torch.tensor([1.0, 2.0, 5.0]), losses) == pytest.approx(1.0)


def test_pairs_of_equal_structures() -> None:
    # Two equal columns cost four times one of them together; opposite ones as well.
    rows = torch.tensor([[1.0, 1.0, -1.0, 0.0], [2.0, 2.0, -2.0, 1.0]])
    pairs = PairScores(rows, 2, torch.zeros(4))
    one = objective(pairs, [0])
    assert objective(pairs, [0, 1]) == pytest.approx(4 * one)
    assert objective(pairs, [0, 2]) == pytest.approx(4 * one)
