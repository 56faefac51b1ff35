"""``lightning-woodfisher export``: files of a pruned checkpoint for other programs."""

from __future__ import annotations

__all__ = ["make_parser", "run_export"]

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.cli import LightningCLI
from torch import Tensor, nn

from lightning_woodfisher.base.errors import ConfigurationError, nearest
from lightning_woodfisher.cli.estimate import command_line
from lightning_woodfisher.export.checkpoint import (
    Checkpoint,
    read_checkpoint,
    strip_prefix,
)
from lightning_woodfisher.export.onnx_and_torch_export import (
    export_onnx,
    export_program,
)
from lightning_woodfisher.export.semi_structured import (
    find_semi_structured,
    to_semi_structured,
)
from lightning_woodfisher.export.state_dict_files import save_dense, save_sparse
from lightning_woodfisher.export.summary import ExportSummary, summarize

_EXAMPLE = """\
formats:

  sparse           safetensors with a bit for each weight and the weights that are left:
                   small. Read by lightning_woodfisher.export.load_sparse. Needs no config.
  dense            a plain state_dict: torch.load(FILE, weights_only=True). Needs no config.
  onnx             network and weights, for onnxruntime and others; the outputs are
                   compared with PyTorch's.
  torch-export     network and weights, for torch.export.load; compared likewise.
  semi-structured  a dense state_dict in half precision, whose Linear weights were checked
                   to be 2:4 and converted on the GPU at hand.

examples:

  lightning-woodfisher export best.ckpt --format sparse --network net \\
      --out model.safetensors
  lightning-woodfisher export best.ckpt --format onnx --config run.yaml \\
      --input_shape 1 3 224 224 --out model.onnx

The checkpoint is only read, and no code in it is run. Before anything is written, the
pruned weights are checked to be zero, by the masks that the callback has saved in it.
"""
_SUFFIXES = {
    "sparse": (".safetensors",),
    "dense": (".pt", ".pth", ".bin"),
    "onnx": (".onnx",),
    "torch-export": (".pt2",),
    "semi-structured": (".pt", ".pth", ".bin"),
}
_SPELLINGS = {
    f"--{name.replace('_', '-')}": f"--{name}"
    for name in ("from_zeros", "input_shape", "dynamic_batch")
}
_WITHOUT_MODEL = ("sparse", "dense")
# What a Trainer would be given that is not made.
_UNUSED = ("callbacks", "logger", "plugins", "profiler", "strategy", "accelerator")


def run_export(arguments: Sequence[str], cli: type[LightningCLI]) -> int:
    """Write the file and print what is in it.

    Args:
        arguments: of the subcommand; those that are not its own are read as ``fit`` does.
        cli: reads the configuration.

    Returns:
        Exit status.
    """
    given = [_SPELLINGS.get(argument, argument) for argument in arguments]
    options, rest = make_parser().parse_known_args(given)
    out = Path(options.out)
    _check(options, rest, out)
    checkpoint = read_checkpoint(options.checkpoint)
    if not options.from_zeros:
        checkpoint.require_masks_hold()
    weights = strip_prefix(checkpoint.weights, options.network)
    note = ""
    if options.format == "sparse":
        summary = save_sparse(weights, out, {"network": options.network})
    elif options.format == "dense":
        summary = save_dense(weights, out)
    else:
        write = {
            "onnx": _write_onnx,
            "torch-export": _write_program,
            "semi-structured": _write_semi_structured,
        }[options.format]
        config = [f"--config={path}" for path in options.config]
        module = _load(_make_module([*config, *rest], cli), checkpoint)
        summary, note = write(module, _find_network(module, options.network), options)
    if options.format in _WITHOUT_MODEL and checkpoint.left_out:
        note = f"\nLeft out, being no tensors: {', '.join(checkpoint.left_out)}."
    sys.stdout.write(f"{summary.to_table()}\n{_describe(checkpoint, options)}{note}\n")
    sys.stdout.write(f"Written: {out}.\n")
    return 0


def _describe(checkpoint: Checkpoint, options: argparse.Namespace) -> str:
    if options.from_zeros:
        return "Masks were not looked at (--from_zeros)."
    weights = sum(kept.numel() for kept in checkpoint.masks.values())
    return (
        f"Masks of {len(checkpoint.masks)} layers: {checkpoint.pruned:,} of {weights:,} "
        "weights pruned, all of them zero."
    )


def _check(options: argparse.Namespace, rest: Sequence[str], out: Path) -> None:
    """Find out what cannot be before anything is read."""
    suffixes = _SUFFIXES[options.format]
    if out.suffix not in suffixes:
        raise ConfigurationError(
            f"--out {out} must end in {' or '.join(suffixes)} for --format "
            f"{options.format}."
        )
    if out.resolve() == Path(options.checkpoint).resolve():
        raise ConfigurationError(f"--out {out} is the checkpoint itself.")
    if options.format in _WITHOUT_MODEL:
        if rest:
            known = [f"--{name}" for name in vars(options)]
            raise ConfigurationError(
                f"{' '.join(rest)} means nothing with --format {options.format}, which "
                f"needs no model; leave it out.{nearest(rest[0], known)}"
            )
    elif not options.config and not any(a.startswith("--model") for a in rest):
        raise ConfigurationError(
            f"--format {options.format} needs the network and not only its weights: add "
            "--config run.yaml, the configuration that `fit` was run with (it saves one as "
            "config.yaml beside its logs)."
        )


