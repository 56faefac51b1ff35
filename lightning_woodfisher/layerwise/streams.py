"""Forward passes that pause before each linear map and go on when it has been solved.

The dense and the pruned network run side by side on every mini-batch. Each run is a thread
that waits in the middle of its forward pass, so that no layer is computed twice, whatever the
network looks like. Only one thread runs at a time.
"""

from __future__ import annotations

__all__ = ["NetworkRun", "open_runs"]

import contextlib
import contextvars
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.backends import cuda

from lightning_woodfisher.base.errors import PruningError
from lightning_woodfisher.data.isolation import RandomStates, preserve_random_states

# Settings of the process that a forward pass may change for a while: each run has its own.
_SETTINGS: tuple[tuple[Callable[[], Any], Callable[[Any], Any]], ...] = (
    (torch.get_default_dtype, torch.set_default_dtype),
    *(
        (getattr(cuda, f"{kind}_sdp_enabled"), getattr(cuda, f"enable_{kind}_sdp"))
        for kind in ("flash", "mem_efficient", "math", "cudnn")
    ),
)


class _AbandonedError(BaseException):
    """Raised inside a paused run that is not needed any more."""


class NetworkRun:
    """One forward pass in a thread of its own.

    Args:
        work: runs the network with the function ``pause`` as its argument.
        states: states of the random generators at the start.
        device: device of the network.
    """

    def __init__(
        self,
        work: Callable[[Callable[[], None]], None],
        states: RandomStates,
        device: torch.device,
    ) -> None:
        self._work = work
        self._states = states
        self._device = device
        self._go, self._stopped = threading.Semaphore(0), threading.Semaphore(0)
        self._error: BaseException | None = None
        self._abandoned = False
        self._settings = [get() for get, _ in _SETTINGS]
        self.is_done = False
        context = contextvars.copy_context()
        self._thread = threading.Thread(
            target=context.run, args=(self._run,), daemon=True
        )
        self._thread.start()

    def advance(self) -> None:
        """Run until the next pause, or to the end.

        Raises:
            PruningError: if the run has ended already.
        """
        if self.is_done:
            raise PruningError(
                "the network has run fewer layers for one mini-batch than for another; "
                "criterion='layerwise' needs the same layers in the same order"
            )
        with preserve_random_states():
            self._states.restore()
            self._settings = _exchange(self._settings, self._switch)
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """End the run wherever it is."""
        if not self.is_done:
            self._abandoned = True
            _exchange(self._settings, self._switch)
        self._thread.join()

    def _switch(self) -> None:
        self._go.release()
        self._stopped.acquire()

    def _pause(self) -> None:
        self._states = RandomStates.capture()
        self._stopped.release()
        self._go.acquire()
        if self._abandoned:
            raise _AbandonedError

    def _run(self) -> None:
        self._go.acquire()
        try:
            if not self._abandoned:
                if self._device.type == "cuda":
                    torch.cuda.set_device(self._device)
                with torch.no_grad():
                    self._work(self._pause)
        except _AbandonedError:
            pass
        except BaseException as error:
            self._error = error
        self.is_done = True
        self._stopped.release()


def _exchange(settings: Sequence[Any], work: Callable[[], None]) -> list[Any]:
    """Do work with other settings of the process, and return those that it has left."""
    before = [get() for get, _ in _SETTINGS]
    for (_, change), value in zip(_SETTINGS, settings, strict=True):
        change(value)
    try:
        work()
        return [get() for get, _ in _SETTINGS]
    finally:
        for (_, change), value in zip(_SETTINGS, before, strict=True):
            change(value)


@contextlib.contextmanager
def open_runs(runs: Sequence[NetworkRun]) -> Iterator[Any]:
    """Close all runs at the end, also after an error.

    Args:
        runs: the runs.

    Yields:
        Nothing.
    """
    try:
        yield
    finally:
        for run in runs:
            run.close()
