"""Ends a process that makes no progress, and says where it stood."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time

EXIT_CODE = 70
STARTING = "starting"
# Until the first step has ended: reading a checkpoint, compiling kernels, and meeting the other ranks take their time.
STARTING_SECONDS = 600.0
# A thread of Python cannot speak while other code keeps the interpreter's lock; faulthandler's can, after this delay.
LOCKED_SECONDS = 30.0
# The first to end would take the others with it before they have shown their stacks.
OTHERS_SECONDS = 2.0


class Watchdog:
    """A thread that waits for `beat`; after too long a silence it prints all stacks to stderr and ends the process.

    As all ranks wait for a hung one, all of them fall silent: its stack is the one that is not in a collective.

    Args:
        rank: named in the message.
        seconds: longest silence; 0 for ever.
    """

    def __init__(self, rank: int, seconds: float) -> None:
        self.rank, self.seconds = rank, seconds
        self._ended = threading.Event()
        self._doing, self._allowed, self._last = STARTING, seconds + STARTING_SECONDS, time.monotonic()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def beat(self, doing: str) -> None:
        """Progress was made; `doing` is what comes next."""
        self._allowed = self.seconds + (STARTING_SECONDS if self._doing == STARTING else 0.0)
        self._doing, self._last = doing, time.monotonic()
        if self.seconds:
            faulthandler.dump_traceback_later(self._allowed + LOCKED_SECONDS, exit=True)

    def start(self) -> None:
        """Begin to watch. A process that ends meanwhile need not stop it."""
        if self.seconds:
            self._thread.start()

    def stop(self) -> None:
        """Watch no longer."""
        self._ended.set()
        if self.seconds:
            faulthandler.cancel_dump_traceback_later()
            self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(min(1.0, self.seconds / 4)):
            silence = time.monotonic() - self._last
            if silence > self._allowed:
                self._die(silence)

    def _die(self, silence: float) -> None:
        print(
            f"error: rank {self.rank} made no progress for {silence:.0f} s (guard.hang_timeout_s {self.seconds:g}) "
            f"while {self._doing}; its stacks follow, and it ends",
            file=sys.stderr,
            flush=True,
        )
        faulthandler.dump_traceback(all_threads=True)
        time.sleep(OTHERS_SECONDS)
        os._exit(EXIT_CODE)
