"""``lightning-woodfisher export``: write a pruned checkpoint for other programs."""

from __future__ import annotations

__all__ = ["make_parser", "run_export"]

import argparse
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_woodfisher.base.byte_sizes import format_bytes
from lightning_woodfisher.base.errors import ConfigurationError, nearest
from lightning_woodfisher.base.printable import printable
from lightning_woodfisher.callbacks.checks import require_writable
from lightning_woodfisher.cli.arguments import SubcommandParser
from lightning_woodfisher.cli.lightning_cli import load_weights, read_fit
from lightning_woodfisher.cli.messages import warn_of_missing_steps
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
from lightning_woodfisher.structured.shrink.files import read_shrunk, save_shrunk

_EXAMPLE = """\
formats:

  sparse           safetensors with a bit for each weight and the remaining weights: small.
                   Read by lightning_woodfisher.export.load_sparse. Needs no config.
  dense            a plain state_dict: torch.load(FILE, weights_only=True). Needs no config.
  shrunk           a folder with the smaller network of a run that removed channels.
                   Read by lightning_woodfisher.load_shrunk. Needs no config.
  onnx             network and weights, for onnxruntime and others; the outputs are
                   compared with PyTorch's.
  torch-export     network and weights, for torch.export.load; compared likewise.
  semi-structured  a dense state_dict in half precision, whose Linear weights were checked
                   to be 2:4 and converted on the GPU of this machine.

examples:

  lightning-woodfisher export best.ckpt --format sparse --network net \\
      --out model.safetensors
  lightning-woodfisher export best.ckpt --format shrunk --network net --out small
  lightning-woodfisher export best.ckpt --format onnx --config run.yaml \\
      --input_shape 1 3 224 224 --out model.onnx

The checkpoint is only read, and no code in it is run. Before anything is written, the
pruned weights are checked to be zero, by the masks that the callback saved in it.
"""
_SUFFIXES = {
    "sparse": (".safetensors",),
    "dense": (".pt", ".pth", ".bin"),
    "shrunk": (),
    "onnx": (".onnx",),
    "torch-export": (".pt2",),
    "semi-structured": (".pt", ".pth", ".bin"),
}
_WITHOUT_MODEL = ("sparse", "dense", "shrunk")


def run_export(options: argparse.Namespace) -> int:
    """Write the file and print a summary of it.

    Args:
        options: parsed by :func:`make_parser`, with ``fit_arguments``.

    Returns:
        Exit status 0.
    """
    out = Path(options.out)
    _check(options, out)
    checkpoint = read_checkpoint(options.checkpoint)
    # What is shrunk is checked by what cuts it.
    if not options.from_zeros and options.format != "shrunk":
        checkpoint.require_masks_hold()
    if options.format != "shrunk":
        require_writable("--out", out)
    if checkpoint.steps_left:
        warn_of_missing_steps(checkpoint.path, checkpoint.steps_left)
    weights = strip_prefix(checkpoint.weights, options.network)
    note = ""
    if options.format == "sparse":
        summary = save_sparse(weights, out, {"network": options.network})
    elif options.format == "shrunk":
        summary, note = _write_shrunk(checkpoint, options, weights)
    elif options.format == "dense":
        summary = save_dense(weights, out)
    else:
        module = _make_module(options, checkpoint)
        network = _find_network(module, options.network)
        if options.format == "semi-structured":
            summary, note = _write_semi_structured(network, options)
        else:
            inputs = _example_inputs(module, network, options)
            summary, note = _write_graph(network, inputs, options)
    if options.format in {"sparse", "dense"} and checkpoint.left_out:
        names = printable(", ".join(checkpoint.left_out))
        note = f"\nNot exported, because not tensors: {names}."
    sys.stdout.write(f"{summary.to_table()}\n{_describe(checkpoint, options)}{note}\n")
    sys.stdout.write(f"Written: {out}.\n")
    return 0


def _describe(checkpoint: Checkpoint, options: argparse.Namespace) -> str:
    if options.from_zeros:
        return "Masks were not read (--from_zeros)."
    weights = sum(kept.numel() for kept in checkpoint.masks.values())
    return (
        f"Masks of {len(checkpoint.masks)} layers: {checkpoint.pruned:,} of {weights:,} "
        "weights pruned, all of them zero."
    )


def _check(options: argparse.Namespace, out: Path) -> None:
    """Check the options before anything is read."""
    rest = options.fit_arguments
    suffixes = _SUFFIXES[options.format]
    if options.format == "shrunk":
        if out.is_file():
            raise ConfigurationError(f"--out {out} is a file; give a folder.")
        if options.from_zeros:
            raise ConfigurationError(
                "--from_zeros has no effect with --format shrunk, which needs the plan that "
                "the callback saved in the checkpoint; omit it."
            )
    elif out.suffix not in suffixes:
        raise ConfigurationError(
            f"--out {out} must end in {' or '.join(suffixes)} for --format "
            f"{options.format}."
        )
    if out.resolve() == Path(options.checkpoint).resolve():
        raise ConfigurationError(
            f"--out {out} is the checkpoint itself; give another file."
        )
    if options.format in _WITHOUT_MODEL:
        if rest:
            known = [f"--{name}" for name in vars(options)]
            raise ConfigurationError(
                f"{' '.join(rest)} has no effect with --format {options.format}, which "
                f"needs no model; omit it.{nearest(rest[0], known)}"
            )
    elif not options.config and not any(a.startswith("--model") for a in rest):
        raise ConfigurationError(
            f"--format {options.format} needs the network and not only its weights: add "
            "--config run.yaml, the configuration that `fit` was run with (`fit` saves it "
            "as config.yaml beside its logs)."
        )


