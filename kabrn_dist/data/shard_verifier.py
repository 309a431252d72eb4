"""Verification of shards while they are read: a thread hashes each that a run has opened, once on each machine.

Reading does not wait for it, so a run on a large set starts at once. Whoever saves what was computed from the tokens
asks `is_pending` and `check` first: no checkpoint holds anything of a shard whose content is not that of the index.
"""

from __future__ import annotations

import errno
import threading
import time
from pathlib import Path
from typing import NamedTuple

from kabrn_dist.data.index import Shard
from kabrn_dist.data.verified_record import FileIdentity, VerifiedRecord, identify
from kabrn_dist.utils.atomic_io import sha256_of
from kabrn_dist.utils.errors import UserError

# Network disks fail now and then: seconds to wait after each failed try.
_RETRY_AFTER_SECONDS = (0.1, 0.4, 2.0)


class OpenedShard(NamedTuple):
    """A shard that has been opened for reading.

    Attributes:
        path: Its file.
        shard: Its entry in the index.
        is_cached: Whether the file is in the cache of a remote set, which may remove it.
    """

    path: Path
    shard: Shard
    is_cached: bool


class ShardVerifier:
    """Compares the content of opened shards with the hashes of their indexes. Any thread may call it.

    Args:
        record: What was verified on this machine; None for the record in the user's cache folder.
    """

    def __init__(self, record: VerifiedRecord | None = None) -> None:
        self._record = record
        self._verified: dict[Path, FileIdentity] = {}
        self._waiting: dict[Path, OpenedShard] = {}
        self._failure: Exception | None = None
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def add(self, opened: OpenedShard) -> None:
        """Have a shard hashed that is being opened, unless its file has not changed since that was done."""
        with self._lock:
            known = self._verified.get(opened.path)
            try:
                if known is not None and known == identify(opened.path, not opened.is_cached):
                    return
            except OSError:
                # Whoever opens it will say so.
                return
            self._waiting.setdefault(opened.path, opened)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="verify", daemon=True)
                self._thread.start()

    def is_pending(self) -> bool:
        """Return whether an opened shard is still to be hashed. Never blocks."""
        with self._lock:
            return self._thread is not None and self._failure is None

    def check(self) -> None:
        """Do nothing unless an opened shard turned out to be damaged.

        Raises:
            UserError: if one did.
        """
        if self._failure is not None:
            raise self._failure

    def wait(self) -> None:
        """Wait until every opened shard has been hashed.

        Raises:
            UserError: if one is damaged.
        """
        thread = self._thread
        if thread is not None:
            thread.join()
        self.check()

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._waiting or self._failure is not None:
                    self._thread = None
                    return
                opened = next(iter(self._waiting.values()))
            try:
                self._verify(opened)
            except Exception as error:
                self._failure = error
            with self._lock:
                del self._waiting[opened.path]

    def _verify(self, opened: OpenedShard) -> None:
        path, shard, record = opened.path, opened.shard, self._open_record()
        try:
            identity = identify(path, not opened.is_cached)
            if not record.holds(path, identity, shard.sha256):
                with record.turn():
                    # Another process may have done it meanwhile.
                    if not record.holds(path, identity, shard.sha256):
                        self._hash(opened, identity)
        except FileNotFoundError as error:
            # The cache has removed it; when it comes back, its hash is compared on the way.
            if not opened.is_cached:
                raise UserError(f"{path}: was removed while it was read; copy this shard again") from error
            return
        except OSError as error:
            is_full = error.errno in (errno.EMFILE, errno.ENFILE)
            remedy = "raise the limit on open files (ulimit -n)" if is_full else "copy this shard again"
            raise UserError(f"{path}: cannot be read ({error.strerror}); {remedy}") from error
        self._verified[path] = identity

    def _open_record(self) -> VerifiedRecord:
        """A corpus that is opened only to be counted leaves no file."""
        self._record = self._record or VerifiedRecord()
        return self._record

    def _hash(self, opened: OpenedShard, identity: FileIdentity) -> None:
        started, digest = time.time(), _hash_with_retries(opened.path)
        if digest != opened.shard.sha256:
            remedy = "remove this file, and it is downloaded again" if opened.is_cached else _remedy(opened.path)
            raise UserError(
                f"{opened.path}: its sha256 is {digest[:12]}…, the index says {opened.shard.sha256[:12]}…: the shard "
                f"{opened.shard.name} is damaged; {remedy}"
            )
        self._open_record().add(opened.path, identity, digest, started)


def _hash_with_retries(path: Path) -> str:
    for pause in _RETRY_AFTER_SECONDS:
        try:
            return sha256_of(path)
        except FileNotFoundError:
            raise
        except OSError:
            time.sleep(pause)
    return sha256_of(path)


def _remedy(path: Path) -> str:
    return f"find every bad shard with `mixkabrn inspect {path.parent}`, copy them again, and resume"
