"""Tensors of a ``state_dict`` that share memory: tied weights, views."""

from __future__ import annotations

__all__ = ["View", "find_views", "view_of"]

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class View:
    """How a tensor lies in the memory of another one.

    Attributes:
        owner: name of the other one, which is no view.
        shape: of the view; like the strides and the offset None where the two are the
            same tensor.
        stride: in elements.
        offset: of the first element from the first one of the owner.
    """

    owner: str
    shape: tuple[int, ...] | None = None
    stride: tuple[int, ...] | None = None
    offset: int | None = None


def find_views(state_dict: Mapping[str, Tensor]) -> dict[str, View]:
    """Find the tensors whose memory is that of another one, or part of it.

    Args:
        state_dict: tensors by name.

    Returns:
        Views by name. The tensors without one own their memory, or overlap with another
        one only in part.
    """
    owners: dict[object, list[tuple[str, Tensor]]] = {}
    views: dict[str, View] = {}
    # A view can only lie in a tensor that is at least as large.
    for name, tensor in sorted(state_dict.items(), key=lambda item: -item[1].numel()):
        if tensor.numel() == 0:
            continue
        memory = tensor.device, tensor.untyped_storage().data_ptr(), tensor.dtype
        candidates = owners.setdefault(memory, [])
        for owner, whole in candidates:
            view = _place(tensor, owner, whole)
            if view is not None:
                views[name] = view
                break
        else:
            candidates.append((name, tensor))
    return views


def view_of(whole: Tensor, view: View) -> Tensor:
    """Make the view.

    Args:
        whole: the owner.
        view: how the tensor lies in it.

    Returns:
        A tensor in the owner's memory.

    Raises:
        ValueError: when it does not lie in it.
    """
    if view.shape is None or view.stride is None or view.offset is None:
        return whole
    sizes = (*view.shape, *view.stride, view.offset)
    last = view.offset + _reach(view.shape, view.stride)
    if (
        min(sizes) < 0
        or len(view.shape) != len(view.stride)
        or last >= whole.numel()
        or not whole.is_contiguous()
    ):
        raise ValueError(f"a view of {view.owner} does not lie in it")
    return whole.as_strided(
        view.shape, view.stride, whole.storage_offset() + view.offset
    )


def _place(tensor: Tensor, name: str, whole: Tensor) -> View | None:
    offset = int(tensor.storage_offset() - whole.storage_offset())
    if (offset, tensor.shape, tensor.stride()) == (0, whole.shape, whole.stride()):
        return View(name)
    last = offset + _reach(tensor.shape, tensor.stride())
    if whole.is_contiguous() and offset >= 0 and last < whole.numel():
        return View(name, tuple(tensor.shape), tensor.stride(), offset)
    return None


def _reach(shape: tuple[int, ...], stride: tuple[int, ...]) -> int:
    """Give the offset of the last element from the first one."""
    if math.prod(shape) == 0:
        return 0
    return sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
