"""Writes tokenised documents as shards and describes them for the index."""

from __future__ import annotations

import tarfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import webdataset

from kabrn_dist.data.index import Dtype, Shard
from kabrn_dist.utils.atomic_io import atomic_open, sha256_of

BLOCK_TOKENS = 1 << 16


class TokenizedDocument(NamedTuple):
    """A document: ids [tokens], the document token first, and which of them carry loss as targets (None: all)."""

    tokens: np.ndarray
    loss_mask: np.ndarray | None = None


def write_tar_shard(path: Path, documents: Iterable[TokenizedDocument], dtype: Dtype, masked: bool) -> Shard:
    """Write `documents` in stream order as one tar; blocks of a `masked` shard hold a loss mask.

    The same documents give the same bytes. No more than a block and a document are held. Raises UserError when the
    disk refuses.
    """
    little_endian = np.dtype(dtype).newbyteorder("<")
    count = 0
    # Fixed time and owner: what is in the tar depends on the documents alone.
    with (
        atomic_open(path) as file,
        webdataset.TarWriter(file, encoder=False, mtime=0, user="kabrn", group="kabrn") as tar,
    ):
        for number, block in enumerate(_blocks(documents)):
            lengths = np.array([len(document.tokens) for document in block], "<u4")
            tokens = np.concatenate([document.tokens for document in block]).astype(little_endian)
            key = f"{number:06d}"
            # Two calls, as each sorts its members by name: the order is len, use, tok.
            tar.write({"__key__": key, "len": lengths.tobytes(), **({"use": _pack_masks(block)} if masked else {})})
            tar.write({"__key__": key, "tok": tokens.tobytes()})
            count += len(block)
    return _describe_shard(path, count, little_endian.itemsize)


def write_shards(
    folder: Path, stem: str, documents: Iterable[np.ndarray], dtype: Dtype, shard_bytes: int
) -> tuple[Shard, ...]:
    """Write `documents`, int arrays [tokens] in stream order, as `stem-00000.tar` and so on.

    A shard is closed by the document that takes it to `shard_bytes` of tokens. Raises UserError as `write_shard` does.
    """
    itemsize = np.dtype(dtype).itemsize
    parts: list[list[TokenizedDocument]] = [[]]
    waiting = 0
    for document in documents:
        if waiting >= shard_bytes:
            parts.append([])
            waiting = 0
        parts[-1].append(TokenizedDocument(document))
        waiting += len(document) * itemsize
    numbered = enumerate(part for part in parts if part)
    return tuple(write_tar_shard(folder / f"{stem}-{n:05d}.tar", part, dtype, masked=False) for n, part in numbered)


def _blocks(documents: Iterable[TokenizedDocument]) -> Iterator[list[TokenizedDocument]]:
    block: list[TokenizedDocument] = []
    tokens = 0
    for document in documents:
        # One larger than a block is a block of its own.
        if block and len(document.tokens) > BLOCK_TOKENS:
            yield block
            block, tokens = [], 0
        block.append(document)
        tokens += len(document.tokens)
        if tokens >= BLOCK_TOKENS:
            yield block
            block, tokens = [], 0
    if block:
        yield block


def _pack_masks(block: Sequence[TokenizedDocument]) -> bytes:
    uses = [np.ones(len(tokens), bool) if use is None else use for tokens, use in block]
    return np.packbits(np.concatenate(uses), bitorder="little").tobytes()


def _describe_shard(path: Path, documents: int, itemsize: int) -> Shard:
    with tarfile.open(path, "r:") as tar:
        members = {member.name: member for member in tar}
    uses = {name.removesuffix(".use"): member.offset_data for name, member in members.items() if name.endswith(".use")}
    blocks = tuple(
        (member.offset_data, member.size // itemsize, uses.get(name.removesuffix(".tok"), 0))
        for name, member in members.items()
        if name.endswith(".tok")
    )
    return Shard(
        name=path.name,
        bytes=path.stat().st_size,
        sha256=sha256_of(path),
        tokens=sum(tokens for _, tokens, _ in blocks),
        documents=documents,
        blocks=blocks,
    )
