"""TF32 and bfloat16 are off inside, and all settings of the user come back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

from lightning_woodfisher import FisherConfig, prune
from lightning_woodfisher.base import full_float32 as module
from lightning_woodfisher.base.full_float32 import full_float32

BACKENDS = torch.backends
HAS_NEWER = hasattr(BACKENDS.cuda.matmul, "fp32_precision")


def older_products() -> None:
    torch.set_float32_matmul_precision("high")


def older_products_of_cuda() -> None:
    BACKENDS.cuda.matmul.allow_tf32 = True


def older_convolutions_off() -> None:
    BACKENDS.cudnn.allow_tf32 = False


def newer_products() -> None:
    BACKENDS.cuda.matmul.fp32_precision = "tf32"


def newer_convolutions() -> None:
    BACKENDS.cudnn.conv.fp32_precision = "ieee"


def newer_for_all() -> None:
    BACKENDS.fp32_precision = "tf32"


def newer_on_cpus() -> None:
    BACKENDS.mkldnn.matmul.fp32_precision = "bf16"


OLDER = [older_products, older_products_of_cuda, older_convolutions_off]
NEWER = [newer_products, newer_convolutions, newer_for_all, newer_on_cpus]
CONTRADICTION = "contradiction"
CHOICES = [None, *OLDER, *(NEWER if HAS_NEWER else [])]


def settings() -> dict[str, Any]:
    """Read all settings; an older one may contradict a newer one and raise."""
    found: dict[str, Any] = {}
    readers = {
        "products": torch.get_float32_matmul_precision,
        "cuda products": lambda: BACKENDS.cuda.matmul.allow_tf32,
        "convolutions": lambda: BACKENDS.cudnn.allow_tf32,
    }
    for name, read in readers.items():
        try:
            found[name] = read()
        except RuntimeError:
            found[name] = CONTRADICTION
    if HAS_NEWER:
        backends = (BACKENDS.cuda.matmul, BACKENDS.cudnn, BACKENDS.mkldnn)
        operations = [BACKENDS, *backends, *module._operations()]
        found["newer"] = [operation.fp32_precision for operation in operations]
    return found


def is_full() -> bool:
    """Return whether neither kind of settings allows another format."""
    found = settings()
    newer = {operation.fp32_precision for operation in module._operations()}
    return (
        newer <= {"ieee", "none"}
        and found["products"] in {"highest", CONTRADICTION}
        and found["convolutions"] in {False, CONTRADICTION}
    )


@pytest.fixture(params=CHOICES, ids=lambda choice: getattr(choice, "__name__", "none"))
def chosen(request: pytest.FixtureRequest) -> Iterator[dict[str, Any]]:
    """Choose settings as a user does; reset all of them afterwards."""
    if request.param is not None:
        request.param()
    yield settings()
    if HAS_NEWER:
        for operation in (BACKENDS, BACKENDS.mkldnn, *module._operations()):
            operation.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")
    if HAS_NEWER:
        BACKENDS.cuda.matmul.fp32_precision = "none"
        BACKENDS.mkldnn.matmul.fp32_precision = "none"
    BACKENDS.cudnn.allow_tf32 = True


def test_full_float32_inside_and_the_settings_of_the_user_after(chosen: Any) -> None:
    with full_float32():
        assert is_full()
        with full_float32():
            assert is_full()
        assert is_full()
        # What code of the user could read, it still can.
        inside = settings()
        unreadable = {name for name in inside if inside[name] == CONTRADICTION}
        assert unreadable <= {name for name in chosen if chosen[name] == CONTRADICTION}
    assert settings() == chosen
    with pytest.raises(KeyError), full_float32():
        raise KeyError
    assert settings() == chosen


def test_only_older_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch before 2.9 has no others."""
    monkeypatch.setattr(module, "_operations", list)
    torch.set_float32_matmul_precision("medium")
    with full_float32():
        assert torch.get_float32_matmul_precision() == "highest"
        assert BACKENDS.cudnn.allow_tf32 is False
    assert torch.get_float32_matmul_precision() == "medium"
    assert BACKENDS.cudnn.allow_tf32 is True
    torch.set_float32_matmul_precision("highest")


@pytest.mark.skipif(not HAS_NEWER, reason="newer settings since PyTorch 2.9")
def test_an_inherited_setting_is_inherited_afterwards(chosen: Any) -> None:
    BACKENDS.fp32_precision = "tf32"
    with full_float32():
        assert is_full()
    BACKENDS.fp32_precision = "ieee"
    assert BACKENDS.mkldnn.conv.fp32_precision == "ieee"


def test_a_pruning_step_works_with_every_setting_and_never_uses_it(
    chosen: Any,
) -> None:
    """The step raised with the newer settings."""
    seen = set()

    def loss(net: Callable[..., Any], batch: Any) -> Any:
        seen.add(is_full())
        return mse_loss(net(batch), batch[:, :3])

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3))
    data = list(torch.randn(32, 4, 8))
    prune(net, data, loss, target_sparsity=0.5, fisher=FisherConfig(8, 4))
    assert seen == {True}
    assert settings() == chosen
