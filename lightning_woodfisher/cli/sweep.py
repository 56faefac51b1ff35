"""``lightning-woodfisher sweep``: try one-shot settings on a checkpoint."""

from __future__ import annotations

__all__ = ["make_parser", "run_sweep_command"]

import argparse
import functools
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import lightning.pytorch as pl
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn

from lightning_woodfisher.base.errors import ConfigurationError
from lightning_woodfisher.base.lightning_names import callbacks_of
from lightning_woodfisher.callbacks.checks import require_writable
from lightning_woodfisher.callbacks.progress import terminal_bar
from lightning_woodfisher.callbacks.training_step import TrainingStepLoss
from lightning_woodfisher.callbacks.woodfisher import WoodFisherPruningCallback
from lightning_woodfisher.cli.arguments import SubcommandParser, block_size
from lightning_woodfisher.cli.lightning_cli import load_weights, read_fit
from lightning_woodfisher.criteria import CRITERIA
from lightning_woodfisher.criteria.obs import Update
from lightning_woodfisher.export.checkpoint import read_checkpoint
from lightning_woodfisher.pruning.config import Scope
from lightning_woodfisher.reporting.figures import draw_sweep, has_matplotlib
from lightning_woodfisher.sweeps.report import TARGET, SweepReport
from lightning_woodfisher.sweeps.sweep import expand_grid, run_sweep

_EXAMPLE = """\
example, with the run.yaml that `fit` takes:

  lightning-woodfisher sweep --config run.yaml --ckpt_path best.ckpt \\
      --target_sparsity 0.5 0.9 --damping 1e-5 1e-4 1e-3 --num_gradients 256 1000 \\
      --metric val_acc

Every combination is tried on the weights of the checkpoint, which is not changed. Other
settings are those of the WoodFisherPruningCallback in the configuration, or the defaults
if it has none. Nothing is trained.
"""
_DEFAULT_DAMPINGS = [1e-5, 1e-4, 1e-3]
# The settings to try, as options with one or more values.
_SWEPT: Mapping[str, Mapping[str, Any]] = {
    TARGET: {"type": float, "help": "share of zeros, such as 0.5 0.9"},
    "criterion": {
        "choices": list(CRITERIA),
        "help": f"how weights are ranked: {' '.join(CRITERIA)}",
    },
    "update": {
        "choices": get_args(Update),
        "help": f"how the remaining weights change: {' '.join(get_args(Update))}",
    },
    "damping": {"type": float, "help": "λ on the diagonal, such as 1e-5 1e-4"},
    "num_gradients": {"type": int, "help": "N, number of gradients"},
    "gradient_batch_size": {"type": int, "help": "m, samples per gradient"},
    "block_size": {"type": block_size, "help": "B, or none for one block"},
    "recompute_steps": {"type": int, "help": "number of stages of the step"},
    "scope": {
        "choices": get_args(Scope),
        "help": f"weights compete over all layers or in each: {' '.join(get_args(Scope))}",
    },
}
# Settings of a Trainer that neither trains nor writes files nor fills the terminal.
_QUIET: Mapping[str, Any] = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
    "min_epochs": None,
    "min_steps": None,
    "max_epochs": 1,
    "max_steps": -1,
}


def run_sweep_command(options: argparse.Namespace) -> int:
    """Run the sweep, print the table, and write the JSON file and the figure.

    Args:
        options: parsed by :func:`make_parser`, with ``fit_arguments``.

    Returns:
        Exit status: 0, or 1 if every setting failed.

    Raises:
        ConfigurationError: for options or a model with which no sweep is possible.
    """
    output = Path(options.output)
    if output.suffix != ".json":
        raise ConfigurationError(
            f"--output {options.output} must end in .json; the figure is written beside it."
        )
    require_writable("--output", output)
    run = read_fit(options.fit_arguments)
    for name, value in _QUIET.items():
        run.config["fit"]["trainer"][name] = value
    run.make_all()
    if not is_overridden("validation_step", run.model):
        raise ConfigurationError(
            f"{type(run.model).__name__} has no validation_step, whose metrics are needed "
            "to compare settings."
        )
    callback = _take_callback(run.trainer)
    options.ckpt_path = options.ckpt_path or run.config["fit"].get("ckpt_path")
    trial = _TrySettings(options, callback)
    callbacks_of(run.trainer).append(trial)
    run.trainer.fit(run.model, datamodule=run.datamodule)
    report = trial.report
    if report is None:
        raise ConfigurationError(
            "the Trainer stopped before training, so no setting was tried."
        )
    if run.trainer.is_global_zero:
        larger = {"max": True, "min": False}.get(options.mode)
        sys.stdout.write(report.to_table(options.metric, larger) + "\n")
        _save(report, output, options.metric)
    return int(all(result.error is not None for result in report.results))


