"""Reasons to stop, noticed by any rank and acted on by all."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from kabrn_dist.mesh import Mesh


class Guard:
    """Collects wishes to stop: SIGTERM or SIGINT to any rank, or a file `STOP` in the run's folder."""

    def __init__(self, folder: Path, mesh: Mesh) -> None:
        self.file = folder / "STOP"
        self.mesh = mesh
        self._signalled = False

    def should_stop(self) -> bool:
        """The same answer on all ranks. Collective: call it once a step."""
        wish = self._signalled or (self.mesh.first and self.file.exists())
        return self.mesh.any(wish)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Turn the signals into wishes for as long as this lasts; a leftover STOP file is removed first."""
        if self.mesh.first:
            self.file.unlink(missing_ok=True)
        before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._signalled = True
