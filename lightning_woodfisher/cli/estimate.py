"""``lightning-woodfisher estimate``: the cost of a run's pruning steps, before the run."""

from __future__ import annotations

__all__ = ["make_parser", "read_run", "run_estimate"]

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lightning_woodfisher.base.errors import ConfigurationError
from lightning_woodfisher.benchmark.inverse import measure_gemm_rate
from lightning_woodfisher.callbacks.woodfisher import WoodFisherPruningCallback
from lightning_woodfisher.cli.arguments import SubcommandParser, block_size
from lightning_woodfisher.cli.lightning_cli import read_fit
from lightning_woodfisher.fisher.config import FisherConfig
from lightning_woodfisher.pruning.schedule import Horizon
from lightning_woodfisher.resources.estimate import ResourceEstimate, estimate
from lightning_woodfisher.resources.network_shapes import SHAPES

_EXAMPLE = """\
examples:

  lightning-woodfisher estimate --config run.yaml --devices 8 --memory 80GB
  lightning-woodfisher estimate --preset resnet50 --num_gradients 160 --block_size 2000

The exit status is 1 if the step does not fit into the given memory.
"""
# Epochs of a Trainer that is given neither max_epochs nor max_steps.
_DEFAULT_EPOCHS = 1000
_GEMM_SIZE = 1024


@dataclass(frozen=True)
class Run:
    """The properties of a run on which an estimate depends.

    Attributes:
        network: the module, on the meta device if possible, or shapes.
        callback: the pruning callback, with its settings.
        world_size: number of ranks.
        sparsities: sparsities before the first and before the last step.
        sharded: whether the strategy shards parameters.
    """

    network: nn.Module | Mapping[str, tuple[int, ...]]
    callback: WoodFisherPruningCallback
    world_size: int
    sparsities: tuple[float, ...]
    sharded: bool = False


def run_estimate(options: argparse.Namespace) -> int:
    """Print the estimate.

    Args:
        options: parsed by :func:`make_parser`, with ``fit_arguments``.

    Returns:
        Exit status: 0, or 1 if the step does not fit into the given memory.

    Raises:
        ConfigurationError: if a preset is combined with arguments of ``fit``.
    """
    rest = options.fit_arguments
    if options.preset is None:
        run = read_run(rest, options.devices, options.num_nodes)
    elif rest:
        raise ConfigurationError(
            f"{' '.join(rest)} has no effect with --preset; its settings are "
            "--num_gradients, --gradient_batch_size, --block_size and --sparsity."
        )
    else:
        run = _read_preset(options)
    rate = options.flops_per_second
    if rate is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        rate = measure_gemm_rate(device, _GEMM_SIZE)
    settings = run.callback.config
    sparsities = run.sparsities if options.sparsity is None else (options.sparsity,)
    costs = [
        estimate(
            run.network,
            fisher=settings.fisher,
            selection=settings.selection,
            criterion=settings.criterion,
            step=settings.step,
            layerwise=settings.layerwise,
            sparsity=sparsity,
            world_size=run.world_size,
            memory=options.memory or settings.fisher.memory_budget,
            flops_per_second=rate,
            bytes_per_second=options.bytes_per_second,
            seconds_per_gradient=options.seconds_per_gradient,
            sharded=options.sharded or run.sharded,
            positions=options.positions,
        )
        for sparsity in sparsities
    ]
    text = _format(costs, settings.step.recompute_steps, rate, options.json)
    sys.stdout.write(text)
    return int(any(cost.fits is False for cost in costs))


