"""Labels drawn from the model, against closed forms; batches that repeat samples."""

from __future__ import annotations

from collections import namedtuple
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from step_options import in_step
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_woodfisher import (
    ConfigurationError,
    FisherConfig,
    PruningError,
    StepConfig,
    prune,
)
from lightning_woodfisher.data.batches import DatasetBatches, StreamBatches
from lightning_woodfisher.data.losses import FunctionLoss
from lightning_woodfisher.data.sampled_labels import (
    UnlabeledBatch,
    UnlabeledBatches,
    draw_labels,
)
from lightning_woodfisher.distributed.communicator import Communicator
from lightning_woodfisher.gradients.collect import collect_gradients
from lightning_woodfisher.gradients.task import GradientTask

SAMPLED = FisherConfig(num_gradients=24, gradient_batch_size=2, sample_labels=True)


def cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def samples(number: int = 96) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(number, 6, generator=generator)
    return TensorDataset(inputs, inputs[:, :3].argmax(dim=1))


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 3))


def draw(model: nn.Module, batch: Any, seed: int = 0, first: int = 0) -> Any:
    return draw_labels(model, batch, UnlabeledBatch(batch, seed, first))


def test_labels_are_drawn_from_the_softmax() -> None:
    logits = torch.tensor([0.5, -1.0, 2.0, -20.0])
    inputs = logits.expand(20_000, 4)
    labels = torch.full((20_000,), 3)
    _, drawn = draw(nn.Identity(), (inputs, labels))
    counts = drawn.bincount(minlength=4).double()
    expected = 20_000 * logits.double().softmax(0)
    # Five standard deviations; the fourth class is as good as impossible.
    assert ((counts - expected).abs() < 5 * (expected + 1).sqrt()).all()
    assert counts[3] == 0
    # Other numbers and seeds are other draws.
    for other in (
        draw(nn.Identity(), (inputs, labels), first=1),
        draw(nn.Identity(), (inputs, labels), 1),
    ):
        assert 0.3 < float((other[1] != drawn).float().mean()) < 0.6


def test_a_draw_belongs_to_the_sample_however_it_is_grouped() -> None:
    model, data = mlp(), samples()
    small = UnlabeledBatches(DatasetBatches(data, 12, 4, 5), 5, model)
    large = UnlabeledBatches(DatasetBatches(data, 4, 12, 5), 5, model)

    def labels(batch: UnlabeledBatch) -> Tensor:
        return draw_labels(model, batch.batch, batch)[1]

    alone = torch.cat([labels(small.fetch(i)) for i in range(12)])
    assert torch.equal(alone, torch.cat([labels(large.fetch(i)) for i in range(4)]))
    true = torch.cat([small.fetch(i).batch[1] for i in range(12)])
    assert (alone != true).any()


def rows_of(model: nn.Module, data: Any, count: int, collection: Any) -> Tensor:
    source = FunctionLoss(model, data, cross_entropy)
    parameters = {n: p for n, p in model.named_parameters() if p.dim() > 1}
    active = {n: torch.arange(p.numel()) for n, p in parameters.items()}
    batches = UnlabeledBatches(source.batches(count, 1, 3), 3, model)
    size = sum(map(len, active.values()))
    notes: list[str] = []
    task = GradientTask(source, parameters, active, count, 3, Communicator())
    with source.session("eval"):
        rows = torch.cat(
            list(
                collect_gradients(
                    task, batches, [size], collection=collection, note=notes.append
                )
            )
        )
    assert notes[0].startswith("loop" if collection == "loop" else "per-sample")
    return rows


def test_per_sample_gradients_see_the_same_labels_as_a_loop() -> None:
    rows = [rows_of(mlp(), samples(), 60, way) for way in ("loop", "auto")]
    assert torch.allclose(rows[0], rows[1], atol=1e-6)


