"""Progress on a terminal as a bar, elsewhere as one line a phase."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn


class Meter:
    """Counts documents and bytes of one phase, as a context manager. `total`: bytes, None if unknown."""

    def __init__(self, label: str, total: int | None) -> None:
        self._label = label
        self._documents = 0
        self._bytes = 0
        self._began = time.monotonic()
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[rate]}"),
        )
        self._bar = Progress(*columns, TimeRemainingColumn(), disable=not sys.stdout.isatty())
        self._task = self._bar.add_task(label, total=total, rate="")

    def __enter__(self) -> Meter:
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
        self._documents += documents
        self._bytes += bytes
        self._bar.update(self._task, advance=bytes, rate=self._rate())

    def _rate(self) -> str:
        seconds = max(time.monotonic() - self._began, 1e-3)
        documents = f"{self._documents:,} documents, " if self._documents else ""
        return f"{documents}{self._bytes / 1e6:,.1f} MB, {self._bytes / 1e6 / seconds:,.1f} MB/s"
