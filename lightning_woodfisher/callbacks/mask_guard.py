"""Hooks that keep pruned weights zero in optimizer steps, averages and checkpoints."""

from __future__ import annotations

__all__ = ["MaskGuard"]

from typing import Any

import lightning.pytorch as pl
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_woodfisher.base.errors import ConfigurationError
from lightning_woodfisher.callbacks.averaging import mask_averages
from lightning_woodfisher.weights.masks import Masks


class MaskGuard(pl.Callback):
    """Apply masks during training.

    Attributes:
        masks: masks of the selected parameters; None before fit.
    """

    def __init__(self) -> None:
        self.masks: Masks | None = None
        self._handles: list[RemovableHandle] = []

    def __getstate__(self) -> dict[str, Any]:
        # A copy made during training has no hooks in the optimizers.
        return {**vars(self), "_handles": []}

    def on_before_optimizer_step(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        optimizer: Optimizer,
    ) -> None:
        """Zero the gradients of pruned weights, for gradient clipping and momentum.

        Args:
            trainer: the Trainer.
            pl_module: its module.
            optimizer: the optimizer that steps next.
        """
        self._get_masks().apply_to_gradients()

    def on_validation_epoch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule
    ) -> None:
        """Apply the masks to averaged weights before they are validated.

        Args:
            trainer: the Trainer.
            pl_module: its module.
        """
        self._mask_all(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remove the optimizer hooks, and apply the masks to averaged weights.

        Args:
            trainer: the Trainer.
            pl_module: its module.
        """
        self._remove_hooks()
        self._mask_all(trainer)

    def on_exception(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        exception: BaseException,
    ) -> None:
        """Remove the optimizer hooks.

        Args:
            trainer: the Trainer.
            pl_module: its module.
            exception: the exception that ends training.
        """
        self._remove_hooks()

    def on_save_checkpoint(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        checkpoint: dict[str, Any],
    ) -> None:
        """Apply the masks to averaged weights before they are saved.

        Args:
            trainer: the Trainer.
            pl_module: its module.
            checkpoint: the checkpoint, which shares its tensors with the average.
        """
        self._mask_all(trainer)

    def _register_hooks(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Register hooks that apply the masks around every optimizer step."""
        # The hooks look the masks up, because loading a checkpoint replaces them.
        for optimizer in trainer.optimizers:
            if not hasattr(optimizer, "register_step_post_hook"):
                raise ConfigurationError(
                    f"{type(optimizer).__name__} has no step hooks, which keep pruned weights "
                    "zero; derive it from torch.optim.Optimizer."
                )
            post = optimizer.register_step_post_hook(
                lambda *_: self._get_masks().apply()
            )
            self._handles.append(post)
            if not module.automatic_optimization:
                # on_before_optimizer_step is not called for a bare optimizer.
                pre = optimizer.register_step_pre_hook(
                    lambda *_: self._get_masks().apply_to_gradients()
                )
                self._handles.append(pre)

    def _remove_hooks(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _mask_all(self, trainer: pl.Trainer) -> None:
        """Apply the masks to averages, and to the weights if there are averages."""
        if trainer.state.fn != "fit" or self.masks is None:
            return
        if mask_averages(trainer, self.masks):
            self.masks.apply()

    def _get_masks(self) -> Masks:
        if self.masks is None:
            raise RuntimeError("masks exist from on_fit_start on")
        return self.masks
