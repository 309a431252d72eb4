"""Thorough check of a shard set, which reads every byte."""

from __future__ import annotations

import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from kabrn_dist.data.index import Index, Shard, Source
from kabrn_dist.data.index_checks import check_shard_files, loss_mask_bytes
from kabrn_dist.utils.atomic_io import sha256_of
from kabrn_dist.utils.errors import UserError


def verify_shards(folder: Path, index: Index, progress: Callable[[int], None] = lambda count: None) -> None:
    """Check every shard's sha256, and that its blocks, documents and loss masks agree with the index.

    Args:
        folder: Folder of the shards.
        index: Contents of the folder.
        progress: Called with the number of bytes just hashed.

    Raises:
        UserError: for the first bad shard.
    """
    check_shard_files(folder, index)
    for source in index.sources:
        for split in (source.train, source.validation):
            loss_tokens = sum(
                _verify_shard(folder / shard.name, index, source, shard, progress) for shard in split.shards
            )
            if loss_tokens != split.loss_tokens:
                raise UserError(
                    f"{folder}: {loss_tokens} tokens of source {source.name} count in the loss, the index says "
                    f"{split.loss_tokens}; prepare the data again"
                )


def _verify_shard(path: Path, index: Index, source: Source, shard: Shard, progress: Callable[[int], None]) -> int:
    """Check one shard; return the number of its tokens that count in the loss."""
    try:
        digest = sha256_of(path, progress)
        if digest != shard.sha256:
            raise _damaged(path, f"sha256 is {digest[:12]}…, the index says {shard.sha256[:12]}…")
        return _verify_blocks(path, index, source, shard)
    except (OSError, tarfile.TarError) as error:
        raise _damaged(path, str(error)) from error


def _verify_blocks(path: Path, index: Index, source: Source, shard: Shard) -> int:
    suffixes = ("len", "use", "tok") if source.masked else ("len", "tok")
    documents = loss_tokens = 0
    with tarfile.open(path, "r:") as tar:
        members = tar.getmembers()
        expected = len(suffixes) * len(shard.blocks)
        if len(members) != expected:
            raise _damaged(path, f"{len(members)} members, {len(shard.blocks)} blocks need {expected}")
        for number, (offset, tokens, mask) in enumerate(shard.blocks):
            parts = members[len(suffixes) * number :][: len(suffixes)]
            names = [f"{number:06d}.{suffix}" for suffix in suffixes]
            if [part.name for part in parts] != names:
                raise _damaged(path, f"block {number} holds {', '.join(repr(part.name) for part in parts)}")
            lengths, words = parts[0], parts[-1]
            if (words.offset_data, words.size) != (offset, tokens * index.item_bytes):
                raise _damaged(path, f"block {number} is not at byte {offset} with {tokens} tokens")
            starts = np.frombuffer(_content(tar, lengths), "<u4").astype(np.int64)
            stream = np.frombuffer(_content(tar, words), "<u2" if index.dtype == "uint16" else "<u4")
            _verify_documents(path, index, number, starts, stream)
            if source.masked and (parts[1].offset_data, parts[1].size) != (mask, loss_mask_bytes(tokens)):
                raise _damaged(path, f"block {number}: no loss mask at byte {mask} of {tokens} tokens")
            loss_tokens += (
                _count_loss_tokens(path, number, tokens, _content(tar, parts[1])) if source.masked else tokens
            )
            documents += len(starts)
    if documents != shard.documents:
        raise _damaged(path, f"{documents} documents, the index says {shard.documents}")
    return loss_tokens


def _count_loss_tokens(path: Path, number: int, tokens: int, mask: bytes) -> int:
    bits = np.unpackbits(np.frombuffer(mask, np.uint8), bitorder="little")
    if bits[tokens:].any():
        raise _damaged(path, f"block {number}: the loss mask goes on beyond its {tokens} tokens")
    return int(bits.sum())


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
    return UserError(f"{path}: {problem}; copy this shard again, or prepare the data again")
