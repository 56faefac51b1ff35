"""Errors of losses: their causes and remedies."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_woodfisher import FisherConfig, StepConfig, prune
from lightning_woodfisher.base.errors import ConfigurationError, PruningError
from lightning_woodfisher.data.losses import FunctionLoss

FISHER = FisherConfig(num_gradients=8, gradient_batch_size=2)


class Detector(nn.Module):
    """Returns losses in training mode only, as the detectors of torchvision do."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)
        self.norm = nn.BatchNorm1d(3)

    def forward(self, inputs: Tensor) -> Any:
        output = self.norm(self.layer(inputs))
        if self.training:
            return {"boxes": output.square().mean(), "labels": output.abs().mean()}
        return [{"boxes": output}]


def sum_of_losses(model: Any, batch: Any) -> Tensor:
    return sum(model(batch[0]).values())  # type: ignore[no-any-return]


def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randn(64, 6, generator=generator))


def test_a_network_with_losses_in_training_mode_only_names_the_setting() -> None:
    model = Detector()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(
        ConfigurationError,
        match=r"evaluation mode \(AttributeError: 'list' object .*model_mode='train'",
    ):
        prune(model, data(), sum_of_losses, target_sparsity=0.5, fisher=FISHER)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    fisher = FisherConfig(num_gradients=8, gradient_batch_size=2, model_mode="train")
    report = prune(model, data(), sum_of_losses, target_sparsity=0.5, fisher=fisher)
    assert report.sparsity == pytest.approx(0.5, abs=0.05)


def test_an_error_in_both_modes_is_that_of_the_loss() -> None:
    def wrong(model: Any, batch: Any) -> Tensor:
        raise LookupError("no such label")

    with pytest.raises(LookupError, match="no such label"):
        prune(Detector(), data(), wrong, target_sparsity=0.5, fisher=FISHER)


def test_the_loss_is_measured_where_mini_batches_have_no_common_shape() -> None:
    """Loss and trials are measured in groups of mini-batches where these collate."""

    class Sentences(torch.utils.data.Dataset[Tensor]):
        def __len__(self) -> int:
            return 64

        def __getitem__(self, index: int) -> Tensor:
            return torch.linspace(-1, 1, 6 * (1 + index % 4)).view(-1, 6)

    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2))
    report = prune(
        model,
        Sentences(),
        lambda network, batch: network(batch).square().mean(),
        target_sparsity=0.5,
        fisher=FisherConfig(num_gradients=32, gradient_batch_size=1),
        step=StepConfig(line_search=True),
    )
    assert report.loss_before is not None
    assert report.loss_after is not None
    assert report.collection is not None
    assert "different shapes" in report.collection


def test_autocast_of_the_caller_is_that_of_the_loss_alone() -> None:
    torch.manual_seed(0)
    model = nn.Linear(64, 64)
    inputs = torch.randn(8, 64)
    dtypes = []

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        output = model(batch)
        dtypes.append(output.dtype)
        return output.float().square().mean()

    with torch.autocast("cpu", torch.bfloat16):
        source = FunctionLoss(model, [inputs], loss_fn)
        model(inputs)
        with source.session("eval"), torch.no_grad():
            before = source.loss(inputs, 0)
            assert (inputs @ inputs.t()).dtype == torch.float32
            model.weight.mul_(2.0)
            model.bias.mul_(2.0)
            # No copy of the old weights is left, neither for the loss nor afterwards.
            torch.testing.assert_close(source.loss(inputs, 0), 4.0 * before)
        wanted = 4.0 * before
        found = model(inputs).float().square().mean()
        torch.testing.assert_close(found, wanted)
    assert set(dtypes) == {torch.bfloat16}


@pytest.mark.parametrize("given", ["tensors", "samples", "numbers", "mappings"])
def test_tensors_and_lists_of_samples_are_data(given: str) -> None:
    """They give the same gradients, and so the same masks, as a dataset of them."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(64, 6, generator=generator)
    labels = torch.randint(3, (64,), generator=generator)
    dataset = TensorDataset(inputs, labels)
    data: Any = {
        "tensors": (inputs, labels),
        "samples": [*dataset],
        "numbers": [(sample, int(label)) for sample, label in dataset],
        "mappings": [{"inputs": x, "labels": int(label)} for x, label in dataset],
    }[given]

    def pruned(data: Any) -> tuple[Tensor, str | None]:
        torch.manual_seed(0)
        model = nn.Linear(6, 3)
        report = prune(model, data, cross_entropy, target_sparsity=0.5, fisher=FISHER)
        return model.weight.detach(), report.collection

    expected, found = pruned(dataset), pruned(data)
    assert torch.equal(found[0], expected[0])
    assert found[1] == expected[1] == "per-sample"


def cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    inputs, labels = batch.values() if isinstance(batch, dict) else batch
    return nn.functional.cross_entropy(model(inputs), labels)


def test_tensors_of_different_lengths_are_refused() -> None:
    tensors = torch.zeros(8, 6), torch.zeros(7)
    with pytest.raises(ConfigurationError, match=r"lengths \[8, 7\]; give inputs and"):
        FunctionLoss(nn.Linear(6, 3), tensors, cross_entropy)
    arrays: Any = tuple(tensor.numpy() for tensor in tensors)
    with pytest.raises(ConfigurationError, match=r"NumPy arrays; give tensors of the"):
        FunctionLoss(nn.Linear(6, 3), arrays, cross_entropy)


def test_a_tensor_is_a_dataset_of_its_rows() -> None:
    source = FunctionLoss(
        nn.Linear(6, 3), torch.arange(48.0).view(8, 6), lambda m, b: m(b).mean()
    )
    batch = source.batches(2, 4, seed=0).fetch(0)
    assert batch.shape == (4, 6)


@pytest.mark.parametrize(
    ("loss_fn", "message"),
    [
        (nn.functional.cross_entropy, r"^loss_fn=cross_entropy takes outputs and"),
        (nn.CrossEntropyLoss(), r"^loss_fn=CrossEntropyLoss takes outputs and"),
        (
            lambda x, y: nn.functional.mse_loss(x, y) + 0,
            r"^loss_fn fails \(AttributeErr",
        ),
        (lambda x, y: nn.functional.nll_loss(x, y) + 0, r"^loss_fn fails \(TypeError"),
        (lambda model, inputs, labels: model(inputs).sum(), "missing 1 required pos"),
    ],
)
def test_a_loss_function_with_other_arguments_is_explained(
    loss_fn: Any, message: str
) -> None:
    samples = torch.randn(64, 6), torch.randint(3, (64,))
    with pytest.raises(ConfigurationError, match=message) as raised:
        prune(nn.Linear(6, 3), samples, loss_fn, target_sparsity=0.5, fisher=FISHER)
    assert "called as loss_fn(model, batch)" in str(raised.value)


def test_a_batch_without_labels_is_named() -> None:
    """Models of Hugging Face return outputs whose loss is None then."""

    def loss_fn(model: nn.Module, batch: Any) -> Any:
        return model(batch["inputs"]).sum() if "labels" in batch else None

    batches = [{"inputs": torch.ones(2, 6), "mask": torch.ones(2)} for _ in range(8)]
    with pytest.raises(PruningError, match="has inputs, mask but no labels, without"):
        prune(nn.Linear(6, 3), batches, loss_fn, target_sparsity=0.5, fisher=FISHER)
