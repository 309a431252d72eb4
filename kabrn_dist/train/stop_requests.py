"""Requests to stop a run: signals, the file STOP, a time limit, a lost launcher. The ranks exchange them and agree."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from kabrn_dist.train.launcher_watch import LauncherWatch

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
# File systems keep times less exactly than the clock does.
LEFTOVER_SECONDS = 0.05
# A terminal sends Ctrl-C to all processes, and launchers pass it on: that is one request, not two.
ECHO_SECONDS = 3.0


class StopRequests:
    """Listens for a signal of `SIGNALS` to this rank, a file `STOP` in the run's folder, a time limit, a lost launcher.

    Args:
        folder: the run's folder.
        watch_file: True on the one rank that looks for the file.
        max_minutes: length of this session, from now on; None for no limit.
        started_at: time at which the user started the run, in seconds since 1970: an older file is of an earlier run.
    """

    def __init__(self, folder: Path, watch_file: bool, max_minutes: float | None, started_at: float) -> None:
        self.file, self.started_at = folder / "STOP", started_at
        self.watch_file = watch_file
        self._end = time.monotonic() + 60 * max_minutes if max_minutes is not None else float("inf")
        self._signaled_at: float | None = None
        self._launcher = LauncherWatch()

    def requested(self) -> bool:
        """Return True if this rank has received a stop request. Not synchronized: other ranks may answer otherwise."""
        if self._signaled_at is not None or time.monotonic() >= self._end or self._launcher.is_gone():
            return True
        return self.watch_file and self.file.exists()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take signals as stop requests within the context; a STOP file from before the start is removed first.

        A file that came while the processes started is an order. A hang-up that `nohup` has switched off stays so.
        """
        if self.watch_file:
            self._remove_leftover()
        numbers = [n for n in SIGNALS if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]
        before = {number: signal.signal(number, self._handle) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _remove_leftover(self) -> None:
        with suppress(FileNotFoundError):
            if self.file.lstat().st_mtime < self.started_at - LEFTOVER_SECONDS:
                self.file.unlink()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if number == signal.SIGINT and self._signaled_at is not None and now - self._signaled_at > ECHO_SECONDS:
            # A second Ctrl-C: the user does not want to wait for the checkpoint.
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self._signaled_at = self._signaled_at or now
