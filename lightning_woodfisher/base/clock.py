"""Time actions and the phases of a pruning step, and report its progress."""

from __future__ import annotations

__all__ = ["PhaseClock", "Progress", "no_progress", "time_action"]

import contextlib
import time
from collections.abc import Callable, Iterator

import torch

Progress = Callable[
    [str, int], "contextlib.AbstractContextManager[Callable[[int], object]]"
]


class PhaseClock:
    """Wall-clock seconds by phase; an inner phase is not counted in the outer one.

    Attributes:
        seconds: by phase.
        phase: the current innermost phase, or the one in which an exception was raised.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.phase: str | None = None
        self._inner = 0.0

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Add the time spent in the body to a phase.

        Args:
            phase: its name.

        Yields:
            Nothing.
        """
        outer, self.phase = self.phase, phase
        outer_inner, self._inner = self._inner, 0.0
        start = time.perf_counter()
        try:
            yield
            self.phase = outer
        finally:
            spent = time.perf_counter() - start
            self.seconds[phase] = self.seconds.get(phase, 0.0) + spent - self._inner
            self._inner = outer_inner + spent


def time_action(action: Callable[[], object], device: torch.device) -> float:
    """Measure the time of an action.

    Args:
        action: the action.
        device: device of the action; its work is included.

    Returns:
        Seconds.
    """

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    wait()
    start = time.perf_counter()
    action()
    wait()
    return time.perf_counter() - start


@contextlib.contextmanager
def no_progress(title: str, total: int) -> Iterator[Callable[[int], object]]:
    """Show nothing.

    Args:
        title: title of the progress bar; ignored.
        total: number of items; ignored.

    Yields:
        A function that ignores the number of finished items.
    """
    yield lambda _: None