def test_the_true_fisher_of_a_linear_softmax_model() -> None:
    torch.manual_seed(2)
    model = nn.Linear(4, 3, bias=False)
    inputs = torch.randn(1_500, 4)
    # The labels of the data are far from what the model predicts.
    data = TensorDataset(inputs, model(inputs).argmin(dim=1))
    rows = rows_of(model, data, 1_500, "auto").double()
    x = inputs.double()
    p = (x @ model.weight.double().T).softmax(dim=1).detach()
    # E[(diag(p) − ppᵀ) ⊗ xxᵀ], over y in closed form.
    middle = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
    exact = torch.einsum("nab,ni,nj->aibj", middle, x, x).reshape(12, 12) / len(x)
    sampled = rows.T @ rows / len(rows)
    assert float((sampled - exact).norm() / exact.norm()) < 0.1
    # And not the empirical Fisher.
    wrong = (p - F.one_hot(data.tensors[1], 3)).unsqueeze(2) * x.unsqueeze(1)
    empirical = wrong.reshape(-1, 12).T @ wrong.reshape(-1, 12) / len(x)
    assert float((empirical - exact).norm() / exact.norm()) > 0.5


def test_the_measured_rise_is_that_of_the_labels_of_the_data() -> None:
    # Batches that cannot be regrouped: else the loss is measured apart in any case.
    data = list(DataLoader(samples(), batch_size=4))
    reports = [
        prune(
            mlp(),
            data,
            cross_entropy,
            target_sparsity=0.3,
            fisher=FisherConfig(num_gradients=24, sample_labels=sampled),
            step=StepConfig(update="none"),
        )
        for sampled in (True, False)
    ]
    assert reports[0].loss_before == reports[1].loss_before
    assert reports[0].predicted_increase != reports[1].predicted_increase


def test_ignored_positions_and_the_form_of_the_batch_stay() -> None:
    pair = namedtuple("pair", ["image", "classes"])
    logits = torch.randn(5, 3, 2, 7)
    labels = torch.zeros(5, 2, 7, dtype=torch.int64)
    labels[:, :, 3] = -100
    drawn = draw(nn.Identity(), pair(logits, labels))
    assert isinstance(drawn, pair)
    assert drawn.image is logits
    assert drawn.classes.shape == labels.shape
    assert (drawn.classes[:, :, 3] == -100).all()
    others = [0, 1, 2, 4, 5, 6]
    assert set(drawn.classes[:, :, others].unique().tolist()) == {0, 1, 2}
    assert isinstance(draw(nn.Identity(), [logits, labels]), list)


def test_dropout_drops_the_same_for_the_draw_and_for_the_loss() -> None:
    seen: list[Tensor] = []

    class Dropping(nn.Module):
        def forward(self, inputs: Tensor) -> Tensor:
            seen.append(F.dropout(inputs, 0.5))
            return seen[-1]

    model, batch = Dropping(), (torch.randn(50, 3), torch.zeros(50, dtype=torch.int64))
    model(draw(model, batch)[0])
    assert torch.equal(seen[0], seen[1])


class Drawing(nn.Sequential):
    """Draws its labels itself."""

    calls = 0

    def sample_labels(self, batch: Any) -> Any:
        type(self).calls += 1
        probabilities = self(batch["x"]).softmax(dim=1)
        return {**batch, "y": torch.multinomial(probabilities, 1).squeeze(1)}


def test_a_model_may_draw_its_labels_itself() -> None:
    model = Drawing(*mlp())
    inputs, labels = samples().tensors
    data = [{"x": x, "y": y} for x, y in zip(inputs, labels, strict=True)]
    report = prune(
        model,
        data and DataLoader(data, batch_size=8),  # type: ignore[arg-type]
        lambda m, b: F.cross_entropy(m(b["x"]), b["y"]),
        target_sparsity=0.5,
        fisher=SAMPLED,
    )
    assert Drawing.calls == SAMPLED.num_gradients
    assert report.collection == "loop: sample_labels draws the labels of a whole batch"


