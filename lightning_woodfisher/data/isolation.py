"""Run a model without leaving a trace in it.

Computing gradients calls the user's code, which draws random numbers, updates BatchNorm
statistics and metric states, clips or zeroes ``.grad``. Everything is put back, so that
training goes on bit-identically to a run in which nothing happened.
"""

from __future__ import annotations

__all__ = [
    "RandomStates",
    "derive_seed",
    "isolated",
    "random_states_kept",
    "reseed",
    "seeded",
]

import contextlib
import functools
import hashlib
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_woodfisher.base.types import ModelMode

# Attributes that make a torchmetrics.Metric exchange its state with other ranks.
_METRIC_SYNCHRONISES = ("dist_sync_on_step", "sync_on_compute", "_to_sync")


@contextlib.contextmanager
def isolated(model: nn.Module, mode: ModelMode) -> Iterator[None]:
    """Put back random states, buffers, flags, metric states and ``.grad`` on leaving.

    Inside, every ``.grad`` is None, and neither metrics nor SyncBatchNorm talk to other
    ranks, which may be at another batch or at none.

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
    parameters = [(p, p.grad, p.requires_grad) for p in model.parameters()]
    try:
        for parameter, _, _ in parameters:
            parameter.grad = None
        for metric, _ in metrics:
            metric.__dict__.update(dict.fromkeys(_METRIC_SYNCHRONISES, False))
        with random_states_kept(), torch.enable_grad(), _own_statistics(model):
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
        for parameter, gradient, requires_grad in parameters:
            # The same tensor: DDP keeps views of it.
            parameter.grad = gradient
            parameter.requires_grad_(requires_grad)


@contextlib.contextmanager
def _own_statistics(model: nn.Module) -> Iterator[None]:
    """Let SyncBatchNorm normalise by the batch of its own rank."""
    layers = [
        module
        for module in model.modules()
        if isinstance(module, nn.SyncBatchNorm) and "forward" not in vars(module)
    ]
    try:
        for layer in layers:
            vars(layer)["forward"] = functools.partial(_BatchNorm.forward, layer)
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


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
    with random_states_kept():
        reseed(seed)
        yield


def reseed(seed: int) -> None:
    """Seed every generator that user code is likely to draw from.

    Args:
        seed: any integer of at most 63 bits.
    """
    # torch.manual_seed asks for every kind of device, which takes longer than all this.
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed_all(seed)
    random.seed(seed)
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed(seed % 2**32)


@dataclass(frozen=True)
class RandomStates:
    """The states of all generators at one moment: torch, CUDA, Python and NumPy."""

    cpu: Tensor
    cuda: list[Tensor]
    python: tuple[Any, ...]
    numpy: Any

    @classmethod
    def now(cls) -> RandomStates:
        """Copy them.

        Returns:
            The copies.
        """
        # NumPy is looked up, not imported: if nobody has imported it, nobody draws from it.
        numpy = sys.modules.get("numpy")
        # is_initialized has no annotations.
        cuda = torch.cuda.is_available() and torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        return cls(
            torch.get_rng_state(),
            torch.cuda.get_rng_state_all() if cuda else [],
            random.getstate(),
            None if numpy is None else numpy.random.get_state(),
        )

    def restore(self) -> None:
        """Put them back."""
        torch.set_rng_state(self.cpu)
        if self.cuda:
            torch.cuda.set_rng_state_all(self.cuda)
        random.setstate(self.python)
        if self.numpy is not None:
            sys.modules["numpy"].random.set_state(self.numpy)


@contextlib.contextmanager
def random_states_kept() -> Iterator[None]:
    """Put the states of all generators back on leaving.

    Yields:
        Nothing.
    """
    states = RandomStates.now()
    try:
        yield
    finally:
        states.restore()


@dataclass(frozen=True)
class _Buffers:
    """The buffers of one module, also those that are None, and their content."""

    module: nn.Module
    tensors: dict[str, Tensor | None]
    contents: dict[str, Tensor]
    not_persistent: set[str]


def _buffers(model: nn.Module) -> list[_Buffers]:
    return [
        _Buffers(
            module,
            dict(module._buffers),
            {
                n: b.detach().clone()
                for n, b in module._buffers.items()
                if b is not None
            },
            set(module._non_persistent_buffers_set),
        )
        for module in model.modules()
    ]


@torch.no_grad()
def _restore_buffers(saved: list[_Buffers]) -> None:
    for one in saved:
        for name, content in one.contents.items():
            buffer = one.tensors[name]
            if buffer is not None:
                _restore_content(buffer, content)
        # User code may have put other tensors there, or the first ones.
        one.module._buffers.clear()
        one.module._buffers.update(one.tensors)
        one.module._non_persistent_buffers_set.clear()
        one.module._non_persistent_buffers_set.update(one.not_persistent)


def _restore_content(buffer: Tensor, content: Tensor) -> None:
    if buffer.shape != content.shape:
        buffer.resize_(content.shape)
    # An expanded tensor has one element in many places, and is written to once.
    strides = buffer.stride() if buffer.layout is torch.strided else ()
    for dim, stride in enumerate(strides):
        if stride == 0 and buffer.shape[dim] > 1:
            buffer, content = buffer.narrow(dim, 0, 1), content.narrow(dim, 0, 1)
    # What was made in inference mode can only be replaced, not written to.
    if not buffer.is_inference():
        buffer.copy_(content)


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
