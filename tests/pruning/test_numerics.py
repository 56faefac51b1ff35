"""Numbers at the edge: NaN and infinity, zeros, extreme damping, narrow and wide dtypes."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from step_options import in_step
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset
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
from lightning_woodfisher.data.losses import FunctionLoss
from lightning_woodfisher.distributed.communicator import Communicator
from lightning_woodfisher.fisher.base import raise_until_definite
from lightning_woodfisher.fisher.config import Precision
from lightning_woodfisher.fisher.inverse import make_inverse_fisher
from lightning_woodfisher.gradients.collect import collect_gradients
from lightning_woodfisher.gradients.nonfinite import NonFiniteError, SkippedGradients
from lightning_woodfisher.gradients.task import GradientTask
from lightning_woodfisher.weights.layers import prunable_parameters
from lightning_woodfisher.weights.partition import make_partition

Batch = tuple[Tensor, Tensor]
NAN, INF = math.nan, math.inf

# Each engine, and what else counts or averages rows.
FORMS: dict[str, dict[str, Any]] = {
    "primal": {"block_size": 6},
    "primal, centred": {"block_size": 6, "centered": True},
    "dual": {"block_size": 40, "engine": "dual"},
    "dual, centred": {"block_size": 40, "engine": "dual", "centered": True},
    "full": {"block_size": None},
    "full, centred": {"block_size": None, "centered": True},
}


def network(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)


def samples(number: int = 20, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(number, 5, generator=generator, dtype=torch.float64)
    return [inputs.to(dtype), inputs[:, :3].argmax(dim=1)]


def cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def spoilt(number: int, bad: dict[int, float]) -> tuple[Any, Any]:
    """A dataset with samples that are not finite, and the same one without them."""
    inputs, labels = samples(number)
    good = [i for i in range(number) if i not in bad]
    clean = TensorDataset(inputs[good], labels[good])
    for index, value in bad.items():
        inputs[index, 2] = value
    return TensorDataset(inputs, labels), clean


def one_by_one(data: Dataset[Any]) -> list[Batch]:
    """The same samples as batches of one, in their order."""
    return [
        (inputs.unsqueeze(0), label.unsqueeze(0))
        for inputs, label in (data[i] for i in range(len(data)))  # type: ignore[arg-type]
    ]


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach() for n, p in model.named_parameters() if p.dim() > 1}


def assert_sound(model: nn.Module, report: PruningReport, target: float) -> None:
    """Finite weights, and exactly as many zeros as asked for."""
    values = weights_of(model)
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    total = sum(w.numel() for w in values.values())
    assert sum(int((w == 0).sum()) for w in values.values()) == round(target * total)
    assert report.zeros == round(target * total)


def pruned(
    data: Any, model: nn.Module | None = None, target: float = 0.5, **options: Any
) -> tuple[nn.Module, PruningReport]:
    model = network() if model is None else copy.deepcopy(model)
    fisher = {"gradient_batch_size": 1, "damping": 1e-3, **options.pop("fisher", {})}
    report = prune(
        model,
        data,
        cross_entropy,
        target_sparsity=target,
        fisher=FisherConfig(**fisher),
        **in_step(**options),
    )
    return model, report


def same(a: nn.Module, b: nn.Module) -> None:
    """Equal zeros, and weights that differ by rounding only."""
    for x, y in zip(weights_of(a).values(), weights_of(b).values(), strict=True):
        assert torch.equal(x == 0, y == 0)
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-11)


# ---------------------------------------------------------------- gradients left out


@pytest.mark.parametrize("form", list(FORMS))
def test_what_is_left_out_might_as_well_never_have_been_there(form: str) -> None:
    data, clean = spoilt(20, {0: NAN, 7: INF, 8: -INF, 19: NAN})
    model, report = pruned(
        data, fisher={"num_gradients": 20, "max_nonfinite": 4, **FORMS[form]}
    )
    expected, reference = pruned(clean, fisher={"num_gradients": 16, **FORMS[form]})
    assert report.nonfinite_gradients == 4
    assert reference.nonfinite_gradients == 0
    same(model, expected)
    # Compared on the same samples before and after.
    for name in ("loss_before", "loss_after", "measured_increase"):
        assert getattr(report, name) == pytest.approx(getattr(reference, name))
    assert report.predicted_increase == pytest.approx(reference.predicted_increase)


@pytest.mark.parametrize(
    "options",
    [
        {"criterion": "diagonal_fisher"},
        {"criterion": "woodtaylor"},
        {"criterion": "hessian_diagonal", "update": "none"},
        {"line_search": True},
        {"recompute_steps": 3, "reuse_gradients": True},
        {"local_model_points": 3},
    ],
    ids=str,
)
def test_leaving_out_for_whoever_takes_gradients(options: dict[str, Any]) -> None:
    # The bad one is the last: probes of the Hessian are drawn by number.
    data, clean = spoilt(12, {11: NAN})
    model, report = pruned(
        one_by_one(data), fisher={"num_gradients": 12, "max_nonfinite": 1}, **options
    )
    expected, reference = pruned(
        one_by_one(clean), fisher={"num_gradients": 11}, **options
    )
    assert report.nonfinite_gradients == 1
    same(model, expected)
    assert report.loss_after == pytest.approx(reference.loss_after)


def test_each_part_leaves_out_its_own_and_all_are_counted() -> None:
    data, _ = spoilt(20, {3: NAN})
    model, report = pruned(
        data, fisher={"num_gradients": 20, "max_nonfinite": 1}, recompute_steps=3
    )
    assert_sound(model, report, 0.5)
    assert report.nonfinite_gradients == 3


def test_a_first_order_sample_leaves_out_too() -> None:
    data, _ = spoilt(20, {3: NAN})
    fisher = {"num_gradients": 20, "max_nonfinite": 1, "first_order_samples": 20}
    # Of one batch of all samples none would be left.
    with pytest.raises(PruningError, match=r"gradient 0 .* is nan"):
        pruned(data, criterion="woodtaylor", fisher=fisher)
    model, report = pruned(
        data, criterion="woodtaylor", fisher={**fisher, "model_mode": "train"}
    )
    assert_sound(model, report, 0.5)
    assert report.nonfinite_gradients == 2


def test_passes_over_many_samples_leave_out_the_one() -> None:
    """The first micro-batch is sound, so that later ones are computed in one pass."""
    data, clean = spoilt(64, {45: INF})
    fisher = {"num_gradients": 64, "max_nonfinite": 2}
    model, report = pruned(one_by_one(data), fisher={**fisher, "collection": "loop"})
    # A dataset draws its samples in an order of its own.
    together, other = pruned(data, fisher=fisher)
    assert report.nonfinite_gradients == other.nonfinite_gradients == 1
    assert other.collection is not None
    assert other.collection.startswith("per-sample, but 1 micro-batches by loop")
    same(model, together)
    same(model, pruned(clean, fisher={"num_gradients": 63})[0])


@pytest.mark.parametrize("collection", ["auto", "loop"])
def test_one_too_many_is_named_and_nothing_changes(collection: str) -> None:
    data, _ = spoilt(20, {3: NAN, 9: NAN, 15: NAN})
    model = network()
    before = copy.deepcopy(model.state_dict())
    fisher = FisherConfig(20, 1, collection=collection, max_nonfinite=2)  # type: ignore[arg-type]
    with pytest.raises(PruningError, match=r"samples? .*one more than .*nonfinite=2"):
        prune(model, data, cross_entropy, target_sparsity=0.5, fisher=fisher)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_none_is_left_out_unless_asked_for() -> None:
    data, _ = spoilt(6, {4: NAN})
    with pytest.raises(PruningError, match=r"loss of gradient 4 .* is nan$"):
        pruned(one_by_one(data), fisher={"num_gradients": 6})


class _RootAtZero(nn.Module):
    """A finite loss whose gradient is infinite where its input is zero."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2, bias=False, dtype=torch.float64)

    def forward(self, inputs: Tensor) -> Tensor:
        return (self.linear(inputs).square().sum(dim=1)).sqrt()


