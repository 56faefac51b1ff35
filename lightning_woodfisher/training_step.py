"""Losses from a LightningModule's ``training_step``, without disturbing the fit loop."""

from __future__ import annotations

__all__ = ["TrainingStepLoss"]

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lightning_woodfisher.batches import Batches, DatasetBatches, StreamBatches
from lightning_woodfisher.errors import ConfigurationError, PruningError
from lightning_woodfisher.isolation import ModelMode
from lightning_woodfisher.losses import LossSource


class TrainingStepLoss(LossSource):
    """Runs ``training_step`` (or a method of the user's choice) on own batches.

    Batches come from the training dataset and the loader's ``collate_fn``, never from the
    iterator of the fit loop. The module is called directly, not through the strategy's
    wrapper, under the Trainer's precision. Logging, optimizers, schedulers and loggers
    are replaced by stand-ins that do nothing.

    Args:
        trainer: the Trainer in the middle of fit.
        module: its LightningModule.
        loss_method: name of a method ``(batch, batch_idx) -> loss`` to call instead of
            ``training_step``.
        dataloader: where batches come from; None for the training dataloader.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        loss_method: str | None = None,
        dataloader: Iterable[Any] | None = None,
    ) -> None:
        super().__init__(module)
        self._trainer = trainer
        self._module = module
        self._dataloader = dataloader
        self._method: Callable[..., Any] = getattr(
            module, loss_method or "training_step"
        )
        self._captured: list[Tensor] = []
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None and scaler.is_enabled():
            self.loss_scale = float(scaler.get_scale())

    def batches(self, count: int, size: int, seed: int) -> Batches:
        """Choose mini-batches of the training data.

        Args:
            count: N.
            size: m.
            seed: of the choice.

        Returns:
            The batches.

        Raises:
            ConfigurationError: for data that cannot be sampled, with what to pass.
        """
        given = self._dataloader
        loader = self._trainer.train_dataloader if given is None else given
        if isinstance(loader, DataLoader):
            dataset: Dataset[Any] = loader.dataset
            if not isinstance(dataset, IterableDataset):
                if loader.batch_sampler is None:
                    # Automatic batching is off: every item is a batch.
                    collate = loader.collate_fn
                    return DatasetBatches(
                        dataset,
                        count,
                        1,
                        seed,
                        lambda items: collate(items[0]),
                        regroupable=False,
                    )
                return DatasetBatches(dataset, count, size, seed, loader.collate_fn)
        if given is not None:
            return StreamBatches(given, count)
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

        Raises:
            PruningError: when the step returns no scalar loss.
        """
        trainer, module = self._trainer, self._module
        batch = trainer.precision_plugin.convert_input(batch)
        batch = module._on_before_batch_transfer(batch, dataloader_idx=0)
        batch = trainer.strategy.batch_to_device(batch, dataloader_idx=0)
        arguments = [batch]
        if is_param_in_hook_signature(self._method, "batch_idx", min_args=2):
            arguments.append(index)
        self._captured.clear()
        with trainer.precision_plugin.train_step_context():
            result = self._method(*arguments)
        if self._captured:
            result = sum(self._captured[1:], self._captured[0])
        if isinstance(result, dict):
            result = result.get("loss")
        if not isinstance(result, Tensor) or result.numel() != 1:
            raise PruningError(
                f"{type(module).__name__}.{self._method.__name__} returned "
                f"{_describe(result)} for gradient {index}, not a scalar loss; return one, "
                "or name a method that does with loss_method="
            )
        return result.reshape(())

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
        loggers = trainer.loggers
        with super().session(mode):
            vars(module).update(stand_ins)
            trainer.loggers = [DummyLogger() for _ in loggers]
            try:
                yield
            finally:
                trainer.loggers = loggers
                for name in stand_ins:
                    vars(module).pop(name, None)
                vars(module).update(own)
                self._captured.clear()

    def _stand_ins(self) -> dict[str, Callable[..., Any]]:
        """Methods that shadow those of the module for the time of a session."""

        def nothing(*args: Any, **kwargs: Any) -> None:
            return None

        def capture(loss: Tensor, *args: Any, **kwargs: Any) -> None:
            self._captured.append(loss)

        names = ("log", "log_dict", "print", "clip_gradients", "lr_schedulers")
        toggles = ("toggle_optimizer", "untoggle_optimizer", "lr_scheduler_step")
        stand_ins: dict[str, Callable[..., Any]] = dict.fromkeys(
            names + toggles, nothing
        )
        if not self._module.automatic_optimization:
            optimizers = [_IdleOptimizer(o) for o in self._trainer.optimizers]
            handed_out = optimizers if len(optimizers) != 1 else optimizers[0]
            stand_ins["manual_backward"] = capture
            stand_ins["optimizers"] = lambda *_, **__: handed_out
            schedulers = [_IdleScheduler() for _ in self._trainer.lr_scheduler_configs]
            given = schedulers if len(schedulers) != 1 else schedulers[0]
            stand_ins["lr_schedulers"] = lambda: given or None
        return stand_ins


class _IdleOptimizer:
    """What ``self.optimizers()`` hands out in a session: reads as usual, never steps."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._optimizer, name)

    def step(self, closure: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
        return closure() if closure is not None else None

    def zero_grad(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing."""

    @contextlib.contextmanager
    def toggle_model(self, sync_grad: bool = True) -> Iterator[None]:
        yield


class _IdleScheduler:
    """What ``self.lr_schedulers()`` hands out in a session."""

    def step(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing."""


def _describe(value: Any) -> str:
    if isinstance(value, DataLoader):
        return f"DataLoader of the iterable-style {type(value.dataset).__name__}"
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return type(value).__name__
