"""Pieces of shards: what workers share out to encode, so that a few large shards occupy all of them to the end.

A piece is a file of encoded documents, one after another, each with its numbers of tokens and of bytes of text and
whether it has a loss mask (little-endian int64), its tokens, and its loss mask (a byte each).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_prep.shards import TokenizedDocument
from data_prep.streams import ShardTask
from kabrn_dist.utils.atomic_io import atomic_open

# With this many, workers end at about the same time. Each piece looks into all runs, so there are no more than needed.
PIECES = 256
MIN_PIECE_BYTES = 2 << 20

_HEADER = np.dtype("<i8")
_HEADER_NUMBERS = 3


class ShardPiece(NamedTuple):
    """A part of a shard: the documents in a range of sort keys.

    Attributes:
        shard: number of the shard in the plan.
        task: the shard.
        number: number of the piece within the shard.
        low: smallest sort key.
        high: end of the range.
        bytes: about how many bytes of text it has.
    """

    shard: int
    task: ShardTask
    number: int
    low: int
    high: int
    bytes: int


class EncodedDocument(NamedTuple):
    """A document as a piece holds it.

    Attributes:
        document: its tokens and loss mask.
        text_bytes: bytes of its text.
    """

    document: TokenizedDocument
    text_bytes: int


def divide_shards(tasks: Sequence[ShardTask]) -> list[list[ShardPiece]]:
    """Return the pieces of each shard. They depend on the plan alone, not on the number of workers."""
    piece_bytes = max(MIN_PIECE_BYTES, sum(task.bytes for task in tasks) // PIECES)
    return [_divide_shard(number, task, -(-task.bytes // piece_bytes)) for number, task in enumerate(tasks)]


def _divide_shard(shard: int, task: ShardTask, count: int) -> list[ShardPiece]:
    # Sort keys are hashes: equal ranges hold about equally much.
    edges = [task.low + (task.high - task.low) * part // count for part in range(count + 1)]
    return [
        ShardPiece(shard, task, number, edges[number], edges[number + 1], task.bytes // count)
        for number in range(count)
    ]


def write_piece(path: Path, documents: Iterable[EncodedDocument]) -> None:
    """Write a piece. One document at a time is in memory.

    Raises:
        UserError: the disk refuses.
    """
    with atomic_open(path) as file:
        for (tokens, mask), text_bytes in documents:
            file.write(np.array([len(tokens), text_bytes, mask is not None], _HEADER).tobytes())
            file.write(tokens.tobytes())
            if mask is not None:
                file.write(mask.tobytes())


def read_piece(path: Path, dtype: np.dtype) -> Iterator[EncodedDocument]:
    """Yield the documents of a piece.

    Args:
        path: the file.
        dtype: type of the tokens.
    """
    with path.open("rb") as file:
        while header := file.read(_HEADER_NUMBERS * _HEADER.itemsize):
            count, text_bytes, is_masked = np.frombuffer(header, _HEADER).tolist()
            tokens = np.frombuffer(file.read(count * dtype.itemsize), dtype)
            mask = np.frombuffer(file.read(count), bool) if is_masked else None
            yield EncodedDocument(TokenizedDocument(tokens, mask), text_bytes)
