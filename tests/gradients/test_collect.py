"""Gradient rows: the same numbers as `backward`, and clear errors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from lightning_woodfisher.base.errors import ConfigurationError, PruningError
from lightning_woodfisher.data.batches import DatasetBatches, StreamBatches
from lightning_woodfisher.data.isolation import derive_seed
from lightning_woodfisher.data.losses import FunctionLoss, LossSource, compute_losses
from lightning_woodfisher.distributed.communicator import Communicator
from lightning_woodfisher.gradients.collect import collect_gradients, iterate_chunks
from lightning_woodfisher.gradients.task import GradientTask

Batch = tuple[Tensor, Tensor]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Dropout(0.5), nn.Linear(5, 3))


def batches(number: int = 7, size: int = 4) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(size, 6, generator=generator),
            torch.randint(3, (size,), generator=generator),
        )
        for _ in range(number)
    ]


def cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def weights_of(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.dim() > 1}


def everything_active(parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    return {name: torch.arange(p.numel()) for name, p in parameters.items()}


def collect(
    source: LossSource,
    comm: Communicator,
    *,
    count: int = 7,
    active: dict[str, Tensor] | None = None,
    parameters: dict[str, nn.Parameter] | None = None,
    losses: list[float] | None = None,
    tick: Callable[[int], object] = lambda _: None,
) -> Tensor:
    parameters = parameters or weights_of(source.model)
    active = active or everything_active(parameters)
    losses = [] if losses is None else losses
    task = GradientTask(source, parameters, active, count, 3, comm, losses, tick)
    width = sum(len(positions) for positions in active.values())
    with source.session("eval"):
        pieces = collect_gradients(task, source.batches(count, 4, seed=3), [width])
        return torch.cat(list(pieces))


def by_backward(model: nn.Module, data: Sequence[Batch]) -> tuple[Tensor, list[float]]:
    """One row for each batch from ``loss.backward()``."""
    model.eval()
    rows, losses = [], []
    for one in data:
        model.zero_grad()
        loss = cross_entropy(model, one)
        loss.backward()
        losses.append(float(loss.detach()))
        found = [p.grad for p in weights_of(model).values()]
        rows.append(torch.cat([g.reshape(-1) for g in found if g is not None]))
    model.zero_grad()
    model.train()
    return torch.stack(rows), losses


def test_rows_and_losses_are_those_of_backward(comm: Communicator) -> None:
    model = network()
    expected, expected_losses = by_backward(model, batches())
    losses: list[float] = []
    rows = collect(FunctionLoss(model, batches(), cross_entropy), comm, losses=losses)
    assert torch.equal(rows, expected)
    assert losses == expected_losses
    assert not rows.requires_grad


def test_sparse_gradients_are_those_of_dense_ones(comm: Communicator) -> None:
    generator = torch.Generator().manual_seed(1)
    data = [
        (torch.randint(9, (4, 6), generator=generator), labels)
        for _, labels in batches()
    ]
    rows = []
    for sparse in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Embedding(9, 5, sparse=sparse), nn.Flatten(), nn.Linear(30, 3)
        )
        rows.append(collect(FunctionLoss(model, data, cross_entropy), comm))
    assert torch.equal(*rows)
    assert bool((rows[0][:, :45] == 0).any())
    assert bool((rows[0][:, :45] != 0).any())


def test_one_mini_batch_may_be_computed_by_another_module(comm: Communicator) -> None:
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(6, 3), nn.Linear(6, 3)])
    data = batches()
    data[3][0][0, 0] = 100.0

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        layer = model[int(batch[0][0, 0] == 100.0)]
        return F.cross_entropy(layer(batch[0]), batch[1])

    rows = collect(FunctionLoss(model, data, loss), comm)
    for row, one in zip(rows, data, strict=True):
        model.zero_grad()
        loss(model, one).backward()
        expected = [
            torch.zeros(18) if p.grad is None else p.grad.flatten()
            for p in weights_of(model).values()
        ]
        torch.testing.assert_close(row, torch.cat(expected))


def test_only_active_weights_have_columns(comm: Communicator) -> None:
    model = network()
    rows, _ = by_backward(model, batches())
    active = {
        "0.weight": torch.tensor([0, 7, 29]),
        "3.weight": torch.tensor([], dtype=torch.int64),
    }
    source = FunctionLoss(model, batches(), cross_entropy)
    assert torch.equal(collect(source, comm, active=active), rows[:, [0, 7, 29]])


def test_gradients_of_the_user_and_the_mode_stay(comm: Communicator) -> None:
    model = network()
    kept = torch.full((5, 6), 0.5)
    model[0].weight.grad = kept
    fired: list[int] = []
    model[0].weight.register_post_accumulate_grad_hook(lambda _: fired.append(1))
    collect(FunctionLoss(model, batches(), cross_entropy), comm)
    assert model[0].weight.grad is kept
    assert torch.equal(kept, torch.full((5, 6), 0.5))
    assert model[3].weight.grad is None
    assert model.training
    assert fired == []


def test_progress_is_told_of_every_gradient(comm: Communicator) -> None:
    ticks: list[int] = []
    source = FunctionLoss(network(), batches(), cross_entropy)
    collect(source, comm, tick=ticks.append)
    assert ticks == [1] * 7


def test_dropout_draws_its_own_seed_for_each_gradient(comm: Communicator) -> None:
    """Gradient i does not depend on what was drawn before it."""
    model = network()
    one = batches(1)[0]
    source = FunctionLoss(model, [one] * 5, cross_entropy)
    parameters = weights_of(model)
    active = everything_active(parameters)

    def rows() -> Tensor:
        torch.rand(13)
        task = GradientTask(source, parameters, active, 5, 8, comm)
        with source.session("train"):
            pieces = collect_gradients(task, source.batches(5, 4, 0), [45])
            return torch.cat(list(pieces))

    first = rows()
    assert torch.equal(first, rows())
    assert not torch.equal(first[0], first[1])
    with source.session("train"):
        measured = compute_losses(source, source.batches(5, 4, 0), range(5), comm, 8)
    assert len(set(measured)) == 5


def test_parameters_without_influence_have_zero_gradients(comm: Communicator) -> None:
    model = nn.ModuleDict({"used": nn.Linear(6, 3), "unused": nn.Linear(6, 2)})
    source = FunctionLoss(
        model, batches(), lambda m, b: F.cross_entropy(m["used"](b[0]), b[1])
    )
    rows = collect(source, comm)
    assert rows.shape == (7, 30)
    assert bool((rows[:, 18:] == 0).all())
    assert bool((rows[:, :18] != 0).any(dim=1).all())


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ],
)
def test_rows_are_at_least_float32(
    dtype: torch.dtype, expected: torch.dtype, comm: Communicator
) -> None:
    model = network().to(dtype)
    data = [(x.to(dtype), y) for x, y in batches()]
    rows = collect(FunctionLoss(model, data, cross_entropy), comm)
    assert rows.dtype == expected
    exact = collect(FunctionLoss(network(), batches(), cross_entropy), comm)
    assert float((rows - exact).abs().max()) < 0.05 * float(exact.abs().max())


# --- what goes wrong ------------------------------------------------------------------


def failing_at(index: int, value: float) -> Callable[[nn.Module, Batch], Tensor]:
    calls = iter(range(1000))

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        scale = value if next(calls) == index else 1.0
        return cross_entropy(model, batch) * scale

    return loss


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_names_its_batch(
    value: float, comm: Communicator
) -> None:
    source = FunctionLoss(network(), batches(), failing_at(4, value))
    with pytest.raises(
        PruningError, match=rf"loss of gradient 4 \(batch 4 of the stream\) is {value}"
    ):
        collect(source, comm)


def test_a_gradient_that_is_not_finite_names_samples_and_layer(
    comm: Communicator,
) -> None:
    def loss(model: Any, batch: Batch) -> Tensor:
        hidden = model[0](batch[0])
        # The square root of zero has a finite value and an infinite slope.
        return (model[3](torch.tanh(hidden).detach()) * 0).abs().sqrt().sum() + (
            hidden.square().mean()
        )

    data = TensorDataset(torch.randn(40, 6), torch.zeros(40))
    with pytest.raises(
        PruningError,
        match=r"^gradient 0 \(samples \d+, \d+, \d+, \d+\) is not finite in 3\.weight$",
    ):
        collect(FunctionLoss(network(), data, loss), comm)


@pytest.mark.parametrize(
    "loss",
    [
        lambda model, batch: cross_entropy(model, batch).detach(),
        lambda model, batch: torch.tensor(1.0),
    ],
)
def test_a_loss_without_graph(
    loss: Callable[[nn.Module, Batch], Tensor], comm: Communicator
) -> None:
    with pytest.raises(PruningError, match="loss of gradient 0 has no graph"):
        collect(FunctionLoss(network(), batches(), loss), comm)


def test_an_error_of_the_loss_function_comes_through(comm: Communicator) -> None:
    def loss(model: nn.Module, batch: Batch) -> Tensor:
        raise LookupError("no such label")

    with pytest.raises(LookupError, match="no such label"):
        collect(FunctionLoss(network(), batches(), loss), comm)


class ScaledLoss(LossSource):
    """A float16 head behind a loss scale, as under 16-mixed precision."""

    def __init__(self, scale: float, slope: float) -> None:
        super().__init__(nn.Linear(2, 1, bias=False))
        self.loss_scale = scale
        self.slope = slope
        self.calls = 0

    def batches(self, count: int, size: int, seed: int) -> StreamBatches:
        return StreamBatches([torch.ones(1, 2)] * count, count)

    def loss(self, batch: Tensor, index: int) -> Tensor:
        self.calls += 1
        output = self.model(batch).half()
        return (output * self.slope).sum().float()


@pytest.mark.parametrize(
    ("scale", "calls"),
    [(1.0, 1), (1024.0, 1), (2.0**15, 2), (2.0**19, 3), (2.0**23, 4)],
)
def test_overflow_under_the_loss_scale_is_tried_again_with_less(
    scale: float, calls: int, comm: Communicator
) -> None:
    """Gradient 8 times the scale must stay below 65,504, the largest float16."""
    source = ScaledLoss(scale, slope=8.0)
    losses: list[float] = []
    rows = collect(source, comm, count=1, losses=losses)
    assert torch.equal(rows, torch.full((1, 2), 8.0))
    assert source.calls == calls
    assert source.loss_scale == scale
    with torch.no_grad():
        assert losses == [float(source.loss(torch.ones(1, 2), 0))]


def test_overflow_that_no_scale_cures_is_an_error(comm: Communicator) -> None:
    model = nn.Linear(2, 1, bias=False).half()
    nn.init.zeros_(model.weight)
    data = [torch.full((1, 2), 2.0).half()]
    source = FunctionLoss(model, data, lambda m, b: (m(b) * 60_000.0).float().sum())
    source.loss_scale = 1024.0
    with pytest.raises(PruningError, match=r"gradient 0 .* is not finite in weight"):
        collect(source, comm, count=1)


def test_small_gradients_survive_through_the_scale(comm: Communicator) -> None:
    """2⁻²⁶ is no float16, but 2⁻²⁶ times the scale is: unscaled in float32."""
    model = nn.Linear(2, 1, bias=False).half()
    source = FunctionLoss(
        model, [torch.ones(1, 2).half()], lambda m, b: m(b).float().sum() * 2.0**-26
    )
    assert bool((collect(source, comm, count=1) == 0).all())
    source = FunctionLoss(
        model, [torch.ones(1, 2).half()], lambda m, b: m(b).float().sum() * 2.0**-26
    )
    source.loss_scale = 2.0**16
    assert torch.equal(collect(source, comm, count=1), torch.full((1, 2), 2.0**-26))


@pytest.mark.parametrize("result", [None, "text", torch.ones(3)])
def test_a_loss_that_is_no_scalar(result: Any, comm: Communicator) -> None:
    source = FunctionLoss(network(), batches(), lambda model, batch: result)
    expected = (
        r"^loss_fn returned .* for gradient 0, not a scalar loss; return the mean"
    )
    with pytest.raises(PruningError, match=expected):
        collect(source, comm)
    with (
        pytest.raises(PruningError, match=expected),
        source.session("eval"),
    ):
        compute_losses(source, source.batches(7, 4, seed=3), range(7), comm, 3)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_measured_loss_that_is_not_finite_names_its_batch(
    value: float, comm: Communicator
) -> None:
    source = FunctionLoss(network(), batches(), failing_at(4, value))
    with (
        pytest.raises(PruningError, match=rf"batch 4 of the stream\) is {value}"),
        source.session("eval"),
    ):
        compute_losses(source, source.batches(7, 4, seed=3), range(7), comm, 3)


def test_frozen_weights_have_no_gradient(comm: Communicator) -> None:
    model = network()
    parameters = weights_of(model)
    model[3].weight.requires_grad_(False)
    with pytest.raises(PruningError, match=r"frozen .*: 3\.weight; .*exclude"):
        collect(
            FunctionLoss(model, batches(), cross_entropy), comm, parameters=parameters
        )


# --- batches --------------------------------------------------------------------------


class Numbers(Dataset[int]):
    """Sample i is i."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> int:
        return index


