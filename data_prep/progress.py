"""Show progress: a bar on a terminal, elsewhere a line from time to time and one at the end of each stage."""

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
    """Counts the documents and bytes of one stage, as a context manager.

    Args:
        label: name of the stage.
        total: bytes to process; None if unknown.
    """

    def __init__(self, label: str, total: int | None) -> None:
        self._label = label
        self._documents = 0
        self._bytes = 0
        self._started = self._last_line = time.monotonic()
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
        """Count documents and bytes that were just processed."""
        self.update(self._documents + documents, self._bytes + bytes, self._bytes + bytes)

    def update(self, documents: int, bytes: int, completed: int) -> None:
        """Set the documents and bytes processed so far; `completed` is the position of the bar."""
        self._documents, self._bytes = documents, bytes
        self._bar.update(self._task, completed=completed, rate=self._rate())
        if self._bar.disable and time.monotonic() - self._last_line > _LINE_INTERVAL_S:
            self._last_line = time.monotonic()
            print(f"{self._label} …: {self._rate()}", flush=True)

    def _rate(self) -> str:
        seconds = max(time.monotonic() - self._started, 1e-3)
        documents = f"{self._documents:,} documents, " if self._documents else ""
        return f"{documents}{self._bytes / 1e6:,.1f} MB, {self._bytes / 1e6 / seconds:,.1f} MB/s"


class StageProgress:
    """Progress of a stage over all workers. Each publishes its counts in a file; rank 0 shows the sum.

    A context manager around the stage and the barrier at its end.

    Args:
        folder: folder of the files.
        rank: number of this worker.
        label: name of the stage.
        total: sum of `completed` over all workers at the end.
        already_completed: the part of it that an earlier run did.
    """

    def __init__(self, folder: Path, rank: int, label: str, total: int, already_completed: int = 0) -> None:
        self._folder, self._label = folder, label
        self._path = folder / f"{label} {rank}"
        self._finished = already_completed
        self._counts = [0, 0, 0]
        self._published = 0.0
        self._latest: dict[Path, tuple[int, int, int]] = {}
        self._meter = ProgressMeter(label, total) if rank == 0 else None
        self._stopped = threading.Event()
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
            self._stopped.set()
            self._thread.join()
            self._meter.update(*self._sum())
            self._meter.__exit__(kind, error, trace)

    def advance(self, documents: int, bytes: int, completed: int) -> None:
        """Count documents and bytes that were just processed; `completed` moves the bar."""
        for index, count in enumerate((documents, bytes, completed)):
            self._counts[index] += count
        if time.monotonic() - self._published > _PUBLISH_INTERVAL_S:
            self.publish()

    def publish(self) -> None:
        """Write the counts to this worker's file. Call it once more at the end of the stage."""
        self._published = time.monotonic()
        # A full disk stops the bar, not the work.
        with contextlib.suppress(OSError):
            self._path.write_text(" ".join(map(str, self._counts)))

    def _watch(self) -> None:
        assert self._meter is not None
        while not self._stopped.wait(_PUBLISH_INTERVAL_S):
            self._meter.update(*self._sum())

    def _sum(self) -> tuple[int, int, int]:
        for path in self._folder.glob(f"{self._label} *"):
            # A file that is being written is empty for a moment; its last counts are used.
            with contextlib.suppress(OSError, ValueError):
                documents, size, work = map(int, path.read_text().split())
                self._latest[path] = documents, size, work
        documents, size, work = (
            sum(counts) for counts in zip((0, 0, self._finished), *self._latest.values(), strict=True)
        )
        return documents, size, work
