"""Token stream of one split of a source: all its blocks one after another, read by byte offset."""

from __future__ import annotations

import os
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from kabrn_dist.data.index import Index, Shard, Source, SplitName
from kabrn_dist.data.open_files import OpenFiles
from kabrn_dist.data.shard_set import ShardSet
from kabrn_dist.utils.errors import UserError

# Network disks fail now and then: seconds to wait after each failed try.
_RETRY_AFTER_SECONDS = (0.1, 0.4)


class TokenStream:
    """Random access to the concatenated tokens of one split of a source. For one thread at a time.

    Args:
        shards: Shard set that holds the source.
        source: Its entry in the index.
        split: "train" or "validation".
        files: Open files, shared by all streams of a process; None for files of its own.

    Raises:
        UserError: if the split's name is unknown.
    """

    def __init__(self, shards: ShardSet, source: Source, split: SplitName, files: OpenFiles | None = None) -> None:
        self._set = shards
        self._files = OpenFiles() if files is None else files
        self._shards = source.split(split).shards
        blocks = [(number, *block) for number, shard in enumerate(self._shards) for block in shard.blocks]
        table = np.array(blocks, np.int64).reshape(-1, 4)
        self._first_blocks = np.cumsum([0, *(len(shard.blocks) for shard in self._shards)])
        self._shard, self._offset, self._mask = table[:, 0], table[:, 1], table[:, 3]
        self._start = np.concatenate([[0], np.cumsum(table[:, 2])])
        self._vocabulary = shards.index.vocabulary
        self._dtype = np.dtype("<u2" if shards.index.dtype == "uint16" else "<u4")

    def __len__(self) -> int:
        """Return the number of tokens in the split."""
        return int(self._start[-1])

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return tokens [start, stop) as int64 [stop - start].

        Raises:
            IndexError: if the range leaves the stream.
            UserError: if a shard cannot be read or holds a token outside the vocabulary.
        """
        self._check_range(start, stop)
        tokens = np.empty(stop - start, np.int64)
        for block, skip, count, offset in self._block_ranges(start, stop):
            tokens[offset : offset + count] = self._read_tokens(block, skip, count)
        return tokens

    def read_mask(self, start: int, stop: int) -> np.ndarray:
        """Return whether each of the tokens [start, stop) of a masked source carries loss, bool [stop - start].

        Raises:
            IndexError: if the range leaves the stream.
            UserError: if a shard cannot be read.
        """
        self._check_range(start, stop)
        mask = np.empty(stop - start, bool)
        for block, skip, count, offset in self._block_ranges(start, stop):
            first, last = skip // 8, (skip + count + 7) // 8
            content = self._read_bytes(block, int(self._mask[block]) + first, last - first)
            bits = np.unpackbits(np.frombuffer(content, np.uint8), bitorder="little")
            mask[offset : offset + count] = bits[skip % 8 : skip % 8 + count]
        return mask

    def list_shards(self, starts: np.ndarray, stops: np.ndarray) -> list[list[Shard]]:
        """Return the shards that each range [start, stop) of tokens touches. Reads nothing; any thread may call it."""
        first = self._shard[np.searchsorted(self._start, starts, "right") - 1]
        last = self._shard[np.searchsorted(self._start, stops, "left") - 1]
        return [list(self._shards[a : b + 1]) for a, b in zip(first.tolist(), last.tolist(), strict=True)]

    def close(self) -> None:
        """Close the files; reading opens them again."""
        self._files.close()

    def _check_range(self, start: int, stop: int) -> None:
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"tokens [{start}, {stop}) of a stream of {len(self)}")

    def _block_ranges(self, start: int, stop: int) -> Iterator[tuple[int, int, int, int]]:
        """Yield (block, tokens to skip in it, tokens to take, offset in the range) of each block of the range."""
        block = int(np.searchsorted(self._start, start, "right")) - 1
        position = start
        while position < stop:
            end = min(stop, int(self._start[block + 1]))
            yield block, position - int(self._start[block]), end - position, position - start
            position, block = end, block + 1

    def _read_tokens(self, block: int, skip: int, count: int) -> np.ndarray:
        size = self._dtype.itemsize
        content = self._read_bytes(block, int(self._offset[block]) + skip * size, count * size)
        tokens = np.frombuffer(content, self._dtype)
        if tokens.max() >= self._vocabulary:
            raise self._damaged(block, f"token {tokens.max()} in a vocabulary of {self._vocabulary}")
        return tokens

    def _read_bytes(self, block: int, offset: int, count: int) -> bytes:
        shard = self._shards[int(self._shard[block])]
        for pause in (*_RETRY_AFTER_SECONDS, None):
            try:
                content = os.pread(self._files.descriptor(self._set, shard), count, offset)
                problem = f"{len(content)} bytes instead of {count} at byte {offset}"
            except OSError as error:
                content, problem = b"", str(error.strerror)
            if len(content) == count:
                return content
            # A stale network handle never recovers, so the next try opens the file again.
            self._files.drop(self._set, shard)
            if pause is not None:
                time.sleep(pause)
        raise self._damaged(block, problem)

    def _damaged(self, block: int, problem: str) -> UserError:
        number = int(self._shard[block])
        shard, location = self._shards[number], self._set.location
        return UserError(
            f"{location}/{shard.name} block {block - int(self._first_blocks[number]):06d}: {problem}; find every bad "
            f"shard with `mixkabrn inspect {location}` and copy it again"
        )


def stream_naive(folder: Path, index: Index, split: SplitName, source: str | None = None) -> np.ndarray:
    """Return the stream of a source, int64 [tokens], by unpacking every tar: the reference for `TokenStream`.

    Args:
        folder: Folder of the shards.
        index: Contents of the folder.
        split: "train" or "validation".
        source: Name of the source; None for all sources, one after another.
    """
    dtype = "<u2" if index.dtype == "uint16" else "<u4"
    parts = [np.frombuffer(content, dtype) for content in _members(folder, index, split, source, ".tok")]
    return np.concatenate(parts).astype(np.int64) if parts else np.empty(0, np.int64)


def mask_naive(folder: Path, index: Index, split: SplitName, source: str) -> np.ndarray:
    """Return the loss mask of a masked source, bool [tokens], bit by bit from every tar."""
    sizes = [tokens for shard in index.source(source).split(split).shards for _, tokens, _ in shard.blocks]
    masks = _members(folder, index, split, source, ".use")
    bits = [mask[n // 8] >> (n % 8) & 1 for mask, size in zip(masks, sizes, strict=True) for n in range(size)]
    return np.array(bits, bool)


def _members(folder: Path, index: Index, split: SplitName, source: str | None, suffix: str) -> Iterator[bytes]:
    for each in index.sources if source is None else [index.source(source)]:
        for shard in each.split(split).shards:
            with tarfile.open(folder / shard.name) as tar:
                for member in tar:
                    file = tar.extractfile(member)
                    if file is not None and member.name.endswith(suffix):
                        yield file.read()
