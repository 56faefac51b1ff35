"""Losses that share a pass of the network: the rows of the loop, or the loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from lightning_woodfisher.data.losses import FunctionLoss
from lightning_woodfisher.distributed.communicator import Communicator
from lightning_woodfisher.gradients.collect import collect_gradients
from lightning_woodfisher.gradients.task import GradientTask

Loss = Callable[[Any, Any], Tensor]
CLASSES = 5


def data(samples: int = 120) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(CLASSES, (samples,), generator=generator)
    # Some samples are ignored, some weigh much.
    labels[::7] = -100
    weights = torch.ones(samples)
    weights[3::40] = 50.0
    return TensorDataset(torch.randn(samples, 6, generator=generator), labels, weights)


def network(*middle: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 8), nn.Tanh(), *middle, nn.Linear(8, CLASSES)
    ).double()


def collect(
    model: nn.Module,
    dataset: Dataset[Any],
    loss: Loss,
    *,
    count: int = 20,
    size: int = 3,
    how: Any = "auto",
) -> tuple[Tensor, list[float], str]:
    source = FunctionLoss(model, dataset, loss)
    parameters = {n: p for n, p in model.named_parameters() if p.dim() > 1}
    active = {name: torch.arange(p.numel()) for name, p in parameters.items()}
    losses: list[float] = []
    notes: list[str] = []
    task = GradientTask(source, parameters, active, count, 4, Communicator(), losses)
    width = sum(p.numel() for p in parameters.values())
    with source.session("eval"):
        batches = source.batches(count, size, 4)
        rows = collect_gradients(
            task, batches, [width], collection=how, note=notes.append
        )
        return torch.cat(list(rows)), losses, notes[0]


def assert_rows_of_loop(
    build: Callable[[], nn.Module], loss: Loss, expected_how: str, **options: Any
) -> None:
    dataset = options.pop("dataset", data())
    rows, losses, how = collect(build(), dataset, loss, **options)
    expected, expected_losses, _ = collect(
        build(), dataset, loss, how="loop", **options
    )
    assert how == expected_how
    assert losses == pytest.approx(expected_losses, rel=1e-9, abs=1e-12)
    # Each row of itself: a wrong one may be small.
    errors = (rows - expected).norm(dim=1)
    assert bool((errors <= 1e-9 * expected.norm(dim=1) + 1e-14).all())
    assert float(expected.norm()) > 0


# ---------------------------------------------------------------- losses


def inputs_of(batch: Any) -> Tensor:
    inputs: Tensor = batch[0]
    return inputs.double()


def some_labels(batch: Any) -> Any:
    """Labels of which one is not ignored, so that means are finite."""
    labels = batch[1].clone()
    labels[0] = labels[0].clamp(min=0)
    return labels


def class_weights(model: Any, batch: Any) -> Tensor:
    weights = torch.tensor([1.0, 86.0, 1.0, 3.0, 0.1], dtype=torch.float64)
    return F.cross_entropy(model(inputs_of(batch)), some_labels(batch), weights)


def ignored(model: Any, batch: Any) -> Tensor:
    return F.cross_entropy(model(inputs_of(batch)), some_labels(batch))


def summed(model: Any, batch: Any) -> Tensor:
    output = model(inputs_of(batch))
    return F.cross_entropy(output, some_labels(batch), reduction="sum")


def smoothed(model: Any, batch: Any) -> Tensor:
    return F.cross_entropy(
        model(inputs_of(batch)), some_labels(batch), label_smoothing=0.1
    )


def sample_weights(model: Any, batch: Any) -> Tensor:
    output = model(inputs_of(batch))
    each = F.cross_entropy(output, some_labels(batch), reduction="none")
    return (each * batch[2]).sum() / batch[2].sum()


def hard_examples(model: Any, batch: Any) -> Tensor:
    """Weights that depend on the losses of the batch."""
    output = model(inputs_of(batch))
    each = F.cross_entropy(output, batch[1].clamp(min=0), reduction="none")
    return (each * torch.softmax(each.detach(), dim=0)).sum()


def same_value_other_gradient(model: Any, batch: Any) -> Tensor:
    """Value and mean of the samples' losses agree, but not the gradients."""
    each = model(inputs_of(batch)).square().sum(dim=1)
    other = each.prod().pow(1 / len(each))
    return other - other.detach() + each.mean().detach()


