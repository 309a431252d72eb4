"""The folder of an adapter that is learned further, and what it was before each learning.

NAME/ is the adapter as it is now. NAME.history/0001/ is what it was before the first learning, and so on; an empty one
says that there was nothing.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from kabrn_dist.adapters.adapter import Adapter
from kabrn_dist.adapters.folder import ADAPTER_CONFIG_NAME, ADAPTER_NAME, read_adapter, write_adapter
from kabrn_dist.utils.atomic_io import atomic_write, make_folder
from kabrn_dist.utils.errors import UserError
from kabrn_dist.utils.lock import flock_exclusive
from kabrn_dist.utils.safe_open import read_plain

KEPT_VERSIONS = 20
_FILES = (ADAPTER_CONFIG_NAME, ADAPTER_NAME)
_BYTES_LIMIT = 4 << 30
# A version that is being written, or removed: no number, so that it is never gone back to.
_DRAFT_NAME, _LOCK_NAME = "draft", "lock"


class AdapterHistory:
    """Versions of an adapter on the disk.

    Args:
        folder: The adapter's folder, which need not be there yet.

    Raises:
        UserError: for a folder that holds something else.
    """

    def __init__(self, folder: Path) -> None:
        if folder.name in ("", ".."):
            folder = folder.resolve()
        self.folder = folder
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{folder}: is a file; give --out a folder of its own")
        if folder.is_dir() and any(folder.iterdir()) and not (folder / ADAPTER_NAME).exists():
            raise UserError(f"{folder}: holds something else than an adapter; give --out a folder of its own")
        self._versions = folder.with_name(f"{folder.name}.history")
        self._seen, self._lock = self._stamp(), -1

    @property
    def exists(self) -> bool:
        """Whether there is an adapter."""
        return (self.folder / ADAPTER_NAME).exists()

    def read(self) -> Adapter | None:
        """Return the adapter as it is now; None if there is none.

        Raises:
            UserError: for a damaged one.
        """
        return read_adapter(self.folder) if self.exists else None

    def hold(self) -> None:
        """Keep other processes from changing the adapter until this one ends, or closes the history.

        Raises:
            UserError: if another one holds it, or has changed it since this one read it, or the disk refuses.
        """
        if self._lock < 0:
            make_folder(self._versions)
            self._lock = _open_lock(self._versions / _LOCK_NAME, self.folder)
        if self._stamp() != self._seen:
            raise UserError(
                f"{self.folder}: another program has changed the adapter meanwhile; start again, and go on from there, "
                "or give another --out"
            )

    def close(self) -> None:
        """Let other processes change the adapter."""
        if self._lock >= 0:
            os.close(self._lock)
        self._lock = -1

    def save(self, adapter: Adapter) -> None:
        """Write an adapter, and keep what was there as a version to go back to.

        Raises:
            UserError: if the disk refuses; what was there is then still there.
        """
        self.hold()
        numbers = self._numbers()
        version = self._versions / f"{(numbers[-1] if numbers else 0) + 1:04d}"
        draft = self._versions / _DRAFT_NAME
        shutil.rmtree(draft, ignore_errors=True)
        try:
            # A version appears whole: an empty one means that there was nothing.
            make_folder(draft)
            if self.exists:
                _copy(self.folder, draft)
            _rename(draft, version)
            write_adapter(adapter, self.folder)
        except BaseException:
            for folder in (draft, version):
                shutil.rmtree(folder, ignore_errors=True)
            raise
        self._seen = self._stamp()
        for number in numbers[: max(0, len(numbers) + 1 - KEPT_VERSIONS)]:
            shutil.rmtree(self._versions / f"{number:04d}", ignore_errors=True)

    def undo(self) -> Adapter | None:
        """Go back to what was there before the last `save`, and return it; None if there was nothing.

        Raises:
            UserError: if there is nothing to go back to, or the disk refuses.
        """
        numbers = self._numbers()
        if not numbers:
            raise UserError(f"{self.folder}: nothing was learned that could be taken back")
        self.hold()
        version = self._versions / f"{numbers[-1]:04d}"
        if (version / ADAPTER_NAME).exists():
            _copy(version, self.folder)
        else:
            self._remove_files()
        self._seen = self._stamp()
        draft = self._versions / _DRAFT_NAME
        shutil.rmtree(draft, ignore_errors=True)
        _rename(version, draft)
        shutil.rmtree(draft, ignore_errors=True)
        return self.read()

    def _remove_files(self) -> None:
        """Remove the adapter, and its folder if nothing else is in it."""
        try:
            for name in reversed(_FILES):
                (self.folder / name).unlink(missing_ok=True)
            if self.folder.is_dir() and not any(self.folder.iterdir()):
                self.folder.rmdir()
        except OSError as error:
            raise UserError(f"{self.folder}: cannot be removed ({error.strerror}); make it writable") from error

    def _stamp(self) -> tuple[int, int, int] | None:
        """What is different after each writing of the adapter; None without one."""
        try:
            found = (self.folder / ADAPTER_NAME).stat()
        except OSError:
            return None
        return found.st_ino, found.st_size, found.st_mtime_ns

    def _numbers(self) -> list[int]:
        if not self._versions.is_dir():
            return []
        return sorted(int(path.name) for path in self._versions.iterdir() if path.name.isdecimal() and path.is_dir())


def _open_lock(path: Path, folder: Path) -> int:
    """Return the descriptor of a locked file, which the end of the process unlocks."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    except OSError as error:
        raise UserError(f"{path}: cannot be opened ({error.strerror}); give --out a folder you can write to") from error
    try:
        is_ours = flock_exclusive(descriptor)
    except OSError:
        # On a file system without locks, what another one has written is still noticed.
        is_ours = True
    if not is_ours:
        os.close(descriptor)
        raise UserError(f"{folder}: another chat is learning into it; end that one, or give another --out")
    return descriptor


def _rename(source: Path, target: Path) -> None:
    try:
        source.rename(target)
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({error.strerror}); make its folder writable") from error


def _copy(source: Path, target: Path) -> None:
    """Copy the files of an adapter; the last one is all that a reader needs."""
    make_folder(target)
    for name in _FILES:
        if (source / name).exists():
            atomic_write(target / name, read_plain(source / name, _BYTES_LIMIT))
