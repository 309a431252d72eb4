"""The token stream of a split: all its blocks one after another, read by byte offset."""

from __future__ import annotations

import os
import tarfile
import time
from collections import OrderedDict
from io import FileIO
from pathlib import Path

import numpy as np

from kabrn_dist.data.index import Index, SplitName
from kabrn_dist.errors import UserError

# Network disks have bad moments: this long after a failed try comes the next one.
_RETRY_AFTER_SECONDS = (0.1, 0.4)
_OPEN_FILES = 64


class TokenStream:
    """Random access to the concatenated tokens of a split. For one thread at a time.

    Raises UserError when the split's name is unknown.
    """

    def __init__(self, folder: Path, index: Index, split: SplitName) -> None:
        shards = index.split(split).shards
        blocks = [(number, *block) for number, shard in enumerate(shards) for block in shard.blocks]
        table = np.array(blocks, np.int64).reshape(-1, 3)
        self._paths = [folder / shard.name for shard in shards]
        self._first_blocks = np.cumsum([0, *(len(shard.blocks) for shard in shards)])
        self._shard = table[:, 0]
        self._offset = table[:, 1]
        self._start = np.concatenate([[0], np.cumsum(table[:, 2])])
        self._vocabulary = index.vocabulary
        self._dtype = np.dtype("<u2" if index.dtype == "uint16" else "<u4")
        self._files: OrderedDict[int, FileIO] = OrderedDict()

    def __len__(self) -> int:
        """Tokens in the split."""
        return int(self._start[-1])

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return tokens [start, stop) as int64 [stop - start].

        Raises IndexError when the range leaves the stream, UserError when a shard cannot be read or holds a
        token outside the vocabulary.
        """
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"tokens [{start}, {stop}) of a stream of {len(self)}")
        tokens = np.empty(stop - start, np.int64)
        block = int(np.searchsorted(self._start, start, "right")) - 1
        at = start
        while at < stop:
            end = min(stop, int(self._start[block + 1]))
            tokens[at - start : end - start] = self._read_block(block, at - int(self._start[block]), end - at)
            at, block = end, block + 1
        return tokens

    def close(self) -> None:
        """Close the files; reading opens them again."""
        while self._files:
            self._files.popitem()[1].close()

    def _read_block(self, block: int, skip: int, count: int) -> np.ndarray:
        shard = int(self._shard[block])
        offset = int(self._offset[block]) + skip * self._dtype.itemsize
        wanted = count * self._dtype.itemsize
        for pause in (*_RETRY_AFTER_SECONDS, None):
            try:
                content = os.pread(self._file(shard).fileno(), wanted, offset)
                problem = f"{len(content)} bytes instead of {wanted} at byte {offset}"
            except OSError as error:
                content, problem = b"", str(error.strerror)
            if len(content) == wanted:
                break
            # A stale network handle never recovers, so the next try opens the file anew.
            if shard in self._files:
                self._files.pop(shard).close()
            if pause is None:
                raise self._damaged(block, problem)
            time.sleep(pause)
        tokens = np.frombuffer(content, self._dtype)
        if tokens.max() >= self._vocabulary:
            raise self._damaged(block, f"token {tokens.max()} in a vocabulary of {self._vocabulary}")
        return tokens

    def _file(self, shard: int) -> FileIO:
        if shard not in self._files:
            if len(self._files) >= _OPEN_FILES:
                self._files.popitem(last=False)[1].close()
            self._files[shard] = FileIO(self._paths[shard], "r")
        self._files.move_to_end(shard)
        return self._files[shard]

    def _damaged(self, block: int, problem: str) -> UserError:
        shard = int(self._shard[block])
        path = self._paths[shard]
        return UserError(
            f"{path} block {block - int(self._first_blocks[shard]):06d}: {problem}. Find every bad shard "
            f"with `python -m data_prep inspect {path.parent}` and copy it again."
        )


def stream_naive(folder: Path, index: Index, split: SplitName) -> np.ndarray:
    """Return the whole stream, int64 [tokens], by unpacking every tar: what `TokenStream` must agree with."""
    parts = []
    for shard in index.split(split).shards:
        with tarfile.open(folder / shard.name) as tar:
            for member in tar:
                file = tar.extractfile(member)
                if file is not None and member.name.endswith(".tok"):
                    parts.append(np.frombuffer(file.read(), "<u2" if index.dtype == "uint16" else "<u4"))
    return np.concatenate(parts).astype(np.int64) if parts else np.empty(0, np.int64)