def read_run(
    arguments: Sequence[str], devices: int | None = None, num_nodes: int | None = None
) -> Run:
    """Read a configuration as ``fit`` does; make only the model and the callback.

    Args:
        arguments: the arguments of ``fit``.
        devices: number of devices per node; None for that of the configuration.
        num_nodes: number of nodes; None for that of the configuration.

    Returns:
        The run.

    Raises:
        ConfigurationError: if the configuration has no pruning callback.
    """
    reader = read_fit(arguments)
    try:
        # Not every model can be made without memory: some read weights, or compute.
        with torch.device("meta"):
            made = reader.make_model()
    except Exception:
        # A real error occurs again; jsonargparse wraps it, so its type says nothing.
        made = reader.make_model()
    if not made["trainer"]["callbacks"]:
        raise ConfigurationError(
            "the configuration has no WoodFisherPruningCallback in trainer.callbacks, so "
            "there is nothing to estimate."
        )
    callback, trainer = made["trainer"]["callbacks"][0], reader.config["fit"]["trainer"]
    strategy = trainer.get("strategy")
    epochs, steps = trainer.get("max_epochs"), trainer.get("max_steps", -1)
    if epochs is None and steps == -1:
        epochs = _DEFAULT_EPOCHS
    horizon = Horizon(
        epochs if epochs is not None and epochs >= 0 else None,
        steps if steps >= 0 else None,
    )
    plan = callback.schedule.plan(callback.target_sparsity, horizon)
    before = [0.0, *(step.sparsity for step in plan[:-1])]
    return Run(
        network=made["model"],
        callback=callback,
        world_size=_count_devices(devices or trainer.get("devices", "auto"), trainer)
        * int(num_nodes or trainer.get("num_nodes") or 1),
        sparsities=tuple(dict.fromkeys([before[0], before[-1]])),
        # A name, or the configuration of an object.
        sharded=str(getattr(strategy, "class_path", strategy)).endswith(
            "ModelParallelStrategy"
        ),
    )


def _count_devices(devices: Any, trainer: Any) -> int:
    """Return the number of devices that a Trainer would use."""
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


def _read_preset(options: argparse.Namespace) -> Run:
    fisher = FisherConfig(
        num_gradients=options.num_gradients,
        gradient_batch_size=options.gradient_batch_size,
        block_size=options.block_size,
    )
    return Run(
        network=SHAPES[options.preset],
        callback=WoodFisherPruningCallback(fisher=fisher),
        world_size=(options.devices or 1) * (options.num_nodes or 1),
        sparsities=(0.0,),
    )


def _format(
    costs: Sequence[ResourceEstimate], recompute_steps: int, rate: float, as_json: bool
) -> str:
    if as_json:
        return json.dumps([cost.to_dict() for cost in costs], indent=1) + "\n"
    text = "\n\n".join(cost.to_table() for cost in costs)
    if recompute_steps > 1:
        text += f"\n\nrecompute_steps={recompute_steps}: a step does this once for each stage."
    return (
        f"{text}\n\nSeconds at {rate / 1e9:.3g} Gflop/s. The network's own activations, "
        "gradients and optimizer are not counted.\n"
    )


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the subcommand."""
    parser = SubcommandParser(
        "estimate",
        "Print what the pruning steps of a run cost each rank, without running it. All "
        "options of `fit` are accepted as well, such as --config run.yaml.",
        _EXAMPLE,
    )
    add = parser.add_argument
    add("--devices", type=int, help="devices per node (default: as configured)")
    add("--num_nodes", type=int, help="number of nodes (default: as configured)")
    add(
        "--sharded",
        action="store_true",
        help="parameters are sharded over the ranks (FSDP2); read from the strategy "
        "with --config",
    )
    add("--memory", help="memory of a device for the step, such as 80GB or 24GiB")
    add("--sparsity", type=float, help="sparsity before the step (default: scheduled)")
    add(
        "--flops_per_second",
        type=float,
        help="operations per second of a rank (default: measured)",
    )
    add("--bytes_per_second", type=float, help="bytes per second that a rank can send")
    add("--seconds_per_gradient", type=float, help="seconds for one mini-batch")
    add("--positions", type=int, default=0, help="tokens in a sample, for layerwise")
    add("--json", action="store_true", help="print JSON")
    add("--preset", choices=list(SHAPES), help="a known network instead of a config")
    add("--num_gradients", type=int, default=256, help="N, with --preset")
    add("--gradient_batch_size", type=int, default=16, help="m, with --preset")
    add("--block_size", type=block_size, default=256, help="B or none, with --preset")
    return parser
