"""Find tensors of a ``state_dict`` that share memory, such as tied weights and views."""

from __future__ import annotations

__all__ = ["View", "find_views", "make_view"]

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class View:
    """The position of a tensor in the memory of another one.

    Attributes:
        owner: name of the other tensor, which is not a view itself.
        shape: shape of the view. None, like strides and offset, if the two tensors are
            the same.
        stride: strides in elements.
        offset: elements between the first one of the owner and the first one of the view.
    """

    owner: str
    shape: tuple[int, ...] | None = None
    stride: tuple[int, ...] | None = None
    offset: int | None = None


def find_views(state_dict: Mapping[str, Tensor]) -> dict[str, View]:
    """Find the tensors that lie in the memory of another one.

    Args:
        state_dict: tensors by name.

    Returns:
        Views by name. All other tensors own their memory, or overlap with another one
        only partly.
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
            view = _locate(tensor, owner, whole)
            if view is not None:
                views[name] = view
                break
        else:
            candidates.append((name, tensor))
    return views


def make_view(whole: Tensor, view: View) -> Tensor:
    """Make a view of its owner.

    Args:
        whole: the owner.
        view: position of the view in it.

    Returns:
        A tensor in the owner's memory.

    Raises:
        ValueError: if the view does not lie in the owner's memory.
    """
    if view.shape is None or view.stride is None or view.offset is None:
        return whole
    sizes = (*view.shape, *view.stride, view.offset)
    if (
        min(sizes) < 0
        # Strides of zero could make a view of any size.
        or math.prod(view.shape) > whole.numel()
        or not whole.is_contiguous()
        or view.offset + _span(view.shape, view.stride) >= whole.numel()
    ):
        raise ValueError(f"a view of {view.owner!r} does not lie in it")
    return whole.as_strided(
        view.shape, view.stride, whole.storage_offset() + view.offset
    )


def _locate(tensor: Tensor, name: str, whole: Tensor) -> View | None:
    """Return the position of a tensor in another one of that name, None if outside."""
    offset = int(tensor.storage_offset() - whole.storage_offset())
    if (offset, tensor.shape, tensor.stride()) == (0, whole.shape, whole.stride()):
        return View(name)
    last = offset + _span(tensor.shape, tensor.stride())
    if whole.is_contiguous() and offset >= 0 and last < whole.numel():
        return View(name, tuple(tensor.shape), tensor.stride(), offset)
    return None


def _span(shape: tuple[int, ...], stride: tuple[int, ...]) -> int:
    """Return the offset of the last element from the first one."""
    if math.prod(shape) == 0:
        return 0
    return sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