def test_a_finite_loss_with_a_gradient_that_is_not() -> None:
    torch.manual_seed(0)
    model = _RootAtZero()
    inputs = torch.randn(6, 3, dtype=torch.float64)
    inputs[2] = 0.0
    batches = list(inputs.split(1))

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch).mean()

    def run(most: int) -> PruningReport:
        fisher = FisherConfig(6, 1, max_nonfinite=most)
        return prune(model, batches, loss, target_sparsity=0.5, fisher=fisher)

    with pytest.raises(PruningError, match=r"gradient 2 .* not finite in linear"):
        run(0)
    report = run(1)
    assert report.nonfinite_gradients == 1
    # Its loss was zero and would have lowered the mean.
    kept = [loss(model, batch).item() for batch in batches if bool(batch.any())]
    assert report.loss_after == pytest.approx(sum(kept) / 5)
    assert_sound(model, report, 0.5)


@pytest.mark.parametrize(
    ("fisher", "options", "match"),
    [
        ({"max_nonfinite": -1}, {}, "at least 0"),
        ({"max_nonfinite": 1.5}, {}, "whole number"),
        ({"max_nonfinite": True}, {}, "whole number"),
        ({"max_nonfinite": 8}, {}, "all of num_gradients=8"),
        ({"max_nonfinite": 1}, {"criterion": "kfac"}, "kfac"),
    ],
    ids=str,
)
def test_limits_that_cannot_work(
    fisher: dict[str, Any], options: dict[str, Any], match: str
) -> None:
    data, _ = spoilt(8, {})
    with pytest.raises(ConfigurationError, match=match):
        pruned(data, fisher={"num_gradients": 8, **fisher}, **options)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"fisher": {"damping": 1e-101}}, r"outside \[1e-100, 1e\+100\]"),
        ({"fisher": {"damping": 1e101}}, r"outside \[1e-100, 1e\+100\]"),
        ({"fisher": {"num_gradients": 2**70}}, "at most 10000000"),
        ({"fisher": {"offload_rows": "no"}}, "must be True or False"),
        ({"batchnorm_recalibration_batches": 10**30}, "at most 10000000"),
        ({"seed": 2**63}, "at most 9223372036854775807"),
        ({"seed": "1"}, "whole number"),
        ({"criterion": []}, r"criterion=\[\] is unknown"),
        ({"update": 1}, "update=1 is unknown"),
        ({"line_search": 1}, "must be True or False"),
    ],
    ids=str,
)
def test_values_that_once_gave_a_traceback_or_never_ended(
    settings: dict[str, Any], match: str
) -> None:
    data, _ = spoilt(8, {})
    settings = {
        **settings,
        "fisher": {"num_gradients": 8, **settings.get("fisher", {})},
    }
    with pytest.raises(ConfigurationError, match=match):
        pruned(data, **settings)


