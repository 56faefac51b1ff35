"""Compute losses with a module's ``training_step`` without disturbing the fit loop."""

from __future__ import annotations

__all__ = ["TrainingStepLoss"]

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_woodfisher.base.errors import ConfigurationError, PruningError
from lightning_woodfisher.base.lightning_names import either_name, from_package_of
from lightning_woodfisher.base.types import ModelMode
from lightning_woodfisher.callbacks.stand_ins import (
    CapturedBackward,
    Idle,
    IdleOptimizer,
    map_each,
    unwrap_optimizer,
)
from lightning_woodfisher.data.batches import Batches, RepeatableStream, loader_batches
from lightning_woodfisher.data.losses import LossSource, map_tensors, scalar_loss
from lightning_woodfisher.data.sampled_labels import UnlabeledBatch, draw_labels


class TrainingStepLoss(LossSource):
    """Compute losses with ``training_step`` (or another method) on separate batches.

    Batches come from the training dataset, limited to the samples that the loader's sampler
    may draw, with its ``collate_fn``; the iterator of the fit loop is not touched. The
    module is called directly, not through the strategy's wrapper, with the Trainer's
    precision. Logging, optimizers, schedulers and loggers are replaced by stand-ins that do
    nothing.

    In manual optimization the loss is the sum of the losses passed to ``manual_backward``.
    With several optimizers, each loss is differentiated for the parameters that it trains:
    those of the toggled optimizer, or of the optimizers that step before the next loss.

    Args:
        trainer: the Trainer during fit.
        module: its LightningModule.
        loss_method: name of a method ``(batch, batch_idx) -> loss`` to call instead of
            ``training_step``.
        dataloader: source of batches; None for the training dataloader.
        full_precision: disable autocast under mixed precision, for derivatives that need
            more than float16 and bfloat16.
        network: returns the logits if the module has no ``forward``.
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
        self._backward = CapturedBackward(trainer.optimizers)
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
        """Draw mini-batches of the training data.

        Args:
            count: number of mini-batches, N.
            size: samples in a mini-batch, m.
            seed: seed of the choice.
            repeat: whether samples may repeat when there are fewer than N·m.

        Returns:
            The batches.

        Raises:
            ConfigurationError: for data that cannot be sampled.
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
        kind = type(loader).__name__
        if isinstance(loader, DataLoader):
            kind = f"DataLoader of the iterable-style {type(loader.dataset).__name__}"
        raise ConfigurationError(
            f"the training data is a {kind}, from which samples cannot be "
            "drawn at random; pass dataloader=, an iterable that yields the same batches "
            "in the same order on every rank."
        )

    def peek(self) -> Batches | None:
        """Choose one sample of the training data, or the first batch of an iterable."""
        if isinstance(self._dataloader, Iterator):
            return None
        return self.batches(1, 1, 0, True)

    def loss(self, batch: Any, index: int) -> Tensor:
        """Run the training step.

        Args:
            batch: batch of the dataset, on the CPU.
            index: value of ``batch_idx``.

        Returns:
            The loss, or the sum of the losses passed to ``manual_backward``.
        """
        trainer, module = self._trainer, self._module
        drawn = batch if isinstance(batch, UnlabeledBatch) else None
        batch = trainer.precision_plugin.convert_input(
            batch if drawn is None else drawn.batch
        )
        batch = module._on_before_batch_transfer(batch, dataloader_idx=0)
        if trainer.strategy.root_device.type == "cuda":
            # Lightning copies without waiting, but only pinned memory allows that.
            batch = map_tensors(_pin, batch)
        batch = trainer.strategy.batch_to_device(batch, dataloader_idx=0)
        more = is_param_in_hook_signature(self._method, "batch_idx", min_args=2)
        self._backward.clear()
        trainable = [(p, p.requires_grad) for p in module.parameters()]
        try:
            with (
                contextlib.nullcontext()
                if self._autocast_off
                else trainer.precision_plugin.train_step_context()
            ):
                batch = draw_labels(module, batch, drawn, self.predictor)
                result = self._method(batch, *[index] * more)
        finally:
            # Undo toggled optimizers; the graph keeps the weights it was built for.
            for parameter, requires_grad in trainable:
                parameter.requires_grad_(requires_grad)
        origin = f"{type(module).__name__}.{self._method.__name__}"
        if self._backward:
            result = self._backward.loss(origin)
        if isinstance(result, dict):
            result = result.get("loss")
        remedy = "return one, or set loss_method= to a method that does"
        return scalar_loss(result, index, origin, remedy, batch)

    @contextlib.contextmanager
    def session(self, mode: ModelMode) -> Iterator[None]:
        """Isolate the module from the Trainer.

        Args:
            mode: training or evaluation mode of the layers.

        Yields:
            Nothing.
        """
        trainer, module = self._trainer, self._module
        stand_ins = self._stand_ins()
        own = {name: vars(module)[name] for name in stand_ins if name in vars(module)}
        loggers, toggled = trainer.loggers, module._param_requires_grad_state
        with super().session(mode):
            vars(module).update(stand_ins)
            trainer.loggers = [from_package_of(trainer, DummyLogger)() for _ in loggers]
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

    def _stand_ins(self) -> dict[str, Callable[..., Any]]:
        """Return methods that replace those of the module during a session."""
        module, backward = self._module, self._backward
        toggle, untoggle = module.toggle_optimizer, module.untoggle_optimizer
        get_optimizers, get_schedulers = module.optimizers, module.lr_schedulers

        def nothing(*args: Any, **kwargs: Any) -> None:
            return None

        def toggle_optimizer(optimizer: Any) -> None:
            toggle(optimizer)
            backward.toggled = unwrap_optimizer(optimizer)

        def untoggle_optimizer(optimizer: Any) -> None:
            untoggle(optimizer)
            backward.toggled = None

        def optimizers(*args: Any, **kwargs: Any) -> Any:
            return map_each(
                get_optimizers(*args, **kwargs),
                lambda optimizer: IdleOptimizer(optimizer, module, backward),
            )

        def lr_schedulers() -> Any:
            return map_each(get_schedulers(), Idle)

        def all_gather(data: Any, *args: Any, **kwargs: Any) -> Any:
            if self._trainer.world_size == 1:
                return data
            raise PruningError(
                f"{type(module).__name__} calls all_gather while gradients for pruning "
                "are collected, where every rank has a different batch; set loss_method= "
                "to a method that does not"
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


def _pin(tensor: Tensor) -> Tensor:
    return tensor.pin_memory() if tensor.device.type == "cpu" else tensor
