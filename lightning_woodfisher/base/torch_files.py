"""Read files of ``torch.save`` that nobody has vouched for, without running code in them."""

from __future__ import annotations

__all__ = ["load_plain"]

import pickle
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_woodfisher.base.errors import ConfigurationError, first_line


def load_plain(path: Path, *, mmap: bool = False) -> Any:
    """Read tensors and plain values with ``torch.load(path, weights_only=True)``.

    Attributes that a pickle can attach to dictionaries and tensors, also in place of their
    methods, are dropped.

    Args:
        path: path of the file.
        mmap: map the tensors into memory instead of reading them.

    Returns:
        The content, on the CPU, in plain dicts, lists, tuples and tensors.

    Raises:
        ConfigurationError: if the file was not written by ``torch.save``, holds other
            objects, or would need much more memory than its size.
    """
    try:
        _require_uncompressed(path)
        with warnings.catch_warnings():
            # torch warns about a pickle that is not a checkpoint; the error below is clearer.
            warnings.filterwarnings("ignore", "Detected pickle protocol", UserWarning)
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        return _Copier(path.stat().st_size).copy(content)
    except pickle.UnpicklingError as error:
        raise ConfigurationError(_explain(path, error)) from error
    # Arbitrary bytes can raise any exception in the reader.
    except Exception as error:
        raise ConfigurationError(
            f"{path} is not a checkpoint, or it is cut off ({first_line(error)})."
        ) from error


def _require_uncompressed(path: Path) -> None:
    """Check that a zip file does not unpack to more than its size."""
    with zipfile.ZipFile(path) as archive:
        size = sum(record.file_size for record in archive.infolist())
    if size > path.stat().st_size:
        raise ValueError("it is compressed")


class _Copier:
    """Copy nested containers into plain ones; tensors keep their memory.

    Args:
        file_size: size of the file in bytes, the limit for objects and bytes of a tensor.
    """

    def __init__(self, file_size: int) -> None:
        self._file_size = file_size
        self._objects = 0

    def copy(self, value: Any) -> Any:
        # Lists that contain a list twice, and so on, are exponentially large.
        self._objects += 1
        if self._objects > self._file_size:
            raise ValueError("it has more objects than bytes")
        # The methods of the base class: a pickle can replace those of an instance.
        if isinstance(value, dict):
            return {self.copy(k): self.copy(v) for k, v in dict.items(value)}
        if isinstance(value, list):
            return [self.copy(each) for each in list.__iter__(value)]
        if type(value) is tuple:
            return tuple(self.copy(each) for each in value)
        if isinstance(value, Tensor):
            value = Tensor.detach(value)
            if value.layout == torch.strided and value.nbytes > self._file_size:
                raise ValueError(
                    f"a tensor of shape {tuple(value.shape)} is larger than the file"
                )
        return value


def _explain(path: Path, error: Exception) -> str:
    message = str(error)
    if "GLOBAL" not in message:
        return f"{path} is not a checkpoint ({first_line(error)})."
    culprit = message.partition("GLOBAL ")[2].split()[0]
    return (
        f"{path} contains an object of {culprit}. Only tensors and plain values are read, so "
        "that no code in the file is run. Keep the object out of the checkpoint "
        "(self.save_hyperparameters(ignore=[…])). If you trust the file, load it, save its "
        "['state_dict'] with torch.save, and export that with --from_zeros."
    )