def _take_callback(trainer: pl.Trainer) -> WoodFisherPruningCallback:
    """Remove the pruning callback from the Trainer and return it."""
    callbacks = callbacks_of(trainer)
    ours = [c for c in callbacks if isinstance(c, WoodFisherPruningCallback)]
    for callback in ours:
        callbacks.remove(callback)
    if len(ours) > 1:
        raise ConfigurationError(
            f"the configuration has {len(ours)} pruning callbacks; a sweep tries the "
            "settings of one."
        )
    return ours[0] if ours else WoodFisherPruningCallback()


class _TrySettings(pl.Callback):
    """Run the sweep at the start of training, when a training step can be computed.

    Args:
        options: options of the command.
        callback: the callback with the settings that are not swept.
    """

    def __init__(
        self, options: argparse.Namespace, callback: WoodFisherPruningCallback
    ) -> None:
        self.report: SweepReport | None = None
        self._options = options
        self._callback = callback

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        strategy = trainer.strategy
        if not isinstance(strategy, SingleDeviceStrategy | DDPStrategy):
            raise ConfigurationError(
                f"sweep runs on a single device or with 'ddp', not with "
                f"{type(strategy).__name__}."
            )
        if self._options.ckpt_path is not None:
            load_weights(pl_module, read_checkpoint(self._options.ckpt_path))

    def on_train_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule
    ) -> None:
        options, callback = self._options, self._callback
        grid = {name: given for name in _SWEPT if (given := getattr(options, name))}
        if not set(grid) - {TARGET}:
            grid["damping"] = _DEFAULT_DAMPINGS
        settings = expand_grid(grid, callback.config, callback.target_sparsity)
        source = TrainingStepLoss(
            trainer, pl_module, callback.loss_method, callback.dataloader
        )
        evaluate = functools.partial(_validate, trainer, options.metric)
        bar = terminal_bar if trainer.is_global_zero else None
        self.report = run_sweep(source, evaluate, settings, options.row_memory, bar)
        trainer.should_stop = True


def _validate(
    trainer: pl.Trainer, metric: str | None, model: nn.Module
) -> dict[str, float]:
    """Run the validation loop and return the metrics that it logs."""
    trainer.validating = True
    try:
        trainer.fit_loop.epoch_loop.val_loop.run()
    finally:
        trainer.training = True
    found = {name: float(value) for name, value in trainer.callback_metrics.items()}
    if not found:
        raise ConfigurationError(
            f"{type(model).__name__} logs no metric in validation, so settings cannot be "
            "compared; call self.log in validation_step, and check that there is "
            "validation data."
        )
    # Reports a wrong name after the first evaluation, not after the last.
    SweepReport(found, (), 0).choose_metric(metric)
    return found


def _save(report: SweepReport, output: Path, metric: str | None) -> None:
    output.write_text(json.dumps(report.to_dict(), indent=1))
    written = [str(output)]
    if has_matplotlib():
        picture = output.with_suffix(".png")
        draw_sweep(report, metric).savefig(picture, dpi=150)
        written.append(str(picture))
    else:
        written.append("no figure, because matplotlib is not installed")
    sys.stdout.write(f"Written: {', '.join(written)}.\n")


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the subcommand."""
    parser = SubcommandParser(
        "sweep",
        "Find good one-shot pruning settings: every combination of the values below is "
        "tried on a trained network and compared by its validation loop. Without values, "
        "three dampings are tried. All options of `fit` are accepted as well, such as "
        "--config run.yaml or --trainer.limit_val_batches 50.",
        _EXAMPLE,
    )
    # `fit` has an option of this name, but it also reads the state of the optimizer.
    parser.add_argument(
        "--ckpt_path",
        metavar="FILE",
        help="file with the weights to prune; it is only read",
    )
    swept = parser.add_argument_group("settings to try, each with one or more values")
    for name, options in _SWEPT.items():
        swept.add_argument(f"--{name}", nargs="+", metavar="VALUE", **options)
    add = parser.add_argument_group("results").add_argument
    add("--metric", help="a validation metric, such as val_acc (default: the first)")
    add(
        "--mode",
        choices=["min", "max"],
        help="whether a smaller or larger metric is better (default: min for names such as "
        "loss or err, otherwise max)",
    )
    add(
        "--output",
        metavar="FILE",
        default="sweep.json",
        help="file for the results (default: sweep.json); the figure is saved beside it",
    )
    add(
        "--row_memory",
        help="memory for stored gradients, such as 8GB; beyond it a temporary file is used "
        "(default: a quarter of the free memory)",
    )
    return parser
