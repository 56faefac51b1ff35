"""``lightning-woodfisher estimate``: what the steps of a run cost, without running it."""

from __future__ import annotations

__all__ = ["command_line", "make_parser", "read_run", "run_estimate"]

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch.cli import LightningCLI
from torch import nn

from lightning_woodfisher.base.errors import ConfigurationError, nearest
from lightning_woodfisher.callbacks.woodfisher import WoodFisherPruningCallback
from lightning_woodfisher.fisher.config import FisherConfig
from lightning_woodfisher.pruning.schedule import Horizon
from lightning_woodfisher.resources.estimate import ResourceEstimate, estimate
from lightning_woodfisher.resources.network_shapes import SHAPES

_EXAMPLE = """\
examples:

  lightning-woodfisher estimate --config run.yaml --devices 8 --memory 80GB
  lightning-woodfisher estimate --preset resnet50 --num_gradients 160 --block_size 2000

Exit status 1 says that the step does not fit into the memory that was given.
"""
# What a Trainer does that is told neither epochs nor steps.
_DEFAULT_EPOCHS = 1000
_GEMM_SIZE = 1024
_GEMM_SECONDS = 0.2


@dataclass(frozen=True)
class Run:
    """What an estimate needs to know of a run.

    Attributes:
        network: the module, on the meta device where it allows that, or shapes.
        callback: the pruning callback, with its settings.
        world_size: number of ranks.
        levels: sparsities before a step: the first and the last one.
        sharded: whether the strategy shards parameters.
    """

    network: nn.Module | Mapping[str, tuple[int, ...]]
    callback: WoodFisherPruningCallback
    world_size: int
    levels: tuple[float, ...]
    sharded: bool = False


def run_estimate(arguments: Sequence[str], cli: type[LightningCLI]) -> int:
    """Print the estimate.

    Args:
        arguments: of the subcommand; those that are not its own are read as ``fit`` does.
        cli: reads the configuration.

    Returns:
        Exit status: 0, or 1 when the step does not fit into the memory that was given.

    Raises:
        ConfigurationError: for settings that cannot be.
    """
    options, rest = make_parser().parse_known_args(arguments)
    if options.preset is not None:
        if rest:
            raise ConfigurationError(
                f"{' '.join(rest)} means nothing with --preset; its settings are "
                "--num_gradients, --gradient_batch_size, --block_size and --sparsity."
            )
        run = _read_preset(options)
    else:
        run = read_run(rest, cli, options.devices, options.num_nodes)
    rate = options.flops_per_second
    if rate is None:
        rate = _measure_flops_per_second()
    settings = run.callback.config
    levels = run.levels if options.sparsity is None else (options.sparsity,)
    costs = [
        estimate(
            run.network,
            fisher=settings.fisher,
            selection=settings.selection,
            criterion=settings.criterion,
            step=settings.step,
            sparsity=level,
            world_size=run.world_size,
            memory=options.memory or settings.fisher.memory_budget,
            flops_per_second=rate,
            bytes_per_second=options.bytes_per_second,
            seconds_per_gradient=options.seconds_per_gradient,
            sharded=options.sharded or run.sharded,
        )
        for level in levels
    ]
    sys.stdout.write(_write(costs, settings.step.recompute_steps, rate, options.json))
    return int(any(cost.fits is False for cost in costs))


def read_run(
    arguments: Sequence[str],
    cli: type[LightningCLI],
    devices: int | None = None,
    num_nodes: int | None = None,
) -> Run:
    """Read a configuration as ``fit`` does, and make nothing but the model and callback.

    Args:
        arguments: of ``fit``.
        cli: its command line.
        devices: of a node, in place of the configured ones.
        num_nodes: in place of the configured ones.

    Returns:
        What an estimate needs.

    Raises:
        ConfigurationError: when the configuration has no pruning callback.
    """

    class Reader(cli):  # type: ignore[valid-type, misc]
        """Parses; the rest is left out."""

        def instantiate_classes(self) -> None:
            self.made = _make(self.parser, self.config)

        def _run_subcommand(self, subcommand: str) -> None: ...

        def _set_seed(self) -> None: ...

    with command_line(["fit", *arguments]):
        reader = Reader()
    config, made = reader.config["fit"], reader.made["fit"]
    callbacks = made["trainer"]["callbacks"]
    if not callbacks:
        raise ConfigurationError(
            "the configuration has no WoodFisherPruningCallback in trainer.callbacks, so "
            "there is nothing to estimate."
        )
    callback, trainer = callbacks[0], config["trainer"]
    epochs, steps = trainer.get("max_epochs"), trainer.get("max_steps", -1)
    if epochs is None and steps == -1:
        epochs = _DEFAULT_EPOCHS
    horizon = Horizon(
        epochs if epochs is not None and epochs >= 0 else None,
        steps if steps >= 0 else None,
    )
    plan = callback.schedule.plan(callback.target_sparsity, horizon)
    levels = [0.0, *(step.sparsity for step in plan)][:-1][-1:] if plan else []
    return Run(
        network=made["model"],
        callback=callback,
        world_size=_count_devices(devices or trainer.get("devices", "auto"), trainer)
        * int(num_nodes or trainer.get("num_nodes") or 1),
        levels=tuple(dict.fromkeys([0.0, *levels])),
        sharded=_is_sharding(trainer.get("strategy")),
    )