@pytest.mark.parametrize("name", ["fisher", "selection"])
def test_settings_as_plain_dicts_are_refused(name: str) -> None:
    data, _ = spoilt(8, {})
    settings: dict[str, Any] = {name: {"a": 1}}
    with pytest.raises(ConfigurationError, match=f"{name}=.* is not a "):
        prune(
            network(),
            data,
            cross_entropy,
            target_sparsity=0.5,
            **in_step(**settings),
        )


@pytest.mark.parametrize("criterion", ["woodfisher", "kfac", "magnitude"])
@pytest.mark.parametrize("flops_power", [0.0, 1.0])
def test_batchnorm_of_a_single_sample_is_explained(
    criterion: str, flops_power: float
) -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).double()
    data = TensorDataset(*samples())
    fisher = {"num_gradients": 8, "model_mode": "train"}
    with pytest.raises(ConfigurationError, match="gradient_batch_size"):
        pruned(
            data,
            model,
            fisher=fisher,
            criterion=criterion,
            selection=SelectionConfig(flops_power=flops_power),
        )


# ---------------------------------------------------------------- what has no curvature


@pytest.mark.parametrize("update", ["joint", "independent"])
@pytest.mark.parametrize("form", list(FORMS))
def test_a_layer_without_gradient_and_dead_units(form: str, update: Any) -> None:
    model = network(torch.float32)
    head = model[2]
    # A unit whose output is multiplied by nothing, and an input that is always zero.
    with torch.no_grad():
        head.weight[:, 2] = 0.0
    inputs, labels = samples(20, torch.float32)
    inputs[:, 3] = 0.0
    data = TensorDataset(inputs, labels)
    result, report = pruned(
        data,
        model,
        update=update,
        line_search=False,
        fisher={"num_gradients": 20, "damping": 1e-6, **FORMS[form]},
    )
    assert_sound(result, report, 0.5)
    # Without gradient F is λI: whatever stays there stays as it was.
    first, before = weights_of(result)["0.weight"], weights_of(model)["0.weight"]
    for still, was in ((first[:, 3], before[:, 3]), (first[2], before[2])):
        torch.testing.assert_close(still, was * (still != 0))
    assert not torch.equal(first, before * (first != 0))