def _make_module(arguments: Sequence[str], cli: type[LightningCLI]) -> nn.Module:
    """Read a configuration as ``fit`` does, and make nothing but the module."""

    class Reader(cli):  # type: ignore[valid-type, misc]
        """Parses; the rest is left out."""

        def instantiate_classes(self) -> None:
            config = self.config.clone()
            fit = config["fit"]
            if "data" in fit:
                fit["data"] = None
            for name in _UNUSED:
                fit["trainer"][name] = None
            self.module = self.parser.instantiate_classes(config)["fit"]["model"]

        def _run_subcommand(self, subcommand: str) -> None: ...

    with command_line(["fit", *arguments]):
        module: nn.Module = Reader(save_config_callback=None).module
    return module


def _load(module: Any, checkpoint: Checkpoint) -> Any:
    module.configure_model()
    module.on_load_checkpoint(checkpoint.content)
    try:
        module.load_state_dict(checkpoint.state_dict, strict=module.strict_loading)
    except RuntimeError as error:
        raise ConfigurationError(
            f"{checkpoint.path} does not fit the model of the configuration: {error}"
        ) from error
    return module.eval()


def _find_network(module: nn.Module, name: str) -> nn.Module:
    try:
        return module.get_submodule(name.rstrip("."))
    except AttributeError as error:
        raise ConfigurationError(
            f"--network {name}: {type(module).__name__} has no such submodule; it has "
            f"{', '.join(dict(module.named_children()))}."
        ) from error


def _example_inputs(
    module: nn.Module, network: nn.Module, options: argparse.Namespace
) -> tuple[Tensor, ...]:
    if options.input_shape:
        floats = (p.dtype for p in network.parameters() if p.is_floating_point())
        dtype = next(floats, torch.float32)
        generator = torch.Generator().manual_seed(0)
        return tuple(
            torch.randn(shape, generator=generator).to(dtype)
            for shape in options.input_shape
        )
    example = getattr(module, "example_input_array", None)
    if isinstance(example, Tensor):
        return (example,)
    if isinstance(example, tuple | list):
        return tuple(example)
    raise ConfigurationError(
        f"--format {options.format} needs an input to follow: give --input_shape, such as "
        f"1 3 224 224, or set self.example_input_array in {type(module).__name__} to a "
        "tensor or a tuple of tensors."
    )


Written = tuple[ExportSummary, str]


def _write_onnx(
    module: nn.Module, network: nn.Module, options: argparse.Namespace
) -> Written:
    inputs, out = _example_inputs(module, network, options), Path(options.out)
    difference = export_onnx(
        network,
        inputs,
        out,
        dynamic_batch=options.dynamic_batch,
        tolerance=options.tolerance,
    )
    side = out.with_name(f"{out.name}.data")
    summary = summarize(
        network.state_dict(), out, side_files=(side,) if side.exists() else ()
    )
    return summary, f"\nLargest difference to PyTorch's outputs: {difference:.3g}."


def _write_program(
    module: nn.Module, network: nn.Module, options: argparse.Namespace
) -> Written:
    inputs, out = _example_inputs(module, network, options), Path(options.out)
    difference = export_program(
        network, inputs, out, dynamic_batch=options.dynamic_batch
    )
    return (
        summarize(network.state_dict(), out),
        f"\nLargest difference of the reloaded program: {difference:.3g}.",
    )


def _write_semi_structured(
    module: nn.Module, network: nn.Module, options: argparse.Namespace
) -> Written:
    find_semi_structured(network, options.exclude)
    dtype = getattr(torch, options.dtype)
    if torch.cuda.is_available():
        network.to("cuda", dtype)
    weights = {name: tensor.cpu() for name, tensor in network.state_dict().items()}
    layers = to_semi_structured(network, options.exclude)
    return (
        save_dense(weights, options.out),
        f"\n{len(layers)} Linear layers are 2:4 and were converted on "
        f"{torch.cuda.get_device_name()}; convert them where they are used with "
        "lightning_woodfisher.export.to_semi_structured.",
    )


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of the subcommand.

    Returns:
        It.
    """
    parser = argparse.ArgumentParser(
        prog="lightning-woodfisher export",
        usage="lightning-woodfisher export CHECKPOINT --format FORMAT --out FILE …",
        description="Write a pruned checkpoint to a file that other programs read: small, "
        "plain, or with the network in it.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add: Callable[..., Any] = parser.add_argument
    add(
        "checkpoint",
        metavar="CHECKPOINT",
        help="saved by Lightning with the pruning callback, or a state_dict",
    )
    add("--format", required=True, choices=list(_SUFFIXES), help="see below")
    add("--out", required=True, metavar="FILE", help="file to write")
    add(
        "--network",
        default="",
        metavar="NAME",
        help="only this part of the LightningModule, such as net, named without it",
    )
    add(
        "--from_zeros",
        action="store_true",
        help="take the weights as they are, without masks: for a checkpoint that has none",
    )
    add(
        "-c",
        "--config",
        action="append",
        default=[],
        metavar="YAML",
        help="what fit was run with, to make the network from; other arguments of fit, "
        "such as --model.width 16, may follow (onnx, torch-export, semi-structured)",
    )
    graph = parser.add_argument_group("onnx and torch-export").add_argument
    graph(
        "--input_shape",
        nargs="+",
        type=int,
        action="append",
        metavar="N",
        help="of an input, batch first, as 1 3 224 224; once for each input (the module's "
        "example_input_array)",
    )
    graph(
        "--dynamic_batch",
        action="store_true",
        help="take batches of any size; the input needs 2 or more samples then",
    )
    graph(
        "--tolerance",
        type=float,
        default=1e-4,
        help="largest difference of an ONNX output that is accepted (1e-4)",
    )
    half = parser.add_argument_group("semi-structured").add_argument
    half("--dtype", choices=["float16", "bfloat16"], default="float16", help="float16")
    half(
        "--exclude",
        nargs="+",
        default=[],
        metavar="REGEX",
        help="Linear layers that stay dense, such as head",
    )
    return parser
