"""Record of the shards that were hashed on this machine and had the right content.

One JSON object a line, appended whole: a line that a crash cut off is no JSON and counts for nothing. An entry holds
only while the file keeps its inode, size and times, and only for the hash that it was compared with.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import NamedTuple

from kabrn_dist.utils.cache_folder import cache_folder

# A file that changes twice within the resolution of its times looks unchanged (git calls this racy).
RESOLUTION_SECONDS = 2.0
# A quarter of a million entries; then the record begins anew.
_BYTES_LIMIT = 64 << 20


class FileIdentity(NamedTuple):
    """What changes when a file is written or replaced.

    Attributes:
        inode: Inode.
        size: Size in bytes.
        modified_ns: Time of the last change of the content.
        changed_ns: Time of the last change of the inode, which no program can set; 0 if it is not compared.
    """

    inode: int
    size: int
    modified_ns: int
    changed_ns: int


def identify(path: Path, compare_inode_time: bool = True) -> FileIdentity:
    """Return the identity of a file.

    Args:
        path: File.
        compare_inode_time: Whether the inode's time counts; not in a cache, where each use sets it.

    Raises:
        OSError: from the file system.
    """
    status = path.stat()
    return FileIdentity(
        status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns if compare_inode_time else 0
    )


class VerifiedRecord:
    """The record of one machine, shared by its processes. Where it cannot be kept, every process hashes for itself.

    Args:
        folder: Folder of the record; None for the user's cache folder.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._hashes: dict[str, tuple[str, list[int]]] = {}
        self._read_bytes = 0
        self._file = _open_record(folder)

    def holds(self, path: Path, identity: FileIdentity, sha256: str) -> bool:
        """Return whether a file with this identity had this hash."""
        self._refresh()
        return self._hashes.get(os.path.realpath(path)) == (sha256, list(identity))

    def add(self, path: Path, identity: FileIdentity, sha256: str, started: float) -> None:
        """Record that a file had a hash.

        Args:
            path: The file.
            identity: Its identity before it was hashed.
            sha256: Its hash.
            started: When hashing began, in seconds since the epoch.
        """
        newest = max(identity.modified_ns, identity.changed_ns) / 1e9
        if self._file is None or newest > started - RESOLUTION_SECONDS:
            return
        name = os.path.realpath(path)
        line = json.dumps({"path": name, "sha256": sha256, "identity": list(identity)})
        # On a full disk the file will be hashed again.
        with suppress(OSError):
            os.write(self._file.fileno(), f"\n{line}\n".encode())

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Wait until no other process of this machine hashes: one shard at a time leaves the cores to training."""
        self._lock(fcntl.LOCK_EX)
        try:
            yield
        finally:
            self._lock(fcntl.LOCK_UN)

    def _lock(self, operation: int) -> None:
        if self._file is not None:
            # On a file system without locks processes may hash the same shard twice.
            with suppress(OSError):
                fcntl.flock(self._file.fileno(), operation)

    def _refresh(self) -> None:
        """Read what has been appended since the last time."""
        if self._file is None:
            return
        try:
            size = os.fstat(self._file.fileno()).st_size
            if size > _BYTES_LIMIT:
                os.ftruncate(self._file.fileno(), 0)
                size = 0
            if size < self._read_bytes:
                self._hashes, self._read_bytes = {}, 0
            content = os.pread(self._file.fileno(), size - self._read_bytes, self._read_bytes)
        except OSError:
            return
        whole = content[: content.rfind(b"\n") + 1]
        self._read_bytes += len(whole)
        for line in whole.splitlines():
            self._parse(line)

    def _parse(self, line: bytes) -> None:
        try:
            entry = json.loads(line)
            self._hashes[str(entry["path"])] = (str(entry["sha256"]), [int(part) for part in entry["identity"]])
        except (ValueError, KeyError, TypeError):
            # Cut off, or written by another version.
            return


def _open_record(folder: Path | None) -> FileIO | None:
    try:
        folder = folder or cache_folder() / "verified"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        # A home folder may be shared by machines, each of which has disks of its own.
        path = folder / f"{socket.gethostname()}.jsonl"
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NONBLOCK
        descriptor = os.open(path, flags, 0o600)
    except (OSError, RuntimeError):
        return None
    return FileIO(descriptor, "r+")
