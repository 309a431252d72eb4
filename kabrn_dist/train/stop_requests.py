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
    """Listens for a signal of `SIGNALS` to this rank, a lost launcher; on one rank also a file `STOP` and a time limit.

    Args:
        folder: the run's folder.
        is_main: True on the one rank that looks for the file and at the clock.
        max_minutes: length of this session, from now on; None for no limit.
        started_at: time at which the user started the run, in seconds since 1970: an older file is of an earlier run.
    """

    def __init__(self, folder: Path, is_main: bool, max_minutes: float | None, started_at: float) -> None:
        self.file, self.started_at = folder / "STOP", started_at
        self.is_main, self.max_minutes = is_main, max_minutes
        self._end = time.monotonic() + 60 * max_minutes if max_minutes is not None else float("inf")
        self._signal, self._signaled_at = "", 0.0
        self._launcher = LauncherWatch()

    def requested(self) -> bool:
        """Return True if this rank has received a stop request. Not synchronized: other ranks may answer otherwise."""
        return bool(self.cause())

    def cause(self) -> str:
        """Return what has asked this rank to stop, as a message has it; empty if nothing has."""
        if self._signal:
            return self._signal
        if self._launcher.is_gone():
            return "the end of its launcher"
        if self.is_main and time.monotonic() >= self._end:
            return f"run.max_minutes {self.max_minutes:g}"
        return f"the file {self.file}" if self.is_main and self.file.exists() else ""

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take signals as stop requests within the context; a STOP file from before the start is removed first.

        A file that came while the processes started is an order. A hang-up that `nohup` has switched off stays so.
        """
        if self.is_main:
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
        if number == signal.SIGINT and self._signal and now - self._signaled_at > ECHO_SECONDS:
            # A second Ctrl-C: the user does not want to wait for the checkpoint.
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        if not self._signal:
            name = signal.Signals(number).name
            self._signal, self._signaled_at = "Ctrl-C" if number == signal.SIGINT else name, now
