"""Network and weights in one file: ONNX and torch.export, each checked after writing."""

from __future__ import annotations

__all__ = ["export_onnx", "export_program"]

import os
import re
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils._pytree import tree_leaves, tree_map

from lightning_woodfisher.base.errors import ConfigurationError
from lightning_woodfisher.base.optional_imports import import_optional
from lightning_woodfisher.data.isolation import isolated
from lightning_woodfisher.export.sparse import replacing

Inputs = Tensor | Sequence[Any]

# A protobuf file may have 2 GB; beyond that ONNX keeps weights in a file beside it.
_MOST_PROTOBUF_BYTES = 1_900_000_000
_NO_FUNCTION = re.compile(r"No ONNX function found for <OpOverload\(op='([\w.]+)'")


def export_onnx(
    model: nn.Module,
    example_inputs: Inputs,
    path: str | os.PathLike[str],
    *,
    dynamic_batch: bool = False,
    tolerance: float = 1e-4,
) -> float:
    """Write a model as ONNX, and compare its outputs in onnxruntime with the model's.

    The model is exported in evaluation mode and left as it was. The file appears under
    its name only when the outputs agree. Weights of 1.9 GB or more are put beside it,
    in ``<name>.data``.

    Args:
        model: on the CPU.
        example_inputs: a tensor, or the positional arguments of ``forward``.
        path: of the file, ``….onnx``.
        dynamic_batch: whether the file takes any size of the first dimension of the
            inputs; the example must have two or more then.
        tolerance: largest absolute difference of an output that is accepted.

    Returns:
        The largest absolute difference.

    Raises:
        ConfigurationError: when the model cannot be exported, with the operator or the
            line where that is known; when outputs differ by more than ``tolerance``; or
            without onnx, onnxscript and onnxruntime.
    """
    checker = import_optional("onnx.checker", "this file")
    import_optional("onnxscript", "this file")
    runtime = import_optional("onnxruntime", "this file")
    inputs = _as_tuple(example_inputs)
    expected = _evaluate(model, inputs)
    program = _trace(model, inputs, dynamic_batch)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    size = sum(t.numel() * t.itemsize for t in model.state_dict().values())
    # A side file is found by its name: it must be written under the final one.
    with tempfile.TemporaryDirectory(prefix=".onnx", dir=path.parent) as folder:
        unfinished = Path(folder, path.name)
        _convert(program, unfinished, size > _MOST_PROTOBUF_BYTES)
        checker.check_model(str(unfinished))
        session = runtime.InferenceSession(
            str(unfinished), providers=["CPUExecutionProvider"]
        )
        difference = _difference(expected, _evaluate_onnx(session, inputs))
        if dynamic_batch:
            twice = tree_map(_twice, inputs)
            found = _evaluate_onnx(session, twice)
            difference = max(difference, _difference(_evaluate(model, twice), found))
        del session
        if not difference <= tolerance:
            raise ConfigurationError(
                f"the outputs of onnxruntime differ from the model's by {difference:.3g}, "
                f"more than tolerance={tolerance:g}; nothing was written. Raise the "
                "tolerance if the outputs are large, or export the model in float32."
            )
        for written in Path(folder).iterdir():
            written.replace(path.parent / written.name)
    return difference


def export_program(
    model: nn.Module,
    example_inputs: Inputs,
    path: str | os.PathLike[str],
    *,
    dynamic_batch: bool = False,
) -> float:
    """Write a model with ``torch.export``, and compare the file's outputs with its own.

    The model is exported in evaluation mode and left as it was. ``torch.export.load``
    reads the file.

    Args:
        model: the network.
        example_inputs: a tensor, or the positional arguments of ``forward``.
        path: of the file, ``….pt2``.
        dynamic_batch: whether the file takes any size of the first dimension of the
            inputs; the example must have two or more then.

    Returns:
        The largest absolute difference; 0 unless kernels are not deterministic.

    Raises:
        ConfigurationError: when the model cannot be exported, with the reason.
    """
    path = Path(path)
    if path.suffix != ".pt2":
        raise ConfigurationError(f"{path} must end in .pt2, by which torch knows it.")
    inputs = _as_tuple(example_inputs)
    expected = _evaluate(model, inputs)
    program = _trace(model, inputs, dynamic_batch)
    with replacing(path) as unfinished:
        # Under another name than ….pt2 torch writes, but warns.
        written = unfinished.with_name(f"{unfinished.name}.pt2")
        try:
            torch.export.save(program, written)
            loaded = torch.export.load(written).module()
            difference = _difference(expected, _leaves(loaded(*inputs)))
            written.replace(unfinished)
        finally:
            written.unlink(missing_ok=True)
    return difference


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
                f"{sorted(sizes)}; give all of them the same size of 2 or more, since 1 "
                "is taken for a constant."
            )
        batch = Dim("batch")
        shapes = tree_map(lambda v: {0: batch} if _has_batch(v) else None, inputs)
    try:
        with isolated(model, "eval"), torch.no_grad():
            return torch.export.export(model, inputs, dynamic_shapes=shapes)
    # Classes of torch, public and not, and what forward makes of tensors without values.
    except Exception as error:
        raise ConfigurationError(
            f"torch.export cannot follow {type(model).__name__}: {_first_line(error)} "
            "Its forward may not branch on values of tensors (torch.where or torch.cond "
            "can); see https://pytorch.org/docs/stable/export.html."
        ) from error


def _convert(program: ExportedProgram, path: Path, external: bool) -> None:
    try:
        with warnings.catch_warnings():
            # torch.onnx and onnxscript use what torch and Python have deprecated.
            warnings.simplefilter("ignore", DeprecationWarning)
            warnings.simplefilter("ignore", FutureWarning)
            torch.onnx.export(
                program, (), path, dynamo=True, verbose=False, external_data=external
            )
    except torch.onnx.OnnxExporterError as error:
        unknown = _NO_FUNCTION.search(str(error))
        if unknown is None:
            raise ConfigurationError(
                f"torch.onnx cannot export the model: {error.__cause__ or error}."
            ) from error
        raise ConfigurationError(
            f"ONNX has no operator for {unknown[1]}. Write it with others in forward, "
            "register a translation (custom_translation_table of torch.onnx.export), or "
            "export with torch.export, which knows every operator."
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
            f"forward of {name} fails on the example inputs: {_first_line(error)}"
        ) from error


def _evaluate_onnx(session: Any, inputs: tuple[Any, ...]) -> list[Tensor]:
    tensors = _leaves(inputs)
    names = [argument.name for argument in session.get_inputs()]
    try:
        feed = {n: t.numpy() for n, t in zip(names, tensors, strict=True)}
    except TypeError as error:
        raise ConfigurationError(
            f"onnxruntime takes no {', '.join(str(t.dtype) for t in tensors)} from here; "
            "export the model in float32 or float16."
        ) from error
    return [torch.as_tensor(value) for value in session.run(None, feed)]


def _leaves(values: Any) -> list[Tensor]:
    return [v.detach() for v in tree_leaves(values) if isinstance(v, Tensor)]


def _difference(expected: list[Tensor], found: list[Tensor]) -> float:
    """Give the largest absolute difference; ∞ where shapes or NaNs differ."""
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


def _twice(value: Any) -> Any:
    return torch.cat([value, value]) if _has_batch(value) else value


def _first_line(error: Exception) -> str:
    """Give the first line of a message as a sentence."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return line if line.endswith(".") else f"{line}."
