"""Check a Trainer, a checkpoint and data before training, and format the planned steps."""

from __future__ import annotations

__all__ = [
    "describe_plan",
    "require_enough_batches",
    "require_masks_hold",
    "require_same_selection",
    "require_supported",
    "require_weight_decay",
    "require_writable",
    "training_horizon",
    "training_samples",
]

import math
import os
import tempfile
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import (
    GradientAccumulationScheduler,
    ModelPruning,
    StochasticWeightAveraging,
)
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
)
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch.optim import Optimizer

from lightning_woodfisher.base.errors import ConfigurationError
from lightning_woodfisher.base.lightning_names import (
    callbacks_of,
    either_name,
    has_callback,
)
from lightning_woodfisher.base.text_table import format_table
from lightning_woodfisher.data.batches import Batches, StreamBatches, known_length
from lightning_woodfisher.pruning.schedule import (
    Horizon,
    PlannedStep,
    PruningSchedule,
)
from lightning_woodfisher.weights.masks import Masks

# As much as a report of a large network takes.
_PROBE_BYTES = 2**18


def training_horizon(trainer: pl.Trainer, schedule: PruningSchedule) -> Horizon:
    """Return the number of epochs and of optimizer steps of a training run.

    Args:
        trainer: the Trainer, in ``on_train_start`` or later.
        schedule: its ``unit`` says which of the two numbers is needed.

    Returns:
        The numbers; None where there is no limit or the number is not known.
    """
    epochs, max_steps = _epochs(trainer), trainer.max_steps
    steps: int | None = max_steps if max_steps >= 0 else None
    unit = getattr(schedule, "unit", "step")
    if unit == "epoch":
        within = None if steps is None else _epochs_within(trainer, steps)
        limits = [limit for limit in (epochs, within) if limit is not None]
        return Horizon(min(limits, default=None), steps)
    if not trainer.lightning_module.automatic_optimization:
        # Every step of every optimizer counts.
        return Horizon(
            epochs,
            steps if epochs is None else None,
            "manual optimization may step its optimizers any number of times",
        )
    # Only when needed, because it asks the dataloaders for their length.
    estimate = trainer.estimated_stepping_batches
    if epochs is not None and epochs != trainer.max_epochs:
        estimate = min(estimate, epochs * _steps_of_an_epoch(trainer))
    return Horizon(epochs, int(estimate) if math.isfinite(estimate) else None)


def _epochs(trainer: pl.Trainer) -> int | None:
    """Return the number of epochs; None without a limit."""
    epochs = trainer.max_epochs
    if epochs is None or epochs < 0:
        return None
    for callback in callbacks_of(trainer):
        if isinstance(callback, either_name(StochasticWeightAveraging)):
            # It adds an epoch without optimizer steps, for BatchNorm statistics.
            epochs -= bool(callback._model_contains_batch_norm)
    return epochs


def _steps_of_an_epoch(trainer: pl.Trainer) -> float:
    return math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)


def _epochs_within(trainer: pl.Trainer, steps: int) -> int | None:
    """Return the number of epochs that begin before a number of optimizer steps."""
    batches = trainer.num_training_batches
    reloads = getattr(trainer, "reload_dataloaders_every_n_epochs", 0)
    varies = reloads or has_callback(trainer, GradientAccumulationScheduler)
    known = trainer.lightning_module.automatic_optimization and not varies
    if not known or not math.isfinite(batches) or batches < 1:
        return None
    return math.ceil(steps / _steps_of_an_epoch(trainer))


def training_samples(trainer: pl.Trainer) -> int | None:
    """Return the number of samples of the training data.

    Args:
        trainer: the Trainer, in ``on_train_start`` or later.

    Returns:
        Length of the dataset, or of the dataloader; None if it has none.
    """
    return known_length(trainer.train_dataloader)


def require_enough_batches(batches: Batches, data: Any, num_gradients: int) -> None:
    """Check that a stream of batches is long enough, if its length is known.

    Args:
        batches: batches made from the data.
        data: the dataloader that they come from.
        num_gradients: number of gradients, N.

    Raises:
        ConfigurationError: for fewer than N batches.
    """
    if not isinstance(batches, StreamBatches):
        return
    try:
        length = len(data)
    except TypeError:
        return  # The length is known only after reading the stream.
    if length < num_gradients:
        raise ConfigurationError(
            f"dataloader has {length} batches, but num_gradients={num_gradients} needs "
            "one batch each; lower num_gradients or give more batches."
        )


def require_weight_decay(optimizers: Sequence[Optimizer]) -> None:
    """Check that at least one optimizer has a weight decay to switch off.

    Args:
        optimizers: optimizers of the Trainer.

    Raises:
        ConfigurationError: when no parameter group has a ``weight_decay``.
    """
    kinds = [type(optimizer).__name__ for optimizer in optimizers]
    if not any("weight_decay" in g for o in optimizers for g in o.param_groups):
        raise ConfigurationError(
            "weight_decay_off_after_last_step needs an optimizer with weight_decay in its "
            f"parameter groups, but there is {', '.join(kinds) or 'none'}; remove the setting."
        )


