"""Running a model changes neither its state nor the random generators."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
import torchmetrics
from torch import Tensor, nn

from lightning_woodfisher.base.types import ModelMode
from lightning_woodfisher.data.isolation import isolated, seeded

MODES: tuple[ModelMode, ...] = ("train", "eval")


class Careless(nn.Module):
    """Draws from every generator, counts, replaces buffers and logs metrics."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.drop = nn.Dropout(0.5)
        self.accuracy = torchmetrics.classification.MulticlassAccuracy(num_classes=4)
        self.loss = torchmetrics.MeanMetric()
        self.history = torchmetrics.CatMetric()
        self.group = torchmetrics.MetricCollection([torchmetrics.MeanSquaredError()])
        self.register_buffer("count", torch.zeros(1))
        self.register_buffer("queue", torch.arange(6.0))
        self.register_buffer("absent", None)
        self.count: Tensor
        self.queue: Tensor

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.drop(self.norm(self.fc(x)))
        out = out * random.random() + float(np.random.rand()) + torch.rand(())
        self.count += 1
        self.queue = torch.cat([self.queue[1:], x.mean().detach().reshape(1)])
        self.loss(out.detach().mean())
        self.history.update(out.detach().mean())
        self.accuracy(out.detach(), x.argmax(dim=1))
        self.group.update(out.detach(), x)
        self.loss.compute()
        return out


def draws() -> list[float]:
    """The next number of each generator."""
    return [
        float(torch.rand(())),
        random.random(),
        float(np.random.rand()),
    ]


@contextlib.contextmanager
def same_draws_after() -> Iterator[None]:
    torch.manual_seed(1)
    random.seed(2)
    np.random.seed(3)
    expected = draws()
    torch.manual_seed(1)
    random.seed(2)
    np.random.seed(3)
    yield
    assert draws() == expected


def batch() -> Tensor:
    return torch.linspace(-1, 1, 32).view(8, 4)


def used_model() -> Careless:
    """A model in the middle of training, in which nothing has its initial value."""
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    model = Careless()
    model(batch())
    model(2 * batch())
    return model


def snapshot(model: Careless) -> dict[str, object]:
    """Values of everything that a forward pass may change."""
    state: dict[str, object] = {
        f"tensor {name}": value.clone().tolist()
        for name, value in (*model.named_parameters(), *model.named_buffers())
    }
    state["flags"] = [module.training for module in model.modules()]
    for name, module in model.named_modules():
        if isinstance(module, torchmetrics.Metric):
            for key in module._defaults:
                value = getattr(module, key)
                state[f"{name}.{key}"] = (
                    [item.tolist() for item in value]
                    if isinstance(value, list)
                    else value.tolist()
                )
            state[f"{name} updates"] = module._update_count
    return state


@pytest.mark.parametrize("mode", MODES)
def test_everything_is_put_back(mode: ModelMode) -> None:
    model = used_model()
    before = snapshot(model)
    with same_draws_after(), isolated(model, mode):
        for _ in range(3):
            model(batch())
            draws()
        assert snapshot(model) != before
    assert snapshot(model) == before


@pytest.mark.parametrize("mode", MODES)
def test_everything_is_put_back_after_an_exception(mode: ModelMode) -> None:
    model = used_model()
    before = snapshot(model)

    def fail() -> None:
        with isolated(model, mode):
            model(batch())
            raise ZeroDivisionError

    with same_draws_after(), pytest.raises(ZeroDivisionError):
        fail()
    assert snapshot(model) == before


def test_metrics_go_on_as_if_nothing_had_happened() -> None:
    model, untouched = used_model(), used_model()
    with isolated(model, "train"):
        model(batch() ** 3)
        model.loss.reset()
        model.group.reset()
    for one in (model, untouched):
        torch.manual_seed(5)
        random.seed(5)
        np.random.seed(5)
        one(batch())
    assert float(model.loss.compute()) == float(untouched.loss.compute())
    assert torch.equal(model.history.compute(), untouched.history.compute())
    assert float(model.accuracy.compute()) == float(untouched.accuracy.compute())
    assert str(model.group.compute()) == str(untouched.group.compute())


def test_buffers_keep_their_tensors() -> None:
    model = used_model()
    buffers = dict(model.named_buffers())
    pointers = {name: buffer.data_ptr() for name, buffer in buffers.items()}
    with isolated(model, "train"):
        model(batch())
        assert model.queue is not buffers["queue"]
    for name, buffer in model.named_buffers():
        assert buffer is buffers[name]
        assert buffer.data_ptr() == pointers[name]
    assert model.absent is None


@pytest.mark.parametrize("mode", MODES)
def test_buffers_that_come_up_inside_go_away(mode: ModelMode) -> None:
    model = used_model()
    keys, persistent = list(model.state_dict()), set(model._non_persistent_buffers_set)
    names = list(model._buffers)
    with isolated(model, mode):
        model.absent = torch.ones(2)
        model.register_buffer("late", torch.ones(3))
        model.register_buffer("later", torch.ones(3), persistent=False)
        model._buffers["count"] = None
        del model.queue
    assert list(model.state_dict()) == keys
    assert model._non_persistent_buffers_set == persistent
    assert list(model._buffers) == names
    assert model.absent is None
    assert not hasattr(model, "late")