@pytest.mark.parametrize(
    "criterion",
    ["woodfisher", "woodtaylor", "kfac", "diagonal_fisher", "hessian_diagonal"],
)
@pytest.mark.parametrize("block_size", [None, 8, 30])
def test_without_any_gradient_weights_go_by_magnitude(
    criterion: str, block_size: int | None
) -> None:
    def flat(model: nn.Module, batch: Batch) -> Tensor:
        return cross_entropy(model, batch) * 0.0

    by_magnitude = network()
    data = TensorDataset(*samples())
    fisher = FisherConfig(10, 2, block_size, 1e-3)
    prune(
        by_magnitude,
        data,
        flat,
        target_sparsity=0.5,
        fisher=fisher,
        criterion="magnitude",
    )
    model = network()
    before = copy.deepcopy(weights_of(model))
    prune(model, data, flat, target_sparsity=0.5, fisher=fisher, criterion=criterion)
    for name, weight in weights_of(model).items():
        assert bool(weight.isfinite().all())
        # F of K-FAC is not λI: its factor of the inputs is not zero.
        if criterion != "kfac":
            assert torch.equal(weight == 0, weights_of(by_magnitude)[name] == 0)
            # Nothing makes up for anything.
            torch.testing.assert_close(weight, before[name] * (weight != 0))


@pytest.mark.parametrize("form", list(FORMS))
def test_huge_damping_is_pruning_by_magnitude(form: str) -> None:
    data = TensorDataset(*samples())
    fisher = {"num_gradients": 10, "damping": 1e6, **FORMS[form]}
    model, report = pruned(data, fisher=fisher)
    expected, _ = pruned(data, criterion="magnitude", fisher={"num_gradients": 10})
    for x, y in zip(
        weights_of(model).values(), weights_of(expected).values(), strict=True
    ):
        assert torch.equal(x == 0, y == 0)
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)
    assert report.raised_damping == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("form", list(FORMS))
def test_tiny_damping(form: str, dtype: torch.dtype) -> None:
    """Where digits do not suffice λ is raised, which is reported; nothing is NaN."""
    model = network(dtype)
    data = TensorDataset(*samples(20, dtype))
    fisher = {"num_gradients": 10, "damping": 1e-12, **FORMS[form]}
    result, report = pruned(data, model, fisher=fisher)
    assert_sound(result, report, 0.5)
    assert all(value > 1e-12 for value in report.raised_damping.values())
    assert report.damping == 1e-12
    if dtype == torch.float32 and form == "dual":
        # 10 gradients of 18 weights: the others have a curvature of λ alone.
        assert report.predicted_increase is not None
        assert 0 <= report.predicted_increase < 1e3


def test_raised_damping_is_reported_and_enough() -> None:
    """Two weights that always see the same input, and a λ that float64 cannot add."""
    model = nn.Linear(2, 1, bias=False).double()
    nn.init.constant_(model.weight, 1.0)
    inputs = torch.full((4, 2), 1e3, dtype=torch.float64)
    data = [(row.unsqueeze(0), torch.zeros(1, 1)) for row in inputs]

    def squared(model: nn.Module, batch: Batch) -> Tensor:
        return (model(batch[0]) - batch[1]).square().mean()

    report = prune(
        model,
        data,
        squared,
        target_sparsity=0.5,
        fisher=FisherConfig(4, 1, 2, damping=1e-12, engine="primal"),
        step=StepConfig(line_search=False),
    )
    assert list(report.raised_damping) == ["weight from weight 0"]
    assert report.raised_damping["weight from weight 0"] > 1e-12
    assert bool(model.weight.isfinite().all())
    # What is lost is made up for by its twin: the output stays.
    assert float(model.weight.detach().sum()) == pytest.approx(2.0, rel=1e-3)


def test_of_a_unit_only_the_failing_block_is_damped_more(comm: Communicator) -> None:
    partition = make_partition([800], 2, 1)
    together = max(partition.units, key=lambda unit: unit.count)
    assert together.count > 2
    generator = torch.Generator().manual_seed(2)
    rows = torch.randn(6, 800, generator=generator, dtype=torch.float64)
    # Two equal columns, so long that float64 cannot add λ to their squares.
    first = together.start + together.size
    rows[:, first] *= 1e6
    rows[:, first + 1] = rows[:, first]
    for engine in ("primal", "dual"):
        fisher = FisherConfig(6, damping=1e-6, block_size=2, engine=engine)
        inverse = make_inverse_fisher(partition, fisher, comm)
        inverse.observe(rows)
        inverse.factorize()
        assert list(inverse.raised_damping()) == [first], engine
        assert int((inverse.damping != 1e-6).sum()) == 1


