"""Progress on a terminal as a bar, elsewhere as a line now and then and one at the end of a phase."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from pathlib import Path
from types import TracebackType

from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

_PUBLISH_INTERVAL_S = 0.5
_LINE_INTERVAL_S = 30.0


class ProgressMeter:
    """Counts documents and bytes of one phase, as a context manager. `total`: bytes, None if unknown."""

    def __init__(self, label: str, total: int | None) -> None:
        self._label = label
        self._documents = 0
        self._bytes = 0
        self._began = self._spoke = time.monotonic()
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[rate]}"),
        )
        self._bar = Progress(*columns, TimeRemainingColumn(), disable=not sys.stdout.isatty())
        self._task = self._bar.add_task(label, total=total, rate="")

    def __enter__(self) -> ProgressMeter:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()
        if self._bar.disable and error is None:
            print(f"{self._label}: {self._rate()}", flush=True)

    def advance(self, documents: int, bytes: int) -> None:
        """Count work just done."""
        self.update(self._documents + documents, self._bytes + bytes, self._bytes + bytes)

    def update(self, documents: int, bytes: int, completed: int) -> None:
        """Say how much has been done so far; `done` moves the bar towards the total."""
        self._documents, self._bytes = documents, bytes
        self._bar.update(self._task, completed=completed, rate=self._rate())
        if self._bar.disable and time.monotonic() - self._spoke > _LINE_INTERVAL_S:
            self._spoke = time.monotonic()
            print(f"{self._label} …: {self._rate()}", flush=True)

    def _rate(self) -> str:
        seconds = max(time.monotonic() - self._began, 1e-3)
        documents = f"{self._documents:,} documents, " if self._documents else ""
        return f"{documents}{self._bytes / 1e6:,.1f} MB, {self._bytes / 1e6 / seconds:,.1f} MB/s"


class StageProgress:
    """What this worker has done of a stage. It is noted in a file, and rank 0 shows the sum over all workers.

    As a context manager around the stage and the meeting at its end. `total`: what the `work` of all will add up to;
    `finished`: how much of that was done before.
    """

    def __init__(self, folder: Path, rank: int, label: str, total: int, already_completed: int = 0) -> None:
        self._folder, self._label = folder, label
        self._path = folder / f"{label} {rank}"
        self._finished = already_completed
        self._counts = [0, 0, 0]
        self._noted = 0.0
        self._seen: dict[Path, tuple[int, int, int]] = {}
        self._meter = ProgressMeter(label, total) if rank == 0 else None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> StageProgress:
        if self._meter is not None:
            self._meter.__enter__()
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._meter is not None:
            self._over.set()
            self._thread.join()
            self._meter.update(*self._sum())
            self._meter.__exit__(kind, error, trace)

    def advance(self, documents: int, bytes: int, completed: int) -> None:
        """Count work just done: documents, bytes of text, and what moves the bar."""
        for place, count in enumerate((documents, bytes, completed)):
            self._counts[place] += count
        if time.monotonic() - self._noted > _PUBLISH_INTERVAL_S:
            self.publish()

    def publish(self) -> None:
        """Write the counts where rank 0 finds them; called once more at the end of the work."""
        self._noted = time.monotonic()
        # A bar that stands still is no reason to stop.
        with contextlib.suppress(OSError):
            self._path.write_text(" ".join(map(str, self._counts)))

    def _watch(self) -> None:
        assert self._meter is not None
        while not self._over.wait(_PUBLISH_INTERVAL_S):
            self._meter.update(*self._sum())

    def _sum(self) -> tuple[int, int, int]:
        for path in self._folder.glob(f"{self._label} *"):
            # One that is being written is empty for a moment; what it said before holds.
            with contextlib.suppress(OSError, ValueError):
                documents, size, work = map(int, path.read_text().split())
                self._seen[path] = documents, size, work
        documents, size, work = (
            sum(counts) for counts in zip((0, 0, self._finished), *self._seen.values(), strict=True)
        )
        return documents, size, work
