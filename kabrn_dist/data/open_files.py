"""Files of shards that a process keeps open: few enough for the whole process, whatever the number of sources."""

from __future__ import annotations

import errno
import resource
from collections import OrderedDict
from io import FileIO

from kabrn_dist.data.index import Shard
from kabrn_dist.data.shard_set import MAX_OPEN_FILES, ShardSet
from kabrn_dist.data.shard_verifier import OpenedShard, ShardVerifier
from kabrn_dist.utils.errors import UserError
from kabrn_dist.utils.safe_open import open_regular

# The rest is for libraries, sockets to other ranks, checkpoints and logs.
_PART_OF_LIMIT = 4


class OpenFiles:
    """The least recently used of all open shards is closed for the next one. For one thread at a time.

    Args:
        verifier: Compares the content of what is opened with the indexes; None to read without.
        limit: Most files to keep open; None for a quarter of what the system allows this process.
    """

    def __init__(self, verifier: ShardVerifier | None = None, limit: int | None = None) -> None:
        self._verifier = verifier
        self._limit = _default_limit() if limit is None else limit
        self._files: OrderedDict[tuple[int, str], tuple[ShardSet, FileIO]] = OrderedDict()

    def __len__(self) -> int:
        """Return the number of open files."""
        return len(self._files)

    def descriptor(self, shards: ShardSet, shard: Shard) -> int:
        """Return the descriptor of a shard's file, opening it if needed.

        Raises:
            OSError: from the file system, and for what is not a regular file.
            UserError: if a shard cannot be downloaded, or the process has no room for another file.
        """
        key = (id(shards), shard.name)
        if key not in self._files:
            self._make_room(shards)
            path = shards.locate(shard)
            self._files[key] = (shards, self._open(OpenedShard(path, shard, shards.is_remote)))
        self._files.move_to_end(key)
        return self._files[key][1].fileno()

    def drop(self, shards: ShardSet, shard: Shard) -> None:
        """Close a shard's file, if it is open."""
        _, file = self._files.pop((id(shards), shard.name), (None, None))
        if file is not None:
            file.close()

    def close(self) -> None:
        """Close all files; reading opens them again."""
        while self._files:
            self._close(next(iter(self._files)))

    def is_verifying(self) -> bool:
        """Return whether the content of a shard that was opened is still to be compared with its index."""
        return self._verifier is not None and self._verifier.is_pending()

    def check(self) -> None:
        """Do nothing unless a shard that was opened turned out to be damaged.

        Raises:
            UserError: if one did.
        """
        if self._verifier is not None:
            self._verifier.check()

    def _make_room(self, shards: ShardSet) -> None:
        """Close files until one of this set can be opened."""
        if shards.max_open_files < self._limit:
            same = [key for key in self._files if key[0] == id(shards)]
            for key in same[: max(0, len(same) + 1 - shards.max_open_files)]:
                self._close(key)
        while len(self._files) >= self._limit:
            self._close(next(iter(self._files)))

    def _open(self, opened: OpenedShard) -> FileIO:
        while True:
            try:
                file = open_regular(opened.path)
            except OSError as error:
                if error.errno not in (errno.EMFILE, errno.ENFILE):
                    raise
                # Others in this process have opened more than was foreseen.
                if not self._files:
                    raise UserError(
                        f"{opened.path}: this process has no room for another open file "
                        f"(ulimit -n {resource.getrlimit(resource.RLIMIT_NOFILE)[0]}); raise it, as with ulimit -n 4096"
                    ) from error
                self._limit = max(1, len(self._files) // 2)
                while len(self._files) >= self._limit:
                    self._close(next(iter(self._files)))
                continue
            if self._verifier is not None:
                self._verifier.add(opened)
            return file

    def _close(self, key: tuple[int, str]) -> None:
        self._files.pop(key)[1].close()


def _default_limit() -> int:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MAX_OPEN_FILES if soft == resource.RLIM_INFINITY else max(1, min(MAX_OPEN_FILES, soft // _PART_OF_LIMIT))
