"""Watchdog: ends a process that makes no progress and prints where it hangs."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from types import TracebackType

EXIT_CODE = 70
STARTING = "starting"
# Extra time until the first step has ended: reading a checkpoint, compiling kernels, and meeting the other ranks.
STARTING_SECONDS = 600.0
# A Python thread cannot print while other code holds the interpreter's lock; faulthandler can, after this delay.
LOCKED_SECONDS = 30.0
# The first rank to exit takes the others with it; this lets them print their stacks before.
PEER_GRACE_SECONDS = 2.0


class Watchdog:
    """A thread that expects regular calls of `report_progress`; without them it prints all stacks and ends the process.

    As all ranks wait for a hung one, all of them stop reporting: the hung one is the one that is not in a collective.

    Args:
        rank: this process's rank, for the message.
        timeout_s: longest time without progress in seconds; 0 for no limit.
    """

    def __init__(self, rank: int, timeout_s: float) -> None:
        self.rank, self.timeout_s = rank, timeout_s
        self._stopped = threading.Event()
        self._activity, self._limit_s, self._last = STARTING, timeout_s + STARTING_SECONDS, time.monotonic()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def report_progress(self, activity: str) -> None:
        """Reset the timeout; `activity` is what comes next, for the message."""
        self._limit_s = self.timeout_s + (STARTING_SECONDS if self._activity == STARTING else 0.0)
        self._activity, self._last = activity, time.monotonic()
        if self.timeout_s:
            faulthandler.dump_traceback_later(self._limit_s + LOCKED_SECONDS, exit=True)

    def __enter__(self) -> Watchdog:
        if self.timeout_s:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped.set()
        if self.timeout_s:
            faulthandler.cancel_dump_traceback_later()
            self._thread.join()

    def _watch(self) -> None:
        while not self._stopped.wait(min(1.0, self.timeout_s / 4)):
            idle = time.monotonic() - self._last
            if idle > self._limit_s:
                self._abort(idle)

    def _abort(self, idle: float) -> None:
        print(
            f"error: rank {self.rank} made no progress for {idle:.0f} s (guard.hang_timeout_s {self.timeout_s:g}) "
            f"while {self._activity}; its stacks follow, then it exits",
            file=sys.stderr,
            flush=True,
        )
        faulthandler.dump_traceback(all_threads=True)
        time.sleep(PEER_GRACE_SECONDS)
        os._exit(EXIT_CODE)
