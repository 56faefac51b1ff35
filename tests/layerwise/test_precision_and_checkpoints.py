"""Layer-wise reconstruction with autocast, 16 bits, checkpointing and compiled modules."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from torch.utils.data import TensorDataset

from lightning_woodfisher import FisherConfig, LayerwiseConfig, PruningError, prune
from lightning_woodfisher.layerwise import step
from lightning_woodfisher.layerwise.allocation import propose

SAMPLES = 96


class Residual(nn.Module):
    """A block whose inner part is run with gradient checkpointing, if that is set."""

    def __init__(self, reentrant: bool | None = None) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.norm = nn.LayerNorm(16)
        self.expand, self.contract = nn.Linear(16, 32), nn.Linear(32, 16)

    def inner(self, stream: Tensor) -> Tensor:
        hidden: Tensor = self.contract(self.expand(self.norm(stream)).relu())
        return hidden

    def forward(self, stream: Tensor) -> Tensor:
        if self.reentrant is None:
            return stream + self.inner(stream)
        inner = checkpoint(self.inner, stream, use_reentrant=self.reentrant)
        return stream + inner


def network(reentrant: bool | None = None) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(12, 16), Residual(reentrant), Residual(reentrant), nn.Linear(16, 4)
    )


def vectors() -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    mix = torch.randn(12, 12, generator=generator)
    with torch.autocast("cpu", enabled=False):
        inputs = torch.randn(SAMPLES, 12, generator=generator) @ mix
    return TensorDataset(inputs, torch.randint(0, 4, (SAMPLES,), generator=generator))


def cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    inputs = batch[0].to(next(model.parameters()).dtype)
    return F.cross_entropy(model(inputs).float(), batch[1])


def with_autocast(model: nn.Module, batch: Any) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return cross_entropy(model, batch)


def reconstruct(
    model: nn.Module, loss: Callable[[Any, Any], Tensor] = cross_entropy, **options: Any
) -> None:
    prune(
        model,
        vectors(),
        loss,
        target_sparsity=0.6,
        criterion="layerwise",
        fisher=FisherConfig(num_gradients=SAMPLES, gradient_batch_size=1),
        **options,
    )


def relative_error(model: nn.Module) -> float:
    dense, (inputs, _) = network(), vectors().tensors
    with torch.no_grad():
        wanted, found = dense(inputs), model.float()(inputs)
    gap = (wanted - found).square().sum()
    return float(gap / (wanted - wanted.mean(0)).square().sum())


@pytest.fixture(scope="module")
def expected() -> dict[str, Tensor]:
    model = network()
    reconstruct(model)
    assert relative_error(model) < 0.012
    return model.state_dict()


def require_same(model: nn.Module, expected: dict[str, Tensor]) -> None:
    for found, wanted in zip(model.parameters(), expected.values(), strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(
    ("dtype", "limit"),
    [(torch.bfloat16, 0.02), (torch.float16, 0.012), (torch.float64, 0.012)],
)
def test_models_of_another_dtype(dtype: torch.dtype, limit: float) -> None:
    model = network().to(dtype)
    reconstruct(model)
    assert {p.dtype for p in model.parameters()} == {dtype}
    zeros = sum(int((p == 0).sum()) for p in model.parameters() if p.dim() == 2)
    assert zeros == round(
        0.6 * sum(p.numel() for p in model.parameters() if p.dim() == 2)
    )
    assert relative_error(model) < limit


@pytest.mark.parametrize("place", ["loss", "caller"])
def test_autocast(place: str) -> None:
    # Its copies of biases would outlive a change: the error was 30 times as large.
    model = network()
    around = contextlib.nullcontext()
    if place == "caller":
        around = torch.autocast("cpu", torch.bfloat16)
    with around:
        reconstruct(model, with_autocast if place == "loss" else cross_entropy)
        inputs = vectors().tensors[0]
        with torch.no_grad():
            after = model(inputs)
    with torch.no_grad():
        # No copies of dense weights are left.
        torch.testing.assert_close(after.float(), model(inputs), atol=0.05, rtol=0.05)
    assert relative_error(model) < 0.02


def test_error_curves_do_not_depend_on_autocast(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Sums of products in 16 bits had negative eigenvalues, and so curves of zeros.
    found: list[Tensor] = []

    def keep(curves: Any, weights: Any, sparsity: float) -> list[float]:
        found.append(torch.tensor(curves, dtype=torch.float64))
        return propose(curves, weights, sparsity)

    monkeypatch.setattr(step, "propose", keep)
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(SAMPLES, 2, generator=generator)
    inputs = inputs @ torch.randn(2, 40, generator=generator)
    inputs += 0.02 * torch.randn(SAMPLES, 40, generator=generator)
    data = TensorDataset(inputs, torch.arange(SAMPLES) % 4)
    for loss in (cross_entropy, with_autocast):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(40, 48), nn.ReLU(), nn.Linear(48, 4))
        prune(
            model,
            data,
            loss,
            target_sparsity=0.6,
            criterion="layerwise",
            fisher=FisherConfig(num_gradients=SAMPLES, gradient_batch_size=1),
        )
    ratios = found[1] / found[0]
    assert 0.5 < float(ratios.min()) < float(ratios.max()) < 2.0


def test_settings_of_the_process_that_a_loss_changes_for_a_while(
    expected: dict[str, Tensor],
) -> None:
    seen = set()

    def loss(model: nn.Module, batch: Any) -> Tensor:
        # As Lightning does with precision="bf16-true".
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            with sdpa_kernel(SDPBackend.MATH):
                result = cross_entropy(model, batch)
                seen.add(
                    (torch.zeros(()).dtype, torch.backends.cuda.flash_sdp_enabled())
                )
        finally:
            torch.set_default_dtype(before)
        seen.add((torch.zeros(()).dtype, torch.backends.cuda.flash_sdp_enabled()))
        return result

    model = network()
    reconstruct(model, loss)
    require_same(model, expected)
    assert seen == {(torch.bfloat16, False), (torch.float32, True)}
    assert torch.get_default_dtype() == torch.float32
    assert torch.backends.cuda.flash_sdp_enabled()


def test_checkpointing(expected: dict[str, Tensor]) -> None:
    model = network(reentrant=False)
    reconstruct(model)
    require_same(model, expected)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_reentrant_checkpointing_has_no_gradients() -> None:
    model = network(reentrant=True)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(PruningError, match="pass use_reentrant=False"):
        reconstruct(model)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
    reconstruct(model, layerwise=LayerwiseConfig(output_weights=False))
    assert relative_error(model) < 0.012


@pytest.mark.parametrize("place", ["whole", "part", "method"])
def test_compiled_modules(place: str, expected: dict[str, Tensor]) -> None:
    model = network()
    run = model
    if place == "whole":
        run = torch.compile(model, backend="eager")
    elif place == "part":
        model[1] = torch.compile(model[1], backend="eager")
    else:
        model.compile(backend="eager")
    with torch.no_grad():
        run(vectors().tensors[0])
    reconstruct(run)
    require_same(model, expected)