@contextlib.contextmanager
def command_line(arguments: Sequence[str]) -> Iterator[None]:
    """Stand in for ``sys.argv``: LightningCLI warns when it is given arguments beside it.

    Args:
        arguments: without the name of the program.

    Yields:
        Nothing.
    """
    before = sys.argv
    sys.argv = [before[0], *arguments]
    try:
        yield
    finally:
        sys.argv = before


def _make(parser: Any, config: Any) -> Any:
    """Make the model and the pruning callbacks of a parsed configuration."""
    config = config.clone()
    fit = config["fit"]
    if "data" in fit:
        fit["data"] = None
    given = fit["trainer"].get("callbacks") or []
    callbacks = given if isinstance(given, list) else [given]
    ours = WoodFisherPruningCallback.__name__
    for name in list(vars(fit["trainer"])):
        # The Trainer is not made: neither are its loggers, plugins and profilers.
        if name in {"logger", "plugins", "profiler"}:
            fit["trainer"][name] = None
    fit["trainer"]["callbacks"] = [
        callback
        for callback in callbacks
        if callback["class_path"].rpartition(".")[2] == ours
    ]

    def instantiate() -> Any:
        return parser.instantiate_classes(config.clone())

    try:
        # Not every model can be made without memory: some read weights, or compute.
        with torch.device("meta"):
            return instantiate()
    except Exception:
        # jsonargparse wraps what a constructor raises; what is wrong in earnest is
        # raised again.
        return instantiate()


def _count_devices(devices: Any, trainer: Any) -> int:
    """Give the number of devices that a Trainer would use."""
    if isinstance(devices, str) and devices.lstrip("-").isdigit():
        devices = int(devices)
    if isinstance(devices, str) and devices != "auto":
        return len([part for part in devices.split(",") if part])
    if isinstance(devices, list):
        return len(devices)
    if devices in {"auto", -1}:
        on_cpu = trainer.get("accelerator") == "cpu"
        return 1 if on_cpu else max(1, torch.cuda.device_count())
    return int(devices)


def _is_sharding(strategy: Any) -> bool:
    """Whether a configured strategy is ModelParallelStrategy, by name or as an object."""
    if hasattr(strategy, "class_path"):
        strategy = strategy.class_path
    names = (str(strategy), type(strategy).__name__)
    return any(name.endswith("ModelParallelStrategy") for name in names)


def _read_preset(options: argparse.Namespace) -> Run:
    if options.preset not in SHAPES:
        raise ConfigurationError(
            f"--preset {options.preset} is unknown; use one of {', '.join(SHAPES)}."
            f"{nearest(options.preset, SHAPES)}"
        )
    block = options.block_size
    fisher = FisherConfig(
        num_gradients=options.num_gradients,
        gradient_batch_size=options.gradient_batch_size,
        block_size=None if block in {"none", "None", "null"} else int(block),
    )
    return Run(
        network=SHAPES[options.preset],
        callback=WoodFisherPruningCallback(fisher=fisher),
        world_size=(options.devices or 1) * (options.num_nodes or 1),
        levels=(0.0,),
    )


def _write(
    costs: Sequence[ResourceEstimate], parts: int, rate: float, as_json: bool
) -> str:
    if as_json:
        return json.dumps([cost.to_dict() for cost in costs], indent=1) + "\n"
    text = "\n\n".join(cost.to_table() for cost in costs)
    if parts > 1:
        text += f"\n\nrecompute_steps={parts}: a step has that many parts like these."
    return (
        f"{text}\n\nSeconds at {rate / 1e9:.3g} Gflop/s. The network's own activations, "
        "gradients and optimizer are not counted.\n"
    )


def _measure_flops_per_second() -> float:
    """Time matrix products in float32 for a moment."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    matrix = torch.randn(_GEMM_SIZE, _GEMM_SIZE, device=device)
    wait: Callable[[], None] = (
        torch.cuda.synchronize if device == "cuda" else lambda: None
    )
    float((matrix @ matrix).sum())
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < _GEMM_SECONDS:
        product = matrix @ matrix
        wait()
        count += 1
    del product
    return count * 2 * _GEMM_SIZE**3 / (time.perf_counter() - start)


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of the subcommand.

    Returns:
        It.
    """
    parser = argparse.ArgumentParser(
        prog="lightning-woodfisher estimate",
        description="What the pruning steps of a run cost each rank; nothing is run. "
        "Other arguments are those of `fit`, such as --config run.yaml.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--devices", type=int, help="devices of a node, in place of the configured")
    add("--num_nodes", type=int, help="nodes, in place of the configured")
    add(
        "--sharded",
        action="store_true",
        help="parameters are sharded over the ranks (FSDP2); with --config, the "
        "strategy says so",
    )
    add("--memory", help="of a device for the step, such as 80GB or 24GiB")
    add("--sparsity", type=float, help="before the step, in place of the scheduled")
    add("--flops_per_second", type=float, help="of a rank; measured here if left out")
    add("--bytes_per_second", type=float, help="that a rank can send")
    add("--seconds_per_gradient", type=float, help="of one mini-batch")
    add("--json", action="store_true", help="write JSON")
    add("--preset", help=f"shapes in place of a model: {', '.join(SHAPES)}")
    add("--num_gradients", type=int, default=256, help="N, with --preset")
    add("--gradient_batch_size", type=int, default=16, help="m, with --preset")
    add("--block_size", default="256", help="B or none, with --preset")
    return parser
