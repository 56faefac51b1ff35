"""Copies between host and device for which the host does not wait."""

from __future__ import annotations

__all__ = ["HostCopy", "upload"]

import torch
from torch import Tensor


class HostCopy:
    """A copy of a few numbers on the host, to be read after other work has been started.

    On a GPU the numbers are copied to pinned memory in the order of the stream. Reading them
    waits for this copy, and not for what the device has been given since.

    Args:
        numbers: tensor of shape ``[n]``.
    """

    def __init__(self, numbers: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        self._host = numbers.detach()
        if numbers.device.type == "cuda":
            self._host = torch.empty(
                numbers.shape, dtype=numbers.dtype, pin_memory=True
            )
            self._host.copy_(numbers.detach(), non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record(torch.cuda.current_stream(numbers.device))

    def read(self) -> list[float]:
        """Wait for the copy.

        Returns:
            The numbers.
        """
        if self._event is not None:
            self._event.synchronize()
            self._event = None
        numbers: list[float] = self._host.tolist()
        return numbers


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """Move a tensor to a device without waiting for it.

    Args:
        tensor: tensor on any device.
        device: where it is needed. From host to GPU it is copied from pinned memory, which
            the allocator keeps until the copy is done.

    Returns:
        The tensor on the device; the same one if it is there.
    """
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
