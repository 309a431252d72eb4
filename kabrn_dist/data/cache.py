"""Files of this machine that can be had again: bounded, shared by all its processes, each whole or not there.

`KEY` is a whole file; `KEY.SIZE.part` one that is being fetched, which counts with its final size.
"""

from __future__ import annotations

import fcntl
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from kabrn_dist.utils.errors import UserError

FetchFunction = Callable[[Path], None]

_NAME = re.compile(r"[0-9a-f]{64}(\.(?P<part>[0-9]+)\.part)?")
_LOCKS = 256
_WAIT_SECONDS = 0.05


class FileCache:
    """Keeps at most `limit` bytes in `folder`; what was used longest ago goes first. Any thread may ask.

    A file that is dropped while a process has it open stays readable there. Raises UserError when the folder cannot be
    made.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self._folder, self._limit = folder, limit
        try:
            (folder / "locks").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"data.cache_dir {folder}: {error.strerror}. Choose a folder you can write to.") from error

    def get(self, key: str, size: int, fetch: FetchFunction) -> Path:
        """Return the file of `key`, a sha256, of `size` bytes; `fetch` completes a part that it is given.

        One process of the machine fetches, the others wait. Raises UserError when the disk is full, and as `fetch`.
        """
        if (path := self._find(key, size)) is not None:
            return path
        with self._lock(_lock_name(key), wait=True):
            return self._fetch(key, size, fetch)

    def prefetch(self, key: str, size: int, fetch: FetchFunction) -> None:
        """As `get`, but leaves alone what another process or thread is fetching."""
        if self._find(key, size) is None:
            with self._lock(_lock_name(key), wait=False) as mine:
                if mine:
                    self._fetch(key, size, fetch)

    def _find(self, key: str, size: int) -> Path | None:
        path = self._folder / key
        try:
            if path.stat().st_size != size:
                return None
            os.utime(path)
        except FileNotFoundError:
            return None
        return path

    def _fetch(self, key: str, size: int, fetch: FetchFunction) -> Path:
        """With the key's lock held."""
        if (path := self._find(key, size)) is not None:
            return path
        path, part = self._folder / key, self._folder / f"{key}.{size}.part"
        try:
            while not self._make_room(part, size):
                # Others are fetching all that there is room for; what they have fetched may go.
                time.sleep(_WAIT_SECONDS)
            fetch(part)
            os.replace(part, path)
        except OSError as error:
            raise UserError(
                f"data.cache_dir {self._folder}: {error.strerror or error}. Free some space there, lower data.cache_size_gb, or "
                "choose another folder."
            ) from error
        return path

    def _make_room(self, part: Path, size: int) -> bool:
        """Drop what is needed for `part` to fit, and begin it. False while others hold too much."""
        with self._lock("cache", wait=True):
            files = sorted(_list_files(self._folder), key=lambda file: file[1])
            over = size + sum(bytes_ for path, _, bytes_ in files if path != part) - self._limit
            for path, _, bytes_ in files:
                if over <= 0:
                    break
                if path != part and self._drop(path):
                    over -= bytes_
            if over <= 0:
                part.touch()
            return over <= 0

    def _drop(self, path: Path) -> bool:
        if path.suffix == ".part":
            with self._lock(_lock_name(path.name), wait=False) as mine:
                if mine:
                    path.unlink(missing_ok=True)
                return mine
        path.unlink(missing_ok=True)
        return True

    @contextmanager
    def _lock(self, name: str, wait: bool) -> Iterator[bool]:
        """Hold a lock of this machine, which ends with the process; without `wait` False comes if another has it."""
        descriptor = os.open(self._folder / "locks" / name, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
            else:
                yield True
        finally:
            os.close(descriptor)


def _lock_name(key: str) -> str:
    # A file for each key would stay for ever: one that is removed may be held by a process that just opened it.
    return f"{int(key[:8], 16) % _LOCKS:02x}"


def _list_files(folder: Path) -> Iterator[tuple[Path, float, int]]:
    """(path, time of last use, bytes that it takes or will take)."""
    for entry in os.scandir(folder):
        # Whatever else lies there is not the cache's to drop.
        if name := _NAME.fullmatch(entry.name):
            try:
                found = entry.stat()
            except FileNotFoundError:
                continue
            yield Path(entry.path), found.st_mtime, int(name["part"]) if name["part"] else found.st_size