class BulkNumbers(Numbers):
    """Reads whole batches at once."""

    def __getitems__(self, indices: list[int]) -> list[int]:
        return [100 + index for index in indices]


class Stream(IterableDataset[Tensor]):
    """Batches without a length."""

    def __iter__(self) -> Iterator[Tensor]:
        return iter([torch.full((2,), float(i)) for i in range(3)])


def test_dataset_batches_use_no_sample_twice() -> None:
    chosen = DatasetBatches(Numbers(50), count=12, size=4, seed=0)
    samples = torch.cat([chosen.fetch(i) for i in range(12)]).tolist()
    assert len(samples) == 48 == len(set(samples))
    assert set(samples) <= set(range(50))


def test_dataset_batches_depend_on_the_seed_alone() -> None:
    def samples(seed: int) -> list[list[int]]:
        chosen = DatasetBatches(Numbers(50), count=3, size=4, seed=seed)
        return [chosen.fetch(i).tolist() for i in range(3)]

    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = samples(7)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert samples(7) == first
    assert samples(8) != first
    backwards = DatasetBatches(Numbers(50), count=3, size=4, seed=7)
    assert [backwards.fetch(i).tolist() for i in (2, 1, 0)] == first[::-1]


def test_dataset_batches_are_collated_and_described() -> None:
    chosen = DatasetBatches(Numbers(5), count=2, size=2, seed=0, collate=tuple)
    batch = chosen.fetch(1)
    assert isinstance(batch, tuple)
    assert chosen.describe(1) == f"samples {batch[0]}, {batch[1]}"


