"""Signals that wait until a pruning step is whole.

A cluster announces the end of a job by a signal, and Lightning acts on it at once, wherever
Python is: it saves a checkpoint and meets the other ranks. In the middle of a step that
would save weights without their masks, and meet ranks that are in another collective.
"""

from __future__ import annotations

__all__ = ["hold_back_signals"]

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

# What clusters send and Lightning handles. Ctrl-C is not held back: a step that is
# interrupted puts everything back.
_NAMES = ("SIGTERM", "SIGUSR1", "SIGUSR2", "SIGHUP")


@contextlib.contextmanager
def hold_back_signals() -> Iterator[None]:
    """Let signals that somebody handles in Python wait until the body is left.

    Each is handled once then, in the order of arrival. Signals without a handler act as
    always. Outside of the main thread, where Python runs no handlers, nothing is held back.

    Yields:
        Nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # In order of arrival, and each only once.
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
