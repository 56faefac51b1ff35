"""Groups of weights: costs against brute force in float64, and masks after a step."""

from __future__ import annotations

import itertools
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conv1d import Conv1D
from dense_inverse import sub_blocks, to_dense
from hypothesis import given
from hypothesis import strategies as st
from step_options import in_step
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_woodfisher import (
    ConfigurationError,
    FisherConfig,
    PruningReport,
    SelectionConfig,
    StepConfig,
    prune,
)
from lightning_woodfisher.criteria.woodfisher import WoodFisher
from lightning_woodfisher.data.losses import FunctionLoss
from lightning_woodfisher.distributed.communicator import Communicator
from lightning_woodfisher.fisher.inverse import make_inverse_fisher
from lightning_woodfisher.pruning.config import PruningConfig
from lightning_woodfisher.pruning.pruner import Pruner
from lightning_woodfisher.pruning.selector import prune_zeros
from lightning_woodfisher.weights.active import ActiveWeights
from lightning_woodfisher.weights.layers import prunable_parameters
from lightning_woodfisher.weights.masks import Masks
from lightning_woodfisher.weights.partition import align_block_size, make_partition
from lightning_woodfisher.weights.patterns import group_costs, parse_pattern

DAMPING = 1e-3


def random_rows(number: int, size: int) -> Tensor:
    generator = torch.Generator().manual_seed(number * 1000 + size)
    return torch.randn(number, size, generator=generator, dtype=torch.float64)


def dense_fisher(rows: Tensor, damping: float = DAMPING) -> Tensor:
    identity = torch.eye(rows.shape[1], dtype=torch.float64)
    return damping * identity + rows.mT @ rows / len(rows)


def cost_by_elimination(fisher: Tensor, weights: Tensor, gone: list[int]) -> float:
    """Increase of ½δᵀFδ if w_S + δ_S = 0 and the rest is free, by solving for the rest."""
    size = len(weights)
    kept = [i for i in range(size) if i not in set(gone)]
    change = torch.zeros_like(weights)
    change[gone] = -weights[gone]
    if kept:
        pull = fisher[kept][:, gone] @ change[gone]
        change[kept] = -torch.linalg.solve(fisher[kept][:, kept], pull)
    return float(0.5 * change @ fisher @ change)


def best_support(
    fisher: Tensor, weights: Tensor, group: list[int], number: int
) -> tuple[float, list[int]]:
    supports = [list(s) for s in itertools.combinations(group, number)]
    costs = [cost_by_elimination(fisher, weights, s) for s in supports]
    best = min(range(len(costs)), key=costs.__getitem__)
    return costs[best], supports[best]


