"""Laws that hold for any input: growth, counts, symmetries, scaling, round trips."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any, Literal, get_args

import pytest
import torch
import torch.nn.functional as F
from devices import DEVICE, called_from_cpu
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_woodfisher import (
    ConfigurationError,
    ConstantSchedule,
    FisherConfig,
    OneShotSchedule,
    PolynomialSchedule,
    PruningReport,
    SelectionConfig,
    StepConfig,
    prune,
)
from lightning_woodfisher.criteria.obs import Update, saliency, weight_update
from lightning_woodfisher.distributed.communicator import Communicator
from lightning_woodfisher.fisher.inverse import InverseFisher, make_inverse_fisher
from lightning_woodfisher.pruning.report import LayerReport, LocalModelPoint
from lightning_woodfisher.pruning.schedule import Horizon
from lightning_woodfisher.weights.masks import Masks
from lightning_woodfisher.weights.partition import make_partition

Batch = tuple[Tensor, Tensor]
Form = Literal["primal", "dual", "full"]

FORMS: tuple[Form, ...] = get_args(Form)
UPDATES: tuple[Update, ...] = get_args(Update)
WHOLE_STEPS = settings(max_examples=15, derandomize=True, deadline=None, database=None)
CHEAP = settings(max_examples=60, derandomize=True, deadline=None, database=None)

forms, updates = st.sampled_from(FORMS), st.sampled_from(UPDATES)
sparsities = st.one_of(
    st.floats(0.0, 1.0, exclude_max=True), st.sampled_from([0.0, 0.5, 1 - 2**-53])
)
factors = st.floats(-4.0, 4.0).map(lambda exponent: 10.0**exponent)


# ---------------------------------------------------------------- whole steps


def network(widths: Sequence[int] = (5, 4, 3)) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for inputs, outputs in zip(widths, widths[1:], strict=False):
        layers += [nn.Linear(inputs, outputs), nn.Tanh()]
    return nn.Sequential(*layers[:-1]).double()


def batches(inputs: int = 5, number: int = 12) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(number, 2, inputs, generator=generator, dtype=torch.float64)
    labels = torch.randint(3, (number, 2), generator=generator)
    return list(zip(values, labels, strict=True))


def cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def fisher_of(form: Form, damping: float = 1e-3, **options: Any) -> FisherConfig:
    if form == "full":
        return FisherConfig(12, 2, None, damping, **options)
    return FisherConfig(12, 2, 7, damping, engine=form, **options)


def weights_of(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters() if p.dim() > 1]


def gone(model: nn.Module) -> Tensor:
    return torch.cat([(w == 0).flatten() for w in weights_of(model)])


def assert_close(found: nn.Module, expected: nn.Module, rtol: float = 1e-7) -> None:
    assert torch.equal(gone(found), gone(expected))
    for x, y in zip(weights_of(found), weights_of(expected), strict=True):
        torch.testing.assert_close(x, y, rtol=rtol, atol=1e-9)


@WHOLE_STEPS
@given(
    targets=st.lists(sparsities, min_size=1, max_size=4).map(sorted),
    criteria=st.lists(
        st.sampled_from(["woodfisher", "woodtaylor", "diagonal_fisher", "magnitude"]),
        min_size=4,
        max_size=4,
    ),
    form=forms,
    update=updates,
    scope=st.sampled_from(["global", "layer"]),
    parts=st.integers(1, 3),
)
def test_masks_only_grow_and_counts_are_exact(
    targets: list[float],
    criteria: list[str],
    form: Form,
    update: Update,
    scope: Any,
    parts: int,
) -> None:
    model, before = network(), gone(network())
    for target, criterion in zip(targets, criteria, strict=False):
        report = prune(
            model,
            batches(),
            cross_entropy,
            target_sparsity=target,
            fisher=fisher_of(form),
            selection=SelectionConfig(scope=scope),
            criterion=criterion,
            step=StepConfig(update=update, recompute_steps=parts, measure_loss=False),
        )
        after = gone(model)
        assert bool(after[before].all())
        groups = weights_of(model)
        if scope == "global":
            groups = [torch.cat([w.flatten() for w in groups])]
        for group in groups:
            assert int((group == 0).sum()) == round(target * group.numel())
        assert report.zeros == int(after.sum())
        assert all(bool(w.isfinite().all()) for w in weights_of(model))
        before = after


@WHOLE_STEPS
@given(
    widths=st.lists(st.integers(1, 7), min_size=1, max_size=3),
    target=sparsities,
    scope=st.sampled_from(["global", "layer"]),
    block_size=st.one_of(st.none(), st.integers(1, 60)),
)
def test_any_shape_and_any_target_give_the_exact_count(
    widths: list[int], target: float, scope: Any, block_size: int | None
) -> None:
    model = network([5, *widths, 3])
    sizes = [w.numel() for w in weights_of(model)]
    report = prune(
        model,
        batches(),
        cross_entropy,
        target_sparsity=target,
        fisher=FisherConfig(6, 2, block_size),
        selection=SelectionConfig(scope=scope),
    )
    wanted = [round(target * size) for size in sizes]
    total = round(target * sum(sizes)) if scope == "global" else sum(wanted)
    assert report.zeros == int(gone(model).sum()) == total
    if scope == "layer":
        assert [layer.zeros_after for layer in report.layers] == wanted


@WHOLE_STEPS
@given(
    order=st.permutations(range(12)),
    form=forms,
    update=updates,
    centered=st.booleans(),
)
def test_the_order_of_gradients_does_not_matter(
    order: list[int], form: Form, update: Update, centered: bool
) -> None:
    data = batches()
    results = []
    for given_order in (range(12), order):
        model = network()
        prune(
            model,
            [data[i] for i in given_order],
            cross_entropy,
            target_sparsity=0.5,
            fisher=fisher_of(form, centered=centered),
            step=StepConfig(update=update),
        )
        results.append(model)
    assert_close(results[1], results[0])


@WHOLE_STEPS
@given(factor=factors, form=forms, update=updates, whole=st.booleans())
def test_a_loss_in_other_units_with_damping_in_theirs_gives_the_same_network(
    factor: float, form: Form, update: Update, whole: bool
) -> None:
    """F grows by c², which F⁻¹F and the order of saliencies do not notice."""
    results, reports = [], []
    for scale in (1.0, factor):
        model = network()
        report = prune(
            model,
            batches(),
            lambda model, batch, c=scale: c * cross_entropy(model, batch),
            target_sparsity=0.6,
            fisher=fisher_of(form, damping=1e-3 * scale**2),
            criterion="woodfisher" if whole else "diagonal_fisher",
            step=StepConfig(update=update),
        )
        results.append(model)
        reports.append(report)
    assert_close(results[1], results[0])
    assert reports[1].predicted_increase == pytest.approx(
        reports[0].predicted_increase * factor**2  # type: ignore[operator]
    )


@WHOLE_STEPS
@given(form=forms, update=updates, turned=st.booleans())
def test_layers_in_another_order_give_the_same_network(
    form: Form, update: Update, turned: bool
) -> None:
    """Blocks end where tensors end, so that their order is only one of bookkeeping."""

    class Net(nn.Module):
        def __init__(self, swap: bool) -> None:
            super().__init__()
            first, second = network()[0], network()[2]
            pairs = [("first", first), ("second", second)]
            for name, layer in reversed(pairs) if swap else pairs:
                self.add_module(name, layer)

        def forward(self, inputs: Tensor) -> Tensor:
            hidden: Tensor = torch.tanh(self.get_submodule("first")(inputs))
            result: Tensor = self.get_submodule("second")(hidden)
            return result

    nets = [Net(turned), Net(not turned)]
    for net in nets:
        prune(
            net,
            batches(),
            cross_entropy,
            target_sparsity=0.5,
            fisher=fisher_of(form),
            step=StepConfig(update=update),
        )
    states = [net.state_dict() for net in nets]
    assert list(states[0]) != list(states[1])
    for name, value in states[0].items():
        assert torch.equal(value == 0, states[1][name] == 0)
        torch.testing.assert_close(value, states[1][name], rtol=1e-7, atol=1e-9)


# ---------------------------------------------------------------- OBS in closed form

SIZE = 18


def normal(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def inverse_of(rows: Tensor, damping: float, form: Form, block: int) -> InverseFisher:
    inverse = make_inverse_fisher(
        make_partition([rows.shape[1]], block, 1),
        FisherConfig(
            len(rows),
            damping=damping,
            block_size=None if form == "full" else block,
            engine="primal" if form == "primal" else "dual",
        ),
        Communicator(DEVICE),
    )
    inverse = called_from_cpu(inverse)
    inverse.observe(rows)
    inverse.factorize()
    return inverse


def dense(rows: Tensor, damping: float, form: Form, block: int) -> Tensor:
    """F from its definition."""
    fisher = rows.mT @ rows / len(rows)
    if form != "full":
        number = torch.arange(rows.shape[1]) // block
        fisher = fisher * (number.unsqueeze(0) == number.unsqueeze(1))
    return fisher + damping * torch.eye(rows.shape[1], dtype=torch.float64)


masks_of_size = st.lists(st.booleans(), min_size=SIZE, max_size=SIZE).map(torch.tensor)


@CHEAP
@given(
    seed=st.integers(0, 10**6),
    number=st.integers(1, 40),
    removed=masks_of_size,
    form=forms,
    block=st.integers(1, SIZE),
    damping=st.sampled_from([1e-6, 1e-3, 1.0]),
)
def test_no_update_is_predicted_to_cost_less_than_the_joint_one(
    seed: int, number: int, removed: Tensor, form: Form, block: int, damping: float
) -> None:
    rows, weights = normal(seed, number, SIZE), normal(seed + 1, SIZE)
    inverse = inverse_of(rows, damping, form, block)
    fisher = dense(rows, damping, form, block)
    rises = {}
    for update in UPDATES:
        change = weight_update(weights, removed, inverse, update)
        assert torch.equal(change[removed], -weights[removed])
        rises[update] = float(0.5 * change @ fisher @ change)
    slack = 1e-9 * max(rises.values())
    assert rises["joint"] <= rises["independent"] + slack
    assert rises["joint"] <= rises["none"] + slack
    # Of a single weight the saliency is the rise, and both updates are one.
    alone = torch.zeros(SIZE, dtype=torch.bool)
    alone[seed % SIZE] = True
    change = weight_update(weights, alone, inverse, "joint")
    torch.testing.assert_close(
        0.5 * change @ fisher @ change,
        saliency(weights, inverse.diagonal())[seed % SIZE],
        rtol=1e-6,
        atol=1e-12,
    )


@CHEAP
@given(
    seed=st.integers(0, 10**6),
    factor=factors,
    removed=masks_of_size,
    form=forms,
    update=updates,
)
def test_weights_in_other_units(
    seed: int, factor: float, removed: Tensor, form: Form, update: Update
) -> None:
    """With the same F: saliencies grow by c², updates by c, signs change nothing."""
    inverse = inverse_of(normal(seed, 15, SIZE), 1e-3, form, 5)
    weights = normal(seed + 1, SIZE)
    signs = torch.where(normal(seed + 2, SIZE) < 0, -1.0, 1.0).double()
    scores = saliency(weights, inverse.diagonal())
    scaled = saliency(factor * signs * weights, inverse.diagonal())
    torch.testing.assert_close(scaled, factor**2 * scores, rtol=1e-12, atol=0.0)
    assert torch.equal(scaled.argsort(), scores.argsort())
    change = weight_update(weights, removed, inverse, update)
    torch.testing.assert_close(
        weight_update(-factor * weights, removed, inverse, update),
        -factor * change,
        rtol=1e-9,
        atol=1e-12 * factor,
    )


@CHEAP
@given(
    seed=st.integers(0, 10**6),
    order=st.permutations(range(4)),
    removed=st.lists(st.booleans(), min_size=24, max_size=24).map(torch.tensor),
    form=forms,
)
def test_the_order_of_blocks_does_not_matter(
    seed: int, order: list[int], removed: Tensor, form: Form
) -> None:
    rows, weights = normal(seed, 9, 24), normal(seed + 1, 24)
    places = torch.arange(24).view(4, 6)[order].flatten()
    here = inverse_of(rows, 1e-2, form, 6)
    there = inverse_of(rows[:, places], 1e-2, form, 6)
    torch.testing.assert_close(there.diagonal(), here.diagonal()[places])
    torch.testing.assert_close(
        there.constrained_solve(weights[places], removed[places]),
        here.constrained_solve(weights, removed)[places],
    )


# ---------------------------------------------------------------- masks


@CHEAP
@given(
    shapes=st.lists(
        st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=3
    ),
    seeds=st.lists(st.integers(0, 99), max_size=4),
)
def test_a_mask_loses_entries_only_and_survives_a_checkpoint(
    shapes: list[tuple[int, int]], seeds: list[int]
) -> None:
    parameters = {
        str(i): nn.Parameter(torch.ones(shape)) for i, shape in enumerate(shapes)
    }
    masks = Masks(parameters)
    expected = {
        name: torch.zeros(p.shape, dtype=bool) for name, p in parameters.items()
    }  # type: ignore[call-overload]
    for seed in seeds:
        new = {
            name: normal(seed + i, *p.shape) > 0.5
            for i, (name, p) in enumerate(parameters.items())
        }
        masks.prune(new)
        for name, leaving in new.items():
            expected[name] |= leaving
    masks.apply()
    masks.verify()
    for name, leaving in expected.items():
        assert torch.equal(masks.kept(name), ~leaving)
        assert masks.zeros()[name] == int(leaving.sum())
        assert torch.equal(parameters[name].detach() == 0, leaving)
    again = Masks(parameters)
    again.load_state_dict(masks.state_dict())
    assert again.zeros() == masks.zeros()
    assert all(torch.equal(again.kept(n), masks.kept(n)) for n in parameters)
    assert again.state_dict().keys() == masks.state_dict().keys()


# ---------------------------------------------------------------- round trips

numbers = st.floats(allow_nan=False)
counts = st.integers(0, 2**53)
names = st.text(max_size=8)
layers = st.builds(
    LayerReport,
    name=names,
    shape=st.lists(counts, max_size=4).map(tuple),
    weights=counts,
    zeros_before=counts,
    zeros_after=counts,
    threshold=st.none() | numbers,
    predicted_increase=st.none() | numbers,
)
points = st.builds(LocalModelPoint, numbers, st.none() | numbers, numbers)
VALUES: dict[str, st.SearchStrategy[Any]] = {
    "str": names,
    "tuple[LayerReport, ...]": st.lists(layers, max_size=3).map(tuple),
    "tuple[tuple[LocalModelPoint, ...], ...]": st.lists(
        st.lists(points, max_size=2).map(tuple), max_size=2
    ).map(tuple),
    "float": numbers,
    "int": counts,
    "Mapping[str, float]": st.dictionaries(names, numbers, max_size=3),
    "Mapping[str, str]": st.dictionaries(names, names, max_size=3),
    "tuple[int, ...]": st.lists(counts, max_size=3).map(tuple),
    "tuple[str, ...]": st.lists(names, max_size=3).map(tuple),
    "tuple[float, ...]": st.lists(numbers, max_size=3).map(tuple),
    "None": st.none(),
}
# Every field of the report, whatever fields are added later.
reports = st.builds(
    PruningReport,
    **{
        field.name: st.one_of(*(VALUES[kind] for kind in str(field.type).split(" | ")))
        for field in dataclasses.fields(PruningReport)
    },
)


@settings(CHEAP, max_examples=25)
@given(report=reports)
def test_a_report_survives_json(report: PruningReport) -> None:
    text = json.dumps(report.to_dict())
    again = PruningReport.from_dict(json.loads(text))
    assert again == report
    assert json.dumps(again.to_dict()) == text


@CHEAP
@given(
    fisher=st.builds(
        FisherConfig,
        num_gradients=st.integers(1, 10**7),
        gradient_batch_size=st.integers(1, 10**7),
        block_size=st.none() | st.integers(1, 10**7),
        damping=st.floats(1e-100, 1e100),
        engine=st.sampled_from(["auto", "dual"]),
        sample_labels=st.booleans(),
        centered=st.booleans(),
        max_nonfinite=st.integers(0, 10**7),
    ),
    selection=st.builds(
        SelectionConfig,
        include=st.lists(names, max_size=2),
        layer_targets=st.dictionaries(
            st.sampled_from(["a", ".*"]), st.floats(0, 0.9), max_size=2
        ),
        max_layer_sparsity=st.none() | st.floats(0.1, 1.0),
    ),
)
def test_a_config_is_what_its_text_says(
    fisher: FisherConfig, selection: SelectionConfig
) -> None:
    assert eval(repr(fisher)) == fisher
    assert eval(repr(selection)) == selection


# ---------------------------------------------------------------- schedules


@CHEAP
@given(
    start=st.integers(0, 60),
    length=st.integers(0, 200),
    every=st.integers(1, 90),
    degree=st.floats(1e-3, 1e6),
    ends=st.tuples(sparsities, sparsities).map(sorted),
    unit=st.sampled_from(["epoch", "step"]),
    spare=st.integers(1, 9),
)
def test_a_legal_ramp_never_falls_and_lands_on_the_target(
    start: int,
    length: int,
    every: int,
    degree: float,
    ends: list[float],
    unit: str,
    spare: int,
) -> None:
    initial, target = ends
    schedule = PolynomialSchedule(
        **{
            f"start_{unit}": start,
            f"end_{unit}": start + length,
            f"every_n_{unit}s": every,
        },
        degree=degree,
        initial_sparsity=initial,
    )  # type: ignore[arg-type]
    total = start + length + spare
    horizon = Horizon(max_epochs=total, max_steps=total)
    plan = schedule.plan(target, horizon)
    reached = [step.sparsity for step in plan]
    places = [step.position for step in plan]
    assert reached == sorted(reached)
    assert reached[-1] == target
    assert initial <= reached[0]
    assert places[0] == start
    assert places[-1] == start + length
    assert places == sorted(set(places))
    assert {step.unit for step in plan} == {unit}
    assert eval(repr(schedule)).plan(target, horizon) == plan


@CHEAP
@given(
    start=st.integers(-3, 5),
    end=st.none() | st.integers(-3, 9),
    every=st.integers(-1, 3),
    degree=st.sampled_from([-1.0, 0.0, 0.5, 3.0, float("nan"), float("inf")]),
    initial=st.sampled_from([-0.1, 0.0, 0.5, 1.0, float("nan")]),
)
def test_an_illegal_ramp_is_refused_when_it_is_made(
    start: int, end: int | None, every: int, degree: float, initial: float
) -> None:
    legal = (
        start >= 0
        and (end is None or end >= start)
        and every >= 1
        and 0 < degree < float("inf")
        and 0 <= initial < 1
    )

    def make() -> PolynomialSchedule:
        return PolynomialSchedule(start, end, every, degree, initial)

    if not legal:
        with pytest.raises(ConfigurationError, match=r"PolynomialSchedule"):
            make()
        return
    plan = make().plan(0.9, Horizon(max_epochs=12))
    assert plan[-1].sparsity == 0.9


@CHEAP
@given(
    epoch=st.none() | st.integers(-2, 9),
    step=st.none() | st.integers(-2, 9),
    target=sparsities,
)
def test_one_shot_is_one_step_at_the_place_given(
    epoch: int | None, step: int | None, target: float
) -> None:
    given_ = [value for value in (epoch, step) if value is not None]
    if len(given_) == 2 or any(value < 0 for value in given_):
        with pytest.raises(ConfigurationError, match=r"OneShotSchedule"):
            OneShotSchedule(epoch, step)
        return
    schedule = OneShotSchedule(epoch, step)
    (only,) = schedule.plan(target, Horizon(10, 10))
    assert only.position == next(iter(given_), 0)
    assert only.unit == ("epoch" if step is None else "step")
    assert only.sparsity == target
    assert eval(repr(schedule)).plan(target, Horizon(10, 10)) == (only,)
    assert ConstantSchedule().plan(target, Horizon(10, 10)) == ()