def require_same_selection(
    trainer: pl.Trainer, checkpoint: Mapping[str, Any], callback: pl.Callback
) -> None:
    """Check that a checkpoint has no masks of another selection, which would be dropped.

    Args:
        trainer: the Trainer with all its callbacks.
        checkpoint: checkpoint of the run to resume.
        callback: the pruning callback; its state key ends with its selection.

    Raises:
        ConfigurationError: when only another selection has a state in the checkpoint.
    """
    states = checkpoint.get("callbacks", {})
    if callback.state_key in states:
        return
    kind = type(callback).__qualname__
    taken = {c.state_key for c in callbacks_of(trainer)}
    for key in map(str, states):
        if key.startswith(f"{kind}{{") and key not in taken:
            raise ConfigurationError(
                f"the checkpoint has the masks of a run with {key[len(kind) :]}, but this "
                f"callback selects by {callback.state_key[len(kind) :]}; use the same "
                "selection, or load only the weights and set initial_sparsity."
            )


def describe_plan(
    plan: Sequence[PlannedStep],
    done: Container[PlannedStep],
    masks: Masks,
    goal: str,
) -> str:
    """Format the planned steps of a run.

    Args:
        plan: all steps.
        done: the steps that were done before the checkpoint.
        masks: masks of the selected weights.
        goal: target and criterion.

    Returns:
        A table.
    """
    weights = sum(parameter.numel() for parameter in masks.parameters.values())
    rows = []
    for step in plan:
        kept = weights - round(step.sparsity * weights)
        state = "done" if step in done else ""
        where = f"{step.unit} {step.position}"
        rows.append((where, f"{step.sparsity:.2%}", f"{kept:,}", state))
    head = ("pruning at start of", "sparsity", "weights left", "")
    return (
        f"Pruning {weights:,} weights of {len(masks.parameters)} tensors {goal}:\n"
        f"{format_table(head, rows)}"
    )


def require_supported(trainer: pl.Trainer) -> None:
    """Check that pruning supports the strategy and the callbacks of a Trainer.

    Args:
        trainer: the Trainer.

    Raises:
        ConfigurationError: for an unsupported strategy or callback.
    """
    strategy = trainer.strategy
    known = either_name(DDPStrategy, SingleDeviceStrategy, ModelParallelStrategy)
    unknown = either_name(DeepSpeedStrategy)  # It is a DDPStrategy.
    if not isinstance(strategy, known) or isinstance(strategy, unknown):
        raise ConfigurationError(
            f"strategy {type(strategy).__name__} shards or moves the parameters in a way "
            "that pruning does not support; use a single device or 'ddp', or for sharded "
            "parameters ModelParallelStrategy with fully_shard (FSDP2)."
        )
    if has_callback(trainer, ModelPruning):
        raise ConfigurationError(
            "Lightning's ModelPruning replaces weights by parameters with other names during "
            "training, so it cannot be combined with this callback; remove it. "
            "criterion='magnitude' prunes by magnitude as well."
        )
    # "popen" starts the whole script again, so that every process has its callbacks.
    method = getattr(strategy, "_start_method", "popen")
    if isinstance(strategy, either_name(DDPStrategy)) and method != "popen":
        rank_zero_info(
            f"Training runs in processes that are started by {method!r}. After fit the "
            "weights are back in this process, but reports, masks and removed channels "
            "are not: read them from report_path or from a checkpoint, with "
            "lightning-woodfisher report and load_shrunk."
        )


def require_masks_hold(masks: Masks) -> None:
    """Check that every weight that the masks of a checkpoint mark as pruned is zero.

    Args:
        masks: masks with the weights.

    Raises:
        ConfigurationError: if some are not, with their number by parameter.
    """
    violations = masks.violations()
    if violations:
        raise ConfigurationError(
            "the checkpoint's weights and masks disagree: weights that its masks mark as "
            f"pruned are not zero, by parameter: {violations}. Was it edited, or saved "
            "from averaged weights?"
        )


def require_writable(name: str, path: str | os.PathLike[str] | None) -> None:
    """Check that a file can be written, and leave nothing but missing folders behind.

    Args:
        name: name of the setting.
        path: path of the file; None if none is to be written.

    Raises:
        ConfigurationError: if it is a folder, or its folder is read-only or full.
    """
    if path is None:
        return
    path = Path(path)
    if path.is_dir():
        raise ConfigurationError(
            f"{name}={str(path)!r} is a folder; give the path of a file in it."
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent) as probe:
            probe.write(bytes(_PROBE_BYTES))
            probe.flush()
    except OSError as error:
        raise ConfigurationError(
            f"{name}={str(path)!r} cannot be written ({error.strerror}); give the path of a "
            "file in a folder that can be written and has space left."
        ) from error
