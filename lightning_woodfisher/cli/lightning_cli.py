"""The LightningCLI of ``fit``, and what other subcommands read with it."""

from __future__ import annotations

__all__ = ["FitReader", "PruningCLI", "load_weights", "read_fit"]

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import lightning.pytorch as pl
from jsonargparse import ActionConfigFile
from lightning.pytorch.cli import (
    LightningArgumentParser,
    LightningCLI,
    SaveConfigCallback,
)
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_woodfisher.base.errors import ConfigurationError
from lightning_woodfisher.base.printable import printable
from lightning_woodfisher.callbacks.woodfisher import WoodFisherPruningCallback
from lightning_woodfisher.cli.messages import condense_error, require_groups
from lightning_woodfisher.export.checkpoint import Checkpoint

# First words of a saved config.
_SAVED = "lightning.pytorch=="


class PruningCLI(LightningCLI):
    """LightningCLI with short error messages that never overwrites a user's config."""

    def __init__(self, **options: Any) -> None:
        options = {"save_config_callback": _SaveConfig, **options}
        super().__init__(save_config_kwargs={"overwrite": True}, **options)

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Return a parser with short messages and ``-c`` as another name of ``--config``."""
        kwargs.setdefault("dump_header", [f"{_SAVED}{pl.__version__}"])
        parser = _Parser(**kwargs)
        parser.add_argument(
            "-c",
            "--config",
            action=ActionConfigFile,
            help="Path to a configuration file in json or yaml format.",
        )
        return parser

    def before_instantiate_classes(self) -> None:
        """Check what jsonargparse does not check before it makes the objects."""
        if self.subcommand is not None:
            require_groups(self.config[self.subcommand])


class _Parser(LightningArgumentParser):
    """A parser whose errors are a few lines, with the nearest valid name."""

    def parse_args(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().parse_args(*args, **kwargs)
        except UnicodeDecodeError as error:
            self.error(
                f"a configuration is not a text file ({error}); --config takes a YAML file, "
                "and --ckpt_path a checkpoint."
            )

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:
            # The parser of one type of a union: another may fit.
            super().error(message, ex)
        text = printable(condense_error(message))
        sys.stderr.write(f"lightning-woodfisher: error: {text}\n")
        self.exit(2)
        raise SystemExit(2)


class _SaveConfig(SaveConfigCallback):
    """Save the config over one that an earlier run saved, but not over a user's file."""

    def setup(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str
    ) -> None:
        folder = trainer.log_dir  # a collective: every rank must ask
        if folder is not None and trainer.is_global_zero:
            path = Path(folder, self.config_filename)
            start = f"# {_SAVED}".encode()
            if path.is_file() and not path.read_bytes().startswith(start):
                self.config_filename = "config.saved.yaml"
                rank_zero_warn(
                    f"{path} was not saved by a run and is left as it is; the "
                    f"configuration of this run is in {path.parent / self.config_filename}."
                )
        super().setup(trainer, pl_module, stage)


class FitReader(PruningCLI):
    """A PruningCLI that parses the options of ``fit`` and runs nothing.

    Of the callbacks it keeps the :class:`WoodFisherPruningCallback`.
    """

    def before_instantiate_classes(self) -> None:
        """Remove other callbacks from the configuration."""
        super().before_instantiate_classes()
        trainer = self.config["fit"]["trainer"]
        given = trainer.get("callbacks") or []
        trainer["callbacks"] = [
            callback
            for callback in (given if isinstance(given, list) else [given])
            if callback["class_path"].rpartition(".")[2]
            == WoodFisherPruningCallback.__name__
        ]

    def instantiate_classes(self) -> None:
        """Leave this to the caller, who may change the configuration first."""

    def _set_seed(self) -> None:
        """Leave the random state unchanged: an estimate or an export needs no seed."""

    def _run_subcommand(self, subcommand: str) -> None: ...

    def make_all(self) -> None:
        """Set the seed; make the model, the data and the Trainer, as ``fit`` does."""
        super()._set_seed()
        super().instantiate_classes()

    def make_model(self) -> Any:
        """Make the model and the pruning callbacks only.

        Returns:
            The objects, by their names in the configuration.
        """
        config = self.config.clone()
        fit = config["fit"]
        if "data" in fit:
            fit["data"] = None
        for name in ("logger", "plugins", "profiler", "strategy", "accelerator"):
            fit["trainer"][name] = None
        return self.parser.instantiate_classes(config)["fit"]


def read_fit(arguments: Sequence[str]) -> FitReader:
    """Parse the options of ``fit`` without making any object.

    Args:
        arguments: the arguments that follow ``fit``.

    Returns:
        The LightningCLI that parsed them; its ``config["fit"]`` may be changed.
    """
    # LightningCLI warns about arguments that differ from those of the process.
    before = sys.argv
    sys.argv = [before[0], "fit", *arguments]
    try:
        return FitReader(save_config_callback=None)
    finally:
        sys.argv = before


def load_weights(module: pl.LightningModule, checkpoint: Checkpoint) -> None:
    """Load the weights of a checkpoint into a module, as Lightning does.

    Args:
        module: a module of the same shapes.
        checkpoint: the checkpoint; its optimizer and position are not used.

    Raises:
        ConfigurationError: if names or shapes differ.
    """
    content: Any = checkpoint.content
    if "state_dict" in content:
        module.on_load_checkpoint(content)
    try:
        module.load_state_dict(checkpoint.state_dict, strict=module.strict_loading)
    except RuntimeError as error:
        raise ConfigurationError(
            f"{checkpoint.path} does not fit the model of the configuration: {error}"
        ) from error
