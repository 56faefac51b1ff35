"""Seconds by phase of a pruning step, and the progress that is shown meanwhile."""

from __future__ import annotations

__all__ = ["PhaseClock", "Progress", "no_progress"]

import contextlib
import time
from collections.abc import Callable, Iterator

Progress = Callable[
    [str, int], "contextlib.AbstractContextManager[Callable[[int], object]]"
]


class PhaseClock:
    """Adds up wall-clock seconds by phase; an inner phase is not counted in the outer.

    Attributes:
        seconds: by phase.
        phase: the innermost one now, or the one that an exception has left.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.phase: str | None = None
        self._inner = 0.0

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Count the time inside for a phase.

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


@contextlib.contextmanager
def no_progress(title: str, total: int) -> Iterator[Callable[[int], object]]:
    """Show nothing.

    Args:
        title: what would be shown.
        total: up to which number.

    Yields:
        A counter that ignores what it is given.
    """
    yield lambda _: None
