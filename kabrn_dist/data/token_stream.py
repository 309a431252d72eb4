"""Token stream of one split of some sources: all their blocks one after another, read by byte offset."""

from __future__ import annotations

import os
import tarfile
import time
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kabrn_dist.data.index import Index, Shard, Source, SplitName
from kabrn_dist.data.open_files import OpenFiles
from kabrn_dist.data.shard_set import ShardSet
from kabrn_dist.utils.errors import UserError

# Network disks fail now and then: seconds to wait after each failed try.
_RETRY_AFTER_SECONDS = (0.1, 0.4)


class _Pieces(NamedTuple):
    """Ranges of tokens that lie within one block each, int64 [P]: block, tokens to skip in it, tokens to take."""

    blocks: np.ndarray
    skips: np.ndarray
    counts: np.ndarray


class TokenStream:
    """Random access to the tokens of one split of some sources, one after another. For one thread at a time.

    Python's work for a sequence costs more than copying its bytes, so many are read at once: their places are computed
    in arrays, and what is left for each is one system call.

    Args:
        sources: Sources, each with the shard set that holds it. All have the same vocabulary.
        split: "train" or "validation".
        files: Open files, shared by all streams of a process; None for files of its own.

    Attributes:
        edges: First token of each source, and the end of the last one, int64 [S + 1].
        dtype: Type of the tokens on disk.

    Raises:
        UserError: if the split's name is unknown.
    """

    def __init__(
        self, sources: Sequence[tuple[ShardSet, Source]], split: SplitName, files: OpenFiles | None = None
    ) -> None:
        self._files = OpenFiles() if files is None else files
        self._shards = [(shards, shard) for shards, source in sources for shard in source.split(split).shards]
        sizes = [len(shard.blocks) for _, shard in self._shards]
        self._first_blocks = np.cumsum([0, *sizes])
        # The index lists of each block its offset, its tokens and the offset of its mask.
        numbers = chain.from_iterable(chain.from_iterable(shard.blocks for _, shard in self._shards))
        self._offset, tokens, self._mask = np.fromiter(numbers, np.int64).reshape(-1, 3).T.copy()
        self._shard = np.repeat(np.arange(len(sizes)), sizes)
        self._start = np.concatenate([[0], np.cumsum(tokens)])
        self.edges = np.cumsum([0, *(source.split(split).tokens for _, source in sources)])
        index = sources[0][0].index
        self._vocabulary, self._is_masked = index.vocabulary, any(source.masked for _, source in sources)
        self.dtype = np.dtype("<u2" if index.dtype == "uint16" else "<u4")

    def __len__(self) -> int:
        """Return the number of tokens."""
        return int(self._start[-1])

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return tokens [start, stop) as int64 [stop - start].

        Raises:
            IndexError: if the range leaves the stream.
            UserError: if a shard cannot be read or holds a token outside the vocabulary.
        """
        tokens, _ = self.read_rows(np.array([start], np.int64), stop - start)
        return tokens[0].astype(np.int64)

    def read_rows(self, starts: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Return the `length` tokens from each of some places on.

        Args:
            starts: First token of each row, int64 [N].
            length: Tokens of a row.

        Returns:
            Tokens in their type on disk [N, length], and whether each carries loss, bool [N, length]; None if no source
            has a mask.

        Raises:
            IndexError: if a row leaves the stream.
            UserError: if a shard cannot be read or holds a token outside the vocabulary.
        """
        shape = (len(starts), length)
        if length < 0 or (starts.size and not 0 <= starts.min() <= starts.max() <= len(self) - length):
            raise IndexError(f"{length} tokens from {starts.min()} to {starts.max()} on of a stream of {len(self)}")
        if not starts.size or not length:
            return np.empty(shape, self.dtype), np.empty(shape, bool) if self._is_masked else None
        pieces = self._divide(starts, length)
        size = self.dtype.itemsize
        offsets = self._offset[pieces.blocks] + pieces.skips * size
        tokens = np.frombuffer(b"".join(self._read_pieces(pieces.blocks, offsets, pieces.counts * size)), self.dtype)
        if tokens.max() >= self._vocabulary:
            piece = np.searchsorted(np.cumsum(pieces.counts), tokens.argmax(), "right")
            problem = f"token {tokens.max()} in a vocabulary of {self._vocabulary}"
            raise self._damaged(int(pieces.blocks[piece]), problem)
        return tokens.reshape(shape), self._read_mask(pieces).reshape(shape) if self._is_masked else None

    def list_shards(self, starts: np.ndarray, stops: np.ndarray) -> list[list[tuple[ShardSet, Shard]]]:
        """Return the shards that each range [start, stop) of tokens touches. Reads nothing; any thread may call it."""
        first = self._shard[np.searchsorted(self._start, starts, "right") - 1]
        last = self._shard[np.searchsorted(self._start, stops, "left") - 1]
        return [self._shards[a : b + 1] for a, b in zip(first.tolist(), last.tolist(), strict=True)]

    def close(self) -> None:
        """Close the files; reading opens them again."""
        self._files.close()

    def _divide(self, starts: np.ndarray, length: int) -> _Pieces:
        """Divide rows, one after another, at the edges of blocks."""
        first = np.searchsorted(self._start, starts, "right") - 1
        stops = starts + length
        pieces = np.searchsorted(self._start, stops, "left") - first
        row = np.repeat(np.arange(len(starts)), pieces)
        blocks = first[row] + np.arange(len(row)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
        begins = self._start[blocks]
        skips = np.maximum(starts[row] - begins, 0)
        return _Pieces(blocks, skips, np.minimum(stops[row], self._start[blocks + 1]) - begins - skips)

    def _read_mask(self, pieces: _Pieces) -> np.ndarray:
        """Return whether each token of the pieces carries loss, bool."""
        offsets, skips = self._mask[pieces.blocks], pieces.skips
        mask = np.ones(pieces.counts.sum(), bool)
        # Only blocks of masked sources have an offset.
        masked = offsets.nonzero()[0]
        first, ends = skips[masked] // 8, np.cumsum(pieces.counts)[masked]
        sizes = (skips[masked] + pieces.counts[masked] + 7) // 8 - first
        contents = self._read_pieces(pieces.blocks[masked], offsets[masked] + first, sizes)
        bits = np.unpackbits(np.frombuffer(b"".join(contents), np.uint8), bitorder="little").view(bool)
        places = 8 * (np.cumsum(sizes) - sizes) + skips[masked] % 8
        for place, count, end in zip(places.tolist(), pieces.counts[masked].tolist(), ends.tolist(), strict=True):
            mask[end - count : end] = bits[place : place + count]
        return mask

    def _read_pieces(self, blocks: np.ndarray, offsets: np.ndarray, sizes: np.ndarray) -> list[bytes]:
        """Return `sizes` bytes at `offsets` in the shards of `blocks`."""
        shards = self._shard[blocks]
        # Shard by shard: each is looked up, and opened if it has been closed, once.
        order = shards.argsort(kind="stable")
        contents = [b""] * len(order)
        current = descriptor = -1
        wanted = (part[order].tolist() for part in (shards, offsets, sizes))
        for place, shard, offset, size in zip(order.tolist(), *wanted, strict=True):
            try:
                if shard != current:
                    descriptor, current = self._files.descriptor(*self._shards[shard]), shard
                content = os.pread(descriptor, size, offset)
            except OSError:
                content = b""
            if len(content) != size:
                content, current = self._read_patiently(int(blocks[place]), offset, size), -1
            contents[place] = content
        return contents

    def _read_patiently(self, block: int, offset: int, count: int) -> bytes:
        shards, shard = self._shards[int(self._shard[block])]
        for pause in (*_RETRY_AFTER_SECONDS, None):
            try:
                content = os.pread(self._files.descriptor(shards, shard), count, offset)
                problem = f"{len(content)} bytes instead of {count} at byte {offset}"
            except OSError as error:
                content, problem = b"", str(error.strerror)
            if len(content) == count:
                return content
            # A stale network handle never recovers, so the next try opens the file again.
            self._files.drop(shards, shard)
            if pause is not None:
                time.sleep(pause)
        raise self._damaged(block, problem)

    def _damaged(self, block: int, problem: str) -> UserError:
        number = int(self._shard[block])
        shards, shard = self._shards[number]
        return UserError(
            f"{shards.location}/{shard.name} block {block - int(self._first_blocks[number]):06d}: {problem}; find "
            f"every bad shard with `mixkabrn inspect {shards.location}` and copy it again"
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
