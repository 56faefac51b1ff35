"""Stand-ins for optimizers and ``manual_backward`` while gradients are collected."""

from __future__ import annotations

__all__ = [
    "CapturedBackward",
    "Idle",
    "IdleOptimizer",
    "map_each",
    "unwrap_optimizer",
]

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor
from torch.optim import Optimizer

from lightning_woodfisher.base.errors import PruningError
from lightning_woodfisher.base.lightning_names import either_name


class CapturedBackward:
    """Record the losses passed to ``manual_backward`` in one step, and their optimizers.

    Args:
        optimizers: optimizers of the Trainer.
    """

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self.toggled: Optimizer | None = None
        self._optimizers = list(optimizers)
        self._losses: list[Tensor] = []
        self._trained: list[list[Optimizer]] = []
        # Losses since the last optimizer step.
        self._waiting: list[int] = []
        self._has_stepped = False

    def __bool__(self) -> bool:
        return bool(self._losses)

    def clear(self) -> None:
        """Remove all records."""
        self.toggled, self._has_stepped = None, False
        self._losses, self._trained, self._waiting = [], [], []

    def capture(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Record a loss instead of differentiating it."""
        if self._has_stepped:
            self._waiting, self._has_stepped = [], False
        if self.toggled is None:
            self._waiting.append(len(self._losses))
        self._losses.append(loss)
        self._trained.append([] if self.toggled is None else [self.toggled])

    def step(self, optimizer: Optimizer) -> None:
        """Record that an optimizer steps with the losses since the last step."""
        self._has_stepped = True
        for index in self._waiting:
            if all(optimizer is not other for other in self._trained[index]):
                self._trained[index].append(optimizer)

    def loss(self, origin: str) -> Tensor:
        """Return the sum, in which each loss has gradients only for its own parameters.

        Args:
            origin: name of the method, for the error.

        Returns:
            The sum.

        Raises:
            PruningError: if it is unknown which loss trains which parameters.
        """
        total = sum(self._losses[1:], self._losses[0])
        if len(self._optimizers) < 2 or not total.requires_grad:
            return total
        if len(self._losses) > 1 and not all(self._trained):
            raise PruningError(
                f"{origin} calls manual_backward {len(self._losses)} times for "
                f"{len(self._optimizers)} optimizers, and neither toggles nor steps one "
                "for each loss, so it is unknown which loss trains which weights; set "
                "loss_method= to a method that returns one loss"
            )
        if not self._trained[0]:
            return total
        owned = [
            (
                loss.reshape(()),
                [p for o in trained for g in o.param_groups for p in g["params"]],
            )
            for loss, trained in zip(self._losses, self._trained, strict=True)
        ]
        unique = {id(p): p for _, own in owned for p in own if p.requires_grad}
        result: Tensor = _SumOfOwnedLosses.apply(owned, *unique.values())
        return result


class _SumOfOwnedLosses(torch.autograd.Function):
    """Sum of losses, each with a gradient for some parameters only."""

    @staticmethod
    def forward(
        ctx: Any, owned: list[tuple[Tensor, list[Tensor]]], *parameters: Tensor
    ) -> Tensor:
        ctx.owned, ctx.parameters = owned, parameters
        return torch.stack([loss.detach() for loss, _ in owned]).sum()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        found: dict[int, Tensor] = {}
        for loss, own in ctx.owned:
            own = [p for p in own if p.requires_grad]
            if not loss.requires_grad or not own:
                continue
            # Losses of one step may share a part of their graphs.
            parts = torch.autograd.grad(
                loss,
                own,
                gradient.to(loss.dtype),
                retain_graph=True,
                allow_unused=True,
            )
            for parameter, part in zip(own, parts, strict=True):
                if part is not None:
                    before = found.get(id(parameter))
                    found[id(parameter)] = part if before is None else before + part
        return None, *(found.get(id(p)) for p in ctx.parameters)


class Idle:
    """Stand-in for an optimizer or a scheduler: has its attributes, but never steps."""

    def __init__(self, replaced: Any) -> None:
        self._idle = replaced

    @property  # type: ignore[misc]
    def __class__(self) -> Any:  # isinstance() sees the replaced object
        return type(self._idle)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._idle, name)

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """Do nothing."""


class IdleOptimizer(Idle):
    """Stand-in for an optimizer that records when it would step."""

    def __init__(
        self, optimizer: Any, module: pl.LightningModule, backward: CapturedBackward
    ) -> None:
        super().__init__(optimizer)
        self._module = module
        self._backward = backward

    def step(self, closure: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
        """Run the closure and record the step."""
        result = closure() if closure is not None else None
        self._backward.step(unwrap_optimizer(self))
        return result

    def zero_grad(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing."""

    @contextlib.contextmanager
    def toggle_model(self, sync_grad: bool = True) -> Iterator[None]:
        """Toggle the optimizer while the body runs."""
        self._module.toggle_optimizer(self)  # type: ignore[arg-type]
        yield
        self._module.untoggle_optimizer(self)  # type: ignore[arg-type]


def unwrap_optimizer(optimizer: Any) -> Any:
    """Remove the stand-in and Lightning's wrapper from an optimizer."""
    optimizer = vars(optimizer).get("_idle", optimizer)
    wrapped = isinstance(optimizer, either_name(LightningOptimizer))
    return optimizer.optimizer if wrapped else optimizer


def map_each(given: Any, wrap: Callable[[Any], Any]) -> Any:
    """Apply a function to one object or to each of a list; None stays None."""
    if isinstance(given, list):
        return [wrap(one) for one in given]
    return None if given is None else wrap(given)