def test_damping_is_not_raised_forever() -> None:
    damping = torch.full((2,), 1e-3, dtype=torch.float64)

    def attempt(values: Tensor) -> tuple[Tensor, Tensor]:
        return values, torch.tensor([False, True])

    with pytest.raises(PruningError, match="not positive definite even with damping"):
        raise_until_definite(attempt, damping)
    assert float(damping[0]) == 1e-3


# ---------------------------------------------------------------- dtypes and sizes


@pytest.mark.parametrize("scale", [2.0**16, 2.0**22])
@pytest.mark.parametrize("collection", ["auto", "loop"])
def test_overflow_in_float16_is_tried_again_with_a_smaller_scale(
    comm: Communicator, collection: Any, scale: float
) -> None:
    model = network(torch.float16)
    wide = network(torch.float64)
    wide.load_state_dict(model.state_dict())
    inputs, labels = samples(16, torch.float16)

    def rows(model: nn.Module, dtype: torch.dtype, scale: float) -> Tensor:
        def loss(model: nn.Module, batch: Batch) -> Tensor:
            return F.cross_entropy(model(batch[0]).to(dtype), batch[1]) * 50.0

        data = TensorDataset(inputs.to(next(model.parameters()).dtype), labels)
        parameters = prunable_parameters(model)
        every = {n: torch.arange(p.numel()) for n, p in parameters.items()}
        sizes = [sum(map(len, every.values()))]
        source = FunctionLoss(model, data, loss)
        source.loss_scale = scale
        batches = source.batches(16, 1, 0)
        with source.session("eval"):
            task = GradientTask(source, parameters, every, 16, 0, comm)
            pieces = collect_gradients(task, batches, sizes, collection=collection)
            return torch.cat([piece.clone() for piece in pieces]).double()

    exact = rows(wide, torch.float64, 1.0)
    # Under this scale the largest are no float16 any more.
    assert float(exact.abs().max()) * scale > torch.finfo(torch.float16).max
    found = rows(model, torch.float32, scale)
    assert bool(found.isfinite().all())
    torch.testing.assert_close(found, exact, rtol=0.02, atol=0.05)


def test_a_gradient_that_float16_cannot_hold_is_an_error(comm: Communicator) -> None:
    model = network(torch.float16)
    data = TensorDataset(*samples(4, torch.float16))

    def steep(model: nn.Module, batch: Batch) -> Tensor:
        return F.cross_entropy(model(batch[0]).float(), batch[1]) * 1e7

    with pytest.raises(PruningError, match="not finite in"):
        prune(model, data, steep, target_sparsity=0.5, fisher=FisherConfig(4, 1))
    assert all(bool(p.isfinite().all()) for p in model.parameters())


def test_bfloat16_weights_and_rows_stay_finite_and_exact_in_number() -> None:
    data = TensorDataset(*samples(20, torch.bfloat16))
    for form in ("primal", "dual", "full"):
        model, report = pruned(
            data,
            network(torch.bfloat16),
            fisher={"num_gradients": 20, "row_dtype": "bfloat16", **FORMS[form]},
        )
        assert_sound(model, report, 0.5)
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_an_update_that_the_dtype_of_the_weights_cannot_hold() -> None:
    """The twin must grow a millionfold, which float16 cannot: nothing is written."""
    model = nn.Linear(2, 1, bias=False).half()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[60000.0, 60000.0]]))
    inputs = torch.full((4, 2), 1e-3, dtype=torch.float16)

    def linear(model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch).float().mean() ** 2

    with pytest.raises(PruningError, match="weights are not finite"):
        prune(
            model,
            list(inputs.split(1)),
            linear,
            target_sparsity=0.5,
            fisher=FisherConfig(4, 1, 2, damping=1e-6),
            step=StepConfig(line_search=False),
        )
    assert model.weight.tolist() == [[60000.0, 60000.0]]


@pytest.mark.parametrize("update", ["joint", "independent", "none"])
def test_blocks_of_one_weight_are_the_diagonal(update: Any) -> None:
    data = TensorDataset(*samples())
    fisher = {"num_gradients": 20, "block_size": 1}
    model, report = pruned(data, fisher=fisher, update=update)
    expected, reference = pruned(
        data, fisher={"num_gradients": 20}, criterion="diagonal_fisher"
    )
    same(model, expected)
    assert report.threshold == pytest.approx(reference.threshold)
    assert report.predicted_increase == pytest.approx(reference.predicted_increase)


