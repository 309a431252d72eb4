"""The files of a run's log, log.jsonl and TensorBoard: if the disk refuses a write, it is lost and the run goes on."""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kabrn_dist.utils.atomic_io import atomic_write
from kabrn_dist.utils.errors import UserError
from kabrn_dist.utils.safe_open import read_plain

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

logger = logging.getLogger(__name__)

# A log of a million steps is smaller.
LOG_BYTES_LIMIT = 4 << 30


class LogWriter:
    """Appends to a run's log files; one process of the run has one.

    Args:
        folder: the run's folder.
        step: steps done before this session; entries of later ones, which an earlier session lost, are removed.

    Raises:
        UserError: if the files cannot be opened. Later failures to write are logged as warnings, once for each streak.
    """

    def __init__(self, folder: Path, step: int) -> None:
        self._path, self._folder = folder / "log.jsonl", folder / "tensorboard"
        self._board: SummaryWriter | None = None
        self._failed_paths: set[Path] = set()
        self._report_thread, threading.excepthook = threading.excepthook, self._hide_board_thread
        try:
            _truncate_log(self._path, step)
            self._log = _open_log(self._path)
            self._open_board(step + 1)
        except OSError as error:
            threading.excepthook = self._report_thread
            raise UserError(
                f"{folder}: cannot be written to ({error}); make room or set run.folder to another disk"
            ) from error

    def truncate_after(self, step: int) -> None:
        """Remove what was written of the steps after `step`: the run continues from there with other data."""
        self._attempt(self._path, lambda: self._truncate(step))
        self._close_board()
        self._attempt(self._folder, lambda: self._open_board(step + 1))

    def write(self, entry: dict[str, Any]) -> None:
        """Append one line to log.jsonl, whole or not at all."""
        self._attempt(self._path, lambda: self._append(f"{json.dumps(entry)}\n".encode()))

    def log_tensorboard(self, step: int, add: Callable[[SummaryWriter], None]) -> None:
        """Call `add` with the TensorBoard writer; what it adds may reach the disk much later."""
        if self._board is None:
            # A new file: what the last one holds may end in the middle.
            self._attempt(self._folder, lambda: self._open_board(step))
        board = self._board
        if board is not None and not self._attempt(self._folder, lambda: add(board)):
            self._close_board()

    def close(self) -> None:
        """Close the files. A second call does nothing."""
        if self._log >= 0:
            os.close(self._log)
        self._log = -1
        self._close_board()
        threading.excepthook = self._report_thread

    def _hide_board_thread(self, failure: threading.ExceptHookArgs) -> None:
        # TensorBoard raises what has ended its thread in the next call too, where it becomes one line.
        if not type(failure.thread).__module__.startswith("tensorboard."):
            self._report_thread(failure)

    def _open_board(self, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._board = SummaryWriter(str(self._folder), purge_step=step)

    def _close_board(self) -> None:
        board, self._board = self._board, None
        if board is not None:
            self._attempt(self._folder, board.close)

    def _append(self, line: bytes) -> None:
        end = os.fstat(self._log).st_size
        try:
            while line:
                line = line[os.write(self._log, line) :]
        except OSError:
            # What follows must not begin in the middle of this line.
            os.ftruncate(self._log, end)
            raise

    def _truncate(self, step: int) -> None:
        _truncate_log(self._path, step)
        # Opened first: where that fails there is still one that can be written to and closed.
        log, self._log = self._log, _open_log(self._path)
        os.close(log)

    def _attempt(self, path: Path, work: Callable[[], object]) -> bool:
        try:
            work()
        except (OSError, UserError) as error:
            if path not in self._failed_paths:
                logger.warning("%s: cannot be written (%s); the run goes on without", path, error)
            self._failed_paths.add(path)
            return False
        self._failed_paths.discard(path)
        return True


def _open_log(path: Path) -> int:
    # A pipe without a reader fails to open instead of waiting for one.
    return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK, 0o644)


def _truncate_log(path: Path, step: int) -> None:
    """Drop what a lost session logged beyond the checkpoint that this one starts from."""
    if not path.exists():
        return
    text = read_plain(path, LOG_BYTES_LIMIT, follow_links=True, remedy="move it away").decode(errors="replace")
    kept = [line for line in text.splitlines() if _logged_step(line) <= step]
    atomic_write(path, "".join(f"{line}\n" for line in kept).encode())


def _logged_step(line: str) -> float:
    try:
        entry: Any = json.loads(line)
        return float(entry["step"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return float("inf")