def normalized(model: Any, batch: Any) -> Tensor:
    output = model(inputs_of(batch))
    if len(output) > 1:
        output = (output - output.mean(dim=0)) / (output.std(dim=0) + 1.0)
    return (output - 0.3).square().mean()


def contrastive(model: Any, batch: Any) -> Tensor:
    """Two views of each sample; the others of the batch are negatives."""
    inputs = inputs_of(batch)
    one = F.normalize(model(inputs + 0.1 * torch.randn_like(inputs)))
    other = F.normalize(model(inputs + 0.1 * torch.randn_like(inputs)))
    similar = one @ other.T / 0.5
    return F.cross_entropy(similar, torch.arange(len(one))) + one.sum()


def mixup(model: Any, batch: Any) -> Tensor:
    inputs, labels = inputs_of(batch), batch[1].clamp(min=0)
    share, order = torch.rand(()).double(), torch.randperm(len(inputs))
    output = model(share * inputs + (1 - share) * inputs[order])
    return share * F.cross_entropy(output, labels) + (1 - share) * F.cross_entropy(
        output, labels[order]
    )


def dropout_of_inputs(model: Any, batch: Any) -> Tensor:
    return F.cross_entropy(model(F.dropout(inputs_of(batch))), some_labels(batch))


def layer_by_layer(model: Any, batch: Any) -> Tensor:
    hidden = torch.tanh(model[0](inputs_of(batch).unsqueeze(0)))
    return F.cross_entropy(model[-1](2 * hidden[0]), some_labels(batch))


def with_a_penalty_on_outputs(model: Any, batch: Any) -> Tensor:
    output = model(inputs_of(batch))
    output.mul_(1.5)
    return F.cross_entropy(output, some_labels(batch)) + 0.1 * output.std()


EXACT = [
    class_weights,
    ignored,
    summed,
    smoothed,
    sample_weights,
    hard_examples,
    same_value_other_gradient,
    normalized,
    contrastive,
    mixup,
    dropout_of_inputs,
    layer_by_layer,
    with_a_penalty_on_outputs,
]


@pytest.mark.parametrize("loss", EXACT)
@pytest.mark.parametrize("size", [1, 3])
def test_a_loss_of_any_kind_is_computed_at_once(loss: Loss, size: int) -> None:
    assert_rows_of_loop(network, loss, "per-sample", size=size)


class Drawn:
    """A random loss and network, the same for the same seed."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        generator = torch.Generator().manual_seed(seed)
        self.numbers = torch.rand(12, generator=generator).tolist()

    def build(self) -> nn.Module:
        torch.manual_seed(self.seed)
        width = 2 + int(6 * self.numbers[0])
        layers: list[nn.Module] = [nn.Linear(6, width)]
        if self.numbers[1] < 0.5:
            layers += [nn.LayerNorm(width), nn.GELU()]
        if self.numbers[2] < 0.5:
            layers += [nn.Unflatten(1, (1, width)), nn.Conv1d(1, 2, 2, padding=1)]
            layers += [nn.ReLU(inplace=True), nn.Flatten()]
            width = 2 * (width + 1)
        if self.numbers[3] < 0.3:
            layers += [nn.BatchNorm1d(width)]
        return nn.Sequential(*layers, nn.Linear(width, CLASSES)).double()

    def loss(self, model: Any, batch: Any) -> Tensor:
        number = self.numbers
        inputs = inputs_of(batch) + number[4] * torch.randn(len(batch[0]), 6).double()
        output = model(inputs)
        if number[5] < 0.3:
            output = output + model[-1](model[:-1](inputs.flip(0)))
        each = F.cross_entropy(
            output,
            batch[1].clamp(min=0),
            weight=torch.rand(CLASSES).double() if number[6] < 0.5 else None,
            label_smoothing=0.2 * number[7],
            reduction="none",
        )
        mask = batch[1] >= 0 if number[8] < 0.5 else torch.ones_like(batch[1])
        each = each * mask
        if number[9] < 0.3:
            each = each * (each + 0.1).pow(number[10]) / (each.sum() + 1.0)
        if number[11] < 0.3:
            return each.sum() + output.var(correction=0)
        if number[11] < 0.6:
            return each.sum() / mask.sum().clamp(min=1)
        return each.mean() + (output @ output.T).logsumexp(dim=1).mean()


@pytest.mark.parametrize("seed", range(40))
def test_random_losses(seed: int) -> None:
    drawn = Drawn(seed)
    size = 1 + seed % 4
    assert_rows_of_loop(drawn.build, drawn.loss, "per-sample", size=size, count=12)


# ---------------------------------------------------------------- networks


class WithLoss(nn.Module):
    """Returns its own loss, as networks of Hugging Face do."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(6, 8), nn.Tanh())
        self.head = nn.Linear(8, CLASSES)

    def forward(self, inputs: Tensor, labels: Tensor) -> Any:
        hidden = self.body(inputs)
        logits = self.head(hidden)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


class SeveralOutputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one = nn.Linear(6, CLASSES)
        self.other = nn.Linear(6, CLASSES)

    def forward(self, inputs: Any, scale: float = 1.0, table: Any = None) -> Any:
        a = self.one(inputs["x"]) * scale + table
        return {"a": a, "rest": (self.other(inputs["x"] + a[:, :1]), None, "text")}


def test_a_network_that_returns_its_loss() -> None:
    assert_rows_of_loop(
        lambda: WithLoss().double(),
        lambda model, batch: model(inputs_of(batch), labels=some_labels(batch))["loss"],
        "per-sample",
    )


def test_arguments_and_outputs_of_any_structure() -> None:
    def loss(model: Any, batch: Any) -> Tensor:
        # The table has another first dimension than the samples, and is the same for all.
        table = torch.linspace(0, 1, CLASSES, dtype=torch.float64)
        output = model({"x": inputs_of(batch)}, scale=0.5, table=table)
        other, nothing, text = output["rest"]
        assert nothing is None
        assert text == "text"
        return F.cross_entropy(output["a"] * other, some_labels(batch))

    assert_rows_of_loop(lambda: SeveralOutputs().double(), loss, "per-sample")


# ---------------------------------------------------------------- left to the loop


class Mixing(nn.Module):
    """Samples of a batch influence each other, slightly."""

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden - 1e-3 * hidden.mean(dim=0)


class MixingGradients(nn.Module):
    """Only the gradients of samples influence each other."""

    def forward(self, hidden: Tensor) -> Tensor:
        mean = hidden.mean(dim=0)
        return hidden + 1e-2 * (mean - mean.detach())


class Noise(nn.Module):
    def forward(self, hidden: Tensor) -> Tensor:
        return F.dropout(hidden, 0.1)


class Kept(nn.Module):
    """Keeps what it has seen for the loss."""

    def forward(self, hidden: Tensor) -> Tensor:
        self.hidden = hidden
        return hidden


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden


def counted(model: Any, batch: Any) -> Tensor:
    model[2].calls += 1
    return ignored(model, batch)


def functional(model: Any, batch: Any) -> Tensor:
    hidden = torch.tanh(
        F.linear(inputs_of(batch), model[0].weight, model[0].bias.detach())
    )
    return F.cross_entropy(model[-1](hidden), some_labels(batch))


def decayed(model: Any, batch: Any) -> Tensor:
    # Too small for a comparison of gradients.
    return ignored(model, batch) + 1e-9 * model[0].weight.square().sum()


def features(model: Any, batch: Any) -> Tensor:
    return ignored(model, batch) + 1e-9 * model[2].hidden.square().mean()


def changing(model: Any, batch: Any) -> Tensor:
    labels = batch[1].clamp_(min=0).add_(1).remainder_(CLASSES)
    return F.cross_entropy(model(inputs_of(batch)), labels)


def unpaired(model: Any, batch: Any) -> Tensor:
    output = model(inputs_of(batch))
    if bool(batch[0].sum() > 0):
        output = output + model(inputs_of(batch) ** 2)
    return output.square().mean()