# --- engines ----------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["primal", "dual", "full"])
@pytest.mark.parametrize("size", [1, 2, 4, 5, 8])
@pytest.mark.parametrize("damping", [1e-7, 1e-3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sub_blocks_are_those_of_the_dense_inverse(
    form: Any, size: int, damping: float, dtype: torch.dtype, comm: Communicator
) -> None:
    segments, block = [37, 16, 3], 16
    # Fewer gradients than weights of a block are what the dual form is for.
    rows = random_rows(11 if form == "dual" else 70, sum(segments)).to(dtype)
    partition = make_partition(segments, block, 1)
    inverse = make_inverse_fisher(
        partition,
        FisherConfig(
            len(rows),
            damping=damping,
            block_size=None if form == "full" else block,
            engine="auto" if form == "full" else form,
            precision="float64",
        ),
        comm,
    )
    inverse.observe(rows)
    inverse.factorize()
    found = sub_blocks(inverse, size)
    dense = to_dense(inverse)
    groups = [
        range(first, first + size)
        for unit in partition.units
        for start in range(unit.start, unit.stop, unit.size)
        for first in range(start, start + unit.size - size + 1, size)
    ]
    expected = [dense[g.start : g.stop, g.start : g.stop] for g in groups]
    assert found.shape == (len(groups), size, size)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", ["dual", "full"])
def test_damping_is_raised_where_a_group_has_no_digits_left(
    form: Any, comm: Communicator
) -> None:
    # Each weight alone is well known, but of two nearly equal columns the difference is
    # as good as unknown.
    rows = random_rows(30, 8)
    rows[:, 1::2] = rows[:, ::2] * (1 + 1e-7) + 1e-7 * random_rows(30, 4)
    inverse = make_inverse_fisher(
        make_partition([8], 8, 1),
        FisherConfig(
            30,
            damping=1e-11,
            block_size=None if form == "full" else 8,
            engine="auto" if form == "full" else "dual",
        ),
        comm,
    )
    inverse.observe(rows)
    inverse.factorize()
    blocks = sub_blocks(inverse, 2)
    assert float(inverse.damping.min()) > 1e-11
    assert bool((torch.linalg.eigvalsh(blocks) > 0).all())
    diagonal = blocks.diagonal(dim1=-2, dim2=-1).flatten()
    torch.testing.assert_close(diagonal, inverse.diagonal(), rtol=1e-5, atol=0.0)


# --- costs ------------------------------------------------------------------------------


@given(
    seed=st.integers(0, 10_000),
    kept_of=st.sampled_from([(2, 4), (1, 4), (3, 4), (1, 2), (4, 8), (1, 3), (5, 7)]),
    groups=st.integers(1, 4),
)
def test_supports_are_those_of_least_joint_cost(
    seed: int, kept_of: tuple[int, int], groups: int
) -> None:
    kept, size = kept_of
    generator = torch.Generator().manual_seed(seed)
    width = groups * size
    rows = torch.randn(width + 3, width, generator=generator, dtype=torch.float64)
    rows = rows @ torch.randn(width, width, generator=generator, dtype=torch.float64)
    weights = torch.randn(width, generator=generator, dtype=torch.float64)
    fisher = dense_fisher(rows)
    inverse = torch.linalg.inv(fisher).view(groups, size, groups, size)
    blocks = torch.stack([inverse[g, :, g] for g in range(groups)])
    costs, leaving = group_costs(
        blocks, weights.view(groups, size), parse_pattern(f"{kept}:{size}")
    )
    for g in range(groups):
        members = list(range(g * size, (g + 1) * size))
        cost, support = best_support(fisher, weights, members, size - kept)
        assert float(costs[g]) == pytest.approx(cost, rel=1e-6)
        gone = [g * size + int(i) for i in leaving[g].nonzero()]
        assert cost_by_elimination(fisher, weights, gone) == pytest.approx(
            cost, rel=1e-6
        )
        assert len(gone) == len(support)


def test_equal_costs_give_the_first_support() -> None:
    _, leaving = group_costs(
        torch.eye(4, dtype=torch.float64).unsqueeze(0),
        torch.ones(1, 4, dtype=torch.float64),
        parse_pattern("2:4"),
    )
    assert leaving.tolist() == [[True, True, False, False]]


@pytest.mark.parametrize("block_size", [5, 12, 24, 100, None])
@pytest.mark.parametrize("engine", ["primal", "dual"])
@pytest.mark.parametrize("text", ["block3", "block6", "rows", "long rows", "2:3"])
def test_groups_cost_what_elimination_says(
    block_size: int | None, engine: Any, text: str, comm: Communicator
) -> None:
    if block_size is None and engine == "primal":
        pytest.skip("the full Fisher has one form")
    pattern = parse_pattern(text.removeprefix("long "))
    # Rows of 48 are parts of one block, or several blocks, according to the block size.
    # Long ones may be cut.
    shapes = [(2, 130) if text == "long rows" else (4, 6, 2, 4), (3, 12)]
    parameters = {str(i): nn.Parameter(torch.randn(s)) for i, s in enumerate(shapes)}
    fisher = (
        FisherConfig(
            num_gradients=20, block_size=block_size, damping=DAMPING, engine=engine
        )
        if block_size
        else FisherConfig(num_gradients=20, block_size=None, damping=DAMPING)
    )
    criterion = WoodFisher(fisher, "joint")
    active = ActiveWeights(Masks(parameters), criterion.layout, comm, pattern)
    criterion.begin(active.partition, comm)
    size = active.partition.size
    rows = random_rows(20, size)
    criterion.observe(rows)
    weights = active.read()
    costs, leaving = criterion.score_groups(weights, active.runs, pattern)
    matrix = dense_fisher(rows)
    if block_size is not None:
        inside = torch.zeros(size, size, dtype=torch.bool)
        for unit in active.partition.units:
            for first in range(unit.start, unit.stop, unit.size):
                inside[first : first + unit.size, first : first + unit.size] = True
        matrix = torch.where(inside, matrix, 0.0)
    index = 0
    for run in active.runs:
        for g in range(run.count):
            start = run.start + g * run.size
            members = list(range(start, start + run.size))
            cost, _ = best_support(matrix, weights, members, run.size - pattern.kept)
            gone = [m for m in members if bool(leaving[m])]
            assert float(costs[index]) == pytest.approx(cost, rel=1e-5)
            assert cost_by_elimination(matrix, weights, gone) == pytest.approx(
                cost, rel=1e-5
            )
            index += 1
    assert index == len(costs) == sum(run.count for run in active.runs)
    assert sum(run.count * run.size for run in active.runs) == size


@given(
    segments=st.lists(st.integers(0, 40), min_size=1, max_size=4),
    block=st.integers(1, 60),
    group=st.integers(1, 40),
    may_cut=st.booleans(),
    world_size=st.integers(1, 4),
)
def test_blocks_and_units_do_not_straddle_groups(
    segments: list[int], block: int, group: int, may_cut: bool, world_size: int
) -> None:
    size = align_block_size(block, group, may_cut)
    assert size % group == 0 or (may_cut and group % size == 0 and size <= block)
    weights = [count * group for count in segments]
    partition = make_partition(
        weights, [size] * len(weights), world_size, group_sizes=[group] * len(weights)
    )
    assert sum(unit.stop - unit.start for unit in partition.units) == sum(weights)
    for unit in partition.units:
        assert (unit.stop - unit.start) % group == 0


# --- a step from end to end -------------------------------------------------------------


def convolution() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(4, 4, 2, bias=False),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(16, 4, bias=False),
    )
    return net.double()


def batches(number: int = 40) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(number, 1, 4, 3, 3, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 4, (number, 1), generator=generator)
    return list(zip(inputs, labels, strict=True))


def loss(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def matrices(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.dim() > 1]


def in_groups(weight: Tensor, size: int) -> list[list[tuple[int, ...]]]:
    """Indices of groups along the inputs, by loops: output, position in the kernel, input."""
    shape = weight.shape
    places = itertools.product(*(range(n) for n in shape[2:]))
    return [
        [(out, first + i, *place) for i in range(size)]
        for out, place in itertools.product(range(shape[0]), places)
        for first in range(0, shape[1], size)
    ]


def pruned(model: nn.Module, **options: Any) -> PruningReport:
    fisher = FisherConfig(num_gradients=40, block_size=None, damping=DAMPING)
    return prune(model, batches(), loss, **in_step(**{"fisher": fisher, **options}))


@pytest.mark.parametrize(("pattern", "kept"), [("2:4", 2), ("1:4", 1), ("3:4", 3)])
def test_woodfisher_takes_the_best_supports_and_solves_for_the_rest(
    pattern: str, kept: int
) -> None:
    model = convolution()
    before = [p.detach().clone() for p in matrices(model)]
    rows = torch.stack(
        [
            torch.cat(
                [
                    g.flatten()
                    for g in torch.autograd.grad(loss(model, b), matrices(model))
                ]
            )
            for b in batches()
        ]
    )
    fisher, weights = dense_fisher(rows), torch.cat([w.flatten() for w in before])
    index = torch.arange(len(weights)).split([w.numel() for w in before])
    gone: list[int] = []
    for weight, numbers in zip(before, index, strict=True):
        for group in in_groups(weight, 4):
            members = [int(numbers.view(weight.shape)[place]) for place in group]
            gone += best_support(fisher, weights, members, 4 - kept)[1]
    left = [i for i in range(len(weights)) if i not in set(gone)]
    expected = weights.clone()
    pull = fisher[left][:, gone] @ weights[gone]
    expected[left] += torch.linalg.solve(fisher[left][:, left], pull)
    expected[gone] = 0.0
    report = pruned(
        model,
        target_sparsity=1 - kept / 4,
        selection=SelectionConfig(pattern=pattern),
        line_search=False,
    )
    after = torch.cat([p.detach().flatten() for p in matrices(model)])
    assert torch.equal(after == 0, expected == 0)
    torch.testing.assert_close(after, expected, rtol=1e-6, atol=1e-9)
    assert report.sparsity == 1 - kept / 4


@pytest.mark.parametrize("criterion", ["woodfisher", "magnitude"])
@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("block_size", [10, None])
def test_every_group_keeps_n(
    criterion: str, parts: int, block_size: int | None
) -> None:
    model = convolution()
    pruned(
        model,
        target_sparsity=0.5,
        criterion=criterion,
        recompute_steps=parts,
        selection=SelectionConfig(pattern="2:4"),
        fisher=FisherConfig(num_gradients=40, block_size=block_size),
    )
    for weight in matrices(model):
        for group in in_groups(weight, 4):
            assert sum(bool(weight[place] != 0) for place in group) == 2


def test_gradients_of_many_samples_at_once_come_in_the_order_of_groups() -> None:
    inputs, labels = (torch.cat(parts) for parts in zip(*batches(), strict=True))
    weights = []
    for collection in ("auto", "loop"):
        model = convolution()
        report = prune(
            model,
            TensorDataset(inputs, labels),
            loss,
            target_sparsity=0.5,
            selection=SelectionConfig(pattern="2:4"),
            fisher=FisherConfig(40, 1, None, DAMPING, collection=collection),
        )
        assert (report.collection == "per-sample") == (collection == "auto")
        weights.append([p.detach() for p in matrices(model)])
    for many, one in zip(*weights, strict=True):
        torch.testing.assert_close(many, one, rtol=1e-6, atol=1e-9)


def test_magnitude_keeps_the_largest_of_each_group() -> None:
    model = convolution()
    before = [p.detach().clone() for p in matrices(model)]
    pruned(
        model,
        target_sparsity=0.5,
        criterion="magnitude",
        selection=SelectionConfig(pattern="2:4"),
    )
    after = [p.detach() for p in matrices(model)]
    for old, new in zip(before, after, strict=True):
        for group in in_groups(old, 4):
            largest = sorted(group, key=lambda place: -abs(float(old[place])))[:2]
            for place in group:
                assert float(new[place]) == (
                    float(old[place]) if place in largest else 0
                )


@pytest.mark.parametrize("pattern", ["block2", "block4", "rows"])
@pytest.mark.parametrize("target", [0.2, 0.5, 0.77])
def test_magnitude_removes_the_groups_of_least_squares(
    pattern: str, target: float
) -> None:
    model = convolution()
    before = [p.detach().clone() for p in matrices(model)]
    groups = []
    for number, weight in enumerate(before):
        if pattern == "rows":
            members = [
                [
                    (out, *rest)
                    for rest in itertools.product(*map(range, weight.shape[1:]))
                ]
                for out in range(len(weight))
            ]
        else:
            members = in_groups(weight, int(pattern.removeprefix("block")))
        for group in members:
            cost = sum(float(weight[place]) ** 2 for place in group) / len(group)
            groups.append((cost, number, group))
    budget = round(target * sum(w.numel() for w in before))
    for _, number, group in sorted(groups, key=lambda g: g[0]):
        if len(group) > budget:
            break
        budget -= len(group)
        for place in group:
            before[number][place] = 0.0
    report = pruned(
        model,
        target_sparsity=target,
        criterion="magnitude",
        selection=SelectionConfig(pattern=pattern),
    )
    assert report.zeros == sum(int((w == 0).sum()) for w in before) > 0
    for new, expected in zip(matrices(model), before, strict=True):
        assert torch.equal(new, expected)


def test_on_the_way_whole_groups_of_least_cost_are_converted(
    comm: Communicator,
) -> None:
    model = convolution()
    before = [p.detach().clone() for p in matrices(model)]
    selection = SelectionConfig(pattern="2:4")
    config = PruningConfig(
        criterion="magnitude", selection=selection, step=StepConfig(measure_loss=False)
    )
    masks = Masks(prunable_parameters(model))
    pruner = Pruner(masks, config, comm)
    source = FunctionLoss(model, batches(), loss)
    costs = sorted(
        sum(sorted(float(weight[place]) ** 2 for place in group)[:2])
        for weight in before
        for group in in_groups(weight, 4)
    )
    for target in (0.1, 0.3, 0.5):
        pruner.step(source, target, final_sparsity=0.5)
        converted = round(target * 128) // 2
        done = []
        for old, weight in zip(before, matrices(model), strict=True):
            for group in in_groups(weight, 4):
                number = sum(bool(weight[place] != 0) for place in group)
                assert number in {2, 4}
                if number == 2:
                    squares = sorted(float(old[place]) ** 2 for place in group)
                    done.append(sum(squares[:2]))
        assert sorted(done) == pytest.approx(costs[:converted])
        assert sum(masks.zeros().values()) == 2 * converted


def test_zeros_count_where_they_make_up_a_group(comm: Communicator) -> None:
    layer = nn.Linear(8, 2, bias=False)
    with torch.no_grad():
        layer.weight.copy_(
            torch.tensor([[0.0, 1, 0, 0, 1, 1, 1, 0], [1.0, 0, 0, 1, 0, 0, 0, 0]])
        )
    masks = Masks({"weight": layer.weight})
    prune_zeros(masks, SelectionConfig(pattern="2:4"))
    assert (~masks.kept("weight")).int().tolist() == [
        [1, 0, 1, 0, 0, 0, 0, 0],
        [0, 1, 1, 0, 1, 1, 0, 0],
    ]
    blocks = Masks({"weight": layer.weight})
    prune_zeros(blocks, SelectionConfig(pattern="block4"))
    assert blocks.zeros() == {"weight": 4}
    assert not blocks.kept("weight")[1, 4:].any()


# --- refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["4:2", "0:4", "2:2", "8:16", "block1", "block65", "block", "row", "", 24.0]
)
def test_unknown_patterns_are_refused(text: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"selection.pattern=.* is unknown"):
        SelectionConfig(pattern=text)


@pytest.mark.parametrize("pattern", ["3:5", "block3"])
def test_a_pattern_that_does_not_divide_a_layer_names_all_of_them(pattern: str) -> None:
    model = nn.Sequential(nn.Linear(15, 8), nn.Linear(8, 4), nn.Linear(4, 30))
    with pytest.raises(ConfigurationError) as caught:
        prune(
            model,
            batches(),
            loss,
            target_sparsity=0.4 if ":" in pattern else 0.5,
            selection=SelectionConfig(pattern=pattern),
        )
    assert "1.weight (8 inputs), 2.weight (4 inputs)" in str(caught.value)
    assert "0.weight" not in str(caught.value)
    # The advice can be followed as it stands.
    advice = re.search(r"exclude=(\[.*\])", str(caught.value))
    assert advice is not None
    left = prunable_parameters(model, [], eval(advice[1]))
    assert list(left) == ["0.weight"]


def transposed(layer: nn.Module) -> Tensor:
    """The weight as ``[outputs, positions of the kernel, inputs]``."""
    weight = layer.weight.detach().transpose(0, 1).movedim(1, -1)
    return weight.reshape(len(weight), -1, weight.shape[-1])


@pytest.mark.parametrize("pattern", ["2:4", "block2", "rows"])
@pytest.mark.parametrize("criterion", ["woodfisher", "diagonal_fisher", "magnitude"])
@pytest.mark.parametrize(
    "build", [lambda: Conv1D(6, 8), lambda: nn.ConvTranspose1d(8, 6, 3)]
)
def test_groups_of_weights_with_their_inputs_first(
    build: Any, criterion: str, pattern: str
) -> None:
    torch.manual_seed(0)
    layer = build()
    shape = (24, 5, 8) if isinstance(layer, Conv1D) else (24, 8, 5)
    model = nn.Sequential(layer)
    data = TensorDataset(torch.randn(shape))
    report = prune(
        model,
        data,
        lambda m, b: m(b[0]).square().mean(),
        target_sparsity=0.5,
        criterion=criterion,
        fisher=FisherConfig(12, 2, block_size=16),
        selection=SelectionConfig(pattern=pattern),
    )
    assert report.sparsity == 0.5
    zero = transposed(layer) == 0
    if pattern == "2:4":
        assert set(zero.unflatten(-1, (-1, 4)).sum(dim=-1).flatten().tolist()) == {2}
    elif pattern == "block2":
        assert set(zero.unflatten(-1, (-1, 2)).sum(dim=-1).flatten().tolist()) == {0, 2}
    else:
        outputs = zero.flatten(1)
        assert outputs.all(dim=1).sum() == (~outputs).all(dim=1).sum() == 3


@pytest.mark.parametrize("pattern", ["2:4", "block2", "rows"])
@pytest.mark.parametrize("criterion", ["woodfisher", "magnitude"])
def test_an_orientation_does_not_change_what_is_pruned(
    criterion: str, pattern: str
) -> None:
    torch.manual_seed(0)
    flipped = nn.Sequential(Conv1D(6, 8))
    plain = nn.Sequential(nn.Linear(8, 6))
    with torch.no_grad():
        plain[0].weight.copy_(flipped[0].weight.T)
        plain[0].bias.copy_(flipped[0].bias)
    data = TensorDataset(torch.randn(24, 5, 8))
    for model in (flipped, plain):
        prune(
            model.double(),
            TensorDataset(data.tensors[0].double()),
            lambda m, b: m(b[0]).square().mean(),
            target_sparsity=0.5,
            criterion=criterion,
            fisher=FisherConfig(12, 2, block_size=48),
            selection=SelectionConfig(pattern=pattern),
        )
    torch.testing.assert_close(flipped[0].weight.T, plain[0].weight)


@pytest.mark.parametrize("pattern", ["2:4", "block2", "rows"])
def test_transposed_convolutions_with_groups_are_refused(pattern: str) -> None:
    model = nn.Sequential(nn.ConvTranspose2d(4, 4, 2, groups=2))
    with pytest.raises(ConfigurationError, match=r"0.weight \(a transposed"):
        prune(
            model,
            batches(),
            loss,
            target_sparsity=0.5,
            selection=SelectionConfig(pattern=pattern),
        )


@pytest.mark.parametrize("target", [0.4, 0.6])
def test_another_target_than_that_of_the_pattern_is_refused(target: float) -> None:
    with pytest.raises(ConfigurationError, match=r"set target_sparsity=0.5"):
        pruned(
            convolution(),
            target_sparsity=target,
            selection=SelectionConfig(pattern="2:4"),
        )


def test_masks_of_another_pattern_are_refused(comm: Communicator) -> None:
    model = convolution()
    masks = Masks(prunable_parameters(model))
    masks.prune({"3.weight": torch.arange(64).view(4, 16) % 4 == 0})
    config = PruningConfig(
        criterion="magnitude", selection=SelectionConfig(pattern="2:4")
    )
    pruner = Pruner(masks, config, comm)
    with pytest.raises(
        ConfigurationError, match=r"3.weight has groups .* partly pruned"
    ):
        pruner.step(FunctionLoss(model, batches(), loss), 0.5)
