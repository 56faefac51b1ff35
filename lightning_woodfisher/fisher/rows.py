"""Storage of gradient rows by unit, on the device or in host memory."""

from __future__ import annotations

__all__ = ["GradientRows"]

from collections.abc import Sequence

import torch
from torch import Tensor


class GradientRows:
    """N gradient rows, cut into the columns of each unit.

    Args:
        columns: slice of each unit in a row.
        num_gradients: N.
        device: device of the rows that are appended and returned.
        offload: keep the rows in host memory. On a GPU, a unit is copied back while the
            previous unit is used, if units are read in order.
    """

    def __init__(
        self,
        columns: Sequence[slice],
        num_gradients: int,
        device: torch.device,
        offload: bool = False,
    ) -> None:
        self._columns = list(columns)
        self._num_gradients = num_gradients
        self._device = device
        self._on_host = offload and device.type != "cpu"
        self._units: list[Tensor] = []
        self._count = 0
        self._arriving: dict[int, tuple[Tensor, torch.cuda.Event]] = {}
        self._stream = (
            torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            if self._on_host
            else None
        )

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the rows; float32 before the first row."""
        return self._units[0].dtype if self._units else torch.float32

    @property
    def device_bytes(self) -> int:
        """Bytes of the rows on the device."""
        return 0 if self._on_host else sum(unit.nbytes for unit in self._units)

    def append(self, rows: Tensor) -> None:
        """Store the next rows.

        Args:
            rows: ``[n, D_r]``; copied.
        """
        if not self._units:
            self._units = [
                torch.empty(
                    (self._num_gradients, columns.stop - columns.start),
                    dtype=rows.dtype,
                    device="cpu" if self._on_host else self._device,
                    pin_memory=self._on_host,
                )
                for columns in self._columns
            ]
        place = slice(self._count, self._count + len(rows))
        for columns, unit in zip(self._columns, self._units, strict=True):
            part = rows[:, columns]
            # Only a contiguous source is copied to the host asynchronously.
            part = part.contiguous() if self._on_host else part
            unit[place].copy_(part, non_blocking=self._on_host)
        self._count += len(rows)

    def __getitem__(self, index: int) -> Tensor:
        """Return the rows of one unit on the device; do not change them."""
        if self._stream is None:
            return self._units[index][: self._count]
        self._begin_copy(index)
        rows, ready = self._arriving.pop(index)
        stream = torch.cuda.current_stream(self._device)
        stream.wait_event(ready)
        rows.record_stream(stream)
        self._arriving.clear()
        if index + 1 < len(self._units):
            self._begin_copy(index + 1)
        return rows[: self._count]

    def clear(self, columns: Tensor) -> None:
        """Set columns to zero.

        Args:
            columns: bool ``[D_r]``, True for columns that become zero.
        """
        # No copy to or from the host may be in progress.
        self._arriving.clear()
        if self._stream is not None:
            torch.cuda.synchronize(self._device)
        for place, unit in zip(self._columns, self._units, strict=True):
            unit.masked_fill_(columns[place].to(unit.device), 0.0)

    def _begin_copy(self, index: int) -> None:
        stream = self._stream
        if stream is None or index in self._arriving:
            return
        # The copy of the rows to the host may still be in progress.
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            rows = self._units[index].to(self._device, non_blocking=True)
        self._arriving[index] = rows, stream.record_event()
