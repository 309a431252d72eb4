"""Notices that a model file is another one than the server has opened: its pages would be of two models, or none."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from kabrn_dist.runtime.server.errors import RequestError

logger = logging.getLogger(__name__)


class FileWatch:
    """Remembers a file as it is now.

    Args:
        file: The file.
    """

    def __init__(self, file: Path) -> None:
        self._file, self._reported = file, False
        self._first = self._look()

    def check(self) -> None:
        """Return if the file is the same, or gone: what is gone stays in memory.

        Raises:
            RequestError: if it has been replaced or written to; logged once.
        """
        now = self._look()
        if now is None or now == self._first:
            return
        message = f"{self._file.name} was replaced while it was served; start the server again"
        if not self._reported:
            self._reported = True
            logger.error("%s", message)
        raise RequestError(message, status=503, code="model_replaced")

    def _look(self) -> tuple[int, int, int, int] | None:
        try:
            found = os.stat(self._file)
        except OSError:
            return None
        return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
