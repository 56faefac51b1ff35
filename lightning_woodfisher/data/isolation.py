"""Run a model and restore its state and the random generators afterwards.

Computing gradients calls the user's code, which draws random numbers, updates BatchNorm
statistics and metric states, clips or zeroes ``.grad``. Everything is restored, so that
training continues bit-identically to a run without pruning.
"""

from __future__ import annotations

__all__ = [
    "AUTOCAST_DEVICES",
    "RandomStates",
    "depends_on_mode",
    "derive_seed",
    "eager",
    "isolated",
    "preserve_random_states",
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
from torch.nn.modules.dropout import _DropoutNd

from lightning_woodfisher.base.full_float32 import full_float32
from lightning_woodfisher.base.types import IsolationMode
from lightning_woodfisher.distributed.dtensor import reshard

#: Kinds of devices whose autocast may be on around a pruning step.
AUTOCAST_DEVICES = ("cpu", "cuda")

# Attributes that make a torchmetrics.Metric exchange its state with other ranks.
_METRIC_SYNC_FLAGS = ("dist_sync_on_step", "sync_on_compute", "_to_sync")


@contextlib.contextmanager
def isolated(model: nn.Module, mode: IsolationMode) -> Iterator[None]:
    """Restore random states, buffers, flags, metric states and ``.grad`` on leaving.

    Inside, every ``.grad`` is None, and neither metrics nor SyncBatchNorm communicate,
    because other ranks may compute another batch or none. The parameters of an FSDP2 model
    are its shards before and after. Float32 products and convolutions do not use TF32, and
    autocast of the caller is off.

    Args:
        model: the network.
        mode: ``"eval"``: running statistics, no dropout; ``"partial_eval"``: the same, but
            only the layers that this is about are in evaluation mode; ``"train"``: the
            training flags as they are, or all set if the model is in evaluation mode.

    Yields:
        Nothing; gradients are enabled inside.
    """
    reshard(model)
    flags = [(module, module.training) for module in model.modules()]
    buffers = [_SavedBuffers(module) for module in model.modules()]
    metrics = [(m, _metric_state(m)) for m in model.modules() if _is_metric(m)]
    parameters = [(p, p.grad, p.requires_grad) for p in model.parameters()]
    try:
        for parameter, _, _ in parameters:
            parameter.grad = None
        for metric, _ in metrics:
            metric.__dict__.update(dict.fromkeys(_METRIC_SYNC_FLAGS, False))
        with (
            preserve_random_states(),
            torch.enable_grad(),
            full_float32(),
            _without_autocast(),
            _local_statistics(model),
        ):
            if mode == "eval":
                model.eval()
            elif mode == "partial_eval" or not model.training:
                model.train()
            if mode == "partial_eval":
                for module in model.modules():
                    module.training = not depends_on_mode(module)
            yield
    finally:
        reshard(model)
        for module, training in flags:
            module.training = training
        for saved in buffers:
            saved.restore()
        for metric, state in metrics:
            metric.__dict__.update(state)
        for parameter, gradient, requires_grad in parameters:
            # The same tensor, because DDP keeps views of it.
            parameter.grad = gradient
            parameter.requires_grad_(requires_grad)


@contextlib.contextmanager
def eager() -> Iterator[None]:
    """Run compiled models as they are written, because compiled code hides its calls.

    Yields:
        Nothing.
    """
    with torch.compiler.set_stance("force_eager"):
        yield


def depends_on_mode(module: nn.Module) -> bool:
    """Check if a layer computes something else in training mode.

    Args:
        module: the layer.

    Returns:
        Whether it is BatchNorm, or drops something at random.
    """
    rates = (getattr(module, key, 0.0) for key in ("dropout", "drop_prob"))
    return (
        isinstance(module, (_BatchNorm, _DropoutNd))
        or type(module).__name__ == "StochasticDepth"
        or any(isinstance(rate, float) and rate > 0.0 for rate in rates)
    )


@contextlib.contextmanager
def _without_autocast() -> Iterator[None]:
    """Turn autocast off, and at the end forget the copies of weights that it keeps."""
    kinds = [kind for kind in AUTOCAST_DEVICES if torch.is_autocast_enabled(kind)]
    try:
        with contextlib.ExitStack() as stack:
            for kind in kinds:
                stack.enter_context(torch.autocast(kind, enabled=False))
            yield
    finally:
        if kinds:
            torch.clear_autocast_cache()


@contextlib.contextmanager
def _local_statistics(model: nn.Module) -> Iterator[None]:
    """Make SyncBatchNorm normalize by the batch of its own rank."""
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
    """Derive a seed from numbers and names.

    Args:
        parts: anything with a stable ``repr``.

    Returns:
        An integer in [0, 2**63).
    """
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed every generator that user code may draw from, and restore all on leaving.

    Args:
        seed: any integer of at most 63 bits.

    Yields:
        Nothing.
    """
    with preserve_random_states():
        reseed(seed)
        yield


def reseed(seed: int) -> None:
    """Seed every generator that user code may draw from.

    Args:
        seed: any integer of at most 63 bits.
    """
    # torch.manual_seed checks every kind of device, which takes longer than all of this.
    torch.default_generator.manual_seed(seed)
    # is_available loads a library each time, and is_initialized has no annotations.
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed_all(seed)
    random.seed(seed)
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed(seed % 2**32)


@dataclass(frozen=True)
class RandomStates:
    """The states of all generators at one time: torch, CUDA, Python and NumPy."""

    cpu: Tensor
    cuda: list[Tensor]
    python: tuple[Any, ...]
    numpy: Any

    @classmethod
    def capture(cls) -> RandomStates:
        """Copy the current states.

        Returns:
            The copies.
        """
        # NumPy is looked up, not imported: if it is not imported, no code draws from it.
        numpy = sys.modules.get("numpy")
        cuda = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        return cls(
            torch.get_rng_state(),
            torch.cuda.get_rng_state_all() if cuda else [],
            random.getstate(),
            None if numpy is None else numpy.random.get_state(),
        )

    def have_changed(self) -> bool:
        """Return whether a generator of torch or Python has been used since."""
        now = RandomStates.capture()
        same = len(self.cuda) == len(now.cuda) and all(
            torch.equal(one, other)
            for one, other in zip(
                [self.cpu, *self.cuda], [now.cpu, *now.cuda], strict=True
            )
        )
        return not same or self.python != now.python

    def restore(self) -> None:
        """Set all generators to these states."""
        torch.set_rng_state(self.cpu)
        if self.cuda:
            torch.cuda.set_rng_state_all(self.cuda)
        random.setstate(self.python)
        if self.numpy is not None:
            sys.modules["numpy"].random.set_state(self.numpy)


@contextlib.contextmanager
def preserve_random_states() -> Iterator[None]:
    """Restore the states of all generators on leaving.

    Yields:
        Nothing.
    """
    states = RandomStates.capture()
    try:
        yield
    finally:
        states.restore()


class _SavedBuffers:
    """The buffers of one module, also those that are None, and copies of their content."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._buffers = {
            name: (buffer, None if buffer is None else buffer.detach().clone())
            for name, buffer in module._buffers.items()
        }
        self._not_persistent = set(module._non_persistent_buffers_set)

    @torch.no_grad()
    def restore(self) -> None:
        module = self._module
        for buffer, content in self._buffers.values():
            if buffer is not None and content is not None:
                _restore_content(buffer, content)
        # User code may have registered other tensors, but not in a scripted module.
        if isinstance(module._buffers, dict):
            module._buffers.clear()
            for name, (buffer, _) in self._buffers.items():
                module._buffers[name] = buffer
        module._non_persistent_buffers_set.clear()
        module._non_persistent_buffers_set.update(self._not_persistent)


def _restore_content(buffer: Tensor, content: Tensor) -> None:
    if buffer.shape != content.shape:
        buffer.resize_(content.shape)
    # An expanded tensor has one element at several indices, and is written to once.
    strides = buffer.stride() if buffer.layout is torch.strided else ()
    for dim, stride in enumerate(strides):
        if stride == 0 and buffer.shape[dim] > 1:
            buffer, content = buffer.narrow(dim, 0, 1), content.narrow(dim, 0, 1)
    # A tensor created in inference mode can only be replaced, not written to.
    if not buffer.is_inference():
        buffer.copy_(content)


def _is_metric(module: nn.Module) -> bool:
    # torchmetrics.Metric, without importing it.
    return hasattr(module, "_defaults") and hasattr(module, "_update_count")


def _metric_state(metric: nn.Module) -> dict[str, Any]:
    """Copy the attributes that an update of the metric changes."""
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
