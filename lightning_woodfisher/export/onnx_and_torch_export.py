"""Export a network with its weights to ONNX or torch.export, and check the file."""

from __future__ import annotations

__all__ = ["export_onnx", "export_program"]

import os
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils._pytree import tree_leaves, tree_map

from lightning_woodfisher.base.errors import ConfigurationError, first_line
from lightning_woodfisher.base.optional_imports import import_optional
from lightning_woodfisher.data.isolation import isolated
from lightning_woodfisher.export.state_dict_files import write_atomically

Inputs = Tensor | Sequence[Any]

# Protobuf files are limited to 2 GB; for more, ONNX keeps weights in a separate file.
_MAX_PROTOBUF_BYTES = 1_900_000_000
_UNKNOWN_OPERATOR = re.compile(r"No ONNX function found for <OpOverload\(op='([\w.]+)'")


def export_onnx(
    model: nn.Module,
    example_inputs: Inputs,
    path: str | os.PathLike[str],
    *,
    dynamic_batch: bool = False,
    tolerance: float = 1e-4,
) -> float:
    """Export a model to ONNX, and compare its outputs in onnxruntime with the model's.

    The model is exported in evaluation mode and not changed. The file appears under its
    name only if the outputs agree. Weights of 1.9 GB or more are written to a second
    file, ``<name>.data``.

    Args:
        model: network on the CPU.
        example_inputs: a tensor, or the positional arguments of ``forward``.
        path: path of the file, ``….onnx``.
        dynamic_batch: let the first dimension of the inputs have any size. The example
            inputs must then have two or more samples.
        tolerance: largest accepted absolute difference of an output.

    Returns:
        The largest absolute difference.

    Raises:
        ConfigurationError: if the model cannot be exported, with the operator or the line
            if known; if outputs differ by more than ``tolerance``; or without onnx,
            onnxscript and onnxruntime.
    """
    checker, _, runtime = (
        import_optional(module, "ONNX export")
        for module in ("onnx.checker", "onnxscript", "onnxruntime")
    )
    inputs = _as_tuple(example_inputs)
    expected = _evaluate(model, inputs)
    program = _trace(model, inputs, dynamic_batch)
    size = sum(tensor.nbytes for tensor in model.state_dict().values())
    with write_atomically(Path(path)) as unfinished:
        _convert(program, unfinished, size > _MAX_PROTOBUF_BYTES)
        checker.check_model(str(unfinished))
        session = runtime.InferenceSession(
            str(unfinished), providers=["CPUExecutionProvider"]
        )
        difference = _difference(expected, _evaluate_onnx(session, inputs))
        if dynamic_batch:
            double = tree_map(_double_batch, inputs)
            found = _evaluate_onnx(session, double)
            difference = max(difference, _difference(_evaluate(model, double), found))
        del session
        if not difference <= tolerance:
            raise ConfigurationError(
                f"the outputs of onnxruntime differ from those of the model by "
                f"{difference:.3g}, more than tolerance={tolerance:g}; nothing was written. "
                "Raise the tolerance if the outputs are large, or export in float32."
            )
    return difference


def export_program(
    model: nn.Module,
    example_inputs: Inputs,
    path: str | os.PathLike[str],
    *,
    dynamic_batch: bool = False,
) -> float:
    """Export a model with ``torch.export``, and compare its outputs with the model's.

    The model is exported in evaluation mode and not changed. ``torch.export.load`` reads
    the file.

    Args:
        model: the network.
        example_inputs: a tensor, or the positional arguments of ``forward``.
        path: path of the file, ``….pt2``.
        dynamic_batch: let the first dimension of the inputs have any size. The example
            inputs must then have two or more samples.

    Returns:
        The largest absolute difference; 0 unless kernels are not deterministic.

    Raises:
        ConfigurationError: if the model cannot be exported, with the reason.
    """
    path = Path(path)
    if path.suffix != ".pt2":
        raise ConfigurationError(f"{path} must end in .pt2, as torch.export expects.")
    inputs = _as_tuple(example_inputs)
    expected = _evaluate(model, inputs)
    program = _trace(model, inputs, dynamic_batch)
    with write_atomically(path) as unfinished:
        torch.export.save(program, unfinished)
        loaded = torch.export.load(unfinished).module()
        return _difference(expected, _leaves(loaded(*inputs)))


