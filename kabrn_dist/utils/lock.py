"""File locks: an flock on the run folder; the kernel releases it when the process exits."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
import time
from pathlib import Path
from types import TracebackType

from kabrn_dist.utils.errors import UserError

LOCK_NAME = "lock"
# A process that is killed while it starts a child leaves the lock to the child until that has executed its program.
PATIENCE_SECONDS = 3.0

_POLL_SECONDS = 0.05
# Answers of file systems without locks.
_UNSUPPORTED = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}

logger = logging.getLogger(__name__)


class FolderLock:
    """A held lock: call `release`, use it as a context, or leave it to the end of the process."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor: int | None = descriptor

    def release(self) -> None:
        """Release the lock; a second call does nothing."""
        # The file stays: were it removed, two processes could each lock a file of that name.
        if self._descriptor is not None:
            os.close(self._descriptor)
        self._descriptor = None

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def acquire_lock(folder: Path) -> FolderLock:
    """Lock `folder`/lock, making the folder if needed, and write host and process into it.

    The lock is an flock(2): it ends with the process, also after SIGKILL, so it is never stale; NFS passes it to the
    other machines. A held lock is waited for, PATIENCE_SECONDS, in case its holder is about to exit. On a file system
    without locks a warning is logged and the run continues unguarded. Not collective: rank 0 takes it.

    Args:
        folder: Folder of the run.

    Returns:
        The held lock.

    Raises:
        UserError: if another process holds the lock, or the folder cannot be written.
    """
    path = folder / LOCK_NAME
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    except OSError as error:
        raise UserError(f"{path}: cannot be opened ({error.strerror}); choose a run.folder you can write to") from error
    try:
        _lock(descriptor, path)
    except BaseException:
        os.close(descriptor)
        raise
    return FolderLock(descriptor)


def flock_exclusive(descriptor: int, timeout: float | None = 0.0) -> bool:
    """Take the exclusive flock(2) of an open file; closing the file, in all processes that have it open, releases it.

    Args:
        descriptor: Open file.
        timeout: Seconds to wait for another holder; None waits for ever.

    Returns:
        False if another holder still had it after `timeout`.

    Raises:
        OSError: on a file system without locks.
    """
    if timeout is None:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        return True
    deadline = time.monotonic() + timeout
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(_POLL_SECONDS)
        else:
            return True


def _lock(descriptor: int, path: Path) -> None:
    try:
        if not flock_exclusive(descriptor, PATIENCE_SECONDS):
            holder = os.pread(descriptor, 300, 0).decode(errors="replace").strip() or "another process"
            raise UserError(
                f"{path.parent}: a run is active in this folder ({holder}); stop it first, or choose another run.folder"
            )
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise UserError(f"{path}: cannot be locked ({error.strerror}); choose another run.folder") from error
        logger.warning("%s: this file system has no locks; never start two runs on one folder", path)
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"host {socket.gethostname()}, process {os.getpid()}\n".encode(), 0)
    except OSError as error:
        # The lock counts, not the note in it: a full disk must not keep a run from resuming.
        logger.warning("%s: cannot be written (%s)", path, error.strerror)
