"""Cache of downloaded files, bounded and shared by all processes of this machine; each file is whole or absent.

`KEY` is a whole file; `KEY.SIZE.part` one that is being downloaded, which counts with its final size.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from kabrn_dist.utils.errors import UserError
from kabrn_dist.utils.lock import flock_exclusive

FetchFunction = Callable[[Path], None]

_NAME = re.compile(r"[0-9a-f]{64}(\.(?P<part>[0-9]+)\.part)?")
_LOCKS = 256
_WAIT_SECONDS = 0.05


class FileCache:
    """Files of at most `limit` bytes in a folder, least recently used first out. Any thread may call it.

    A file that is evicted while a process has it open stays readable there.

    Args:
        folder: Folder of the cache; made if needed.
        limit: Most bytes to keep.

    Raises:
        UserError: if the folder cannot be made.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self._folder, self._limit = folder, limit
        try:
            (folder / "locks").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"data.cache_dir {folder}: {error.strerror}; choose a folder you can write to") from error

    def get(self, key: str, size: int, fetch: FetchFunction) -> Path:
        """Return a file, fetching it if needed. One process of the machine fetches, the others wait.

        Args:
            key: sha256 of the file.
            size: Its size in bytes.
            fetch: Completes the partial file that it is given.

        Raises:
            UserError: if the disk is full, and as `fetch`.
        """
        if (path := self._find(key, size)) is not None:
            return path
        with self._lock(_lock_name(key), wait=True):
            return self._fetch(key, size, fetch)

    def prefetch(self, key: str, size: int, fetch: FetchFunction) -> None:
        """Fetch a file as `get` does, unless another process or thread is fetching it.

        Args:
            key: As for `get`.
            size: As for `get`.
            fetch: As for `get`.

        Raises:
            UserError: as `get`.
        """
        if self._find(key, size) is None:
            with self._lock(_lock_name(key), wait=False) as locked:
                if locked:
                    self._fetch(key, size, fetch)

    def _find(self, key: str, size: int) -> Path | None:
        path = self._folder / key
        try:
            status = path.stat()
            if status.st_size != size:
                return None
            # The time of the last change stays: it tells whether the content was verified.
            os.utime(path, ns=(time.time_ns(), status.st_mtime_ns))
        except FileNotFoundError:
            return None
        return path

    def _fetch(self, key: str, size: int, fetch: FetchFunction) -> Path:
        """Fetch with the key's lock held."""
        if (path := self._find(key, size)) is not None:
            return path
        path, part = self._folder / key, self._folder / f"{key}.{size}.part"
        try:
            while not self._make_room(part, size):
                # Others are fetching all that there is room for; what they have fetched may be evicted.
                time.sleep(_WAIT_SECONDS)
            fetch(part)
            os.replace(part, path)
        except OSError as error:
            raise UserError(
                f"data.cache_dir {self._folder}: {error.strerror or error}; free some space there, lower "
                "data.cache_size_gb, or choose another folder"
            ) from error
        return path

    def _make_room(self, part: Path, size: int) -> bool:
        """Evict files until `part` fits, and create it. False while other processes hold too much."""
        with self._lock("cache", wait=True):
            files = sorted(_list_files(self._folder), key=lambda file: file[1])
            excess = size + sum(file_bytes for path, _, file_bytes in files if path != part) - self._limit
            for path, _, file_bytes in files:
                if excess <= 0:
                    break
                if path != part and self._evict(path):
                    excess -= file_bytes
            if excess <= 0:
                part.touch()
            return excess <= 0

    def _evict(self, path: Path) -> bool:
        if path.suffix == ".part":
            with self._lock(_lock_name(path.name), wait=False) as locked:
                if locked:
                    path.unlink(missing_ok=True)
                return locked
        path.unlink(missing_ok=True)
        return True

    @contextmanager
    def _lock(self, name: str, wait: bool) -> Iterator[bool]:
        """Hold a lock of this machine; without `wait` yield False if another process has it."""
        descriptor = os.open(self._folder / "locks" / name, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            yield flock_exclusive(descriptor, timeout=None if wait else 0.0)
        finally:
            os.close(descriptor)


def _lock_name(key: str) -> str:
    # A file for each key would stay for ever: removing one that a process has just opened would break the lock.
    return f"{int(key[:8], 16) % _LOCKS:02x}"


def _list_files(folder: Path) -> Iterator[tuple[Path, float, int]]:
    """Yield (path, time of last use, bytes that it takes or will take)."""
    for entry in os.scandir(folder):
        # Other files in the folder are not the cache's to evict.
        if name := _NAME.fullmatch(entry.name):
            try:
                stat = entry.stat()
            except FileNotFoundError:
                continue
            yield (
                Path(entry.path),
                max(stat.st_atime, stat.st_mtime),
                int(name["part"]) if name["part"] else stat.st_size,
            )