@pytest.mark.parametrize(
    ("model", "batch", "message"),
    [
        (nn.Identity(), (torch.zeros(4, 3), torch.zeros(4)), "float32"),
        (nn.Identity(), {"x": torch.zeros(4, 3)}, r"found \(dict\)"),
        (nn.Identity(), (torch.zeros(4), torch.zeros(4).long()), "Identity returned"),
        (
            nn.Identity(),
            (torch.zeros(4, 1), torch.zeros(4).long()),
            "Identity returned",
        ),
        (
            nn.Identity(),
            (torch.zeros(5, 3), torch.zeros(4).long()),
            "Identity returned",
        ),
        (nn.Module(), (torch.zeros(4, 3), torch.zeros(4).long()), "which failed"),
    ],
)
def test_what_is_no_classification_is_refused(
    model: nn.Module, batch: Any, message: str
) -> None:
    with pytest.raises(PruningError, match=message) as error:
        draw(model, batch)
    assert "give the model a method sample_labels(batch)" in str(error.value)


def test_a_regression_cannot_have_sampled_labels_and_is_left_alone() -> None:
    model = mlp()
    before = [p.clone() for p in model.parameters()]
    data = TensorDataset(torch.randn(60, 6), torch.randn(60, 3))
    with pytest.raises(PruningError, match="integer class labels"):
        prune(
            model,
            data,
            lambda m, b: F.mse_loss(m(b[0]), b[1]),
            target_sparsity=0.5,
            fisher=SAMPLED,
        )
    assert all(map(torch.equal, before, model.parameters()))


# --- limited data ---------------------------------------------------------------------


def test_samples_repeat_only_after_all_have_come() -> None:
    batches = DatasetBatches(list(range(10)), 7, 4, 2, list, repeat=True)  # type: ignore[arg-type]
    drawn = [sample for i in range(7) for sample in batches.fetch(i)]
    for start in (0, 10):
        assert sorted(drawn[start : start + 10]) == list(range(10))
    assert drawn[:10] != drawn[10:20]
    assert len(set(drawn[20:])) == 8
    # Without need it changes nothing, and groups are the same samples.
    plain = DatasetBatches(list(range(10)), 2, 4, 2, list)  # type: ignore[arg-type]
    again = DatasetBatches(list(range(10)), 2, 4, 2, list, repeat=True)  # type: ignore[arg-type]
    assert [plain.fetch(i) for i in (0, 1)] == [again.fetch(i) for i in (0, 1)]
    grouped = DatasetBatches(list(range(10)), 1, 28, 2, list, repeat=True)  # type: ignore[arg-type]
    assert grouped.fetch(0) == drawn


def test_a_stream_is_opened_again() -> None:
    stream = StreamBatches("abc", 8, repeat=True)
    assert [stream.fetch(i) for i in range(8)] == list("abcabcab")
    with pytest.raises(ConfigurationError, match="ended after 3"):
        StreamBatches(iter("abc"), 8, repeat=True).fetch(5)
    with pytest.raises(ConfigurationError, match="ended after 0"):
        StreamBatches("", 8, repeat=True).fetch(0)


@pytest.mark.parametrize("repeat", [False, True])
def test_few_samples_do_when_they_may_repeat(repeat: bool) -> None:
    fisher = FisherConfig(
        num_gradients=200, gradient_batch_size=2, repeat_samples=repeat
    )
    options: dict[str, Any] = {"target_sparsity": 0.5, "fisher": fisher}
    if repeat:
        report = prune(mlp(), samples(), cross_entropy, **in_step(**options))
        assert report.sparsity == 0.5
        assert report.num_gradients == 200
    else:
        with pytest.raises(ConfigurationError, match=r"repeat_samples"):
            prune(mlp(), samples(), cross_entropy, **in_step(**options))


@pytest.mark.parametrize(
    ("field", "value"),
    [("sample_labels", "drawn"), ("centered", 1), ("repeat_samples", "no")],
)
def test_bad_values_are_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(ConfigurationError, match=rf"fisher\.{field}="):
        FisherConfig(**{field: value})  # type: ignore[arg-type]
