"""Losses from a LightningModule's ``training_step``, without disturbing the fit loop."""

from __future__ import annotations

__all__ = ["TrainingStepLoss"]

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from lightning_woodfisher.base.errors import ConfigurationError, PruningError
from lightning_woodfisher.base.lightning_names import either_name, like
from lightning_woodfisher.base.types import ModelMode
from lightning_woodfisher.data.batches import Batches, RepeatableStream, loader_batches
from lightning_woodfisher.data.losses import LossSource, scalar_loss
from lightning_woodfisher.data.sampled_labels import UnlabeledBatch, draw_labels


class TrainingStepLoss(LossSource):
    """Runs ``training_step`` (or a method of the user's choice) on own batches.

    Batches come from the training dataset, from the samples that the loader's sampler may
    draw, and its ``collate_fn``, never from the iterator of the fit loop. The module is
    called directly, not through the strategy's wrapper, under the Trainer's precision.
    Logging, optimizers, schedulers and loggers are replaced by stand-ins that do nothing.

    In manual optimisation the loss is the sum of what goes to ``manual_backward``. With
    several optimizers every loss is differentiated for the parameters that it trains: of
    the toggled optimizer, or else of those that are stepped before the next loss comes.

    Args:
        trainer: the Trainer in the middle of fit.
        module: its LightningModule.
        loss_method: name of a method ``(batch, batch_idx) -> loss`` to call instead of
            ``training_step``.
        dataloader: where batches come from; None for the training dataloader.
        full_precision: whether a Trainer with mixed precision leaves autocast out, for
            derivatives that float16 and bfloat16 are too coarse for.
        network: gives the logits in place of a module without ``forward``.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        loss_method: str | None = None,
        dataloader: Iterable[Any] | None = None,
        full_precision: bool = False,
        network: nn.Module | None = None,
    ) -> None:
        super().__init__(module)
        self._trainer = trainer
        self._module = module
        self._dataloader = dataloader
        self._streams = None if dataloader is None else RepeatableStream(dataloader)
        self._method: Callable[..., Any] = getattr(
            module, loss_method or "training_step"
        )
        self._backward = _CapturedBackward(trainer.optimizers)
        no_forward = [base.forward for base in either_name(pl.LightningModule)]
        if network is not None and type(module).forward in no_forward:
            self.predictor = network
        plugin = trainer.precision_plugin
        self._autocast_off = full_precision and isinstance(
            plugin, either_name(MixedPrecision)
        )
        scaler = getattr(plugin, "scaler", None)
        if scaler is not None and scaler.is_enabled() and not self._autocast_off:
            self.loss_scale = float(scaler.get_scale())

    def batches(
        self, count: int, size: int, seed: int, repeat: bool = False
    ) -> Batches:
        """Choose mini-batches of the training data.

        Args:
            count: N.
            size: m.
            seed: of the choice.
            repeat: whether samples may come again when there are fewer than N·m.

        Returns:
            The batches.

        Raises:
            ConfigurationError: for data that cannot be sampled, with what to pass.
        """
        given = self._dataloader
        loader = self._trainer.train_dataloader if given is None else given
        if isinstance(loader, DataLoader):
            with warnings.catch_warnings():
                if not self._trainer.is_global_zero:
                    warnings.simplefilter("ignore")
                chosen = loader_batches(loader, count, size, seed, repeat)
            if chosen is not None:
                return chosen
        if self._streams is not None:
            return self._streams.batches(count, seed, repeat)
        raise ConfigurationError(
            f"the training data is a {_describe(loader)}, from which samples cannot be "
            "drawn at random; pass dataloader=, an iterable that yields the same batches "
            "in the same order on every rank."
        )

    def loss(self, batch: Any, index: int) -> Tensor:
        """Run the training step.

        Args:
            batch: as the dataset gives it, on the CPU.
            index: passed as ``batch_idx``.

        Returns:
            The loss, or the sum of what went to ``manual_backward``.
        """
        trainer, module = self._trainer, self._module
        drawn = batch if isinstance(batch, UnlabeledBatch) else None
        batch = trainer.precision_plugin.convert_input(
            batch if drawn is None else drawn.batch
        )
        batch = module._on_before_batch_transfer(batch, dataloader_idx=0)
        batch = trainer.strategy.batch_to_device(batch, dataloader_idx=0)
        more = is_param_in_hook_signature(self._method, "batch_idx", min_args=2)
        self._backward.clear()
        trainable = [(p, p.requires_grad) for p in module.parameters()]
        try:
            with self._precision():
                batch = draw_labels(module, batch, drawn, self.predictor)
                result = self._method(batch, *[index] * more)
        finally:
            # Toggled optimizers; the graph remembers for which weights it was made.
            for parameter, requires_grad in trainable:
                parameter.requires_grad_(requires_grad)
        origin = f"{type(module).__name__}.{self._method.__name__}"
        if self._backward:
            result = self._backward.loss(origin)
        if isinstance(result, dict):
            result = result.get("loss")
        remedy = "return one, or name a method that does with loss_method="
        return scalar_loss(result, index, origin, remedy)

    @contextlib.contextmanager
    def session(self, mode: ModelMode) -> Iterator[None]:
        """Isolate the module and silence everything that would reach the Trainer.

        Args:
            mode: training or evaluation behaviour of the layers.

        Yields:
            Nothing.
        """
        trainer, module = self._trainer, self._module
        stand_ins = self._stand_ins()
        own = {name: vars(module)[name] for name in stand_ins if name in vars(module)}
        loggers, toggled = trainer.loggers, module._param_requires_grad_state
        with super().session(mode):
            vars(module).update(stand_ins)
            trainer.loggers = [like(trainer, DummyLogger)() for _ in loggers]
            try:
                yield
                if self._streams is not None:
                    self._streams.finish()
            finally:
                trainer.loggers = loggers
                module._param_requires_grad_state = toggled
                for name in stand_ins:
                    vars(module).pop(name, None)
                vars(module).update(own)
                self._backward.clear()

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        if self._autocast_off:
            return contextlib.nullcontext()
        context: contextlib.AbstractContextManager[Any] = (
            self._trainer.precision_plugin.train_step_context()
        )
        return context

    def _stand_ins(self) -> dict[str, Callable[..., Any]]:
        """Methods that shadow those of the module for the time of a session."""
        module, backward = self._module, self._backward
        toggle, untoggle = module.toggle_optimizer, module.untoggle_optimizer
        get_optimizers, get_schedulers = module.optimizers, module.lr_schedulers

        def nothing(*args: Any, **kwargs: Any) -> None:
            return None

        def toggle_optimizer(optimizer: Any) -> None:
            toggle(optimizer)
            backward.toggled = _bare(optimizer)

        def untoggle_optimizer(optimizer: Any) -> None:
            untoggle(optimizer)
            backward.toggled = None

        def optimizers(*args: Any, **kwargs: Any) -> Any:
            return _each(
                get_optimizers(*args, **kwargs),
                lambda optimizer: _IdleOptimizer(optimizer, module, backward),
            )

        def lr_schedulers() -> Any:
            return _each(get_schedulers(), _IdleScheduler)

        def all_gather(data: Any, *args: Any, **kwargs: Any) -> Any:
            if self._trainer.world_size == 1:
                return data
            raise PruningError(
                f"{type(module).__name__} calls all_gather while gradients for pruning "
                "are collected, where every rank is at another batch; name a method "
                "that does not with loss_method="
            )

        names = ("log", "log_dict", "print", "clip_gradients", "lr_scheduler_step")
        stand_ins: dict[str, Callable[..., Any]] = dict.fromkeys(names, nothing)
        stand_ins |= {
            "all_gather": all_gather,
            "lr_schedulers": lr_schedulers,
            "optimizers": optimizers,
            "toggle_optimizer": toggle_optimizer,
            "untoggle_optimizer": untoggle_optimizer,
        }
        if not module.automatic_optimization:
            stand_ins["manual_backward"] = backward.capture
        return stand_ins


class _CapturedBackward:
    """Losses that went to ``manual_backward`` in one step, and for which optimizers.

    Args:
        optimizers: those of the Trainer.
    """

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self.toggled: Optimizer | None = None
        self._optimizers = list(optimizers)
        self._losses: list[Tensor] = []
        self._trained: list[list[Optimizer]] = []
        # Losses that the next step of an optimizer consumes.
        self._waiting: list[int] = []
        self._has_stepped = False

    def __bool__(self) -> bool:
        return bool(self._losses)

    def clear(self) -> None:
        """Forget everything."""
        self.toggled, self._has_stepped = None, False
        self._losses, self._trained, self._waiting = [], [], []

    def capture(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Note a loss instead of differentiating it."""
        if self._has_stepped:
            self._waiting, self._has_stepped = [], False
        if self.toggled is None:
            self._waiting.append(len(self._losses))
        self._losses.append(loss)
        self._trained.append([] if self.toggled is None else [self.toggled])

    def step(self, optimizer: Optimizer) -> None:
        """Note that an optimizer steps with the losses that wait."""
        self._has_stepped = True
        for index in self._waiting:
            if all(optimizer is not other for other in self._trained[index]):
                self._trained[index].append(optimizer)

    def loss(self, origin: str) -> Tensor:
        """Add up, in such a way that each loss has gradients for its own parameters.

        Args:
            origin: named in the error.

        Returns:
            The sum.

        Raises:
            PruningError: when it is unknown which loss trains which parameters.
        """
        total = sum(self._losses[1:], self._losses[0])
        if len(self._optimizers) < 2 or not total.requires_grad:
            return total
        if len(self._losses) > 1 and not all(self._trained):
            raise PruningError(
                f"{origin} calls manual_backward {len(self._losses)} times for "
                f"{len(self._optimizers)} optimizers, and neither toggles nor steps one "
                "for each loss, so that it is unknown which loss trains which weights; "
                "name a method that returns one loss with loss_method="
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
    """The sum of losses, each of which has a gradient for some parameters only."""

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
            # The losses of a step share parts of their graphs.
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


class _IdleOptimizer:
    """What ``self.optimizers()`` hands out in a session: reads as usual, never steps."""

    def __init__(
        self, optimizer: Any, module: pl.LightningModule, backward: _CapturedBackward
    ) -> None:
        self._idle = optimizer
        self._module = module
        self._backward = backward

    @property  # type: ignore[misc]
    def __class__(self) -> Any:  # isinstance() sees the optimizer
        return type(self._idle)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._idle, name)

    def step(self, closure: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
        result = closure() if closure is not None else None
        self._backward.step(_bare(self))
        return result

    def zero_grad(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing."""

    @contextlib.contextmanager
    def toggle_model(self, sync_grad: bool = True) -> Iterator[None]:
        self._module.toggle_optimizer(self)  # type: ignore[arg-type]
        yield
        self._module.untoggle_optimizer(self)  # type: ignore[arg-type]


class _IdleScheduler:
    """What ``self.lr_schedulers()`` hands out in a session: reads as usual."""

    def __init__(self, scheduler: Any) -> None:
        self._idle = scheduler

    @property  # type: ignore[misc]
    def __class__(self) -> Any:  # isinstance() sees the scheduler
        return type(self._idle)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._idle, name)

    def step(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing."""


def _bare(optimizer: Any) -> Any:
    """Take the stand-in and Lightning's wrapper off an optimizer."""
    optimizer = vars(optimizer).get("_idle", optimizer)
    wrapped = isinstance(optimizer, either_name(LightningOptimizer))
    return optimizer.optimizer if wrapped else optimizer


def _each(given: Any, wrap: Callable[[Any], Any]) -> Any:
    """Wrap one, or each of a list; None stays."""
    if isinstance(given, list):
        return [wrap(one) for one in given]
    return None if given is None else wrap(given)


def _describe(value: Any) -> str:
    if isinstance(value, DataLoader):
        return f"DataLoader of the iterable-style {type(value.dataset).__name__}"
    return type(value).__name__