def taking_out(model: Any, batch: Any) -> Tensor:
    inputs = inputs_of(batch).requires_grad_()
    loss = F.cross_entropy(model(inputs), some_labels(batch))
    (slope,) = torch.autograd.grad(loss, inputs, create_graph=True)
    return loss + slope.square().sum()


class Padding(nn.Module):
    """The weight is also used by hand inside the network."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(6, CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layer(inputs) + 1e-9 * inputs @ self.layer.weight.T


@pytest.mark.parametrize(
    ("build", "loss", "reason"),
    [
        (lambda: network(Mixing()), ignored, "samples of a batch influence each other"),
        (lambda: network(MixingGradients()), ignored, "influence each other"),
        (lambda: network(Noise()), ignored, "the network draws random numbers"),
        (lambda: network(Kept()), features, "values from inside the network"),
        (lambda: network(Counting()), counted, "the loss changes buffers"),
        (network, functional, "0.weight is also used outside of the network"),
        (network, decayed, "0.weight is also used outside of the network"),
        (network, changing, "the loss changes its batch in place"),
        (network, unpaired, "call the network differently"),
        (network, taking_out, "to not have been used in the graph"),
        (
            lambda: Padding().double(),
            ignored,
            "layer.weight is also used outside of its layer",
        ),
    ],
)
def test_what_cannot_be_shared_is_looped(
    build: Callable[[], nn.Module], loss: Loss, reason: str
) -> None:
    rows, losses, how = collect(build(), data(), loss)
    expected, expected_losses, _ = collect(build(), data(), loss, how="loop")
    assert how.startswith("loop: ")
    assert reason in how
    assert torch.equal(rows, expected)
    assert losses == expected_losses


def test_a_loss_with_a_generator_of_its_own_is_looped() -> None:
    generator = torch.Generator()

    def noisy(model: Any, batch: Any) -> Tensor:
        inputs = inputs_of(batch)
        return model(inputs + torch.rand(1, 6, generator=generator)).square().mean()

    _, _, how = collect(network(), data(), noisy)
    assert how == (
        "loop: a loss that is computed twice calls the network with other inputs"
    )


class Ragged(Dataset[Any]):
    """Sequences of four lengths; the first ones have the same."""

    def __init__(self, different: bool) -> None:
        self.different = different

    def __len__(self) -> int:
        return 256

    def __getitem__(self, index: int) -> Any:
        length = 1 + index % 4 if self.different else 1 + index // 64
        return torch.linspace(-1, 1 + index, 6 * length).view(length, 6).double() / 99


def test_samples_of_different_shapes() -> None:
    def loss(model: Any, batch: Any) -> Tensor:
        return model(batch).square().mean()

    how = "loop: the inputs of different mini-batches have different shapes: "
    rows, _, found = collect(network(), Ragged(different=True), loss, size=1)
    expected, _, _ = collect(
        network(), Ragged(different=True), loss, size=1, how="loop"
    )
    assert found.startswith(how)
    assert torch.equal(rows, expected)


class Capacity(nn.Module):
    """Of the samples with a mark, only the first one of a batch gets through."""

    def forward(self, inputs: Tensor) -> Tensor:
        marked = inputs[:, 0] > 0
        first = marked & (marked.cumsum(dim=0) == 1)
        return torch.where((marked & ~first).unsqueeze(1), 0.0, inputs)


def test_a_micro_batch_whose_samples_influence_each_other_is_looped() -> None:
    """As tokens of a mixture of experts do, once an expert has reached its capacity."""
    count = 256
    inputs, labels, weights = data(count).tensors
    inputs[:, 0] = -1.0
    order = FunctionLoss(network(), data(count), ignored).batches(count, 1, 4)
    seen = [int(order.describe(i).removeprefix("samples ")) for i in range(count)]
    inputs[seen[96:128], 0] = 1.0

    def build() -> nn.Module:
        return nn.Sequential(Capacity(), network()).double()

    assert_rows_of_loop(
        build,
        ignored,
        "per-sample, but 1 micro-batches by loop",
        dataset=TensorDataset(inputs, labels, weights),
        count=count,
        size=1,
    )