def test_dataset_batches_read_in_bulk_where_they_can() -> None:
    plain = DatasetBatches(Numbers(9), 2, 3, seed=1)
    bulk = DatasetBatches(BulkNumbers(9), 2, 3, seed=1)
    assert torch.equal(plain.fetch(1) + 100, bulk.fetch(1))


def test_exactly_enough_samples_are_enough() -> None:
    chosen = DatasetBatches(Numbers(12), count=3, size=4, seed=0)
    assert sorted(torch.cat([chosen.fetch(i) for i in range(3)]).tolist()) == [
        *range(12)
    ]


def test_too_few_samples_say_how_many_there_are_and_what_would_fit() -> None:
    with pytest.raises(
        ConfigurationError,
        match=r"num_gradients=4 .*=3 needs 12.* has 11.*=3 would fit",
    ):
        DatasetBatches(Numbers(11), count=4, size=3, seed=0)
    with pytest.raises(
        ConfigurationError, match=r"gradient_batch_size=12 .* 11 samples"
    ):
        DatasetBatches(Numbers(11), count=1, size=12, seed=0)


def test_a_dataset_without_length_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="Stream has no length"):
        DatasetBatches(Stream(), count=1, size=1, seed=0)


def test_stream_batches_skip_what_other_ranks_take() -> None:
    stream = StreamBatches(iter("abcdefg"), count=7)
    assert [stream.fetch(i) for i in (1, 3, 6)] == ["b", "d", "g"]
    assert stream.describe(3) == "batch 3 of the stream"


