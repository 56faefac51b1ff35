"""Run a model without leaving a trace in it.

Computing gradients calls the user's code, which draws random numbers, updates BatchNorm
statistics and metric states. Everything is put back, so that training goes on
bit-identically to a run in which nothing happened.
"""

from __future__ import annotations

__all__ = ["ModelMode", "derive_seed", "isolated", "seeded"]

import contextlib
import hashlib
import random
import sys
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

ModelMode = Literal["train", "eval"]


@contextlib.contextmanager
def isolated(model: nn.Module, mode: ModelMode) -> Iterator[None]:
    """Put back random states, buffers, training flags and metric states on leaving.

    Args:
        model: the network.
        mode: ``"eval"``: running statistics, no dropout; ``"train"``: the training flags
            as they are, or all set when the model is in evaluation mode.

    Yields:
        Nothing; gradients are enabled inside.
    """
    flags = [(module, module.training) for module in model.modules()]
    buffers = _buffers(model)
    metrics = [(m, _metric_state(m)) for m in model.modules() if _is_metric(m)]
    try:
        with _random_states(), torch.enable_grad():
            if mode == "eval":
                model.eval()
            elif not model.training:
                model.train()
            yield
    finally:
        for module, training in flags:
            module.training = training
        _restore_buffers(buffers)
        for metric, state in metrics:
            metric.__dict__.update(state)


def derive_seed(*parts: object) -> int:
    """Mix numbers and names into one seed.

    Args:
        parts: anything with a stable ``repr``.

    Returns:
        An integer in [0, 2**63).
    """
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed every generator that user code is likely to draw from; put all back after.

    Args:
        seed: any integer of at most 63 bits.

    Yields:
        Nothing.
    """
    with _random_states():
        torch.manual_seed(seed)
        random.seed(seed)
        if (numpy := sys.modules.get("numpy")) is not None:
            numpy.random.seed(seed % 2**32)
        yield


@contextlib.contextmanager
def _random_states() -> Iterator[None]:
    # NumPy is looked up, not imported: if nobody has imported it, nobody draws from it.
    numpy = sys.modules.get("numpy")
    cuda = torch.cuda.is_available() and torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    cpu_state = torch.get_rng_state()
    cuda_states = torch.cuda.get_rng_state_all() if cuda else []
    python_state = random.getstate()
    numpy_state = numpy.random.get_state() if numpy is not None else None
    try:
        yield
    finally:
        torch.set_rng_state(cpu_state)
        if cuda:
            torch.cuda.set_rng_state_all(cuda_states)
        random.setstate(python_state)
        if numpy is not None and numpy_state is not None:
            numpy.random.set_state(numpy_state)


def _buffers(model: nn.Module) -> list[tuple[nn.Module, str, Tensor, Tensor]]:
    return [
        (module, name, buffer, buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]


@torch.no_grad()
def _restore_buffers(saved: list[tuple[nn.Module, str, Tensor, Tensor]]) -> None:
    for module, name, buffer, content in saved:
        # User code may have changed the buffer in place or put another one there.
        if buffer.shape != content.shape:
            buffer.resize_(content.shape)
        buffer.copy_(content)
        module._buffers[name] = buffer


def _is_metric(module: nn.Module) -> bool:
    # torchmetrics.Metric, without importing it.
    return hasattr(module, "_defaults") and hasattr(module, "_update_count")


def _metric_state(metric: nn.Module) -> dict[str, Any]:
    """Copy what a metric's update changes; its states are plain attributes."""
    states = vars(metric)["_defaults"]
    plain = (Tensor, int, float, bool, type(None))
    return {
        key: _copy(value)
        for key, value in vars(metric).items()
        if key in states or (isinstance(value, plain) and key != "training")
    }


def _copy(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, list):
        return [_copy(item) for item in value]
    return value
