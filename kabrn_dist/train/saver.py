"""When checkpoints are written, and what follows where they cannot be."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from kabrn_dist.checkpoint.fragment import Fragment
from kabrn_dist.checkpoint.store import CheckpointStore
from kabrn_dist.utils.errors import UserError

# A disk that is full for a moment costs one checkpoint; one that stays full would cost the run.
MOST_FAILURES = 2


class Saver:
    """Writes checkpoints beside the training or while it waits. All methods but `ended` are collective.

    Attributes:
        saved: step of the newest checkpoint that this session wrote or started from; None if there is none.

    Args:
        background: write in a thread where the run goes on.
        say: prints a line for people.
    """

    def __init__(
        self, store: CheckpointStore, async_save: bool, saved_step: int | None, print_line: Callable[[str], None]
    ) -> None:
        self.store, self.async_save, self.saved_step, self.print_line = store, async_save, saved_step, print_line
        self._failures = 0
        self._step, self._began, self._stalled = 0, 0.0, 0.0

    def save(self, step: int, fragments: list[Fragment], state: dict[str, Any], wait: bool) -> None:
        """Write the checkpoint of `step`, unless it is there; with `wait` it is done, or has failed, at the return."""
        began = time.perf_counter()
        self.wait()
        if self.saved_step == step:
            return
        self._step, self._began = step, began
        if wait or not self.async_save:
            done = self.store.save(step, fragments, state)
            self._stalled = time.perf_counter() - began
            self._settle(done)
        else:
            self.store.start(step, fragments, state)
            self._stalled = time.perf_counter() - began

    def done(self) -> bool:
        """True where this rank's thread has work that is done; never waits."""
        return self.store.under_way and self.store.ended()

    def wait(self) -> None:
        """Wait for what is under way, if anything is."""
        if self.store.under_way:
            self._settle(self.store.collect())

    def check(self) -> None:
        """Raise UserError on all ranks after too many failures in a row."""
        if self._failures >= MOST_FAILURES:
            raise UserError(
                f"{self.store.folder}: {self._failures} checkpoints in a row could not be saved, for the reasons "
                "logged; make room or set run.folder to another disk, then resume"
            )

    def _settle(self, done: bool) -> None:
        if not done:
            self._failures += 1
            return
        self._failures, self.saved_step = 0, self._step
        total = time.perf_counter() - self._began
        self.print_line(f"step {self._step:6d}  saved in {total:.2f} s, of which training waited {self._stalled:.2f} s")
