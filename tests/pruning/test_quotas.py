"""Targets and limits of layers, against a loop over sorted scores."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_woodfisher import ConfigurationError, SelectionConfig, StepConfig, prune
from lightning_woodfisher.distributed.communicator import Communicator
from lightning_woodfisher.distributed.smallest import (
    select_smallest,
)
from lightning_woodfisher.pruning.quotas import (
    Layers,
    make_quotas,
)

SHAPES = ((7, 8), (5, 12), (3, 4))


def network() -> nn.ModuleList:
    torch.manual_seed(0)
    layers = nn.ModuleList(nn.Linear(inputs, outputs) for outputs, inputs in SHAPES)
    with torch.no_grad():
        # So that a global threshold would take nearly all of the second layer.
        layers[1].weight.mul_(0.01)
    return layers


def no_loss(model: nn.Module, batch: Any) -> Tensor:
    raise AssertionError("magnitudes need no loss")


def zeros(model: nn.Module, target: float, **selection: Any) -> list[int]:
    prune(
        model,
        [],
        no_loss,
        target_sparsity=target,
        criterion="magnitude",
        selection=SelectionConfig(**selection),
        step=StepConfig(measure_loss=False),
    )
    return [int((layer.weight == 0).sum()) for layer in model]


def greedy(scores: list[list[float]], budget: int, caps: list[int]) -> list[int]:
    """Take the smallest first, passing over layers that are full."""
    taken = [0] * len(scores)
    for _, layer in sorted((s, i) for i, own in enumerate(scores) for s in own):
        if budget and taken[layer] < caps[layer]:
            taken[layer] += 1
            budget -= 1
    assert budget == 0
    return taken


@pytest.mark.parametrize("target", [0.3, 0.6, 0.7])
@pytest.mark.parametrize("most", [0.7, 0.71, 0.85, 1.0])
def test_limits_bind_exactly_and_others_make_up(target: float, most: float) -> None:
    model = network()
    scores = [
        [abs(float(w)) for w in layer.weight.detach().flatten()] for layer in model
    ]
    # 0.7 · 60 is 42 weights, and none fewer.
    caps = [round(most * 100) * len(own) // 100 for own in scores]
    budget = round(target * 128)
    if budget > sum(caps):
        with pytest.raises(
            ConfigurationError, match=f"{budget} more .* only {sum(caps)};"
        ):
            zeros(model, target, max_layer_sparsity=most)
        return
    found = zeros(model, target, max_layer_sparsity=most)
    assert found == greedy(scores, budget, caps)
    assert sum(found) == budget


@given(
    weights=st.lists(st.integers(1, 300), min_size=1, max_size=5),
    target=st.floats(0.0, 0.99),
    most=st.floats(0.01, 1.0),
)
def test_a_limit_is_refused_only_where_it_leaves_no_room(
    weights: list[int], target: float, most: float
) -> None:
    layers = Layers(
        tuple(f"layer{i}" for i in range(len(weights))),
        tuple((1, count) for count in weights),
        tuple(weights),
        (0,) * len(weights),
    )
    selection = SelectionConfig(max_layer_sparsity=most)
    wanted = round(target * sum(weights))
    room = sum(int(most * count + 1e-9) for count in weights)
    if wanted > room:
        with pytest.raises(ConfigurationError, match=f"only {room};"):
            make_quotas(selection, layers, target)
    else:
        quotas = make_quotas(selection, layers, target)
        assert quotas.totals == [wanted]
        assert sum(quotas.caps or ()) == room


@pytest.mark.parametrize("parts", [1, 4])
def test_layers_with_a_target_reach_it_and_the_rest_shares_what_is_left(
    parts: int,
) -> None:
    model = network()
    scores = [
        [abs(float(w)) for w in layer.weight.detach().flatten()] for layer in model
    ]
    prune(
        model,
        [],
        no_loss,
        target_sparsity=0.6,
        criterion="magnitude",
        selection=SelectionConfig(layer_targets={"^1": 0.25}),
        step=StepConfig(measure_loss=False, recompute_steps=parts),
    )
    found = [int((layer.weight == 0).sum()) for layer in model]
    assert found[1] == 15
    rest = greedy([scores[0], scores[2]], round(0.6 * 128) - 15, [56, 12])
    assert [found[0], found[2]] == rest


def test_with_scope_layer_the_others_keep_the_target_of_all() -> None:
    found = zeros(network(), 0.5, scope="layer", layer_targets={"^1": 0.25})
    assert found == [28, 15, 6]


def test_a_limit_is_not_rounded_twice() -> None:
    # 0.29 · 100 is 28.999999999999996 in floating point.
    layers = Layers(("a",), ((1, 100),), (100,), (9,))
    quotas = make_quotas(SelectionConfig(max_layer_sparsity=0.29), layers, 0.29)
    assert quotas.caps == (20,)
    assert quotas.totals == [20]


def test_targets_of_layers_grow_with_the_schedule() -> None:
    layers = Layers(("a", "b"), ((1, 100), (1, 100)), (100, 100), (0, 0))
    selection = SelectionConfig(layer_targets={"a": 0.2})
    assert make_quotas(selection, layers, 0.25, 0.5).until(1.0) == [40, 10]
    assert make_quotas(selection, layers, 0.5, 0.5).until(1.0) == [80, 20]
    assert make_quotas(selection, layers, 0.5).until(1.0) == [80, 20]


@pytest.mark.parametrize(
    ("selection", "target", "message"),
    [
        ({"layer_targets": {"^1": 0.0}}, 0.9, r"other 68 weights would need 115 zeros"),
        ({"layer_targets": {"^1": 0.9}}, 0.1, r"other 68 weights would need -41 zeros"),
        ({"layer_targets": {"^[01]": 0.5, "1": 0.6}}, 0.5, r"1.weight has two targets"),
        ({"layer_targets": {"fc": 0.5}}, 0.5, r"'fc' of selection.layer_targets match"),
        (
            {"layer_targets": {"1": 0.5}, "max_layer_sparsity": 0.4},
            0.3,
            r"asks for 0.5 of 1.weight",
        ),
        ({"max_layer_sparsity": 0.4}, 0.5, r"out of reach when no layer"),
        ({"pattern": "2:4", "max_layer_sparsity": 0.4}, 0.5, r"out of reach"),
    ],
)
def test_contradictions_are_refused_with_numbers(
    selection: dict[str, Any], target: float, message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        zeros(network(), target, **selection)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer_targets": {"a": 1.0}}, r"layer_targets\['a'\]=1.0 is outside"),
        ({"layer_targets": {"a": "b"}}, r"layer_targets\['a'\]"),
        ({"layer_targets": {"(": 0.5}}, r"'\(' .* not a regular expression"),
        ({"layer_targets": ["a"]}, r"not a mapping"),
        ({"max_layer_sparsity": 0.0}, r"max_layer_sparsity=0.0 is outside"),
        ({"max_layer_sparsity": 1.5}, r"max_layer_sparsity=1.5 is outside"),
        ({"flops_power": -1.0}, r"flops_power=-1.0 is outside"),
        ({"flops_power": float("nan")}, r"flops_power"),
        ({"flops_power": 1.0, "scope": "layer"}, r"has no effect with"),
        ({"pattern": "2:4", "layer_targets": {"a": 0.5}}, r"same sparsity"),
    ],
)
def test_settings_that_make_no_sense_are_refused(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        SelectionConfig(**options)


# --- selection with sizes -----------------------------------------------------------------


@given(data=st.data(), number=st.integers(0, 40))
def test_the_smallest_go_as_long_as_their_sizes_fit(
    comm: Communicator, data: st.DataObject, number: int
) -> None:
    def draw(values: st.SearchStrategy[Any]) -> list[Any]:
        return data.draw(st.lists(values, min_size=number, max_size=number))

    scores = draw(st.sampled_from([0.0, 0.5, 1.0, 1e-300, 7.0]))
    groups, sizes = draw(st.integers(0, 2)), draw(st.integers(1, 2**45))
    counts = data.draw(st.lists(st.integers(0, 2**47), min_size=3, max_size=3))
    expected = [False] * number
    for group, room in enumerate(counts):
        members = [i for i in range(number) if groups[i] == group]
        for i in sorted(members, key=lambda i: (scores[i], i)):
            room -= sizes[i]
            if room < 0:
                break
            expected[i] = True
    marked = select_smallest(
        torch.tensor(scores, dtype=torch.float64),
        torch.tensor(groups, dtype=torch.int64),
        counts,
        comm,
        torch.tensor(sizes, dtype=torch.int64),
    )
    assert marked.tolist() == expected


def test_a_layer_with_more_zeros_than_its_target_leaves_less_to_the_others() -> None:
    layers = Layers(("a", "b"), ((10, 10), (10, 10)), (100, 100), (50, 0))
    selection = SelectionConfig(layer_targets={"a": 0.3})
    quotas = make_quotas(selection, layers, 0.5)
    # Of 100 zeros 50 are there already, 20 more than a was to have.
    assert quotas.totals == [50, 0]
    with pytest.raises(ConfigurationError, match="would need -10 zeros"):
        make_quotas(selection, layers, 0.2)


def test_a_layer_that_is_left_dense_counts_for_nobody() -> None:
    selection = SelectionConfig()
    shapes = ((4, 5), (6, 10), (2, 4))
    sizes = tuple(outputs * inputs for outputs, inputs in shapes)
    every = Layers(("a", "b", "c"), shapes, sizes, (3, 12, 4))
    for place, name in enumerate(every.names):
        others = [i for i in range(3) if i != place]
        quotas = make_quotas(selection, every, 0.5, left_dense={name})
        weights = sum(sizes[i] for i in others)
        zeros = sum(every.zeros[i] for i in others)
        assert quotas.groups == ((0.5, weights, zeros),)
        assert quotas.totals == [round(0.5 * weights) - zeros]