def test_a_stream_is_opened_when_it_is_read() -> None:
    opened: list[int] = []

    class Opened:
        def __iter__(self) -> Iterator[float]:
            opened.append(1)
            while True:
                yield float(torch.rand(()))

    source = FunctionLoss(network(), Opened(), cross_entropy)
    chosen = source.batches(7, 1, seed=2)
    assert not chosen.regroupable
    assert opened == []
    first = [chosen.fetch(i) for i in range(7)]
    assert opened == [1]
    # Whoever begins with another batch and in another state sees the same ones.
    torch.rand(3)
    other = source.batches(7, 1, seed=2)
    assert [other.fetch(i) for i in (2, 5)] == [first[2], first[5]]
    assert source.batches(7, 1, seed=3).fetch(0) != first[0]


def test_a_stream_that_ends_early() -> None:
    stream = StreamBatches("abc", count=5)
    assert [stream.fetch(i) for i in range(3)] == ["a", "b", "c"]
    with pytest.raises(
        ConfigurationError, match="after 3 batches, but num_gradients=5"
    ):
        stream.fetch(3)


def test_function_loss_chooses_batches_by_the_kind_of_data() -> None:
    def kind(data: Any) -> type:
        return type(FunctionLoss(network(), data, cross_entropy).batches(2, 2, 0))

    assert kind(TensorDataset(torch.zeros(5))) is DatasetBatches
    loader = DataLoader(TensorDataset(torch.zeros(5)), batch_size=2)
    assert kind(loader) is DatasetBatches
    assert kind(DataLoader(Stream(), batch_size=2)) is StreamBatches
    assert kind(Stream()) is StreamBatches
    assert kind(batches()) is StreamBatches


