"""Wishes to stop a run: signals, a file, the clock. Each rank has its own; acting on them is decided together."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
# A terminal sends Ctrl-C to all processes, and launchers pass it on: that is one wish, not two.
ECHO_SECONDS = 3.0


class StopRequests:
    """SIGTERM, SIGINT or SIGUSR1 to this rank, a file `STOP` in the run's folder, or the end of its time.

    Args:
        folder: the run's folder.
        watch_file: True on the one rank that looks for the file.
        max_minutes: of this session, from now on; None for ever.
    """

    def __init__(self, folder: Path, watch_file: bool, max_minutes: float | None) -> None:
        self.file = folder / "STOP"
        self.watch_file = watch_file
        self._end = time.monotonic() + 60 * max_minutes if max_minutes is not None else float("inf")
        self._signalled: float | None = None

    def requested(self) -> bool:
        """True where this rank wishes to stop; others may wish otherwise."""
        if self._signalled is not None or time.monotonic() >= self._end:
            return True
        return self.watch_file and self.file.exists()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Turn the signals into wishes for as long as this lasts; a leftover STOP file is removed first."""
        if self.watch_file:
            self.file.unlink(missing_ok=True)
        before = {number: signal.signal(number, self._note) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if number == signal.SIGINT and self._signalled is not None and now - self._signalled > ECHO_SECONDS:
            # Someone pressed Ctrl-C again and will not wait for the save.
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self._signalled = self._signalled or now
