"""Delay signals until a pruning step is complete.

A cluster announces the end of a job by a signal, and Lightning handles it at once: it saves
a checkpoint together with the other ranks. In the middle of a pruning step this would save
weights without their masks, and other ranks may be in another collective.
"""

from __future__ import annotations

__all__ = ["delay_signals"]

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

# Signals that clusters send and Lightning handles. Ctrl-C is not delayed: an interrupted
# step is rolled back.
_NAMES = ("SIGTERM", "SIGUSR1", "SIGUSR2", "SIGHUP")


@contextlib.contextmanager
def delay_signals() -> Iterator[None]:
    """Delay signals that have a Python handler until the body ends.

    Each signal is then handled once, in order of arrival. Signals without a handler act as
    usual. Outside of the main thread, where Python runs no handlers, nothing is delayed.

    Yields:
        Nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # In order of arrival, each only once.
    waiting: dict[int, None] = {}

    def wait(number: int, frame: FrameType | None) -> None:
        waiting[number] = None

    known = [getattr(signal, name) for name in _NAMES if hasattr(signal, name)]
    handlers = {number: signal.getsignal(number) for number in known}
    held = {number: old for number, old in handlers.items() if callable(old)}
    try:
        for number in held:
            signal.signal(number, wait)
        yield
    finally:
        for number, handler in held.items():
            signal.signal(number, handler)
        for number in waiting:
            signal.raise_signal(number)