def test_an_iterator_gives_the_same_batches_for_the_same_seed() -> None:
    """The loss after a step is measured on the samples of its gradients."""
    source = FunctionLoss(network(), iter("abcdef"), cross_entropy)

    def letters(seed: int) -> list[str]:
        chosen = source.batches(3, 1, seed)
        return [chosen.fetch(i) for i in range(3)]

    assert letters(1) == letters(1) == ["a", "b", "c"]
    assert letters(2) == letters(2) == ["d", "e", "f"]
    with pytest.raises(ConfigurationError, match="after 0 batches"):
        letters(3)


def test_an_iterator_is_read_to_the_same_place_by_every_rank() -> None:
    """A rank that has not needed the last batches reads them all the same."""
    for needed in ([0, 2], [1], []):
        source = FunctionLoss(network(), iter("abcdefghi"), cross_entropy)
        with source.session("eval"):
            chosen = source.batches(3, 1, seed=1)
            assert [chosen.fetch(i) for i in needed] == ["abc"[i] for i in needed]
            assert source.batches(3, 1, seed=2).fetch(0) == "d"
        assert source.batches(3, 1, seed=2).fetch(0) == "g"


def test_batches_that_nobody_asks_for_are_not_read() -> None:
    letters = iter("abc")
    FunctionLoss(network(), letters, cross_entropy).batches(3, 1, seed=1)
    assert next(letters) == "a"


