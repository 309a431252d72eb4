"""Wall-clock time of the phases of a training step."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class PhaseTimer:
    """Adds up the seconds spent in named phases.

    On CUDA the time of a kernel counts for the phase that waits for it, which is mostly `sync`.
    """

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}

    @contextmanager
    def span(self, phase: str) -> Iterator[None]:
        """Add the time that the context takes to `phase`."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[phase] = self._seconds.get(phase, 0.0) + time.perf_counter() - begin

    def take(self) -> dict[str, float]:
        """Return the seconds of each phase since the last call, and start again from 0."""
        seconds, self._seconds = self._seconds, {}
        return seconds
