"""Schedule of checkpoint saves in the foreground or background, and the limit on failures."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from kabrn_dist.checkpoint.background import PendingSave
from kabrn_dist.checkpoint.fragment import Fragment
from kabrn_dist.checkpoint.store import CheckpointStore
from kabrn_dist.utils.errors import UserError

# A disk that is full for a moment costs one checkpoint; one that stays full would cost the run.
MAX_FAILURES = 2


class Saver:
    """Saves checkpoints in the background or while training waits. All methods except `done` are collective.

    Args:
        store: Checkpoints of the run.
        async_save: Write in a thread where the run goes on.
        saved_step: Step of the checkpoint that this session started from; None if there is none.
        print_line: Prints one line on the console.
        after_first_save: Called on each rank once this session has saved a checkpoint.

    Attributes:
        saved_step: Step of the newest checkpoint that this session wrote or started from; None if there is none.
    """

    def __init__(
        self,
        store: CheckpointStore,
        async_save: bool,
        saved_step: int | None,
        print_line: Callable[[str], None],
        after_first_save: Callable[[], None],
    ) -> None:
        self.store, self.async_save, self.saved_step, self.print_line = store, async_save, saved_step, print_line
        self._pending: PendingSave | None = None
        self._failures = 0
        self._after_first_save: Callable[[], None] | None = after_first_save
        self._step, self._start_time, self._stall_seconds = 0, 0.0, 0.0

    def save(self, step: int, fragments: list[Fragment], state: dict[str, Any], wait: bool) -> None:
        """Save the checkpoint of `step`, unless it exists.

        Args:
            step: Step of the run.
            fragments: Fragments of this rank.
            state: State of the run, JSON types only.
            wait: Return after the save has ended or failed.
        """
        start_time = time.perf_counter()
        self.wait()
        if self.saved_step == step:
            return
        self._step, self._start_time = step, start_time
        if wait or not self.async_save:
            saved = self.store.save(step, fragments, state)
            self._stall_seconds = time.perf_counter() - start_time
            self._finish(saved)
        else:
            self._pending = self.store.save_async(step, fragments, state)
            self._stall_seconds = time.perf_counter() - start_time

    def done(self) -> bool:
        """Return whether this rank's part of a background save has ended. Never blocks; ranks may differ."""
        return self._pending is not None and self._pending.done()

    def wait(self) -> None:
        """Wait for the background save, if there is one."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            self._finish(pending.result())

    def check(self) -> None:
        """Stop the run after too many failures in a row.

        Raises:
            UserError: on all ranks.
        """
        if self._failures >= MAX_FAILURES:
            raise UserError(
                f"{self.store.folder}: {self._failures} checkpoints in a row could not be saved, for the reasons "
                "logged; make room or set run.folder to another disk, then resume"
            )

    def _finish(self, saved: bool) -> None:
        if not saved:
            self._failures += 1
            return
        self._failures, self.saved_step = 0, self._step
        if self._after_first_save is not None:
            self._after_first_save()
            self._after_first_save = None
        seconds = time.perf_counter() - self._start_time
        self.print_line(
            f"step {self._step:6d}  saved in {seconds:.2f} s, of which training waited {self._stall_seconds:.2f} s"
        )