def test_a_loss_that_differentiates_inside_is_measured(comm: Communicator) -> None:
    """With the same random numbers as in the collection, which draws in fetch, too."""

    class Noisy(Numbers):
        def __getitem__(self, index: int) -> Any:
            return torch.randn(6) + index, index % 3

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        inputs = batch[0].clone().requires_grad_()
        value = cross_entropy(model, (inputs, batch[1]))
        if float(batch[0].sum()) > 500:
            return value
        (slope,) = torch.autograd.grad(value, inputs, create_graph=True)
        return value + slope.square().sum()

    source = FunctionLoss(network(), Noisy(48), loss)
    parameters = weights_of(source.model)
    with source.session("train"):
        losses: list[float] = []
        chosen = source.batches(7, 4, seed=3)
        active = everything_active(parameters)
        task = GradientTask(source, parameters, active, 7, 3, comm, losses)
        list(collect_gradients(task, chosen, [45]))
        assert compute_losses(source, chosen, range(7), comm, 3) == losses
    assert len(set(losses)) == 7


def test_batches_of_any_structure_reach_the_loss(comm: Communicator) -> None:
    seen: list[Any] = []

    def loss(model: nn.Module, batch: Any) -> Tensor:
        seen.append(batch)
        return cross_entropy(model, batch["xy"])

    data = [{"xy": one, "name": "first", "more": [one[0]]} for one in batches(2)]
    collect(FunctionLoss(network(), data, loss), comm, count=2)
    assert seen[0]["name"] == "first"
    assert isinstance(seen[0]["xy"], tuple)
    assert torch.equal(seen[1]["more"][0], data[1]["more"][0])


# --- the rest -------------------------------------------------------------------------


def test_mean_loss_gives_the_losses_in_order_without_a_graph(
    comm: Communicator,
) -> None:
    model = network()
    _, expected = by_backward(model, batches())
    source = FunctionLoss(model, batches(), cross_entropy)
    with source.session("eval"):
        chosen = source.batches(7, 4, seed=3)
        assert compute_losses(source, chosen, range(7), comm, 3) == expected


@pytest.mark.parametrize("pieces", [(10,), (1,) * 10, (3, 3, 4), (0, 9, 0, 1), (7, 3)])
@pytest.mark.parametrize("size", [1, 3, 4, 10, 64])
def test_chunks_do_not_depend_on_the_pieces(pieces: tuple[int, ...], size: int) -> None:
    rows = torch.arange(20.0).view(10, 2)
    # A chunk is only there until the next one.
    chunks = [chunk.clone() for chunk in iterate_chunks(rows.split(pieces), size)]
    assert torch.equal(torch.cat(chunks), rows)
    assert [len(chunk) for chunk in chunks[:-1]] == [size] * (len(chunks) - 1)
    assert 0 < len(chunks[-1]) <= size


def test_no_rows_give_no_chunks() -> None:
    assert list(iterate_chunks([], 4)) == []


def test_derived_seeds_are_stable_and_differ() -> None:
    # Written down: other seeds would change everybody's results.
    assert derive_seed(0, 0) == 1350176041220068806
    assert derive_seed(1, "a") == derive_seed(1, "a")
    seeds = {derive_seed(a, b) for a in range(30) for b in range(30)}
    assert len(seeds) == 900
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed(1, 23) != derive_seed(12, 3)


def test_reentrant_checkpointing_is_explained(comm: Communicator) -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def forward(self, inputs: Tensor) -> Tensor:
            # Reentrant checkpoints need an input with a gradient.
            return checkpoint(self.net, inputs.requires_grad_(), use_reentrant=True)

    source = FunctionLoss(Checkpointed(), batches(), cross_entropy)
    with pytest.raises(PruningError, match="pass use_reentrant=False to torch"):
        collect(source, comm)