def _as_tuple(inputs: Inputs) -> tuple[Any, ...]:
    return (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)


def _trace(
    model: nn.Module, inputs: tuple[Any, ...], dynamic_batch: bool
) -> ExportedProgram:
    shapes = None
    if dynamic_batch:
        sizes = {v.shape[0] for v in tree_leaves(inputs) if _has_batch(v)}
        if len(sizes) != 1 or min(sizes) < 2:
            raise ConfigurationError(
                f"dynamic_batch: the first dimensions of the example inputs are "
                f"{sorted(sizes)}; use the same size of 2 or more for all of them, because "
                "torch.export treats 1 as a constant."
            )
        batch = Dim("batch")
        shapes = tree_map(lambda v: {0: batch} if _has_batch(v) else None, inputs)
    try:
        with isolated(model, "eval"), torch.no_grad():
            return torch.export.export(model, inputs, dynamic_shapes=shapes)
    # torch raises many classes, and forward may fail on tensors without values.
    except Exception as error:
        if "DynamicCache" in str(error):
            raise ConfigurationError(
                f"torch.export cannot trace {type(model).__name__}, whose outputs contain a "
                "cache for generation (DynamicCache); set model.config.use_cache = False."
            ) from error
        raise ConfigurationError(
            f"torch.export cannot trace {type(model).__name__} ({first_line(error)}). "
            "Its forward must not branch on values of tensors; use torch.where or "
            "torch.cond, see https://pytorch.org/docs/stable/export.html."
        ) from error


def _convert(program: ExportedProgram, path: Path, external: bool) -> None:
    try:
        with warnings.catch_warnings():
            # torch.onnx and onnxscript call deprecated functions of torch and Python.
            warnings.simplefilter("ignore", DeprecationWarning)
            warnings.simplefilter("ignore", FutureWarning)
            torch.onnx.export(
                program, (), path, dynamo=True, verbose=False, external_data=external
            )
    except torch.onnx.OnnxExporterError as error:
        unknown = _UNKNOWN_OPERATOR.search(str(error))
        if unknown is None:
            raise ConfigurationError(
                f"torch.onnx cannot export the model: {error.__cause__ or error}."
            ) from error
        raise ConfigurationError(
            f"ONNX has no operator for {unknown[1]}. Replace it in forward by other "
            "operators, register a translation (custom_translation_table of "
            "torch.onnx.export), or export with torch.export, which knows every operator."
        ) from error


def _evaluate(model: nn.Module, inputs: tuple[Any, ...]) -> list[Tensor]:
    name = type(model).__name__
    try:
        with isolated(model, "eval"), torch.no_grad():
            return _leaves(model(*inputs))
    except NotImplementedError as error:
        raise ConfigurationError(
            f"{name} has no forward; export the submodule that is the network."
        ) from error
    except Exception as error:
        raise ConfigurationError(
            f"forward of {name} fails on the example inputs: {first_line(error)}"
        ) from error


def _evaluate_onnx(session: Any, inputs: tuple[Any, ...]) -> list[Tensor]:
    tensors = _leaves(inputs)
    names = [argument.name for argument in session.get_inputs()]
    try:
        feed = {n: t.numpy() for n, t in zip(names, tensors, strict=True)}
    except TypeError as error:
        raise ConfigurationError(
            f"inputs of {', '.join(str(t.dtype) for t in tensors)} cannot be passed to "
            "onnxruntime; export the model in float32 or float16."
        ) from error
    return [torch.as_tensor(value) for value in session.run(None, feed)]


def _leaves(values: Any) -> list[Tensor]:
    return [v.detach() for v in tree_leaves(values) if isinstance(v, Tensor)]


def _difference(expected: list[Tensor], found: list[Tensor]) -> float:
    """Return the largest absolute difference, ∞ if shapes or NaNs differ."""
    if [t.shape for t in expected] != [t.shape for t in found]:
        return float("inf")
    largest = 0.0
    for one, other in zip(expected, found, strict=True):
        one, other = one.double().cpu(), other.double().cpu()
        same = (one == other) | (one.isnan() & other.isnan())
        gap = torch.where(same, 0.0, (one - other).abs()).nan_to_num(float("inf"))
        largest = max(largest, float(gap.max()) if gap.numel() else 0.0)
    return largest


def _has_batch(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0


def _double_batch(value: Any) -> Any:
    return torch.cat([value, value]) if _has_batch(value) else value