def _make_module(options: argparse.Namespace, checkpoint: Checkpoint) -> Any:
    """Make the module of the configuration, with the weights of the checkpoint."""
    config = [f"--config={path}" for path in options.config]
    module = read_fit([*config, *options.fit_arguments]).make_model()["model"]
    module.configure_model()
    load_weights(module, checkpoint)
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
        f"--format {options.format} needs an example input: give --input_shape, such as "
        f"1 3 224 224, or set self.example_input_array in {type(module).__name__} to a "
        "tensor or a tuple of tensors."
    )


def _write_shrunk(
    checkpoint: Checkpoint, options: argparse.Namespace, dense: Mapping[str, Tensor]
) -> tuple[ExportSummary, str]:
    """Write the smaller network; return a summary and its size against that of the dense."""
    plan, state = read_shrunk(checkpoint)
    network = strip_prefix(state, options.network)
    start = f"{options.network.rstrip('.')}." if options.network else ""
    require_writable("--out", Path(options.out, "plan.json"))
    path = save_shrunk(options.out, network, plan.without_prefix(start))
    tensors = {name: t for name, t in network.items() if isinstance(t, Tensor)}
    sizes = [
        (sum(t.numel() for t in found), sum(t.nbytes for t in found))
        for found in (tensors.values(), dense.values())
    ]
    (count, size), (all_count, all_size) = sizes
    return summarize(tensors, path), (
        f"\nSmaller network: {count:,} of {all_count:,} numbers in its state_dict "
        f"({count / max(1, all_count):.1%}), {format_bytes(size)} of "
        f"{format_bytes(all_size)}."
    )


def _write_graph(
    network: nn.Module, inputs: tuple[Tensor, ...], options: argparse.Namespace
) -> tuple[ExportSummary, str]:
    """Write the network with its weights; return a summary and the difference."""
    out, weights = Path(options.out), network.state_dict()
    if options.format == "torch-export":
        difference = export_program(
            network, inputs, out, dynamic_batch=options.dynamic_batch
        )
        note = f"\nLargest difference of the reloaded program: {difference:.3g}."
        return summarize(weights, out), note
    difference = export_onnx(
        network,
        inputs,
        out,
        dynamic_batch=options.dynamic_batch,
        tolerance=options.tolerance,
    )
    side = out.with_name(f"{out.name}.data")
    note = f"\nLargest difference to PyTorch's outputs: {difference:.3g}."
    return summarize(weights, out, side_files=(side,) if side.exists() else ()), note


def _write_semi_structured(
    network: nn.Module, options: argparse.Namespace
) -> tuple[ExportSummary, str]:
    """Check the 2:4 weights on the GPU and write them; return a summary and a note."""
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
    """Return the parser of the subcommand."""
    parser = SubcommandParser(
        "export",
        "Write a pruned checkpoint to a file for other programs: compressed, plain, or "
        "with the network in it.",
        _EXAMPLE,
        usage="lightning-woodfisher export CHECKPOINT --format FORMAT --out FILE …",
    )
    add: Callable[..., Any] = parser.add_argument
    add(
        "checkpoint",
        metavar="CHECKPOINT",
        help="saved by Lightning with the pruning callback, or a state_dict",
    )
    add("--format", required=True, choices=list(_SUFFIXES), help="see below")
    add("--out", required=True, metavar="FILE", help="file (shrunk: folder) to write")
    add(
        "--network",
        default="",
        metavar="NAME",
        help="only this submodule of the LightningModule, such as net; its name is removed "
        "from the names of the weights",
    )
    add(
        "--from_zeros",
        action="store_true",
        help="export the weights as they are, without reading masks: for a checkpoint that "
        "has none",
    )
    add(
        "-c",
        "--config",
        action="append",
        default=[],
        metavar="YAML",
        help="configuration of fit, from which the network is made; other arguments of "
        "fit, such as --model.width 16, may follow (onnx, torch-export, semi-structured)",
    )
    graph = parser.add_argument_group("onnx and torch-export").add_argument
    graph(
        "--input_shape",
        nargs="+",
        type=int,
        action="append",
        metavar="N",
        help="shape of an input, batch first, as 1 3 224 224; once for each input "
        "(default: that of the module's example_input_array)",
    )
    graph(
        "--dynamic_batch",
        action="store_true",
        help="accept batches of any size; the input then needs 2 or more samples",
    )
    graph(
        "--tolerance",
        type=float,
        default=1e-4,
        help="largest accepted difference of an ONNX output (default: 1e-4)",
    )
    half = parser.add_argument_group("semi-structured").add_argument
    half(
        "--dtype",
        choices=["float16", "bfloat16"],
        default="float16",
        help="dtype of the weights (default: float16)",
    )
    half(
        "--exclude",
        nargs="+",
        default=[],
        metavar="REGEX",
        help="Linear layers that stay dense, such as head",
    )
    return parser
