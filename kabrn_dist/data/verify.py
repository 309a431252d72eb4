"""The thorough check of a shard set: every byte is read."""

from __future__ import annotations

import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from kabrn_dist.data.files import sha256_of
from kabrn_dist.data.index import Index, Shard, check_shards
from kabrn_dist.errors import UserError


def verify_shards(folder: Path, index: Index, progress: Callable[[int], None] = lambda read: None) -> None:
    """Check every shard's sha256, and that its blocks and documents lie where the index says.

    `progress` is called with the number of bytes just hashed. Raises UserError naming the first bad shard.
    """
    check_shards(folder, index)
    for shard in (*index.train.shards, *index.validation.shards):
        path = folder / shard.name
        try:
            found = sha256_of(path, progress)
            if found != shard.sha256:
                raise _damaged(path, f"sha256 is {found[:12]}…, the index says {shard.sha256[:12]}…")
            _verify_blocks(path, index, shard)
        except (OSError, tarfile.TarError) as error:
            raise _damaged(path, str(error)) from error


def _verify_blocks(path: Path, index: Index, shard: Shard) -> None:
    documents = 0
    with tarfile.open(path, "r:") as tar:
        members = tar.getmembers()
        if len(members) != 2 * len(shard.blocks):
            raise _damaged(path, f"{len(members)} members, {len(shard.blocks)} blocks need {2 * len(shard.blocks)}")
        for number, (offset, tokens) in enumerate(shard.blocks):
            lengths, words = members[2 * number : 2 * number + 2]
            if (lengths.name, words.name) != (f"{number:06d}.len", f"{number:06d}.tok"):
                raise _damaged(path, f"block {number} holds {lengths.name!r} and {words.name!r}")
            if (words.offset_data, words.size) != (offset, tokens * index.item_bytes):
                raise _damaged(path, f"block {number} is not at byte {offset} with {tokens} tokens")
            starts = np.frombuffer(_content(tar, lengths), "<u4").astype(np.int64)
            stream = np.frombuffer(_content(tar, words), "<u2" if index.dtype == "uint16" else "<u4")
            _verify_documents(path, index, number, starts, stream)
            documents += len(starts)
    if documents != shard.documents:
        raise _damaged(path, f"{documents} documents, the index says {shard.documents}")


def _verify_documents(path: Path, index: Index, number: int, lengths: np.ndarray, stream: np.ndarray) -> None:
    if lengths.sum() != len(stream):
        raise _damaged(path, f"block {number} has {len(stream)} tokens, its document lengths add up to {lengths.sum()}")
    if stream.max() >= index.vocabulary:
        raise _damaged(path, f"block {number} holds token {stream.max()}, the vocabulary has {index.vocabulary}")
    starts = np.cumsum(lengths) - lengths
    if not np.array_equal(np.flatnonzero(stream == index.document_token), starts):
        raise _damaged(path, f"block {number}: the document token is not exactly at the start of each document")


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    if file is None:
        raise tarfile.TarError(f"{member.name} is not a plain file")
    return file.read()


def _damaged(path: Path, problem: str) -> UserError:
    return UserError(f"{path}: {problem}. Copy this shard again, or prepare the data again.")