@pytest.mark.parametrize("form", ["primal", "dual", "full"])
@pytest.mark.parametrize("engine", ["woodfisher", "woodtaylor", "diagonal_fisher"])
def test_a_single_gradient(form: str, engine: str) -> None:
    data = TensorDataset(*samples())
    fisher = {"num_gradients": 1, **FORMS[form]}
    model, report = pruned(data, fisher=fisher, criterion=engine)
    assert_sound(model, report, 0.5)


def test_a_single_centred_gradient_says_nothing() -> None:
    data = TensorDataset(*samples())
    expected, _ = pruned(data, criterion="magnitude", fisher={"num_gradients": 10})
    for form in ("primal, centred", "dual, centred", "full, centred"):
        model, _ = pruned(data, fisher={"num_gradients": 1, **FORMS[form]})
        same(model, expected)


@pytest.mark.parametrize("block_size", [1, 4, None])
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_layers_of_one_weight(block_size: int | None, scope: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(1, 1), nn.Tanh(), nn.Linear(1, 1), nn.Tanh(), nn.Linear(1, 3)
    ).double()
    inputs, labels = samples()
    fisher = {"num_gradients": 5, "block_size": block_size}
    result, report = pruned(
        TensorDataset(inputs[:, :1], labels),
        model,
        target=0.2,
        fisher=fisher,
        selection=SelectionConfig(scope=scope),
    )
    assert all(bool(p.isfinite().all()) for p in result.parameters())
    assert report.zeros == 1


def test_a_network_of_a_single_weight() -> None:
    model = nn.Linear(1, 1, bias=False).double()
    data = TensorDataset(torch.ones(4, 1, dtype=torch.float64))

    def loss(model: nn.Module, batch: list[Tensor]) -> Tensor:
        return (model(batch[0]) - 1.0).square().mean()

    for target, left in ((0.4, 1), (0.6, 0)):
        prune(model, data, loss, target_sparsity=target, fisher=FisherConfig(4, 1))
        assert int((model.weight != 0).sum()) == left


def test_samples_come_again_where_flops_are_counted() -> None:
    data = TensorDataset(*samples(10))
    fisher = {"num_gradients": 25, "repeat_samples": True}
    selection = SelectionConfig(flops_power=1.0)
    model, report = pruned(data, fisher=fisher, selection=selection)
    assert_sound(model, report, 0.5)


# ---------------------------------------------------------------- the count itself


def test_skipped_gradients_count_by_round(comm: Communicator) -> None:
    skipped = SkippedGradients(2, comm)
    skipped.record(1, NonFiniteError("first"))
    skipped.record(2, NonFiniteError("taken back"))
    skipped.record(2, None)
    kept = skipped.find_kept(0, 4)
    assert kept is not None
    assert kept.tolist() == [0, 2, 3]
    assert skipped.find_kept(4, 4) is None
    skipped.record(9, NonFiniteError("second"))
    assert skipped.find_kept(8, 2) is not None
    assert skipped.failure is None
    skipped.record(10, NonFiniteError("third"))
    skipped.find_kept(10, 1)
    assert skipped.indices == [1, 9, 10]
    assert "third" in str(skipped.failure)


# --- precision ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"num_gradients": 300, "block_size": 64, "damping": 1e-3},
        {"num_gradients": 64, "block_size": 256, "damping": 1e-4},
        {"num_gradients": 150, "block_size": None, "damping": 1e-4},
    ],
    ids=["primal", "dual", "full"],
)
@pytest.mark.parametrize("precision", ["auto", "split"])
def test_a_trained_network_loses_the_same_weights_in_every_precision(
    settings: dict[str, Any], precision: Precision
) -> None:
    dense, data, _ = trained_digits()

    def pruned(precision: Precision) -> tuple[Tensor, PruningReport]:
        model = copy.deepcopy(dense)
        report = prune(
            model,
            data,
            lambda m, batch: F.cross_entropy(m(batch[0]), batch[1]),
            target_sparsity=0.7,
            fisher=FisherConfig(gradient_batch_size=4, precision=precision, **settings),
        )
        weights = [model.get_parameter(layer.name) for layer in report.layers]
        return torch.cat([w.detach().reshape(-1) for w in weights]), report

    exact, _ = pruned("float64")
    found, report = pruned(precision)
    fastest = "float32" if precision == "auto" else "split"
    assert report.arithmetics == {fastest: 1.0}
    assert torch.equal(found == 0, exact == 0)
    # The promise is 1e-3 of F⁻¹, and so of the change of the kept weights.
    assert float((found - exact).abs().max()) < 1e-3 * float(exact.abs().max())
