"""How often the host waits for the device in a pruning step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from devices import DEVICE
from sync_counter import counted_waits
from torch import Tensor

FLAGS = torch.tensor([True, False, True], device=DEVICE)


@pytest.mark.parametrize(
    ("number", "work"),
    [
        (1, lambda x: float(x.sum())),
        (1, lambda x: bool(x.any())),
        (1, lambda x: x.tolist()),
        (1, lambda x: x.cpu()),
        (1, lambda x: x.nonzero()),
        (1, lambda x: x[FLAGS]),
        (1, lambda x: torch.equal(x, x)),
        (1, lambda x: torch.tensor([1.0], device=x.device)),
        (0, lambda x: x[torch.arange(2, device=x.device)]),
        (0, lambda x: torch.where(FLAGS, x, 0.0).sum()),
        (0, lambda x: x.masked_fill_(FLAGS, 1.0)),
        (0, lambda x: torch.zeros_like(x).scatter_add_(0, FLAGS.long(), x)),
        (0, lambda x: torch.linalg.cholesky_ex(torch.diag(x))),
    ],
)
def test_counter_sees_what_waits(number: int, work: Callable[[Tensor], Any]) -> None:
    values = torch.ones(3, device=DEVICE)
    with counted_waits() as waits:
        work(values)
    assert waits.total() == number, str(waits)
