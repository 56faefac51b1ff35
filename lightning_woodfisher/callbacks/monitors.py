"""ModelCheckpoint and EarlyStopping in a training that prunes.

Until the target sparsity is reached, a monitored metric favors networks that are dense or
partly pruned: "best" would be one of them, and EarlyStopping would end training when a
pruning step makes the metric worse. So scores count only from the last pruning step on.
"""

from __future__ import annotations

__all__ = ["MonitorHold", "describe_early_end"]

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, Timer

from lightning_woodfisher.base.lightning_names import callbacks_of, either_name

# Metrics of this package do not favor dense networks.
_OWN_METRICS = "pruning/"


class MonitorHold:
    """Hold the scores of monitoring callbacks until the target sparsity is reached."""

    def __init__(self) -> None:
        self._thresholds: list[tuple[EarlyStopping, float]] = []

    def describe(self, trainer: pl.Trainer) -> str:
        """Name the callbacks that are held.

        Args:
            trainer: the Trainer.

        Returns:
            Their classes and metrics, separated by commas; empty if there are none.
        """
        held: list[ModelCheckpoint | EarlyStopping] = [
            *_checkpoints(trainer),
            *_early_stopping(trainer),
        ]
        return ", ".join(f"{type(c).__name__}(monitor={c.monitor!r})" for c in held)

    def restart_early_stopping(self, trainer: pl.Trainer) -> None:
        """Forget the scores of EarlyStopping; call before each of its checks.

        Args:
            trainer: the Trainer.
        """
        for callback in _early_stopping(trainer):
            callback.wait_count = 0
            callback.best_score = _worst_score(callback.mode)
            if callback.stopping_threshold is not None:
                self._thresholds.append((callback, callback.stopping_threshold))
                callback.stopping_threshold = None

    def release(self, trainer: pl.Trainer) -> None:
        """Let scores count from now on; call after the last pruning step.

        Checkpoints saved so far keep their files until better ones replace them, which any
        later checkpoint is.

        Args:
            trainer: the Trainer.
        """
        self.restart_early_stopping(trainer)
        self.restore_thresholds()
        for callback in _checkpoints(trainer):
            worst = _worst_score(callback.mode)
            callback.best_k_models = dict.fromkeys(callback.best_k_models, worst)
            callback.kth_value = worst
            callback.best_model_score = callback.current_score = None

    def restore_thresholds(self) -> None:
        """Give EarlyStopping its stopping thresholds back."""
        for callback, threshold in self._thresholds:
            callback.stopping_threshold = threshold
        self._thresholds = []


def describe_early_end(trainer: pl.Trainer) -> str:
    """Say why training ended before its last epoch.

    Args:
        trainer: the Trainer, after training.

    Returns:
        The cause, as the end of a sentence; empty if it is not known.
    """
    for callback in callbacks_of(trainer):
        if isinstance(callback, either_name(EarlyStopping)) and callback.stopped_epoch:
            return f"EarlyStopping(monitor={callback.monitor!r}) stopped training"
        if isinstance(callback, either_name(Timer)):
            remaining = callback.time_remaining()
            if remaining is not None and remaining <= 0:
                return "max_time was reached"
    if trainer.received_sigterm:
        return "SIGTERM was received"
    if trainer.interrupted:
        return "training was interrupted"
    return "trainer.should_stop was set" if trainer.should_stop else ""


def _checkpoints(trainer: pl.Trainer) -> list[ModelCheckpoint]:
    return [
        callback
        for callback in callbacks_of(trainer)
        if isinstance(callback, either_name(ModelCheckpoint))
        and callback.monitor is not None
        and not callback.monitor.startswith(_OWN_METRICS)
    ]


def _early_stopping(trainer: pl.Trainer) -> list[EarlyStopping]:
    return [
        callback
        for callback in callbacks_of(trainer)
        if isinstance(callback, either_name(EarlyStopping))
    ]


def _worst_score(mode: str) -> torch.Tensor:
    return torch.tensor(torch.inf if mode == "min" else -torch.inf)
