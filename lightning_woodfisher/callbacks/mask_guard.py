"""What is pruned stays at zero through optimizer steps, averages and checkpoints."""

from __future__ import annotations

__all__ = ["MaskGuard"]

from typing import Any

import lightning.pytorch as pl
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_woodfisher.callbacks.averaging import mask_averages
from lightning_woodfisher.weights.masks import Masks


class MaskGuard(pl.Callback):
    """Holds the masks of a training, whoever makes them and lets them grow.

    Attributes:
        masks: of the selected parameters; None before there are any.
    """

    def __init__(self) -> None:
        self.masks: Masks | None = None
        self._handles: list[RemovableHandle] = []

    def __getstate__(self) -> dict[str, Any]:
        # A copy that is made in the middle of training guards nothing yet.
        return {**vars(self), "_handles": []}

    def on_before_optimizer_step(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        optimizer: Optimizer,
    ) -> None:
        """Keep pruned weights out of the clipping norm and of momentum.

        Args:
            trainer: the Trainer.
            pl_module: its module.
            optimizer: about to step.
        """
        self._get_masks().apply_to_gradients()

    def on_validation_epoch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule
    ) -> None:
        """Keep averaged weights that are validated at zero where they are pruned.

        Args:
            trainer: the Trainer.
            pl_module: its module.
        """
        self._mask_all(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let go of the optimizers; keep an average that becomes the result pruned.

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
        """Let go of the optimizers.

        Args:
            trainer: the Trainer.
            pl_module: its module.
            exception: what happened.
        """
        self._remove_hooks()

    def on_save_checkpoint(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        checkpoint: dict[str, Any],
    ) -> None:
        """Keep averaged weights that are saved at zero where they are pruned.

        Args:
            trainer: the Trainer.
            pl_module: its module.
            checkpoint: holds the tensors of the average, or will.
        """
        self._mask_all(trainer)

    def _guard(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Keep what is pruned at zero through every optimizer step."""
        # Asked for each time: a checkpoint that is loaded meanwhile brings new ones.
        for optimizer in trainer.optimizers:
            post = optimizer.register_step_post_hook(
                lambda *_: self._get_masks().apply()
            )
            self._handles.append(post)
            if not module.automatic_optimization:
                # on_before_optimizer_step may be passed by.
                pre = optimizer.register_step_pre_hook(
                    lambda *_: self._get_masks().apply_to_gradients()
                )
                self._handles.append(pre)

    def _remove_hooks(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _mask_all(self, trainer: pl.Trainer) -> None:
        """Mask averages; and the weights, into which one may have been copied."""
        if trainer.state.fn != "fit" or self.masks is None:
            return
        if mask_averages(trainer, self.masks):
            self.masks.apply()

    def _get_masks(self) -> Masks:
        if self.masks is None:
            raise RuntimeError("masks exist from on_fit_start on")
        return self.masks