def test_an_expanded_buffer_is_put_back() -> None:
    model = used_model()
    base = torch.tensor([[2.0], [3.0]])
    model.register_buffer("wide", base.expand(2, 4))
    with isolated(model, "eval"):
        base.add_(1.0)
    assert torch.equal(base, torch.tensor([[2.0], [3.0]]))
    assert model.get_buffer("wide").data_ptr() == base.data_ptr()


def test_a_buffer_of_inference_mode_is_put_back() -> None:
    model = used_model()
    with torch.inference_mode():
        model.queue = torch.ones(2)
    before = model.queue
    with isolated(model, "eval"):
        model.queue = torch.zeros(2)
    assert model.queue is before


def test_a_sparse_buffer_is_put_back() -> None:
    model = used_model()
    model.register_buffer("rare", torch.eye(3).to_sparse())
    with isolated(model, "eval"):
        model.get_buffer("rare").zero_()
    assert torch.equal(model.get_buffer("rare").to_dense(), torch.eye(3))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*")
def test_the_buffers_of_a_scripted_module_are_put_back() -> None:
    norm = torch.jit.script(nn.BatchNorm1d(2))
    model = nn.Sequential(nn.Linear(2, 2), norm)
    with isolated(model, "train"):
        model(torch.rand(3, 2) + 1)
        assert norm.num_batches_tracked == 1
    assert norm.num_batches_tracked == 0
    assert torch.equal(norm.running_var, torch.ones(2))


def test_gradients_of_the_user_are_out_of_reach() -> None:
    model = used_model()
    gradients = [torch.full_like(p, 3.0) for p in model.parameters()]
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        parameter.grad = gradient

    def spoil() -> None:
        with isolated(model, "eval"):
            assert all(p.grad is None for p in model.parameters())
            model(batch()).sum().backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
            model.zero_grad(set_to_none=False)
            model.requires_grad_(False)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        spoil()
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert parameter.grad is gradient
        assert torch.equal(gradient, torch.full_like(gradient, 3.0))
        assert parameter.requires_grad


def test_metrics_do_not_talk_to_other_ranks() -> None:
    model = used_model()
    talks: list[str] = []
    metric = torchmetrics.MeanMetric(
        dist_sync_on_step=True,
        dist_sync_fn=lambda x, group: talks.append("sync") or [x],
        distributed_available_fn=lambda: True,
    )
    model.talking = metric
    metric(torch.ones(1))
    metric.compute()
    talked = len(talks)
    assert talked > 0
    with isolated(model, "train"):
        metric(torch.ones(1))
        metric.compute()
    assert len(talks) == talked
    metric(torch.ones(1))
    assert len(talks) > talked


def test_a_resized_buffer_is_put_back() -> None:
    model = used_model()
    before = model.queue.clone()
    with isolated(model, "train"):
        model.queue.resize_(9).fill_(1.0)
    assert torch.equal(model.queue, before)


def test_eval_mode_uses_running_statistics_and_no_dropout() -> None:
    model = used_model()
    with isolated(model, "eval"):
        assert not any(module.training for module in model.modules())
        assert torch.equal(model.drop(batch()), batch())
        mean = model.norm.running_mean
        assert mean is not None
        before = mean.clone()
        model.norm(batch())
        assert torch.equal(mean, before)
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("mode", MODES)
def test_a_layer_that_the_user_froze_stays_frozen(mode: ModelMode) -> None:
    model = used_model()
    model.norm.eval()
    with isolated(model, mode):
        assert not model.norm.training
        assert model.drop.training == (mode == "train")
    assert not model.norm.training
    assert model.training
    assert model.drop.training


def test_train_mode_wakes_a_model_in_evaluation_mode() -> None:
    model = used_model().eval()
    with isolated(model, "train"):
        assert model.norm.training
    assert not any(module.training for module in model.modules())


def test_gradients_are_enabled_inside_only() -> None:
    model = used_model()
    with torch.no_grad():
        with isolated(model, "eval"):
            assert torch.is_grad_enabled()
            assert model(batch()).requires_grad
        assert not torch.is_grad_enabled()
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**63 - 1])
def test_seeded_repeats_and_puts_back(seed: int) -> None:
    with same_draws_after():
        with seeded(seed):
            first = draws()
        with seeded(seed):
            assert draws() == first
        with seeded(seed ^ 4096):
            assert all(a != b for a, b in zip(draws(), first, strict=True))


def test_seeded_puts_back_after_an_exception() -> None:
    def fail() -> None:
        draws()
        raise KeyError

    with same_draws_after(), pytest.raises(KeyError), seeded(3):
        fail()


@pytest.mark.parametrize(
    "enter",
    [lambda m: isolated(m, "eval"), lambda m: seeded(4)],
    ids=["isolated", "seed"],
)
def test_contexts_nest(
    enter: Callable[[nn.Module], contextlib.AbstractContextManager[None]],
) -> None:
    model = used_model()
    with same_draws_after(), enter(model):
        outer = torch.get_rng_state()
        with enter(model):
            draws()
        assert torch.equal(torch.get_rng_state(), outer)
        draws()
